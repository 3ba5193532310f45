"""The result of a benchmark as one JSON file. Read next: ../report.py.

A figure is worth its origin: beside the scores stand the checkpoint, its
config, the prompt layout, the command, commit and machine, and a hash of the
question files.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from vocojax.core.files import storage, write_atomic
from vocojax.evals.benchmarks.base import Benchmark, Score
from vocojax.evals.benchmarks.files import data_hash


@dataclasses.dataclass(frozen=True)
class Asked:
  """What was asked, and how.

  Attributes:
    checkpoint: its path.
    config: its config, as JSON takes it.
    layout: prompt layout as NAME/VERSION.
    data: folder of the benchmark.
    settings: of this run: k, compressor, dtype, longest answer, judge.
    provenance: of `assemble.provenance`.
  """

  checkpoint: str
  config: Mapping[str, Any]
  layout: str
  data: str
  settings: Mapping[str, Any]
  provenance: Mapping[str, Any]


def write_result(
  path: pathlib.Path,
  benchmark: Benchmark,
  num_questions: int,
  num_bad: int,
  scores: Iterable[Score],
  asked: Asked,
) -> dict[str, Any]:
  """Writes the result, whole or not at all.

  Args:
    path: NAME.json.
    benchmark: what was asked.
    num_questions: how many were asked.
    num_bad: of how many the image or video could not be read.
    scores: from `benchmark.score`.
    asked: where the answers come from.

  Returns:
    What the file holds.

  Raises:
    ValueError: a score is no finite number, is there twice, or the headline
      is missing.
  """
  values: dict[str, float] = {}
  for name, value in scores:
    if name in values or not math.isfinite(value):
      raise ValueError(f"{benchmark.name}: score {name} is {value}, or doubled")
    values[name] = float(value)
  if benchmark.headline and benchmark.headline not in values:
    raise ValueError(f"{benchmark.name}: no score {benchmark.headline}")
  result = {
    "benchmark": benchmark.name,
    "headline": benchmark.headline,
    "value": values.get(benchmark.headline),
    "scores": values,
    "num_questions": num_questions,
    "bad_records": num_bad,
    "checkpoint": asked.checkpoint,
    "prompt_layout": asked.layout,
    "settings": dict(asked.settings),
    "data": {
      "folder": asked.data,
      "files": len(benchmark.files),
      "sha256": data_hash(benchmark.files),
    },
    "provenance": dict(asked.provenance),
    "config": dict(asked.config),
  }
  with storage(path):
    path.parent.mkdir(parents=True, exist_ok=True)
  write_atomic(path, json.dumps(result, indent=1) + "\n")
  return result
