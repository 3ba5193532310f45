"""Results on disk as evaluation and benchmarks leave them, with made-up scores.

And the tables made of them. Read next: test_rows.py, test_tables.py.
"""

import json
import pathlib

from tests.evals import conftest
from vocojax.evals import tables
from vocojax.evals.benchmarks import result as result_lib

# Where runs were made; they are found elsewhere.
HOME = "/home/somebody/runs"


def config(phase, compressor, seed=0, k=1, init_from="", **changes):
  """The config.json of a phase; `changes` are dotted keys with _ for dots."""
  values = json.loads(conftest.small_config(k)[1].to_json())
  values |= {"name": phase, "seed": seed, "init_from": init_from}
  values["model"]["compressor"]["name"] = compressor
  values["data"]["source"] = "easy_vqa"
  for key, value in changes.items():
    group, _, name = key.partition("__")
    values.setdefault(group, {})[name] = value
  return values


def write_phase(workdir: pathlib.Path, values) -> str:
  """Writes config.json; returns the checkpoint's path on the other machine."""
  folder = workdir / values["name"]
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.json").write_text(json.dumps(values))
  return f"{HOME}/{workdir.name}/{values['name']}/checkpoints/100"


def evaluation(workdir, values, name, accuracy, by_category=None, **more):
  """A result of vocojax.evaluate: NAME.json, and the phase it is of."""
  path = workdir / "evaluation" / f"{name}.json"
  path.parent.mkdir(parents=True, exist_ok=True)
  counts = by_category or {"color": accuracy}
  found = {
    "name": name,
    "checkpoint": write_phase(workdir, values),
    "split": "test",
    "accuracy": accuracy,
    "by_category": {
      category: {"correct": 1000 * part, "total": 1000}
      for category, part in counts.items()
    },
    "provenance": {"commit": "0123abc", "devices": "1 x cpu"},
  }
  path.write_text(json.dumps(found | more))
  return path


class _Benchmark:
  """As much of a benchmark as its result tells."""

  max_new_tokens, files = 1, ()

  def questions(self):
    return iter(())

  def score(self, predictions):
    return []

  def write_submission(self, predictions, folder):
    return []

  def __init__(self, name, headline):
    self.name, self.headline = name, headline


def benchmark(workdir, values, name, scores, use=""):
  """A result of a benchmark; `scores` by name, the first is the headline."""
  method = values["model"]["compressor"]["name"]
  path = workdir / "benchmarks" / name / (use or method) / "result.json"
  asked = result_lib.Asked(
    checkpoint=write_phase(workdir, values),
    config=values,
    layout="qa_v1/1",
    data="data",
    settings={"name": use or method},
    provenance={"commit": "0123abc"},
  )
  headline = next(iter(scores))
  result_lib.write_result(
    path, _Benchmark(name, headline), 10, 0, scores.items(), asked
  )
  return path


def bounds(workdir, lower, upper, seed=0, **changes):
  """A `voco_causal` phase evaluated both ways."""
  values = config("upper", "voco_causal", seed, **changes)
  evaluation(workdir, values, "upper", upper)
  evaluation(workdir, values, "lower", lower)


def old_bounds(workdir, lower, upper, seed=0, **changes):
  """A `full` phase evaluated both ways, as before there was `voco_causal`."""
  values = config("full", "full", seed, **changes)
  evaluation(workdir, values, "full", upper)
  evaluation(workdir, values, "lower", lower)


def write_seeds(folder, scores):
  """(lower, voco, upper) of each seed, each seed in its workdir."""
  for seed, (lower, voco, upper) in enumerate(scores):
    bounds(folder / f"s{seed}", lower, upper, seed)
    values = config("voco", "voco", seed)
    evaluation(folder / f"s{seed}", values, "voco", voco)


def section(text, title):
  """What stands under a heading that begins so."""
  [found] = [x for x in text.split("\n## ") if x.startswith(title)]
  return found


def rows(text, title):
  """Cells of the rows of a section, by their first cell; a list of each."""
  found = {}
  for line in section(text, title).splitlines():
    if line.startswith("| "):
      label, *cells = (x.strip() for x in line.strip("| ").split(" | "))
      found.setdefault(label, []).append(cells)
  return found


def row(text, title, label):
  [cells] = rows(text, title)[label]
  return cells


def made(folder):
  path = tables.write_tables(folder)
  assert path == folder / "tables.md"
  return path.read_text()
