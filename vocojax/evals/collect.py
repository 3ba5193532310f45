"""Finds results of evaluations and benchmarks. Read next: rows.py.

Any number of workdirs may lie under one folder. A result names its checkpoint;
what was trained and how is in the config.json of that phase's folder, which is
looked for beside the result, so that a workdir may have been moved. A key that
this version of the config does not know is a setting like any other.
"""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from vocojax.config import HOW_COMPUTED
from vocojax.errors import UserError
from vocojax.evals.benchmarks.files import read_json, with_fields

# Names of results, the longest first: what follows says how it was used.
METHODS = ("voco_full", "qformer", "avgpool", "blind", "lower", "voco", "full")
_EVALUATION = "name checkpoint split accuracy by_category provenance".split()
_BENCHMARK = "benchmark scores checkpoint settings provenance config".split()
_CONFIG = "name seed model data evaluation".split()
# Settings that make no other model: where things lie, how they are computed or
# logged, and what is read for itself.
_ASIDE = (
  *("name", "seed", "init_from", "mesh", "evaluation", "training.teacher"),
  *("data.path", "data.image_folder", "data.tokenizer"),
  *("data.num_workers", "data.prefetch_batches"),
  *("training.log_every", "training.checkpoint_every"),
  *("training.keep_checkpoints", "training.evaluate"),
  *(f"model.{key}" for key in HOW_COMPUTED),
)
_TOKENS = (
  "model.compressor.num_voco_tokens",
  "model.compressor.train_num_voco_tokens",
)


@dataclasses.dataclass(frozen=True)
class Result:
  """What one model scored on one data set.

  Attributes:
    path: its file.
    workdir: the run's folder, by which it finds its own bounds.
    method: one of `METHODS`.
    use: what follows the method in its name, such as 'm4' or 'int8'; or ''.
    data: data set with its variant, or benchmark.
    is_benchmark: whether it is of `vocojax.evals.benchmarks`.
    scores: by name, in the data set's own unit; '' is the headline.
    config: of the phase, as its file has it.
    settings: every key that makes it this model, of this phase and of those
      that it started from.
    provenance: as in the file, with `checkpoint`.
    mean_k: VoCo tokens read for a question, where that was adaptive.
  """

  path: pathlib.Path
  workdir: pathlib.Path
  method: str
  use: str
  data: str
  is_benchmark: bool
  scores: Mapping[str, float]
  config: Mapping[str, Any]
  settings: Mapping[str, str]
  provenance: Mapping[str, Any]
  mean_k: float | None = None

  @property
  def seed(self) -> int:
    return self.config["seed"]

  @property
  def num_voco_tokens(self) -> int:
    """k that it was trained with."""
    return self.config["model"]["compressor"]["num_voco_tokens"]

  @property
  def cut(self) -> int | None:
    """To how many of its tokens a cache was cut, where it was."""
    match = re.fullmatch(r"m(\d+)", self.use)
    return int(match[1]) if match else None

  @property
  def is_elastic(self) -> bool:
    """Whether it was trained with any number of tokens up to k."""
    compressor = self.config["model"]["compressor"]
    return compressor.get("train_num_voco_tokens", "fixed") == "elastic"

  @property
  def is_plain_voco(self) -> bool:
    """Whether it is `voco` trained and used with k tokens, undistilled."""
    is_voco = self.method == "voco" and not self.use
    return is_voco and not self.is_elastic and not self.distillation[0]

  @property
  def distillation(self) -> tuple[float, str]:
    """Weight of distillation in the loss, and the teacher's name, if any."""
    training = self.config.get("training", {})
    weight = float(training.get("distill_weight", 0.0))
    teacher = pathlib.PurePath(training.get("teacher", ""))
    return weight, teacher.name if weight else ""


def collect(folder: pathlib.Path) -> list[Result]:
  """All results under a folder, in the order of their paths.

  Raises:
    UserError: there is none, or one of the files cannot be used.
  """
  if not folder.is_dir():
    raise UserError(
      f"{folder}: no such folder; name one that holds workdirs of vocojax.train"
    )
  evaluations = sorted(folder.glob("**/evaluation/*.json"))
  benchmarks = sorted(folder.glob("**/benchmarks/**/result.json"))
  results = [_evaluation(path) for path in evaluations]
  results += [_benchmark(path) for path in benchmarks]
  if not results:
    raise UserError(
      f"{folder}: no results in it; `python -m vocojax.evaluate "
      "--checkpoint=WORKDIR/PHASE` makes some"
    )
  return results


def read_object(
  path: pathlib.Path, keys: Iterable[str], remedy: str
) -> dict[str, Any]:
  """A JSON object with these keys.

  Raises:
    UserError: the file is something else, or cannot be read.
  """
  try:
    return with_fields(str(path), read_json(path, dict, remedy), keys, remedy)
  except OSError as e:
    raise UserError(f"{path}: cannot be read ({e.strerror}); {remedy}") from e


def _evaluation(path: pathlib.Path) -> Result:
  remedy = "evaluate that checkpoint again, or move the file away"
  found = read_object(path, _EVALUATION, remedy)
  written = pathlib.Path(found["checkpoint"]).parents[1]
  phase = path.parents[1] / written.name
  config = _read_config(phase / "config.json")
  method, use = _split(path, found["name"], remedy)
  categories = {
    name: 100 * counts["correct"] / counts["total"]
    for name, counts in found["by_category"].items()
  }
  return Result(
    path,
    path.parents[1],
    method,
    use,
    _data_set(config, found["split"]),
    False,
    {"": 100 * found["accuracy"], **categories},
    config,
    _settings(config, phase, written),
    {**found["provenance"], "checkpoint": found["checkpoint"]},
    found.get("mean_k"),
  )


def _benchmark(path: pathlib.Path) -> Result:
  remedy = "run that benchmark again, or move the file away"
  found = read_object(path, _BENCHMARK, remedy)
  config = with_fields(f"{path}: config", found["config"], _CONFIG, remedy)
  used = with_fields(f"{path}: settings", found["settings"], ["name"], remedy)
  workdir = next(p for p in path.parents if p.name == "benchmarks").parent
  written = pathlib.Path(found["checkpoint"]).parents[1]
  method, use = _split(path, used["name"], remedy)
  headline = {"": found["value"]} if found["headline"] else {}
  return Result(
    path,
    workdir,
    method,
    use,
    found["benchmark"],
    True,
    {**headline, **found["scores"]},
    config,
    _settings(config, workdir / written.name, written),
    {**found["provenance"], "checkpoint": found["checkpoint"]},
  )


def _split(path: pathlib.Path, name: str, remedy: str) -> tuple[str, str]:
  for method in METHODS:
    if name == method or name.startswith(f"{method}_"):
      return method, name[len(method) + 1 :]
  raise UserError(
    f"{path}: name {name!r}, expected one that begins with one of "
    f"{', '.join(METHODS)}; {remedy}"
  )


def _read_config(path: pathlib.Path) -> dict[str, Any]:
  remedy = "training writes it beside the checkpoints; copy it with the results"
  return read_object(path, _CONFIG, remedy)


def _data_set(config: Mapping[str, Any], split: str) -> str:
  """Name of a data set, with what makes it another one."""
  data = config["data"]
  name = data["source"]
  if name == "grid_vqa":
    name += f" {data['grid_size']}x{data['grid_size']}"
  elif name == "llava_json":
    name = pathlib.PurePath(data["path"]).name
  if split != "test":
    name += f", {split}"
  if first := config["evaluation"].get("max_records"):
    name += f", first {first}"
  return name


def _settings(
  config: Mapping[str, Any], phase: pathlib.Path, written: pathlib.Path
) -> dict[str, str]:
  """Keys of a phase and of those it started from, as 'PHASE.KEY': JSON.

  Args:
    config: of the phase.
    phase: its folder.
    written: where that folder was when config.init_from was written. The phase
      before lies in the same direction now, or is not looked for.
  """
  compressor = config["model"]["compressor"]["name"]
  aside = _ASIDE
  if compressor in ("full", "blind"):
    aside += _TOKENS
  if compressor != "qformer":
    aside += ("model.compressor.qformer_layers",)
  settings = {
    f"{config['name']}.{key}": json.dumps(value)
    for key, value in _flat(config)
    if not key.startswith(aside)
  }
  settings = _of_origin(config.get("init_from"), phase, written) | settings
  training = config.get("training", {})
  if training.get("distill_weight"):
    taught = _of_origin(training.get("teacher"), phase, written)
    settings |= {f"teacher's {key}": value for key, value in taught.items()}
  return settings


def _of_origin(
  origin: str | None, phase: pathlib.Path, written: pathlib.Path
) -> dict[str, str]:
  """Settings of a phase that another started from, if it is still there."""
  if not origin:
    return {}
  way = os.path.relpath(origin, written)
  before = pathlib.Path(os.path.normpath(phase / way))
  if not (before / "config.json").is_file():
    return {}
  first = _read_config(before / "config.json")
  return _settings(first, before, pathlib.Path(origin))


def _flat(config: Mapping[str, Any], prefix="") -> Iterator[tuple[str, Any]]:
  for key, value in config.items():
    if isinstance(value, Mapping):
      yield from _flat(value, f"{prefix}{key}.")
    else:
      yield prefix + key, value
