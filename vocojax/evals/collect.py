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
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from vocojax.config import HOW_COMPUTED
from vocojax.core import files
from vocojax.errors import UserError, shorten

# Names of results; what follows says how it was used. `full` may be used with
# another prompt layout, such as voco_v1, which is no `full_voco`.
METHODS = (
  *("upper", "lower", "full", "full_voco", "voco_full", "voco"),
  *("avgpool", "qformer", "blind"),
)
_NAME = re.compile(
  "(full_voco(?!_v[0-9])|voco_full|upper|lower|full|voco|avgpool|qformer|blind)"
  "(?:_(.+))?"
)
# Fields of files, with their types, and those that a file may lack.
_EVALUATION = {
  "name": str,
  "checkpoint": str,
  "split": str,
  "accuracy": float,
  "by_category": dict,
  "provenance": dict,
}
_COUNTS = {"correct": float, "total": float}
_BENCHMARK = {
  "benchmark": str,
  "scores": dict,
  "checkpoint": str,
  "settings": dict,
  "provenance": dict,
  "config": dict,
}
_CONFIG = {
  "": {"name": str, "seed": int, "model": dict, "data": dict}
  | {"evaluation": dict},
  "model": {"compressor": dict, "vision": dict},
  "model.compressor": {"name": str, "num_voco_tokens": int},
  "model.vision": {"image_size": int},
  "data": {"source": str},
}
_CONFIG_MAY = {
  "": {"init_from": (str, type(None)), "training": dict},
  "model.compressor": {"train_num_voco_tokens": str},
  "data": {"grid_size": int, "path": str},
  "evaluation": {"max_records": (int, type(None))},
  "training": {
    "distill_weight": (float, type(None)),
    "teacher": (str, type(None)),
  },
}
# Settings that make no other model: where things lie, how they are computed or
# logged, and what is read for itself.
_ASIDE = (
  *("name", "seed", "init_from", "mesh", "evaluation", "training.teacher"),
  *("data.path", "data.image_folder", "data.tokenizer"),
  *("data.num_workers", "data.prefetch_batches", "data.on_changed_data"),
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
  provenance: Mapping[str, str]
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
    weight = float(training.get("distill_weight") or 0.0)
    teacher = pathlib.PurePath(training.get("teacher") or "")
    return weight, teacher.name if weight else ""


def collect(folder: pathlib.Path) -> list[Result]:
  """All results under a folder, in the order of their paths.

  Raises:
    UserError: there is none, or one of the files cannot be used.
  """
  if not folder.is_dir():
    raise UserError(
      folder,
      "no such folder",
      "one that holds workdirs of vocojax.train",
      "correct the path",
    )
  evaluations = sorted(folder.glob("**/evaluation/*.json"))
  benchmarks = sorted(folder.glob("**/benchmarks/**/result.json"))
  results = [_read(path, _evaluation) for path in evaluations]
  results += [_read(path, _benchmark) for path in benchmarks]
  if not results:
    raise UserError(
      folder,
      "no results in it",
      "some of vocojax.evaluate",
      "run `python -m vocojax.evaluate --checkpoint=WORKDIR/PHASE` first",
    )
  return results


def _read(
  path: pathlib.Path, reader: Callable[[pathlib.Path], Result]
) -> Result:
  try:
    return reader(path)
  except RecursionError as e:
    raise UserError(
      path,
      "lists or objects nested too deep in it or its config.json",
      "a result",
      "move the file away",
    ) from e


def _evaluation(path: pathlib.Path) -> Result:
  with files.remedy("evaluate that checkpoint again, or move the file away"):
    found = files.read_json(path, dict, UserError)
    optional = {"mean_k": (float, type(None)), "evaluation": dict}
    files.check_fields(found, path, _EVALUATION, UserError, optional)
    categories = {}
    for name, counts in found["by_category"].items():
      where = f"{path}: by_category: {shorten(name)}"
      files.check_fields(counts, where, _COUNTS, UserError)
      if counts["total"] <= 0:
        raise UserError(where, f"total {counts['total']}", "more than 0")
      categories[name] = 100 * counts["correct"] / counts["total"]
    written = _phase(path, found["checkpoint"])
  phase = path.parents[1] / written.name
  config = read_config(phase / "config.json")
  method, use = _split(path, found["name"], config)
  return Result(
    path,
    path.parents[1],
    method,
    use,
    _data_set(config, found["split"], found.get("evaluation")),
    False,
    {"": 100 * found["accuracy"], **categories},
    config,
    _settings(config, phase, written),
    _provenance(found),
    found.get("mean_k"),
  )


def _benchmark(path: pathlib.Path) -> Result:
  with files.remedy("run that benchmark again, or move the file away"):
    found = files.read_json(path, dict, UserError)
    files.check_fields(found, path, _BENCHMARK, UserError, {"headline": str})
    used = files.check_fields(
      found["settings"], f"{path}: settings", {"name": str}, UserError
    )
    kinds = dict.fromkeys(found["scores"], float)
    scores = files.check_fields(
      found["scores"], f"{path}: scores", kinds, UserError
    )
    if found.get("headline"):
      scores[""] = files.get_field(found, "value", float, path, UserError)
    config = _check_config(found["config"], f"{path}: config")
    written = _phase(path, found["checkpoint"])
    method, use = _split(path, used["name"], config)
  workdir = next(p for p in path.parents if p.name == "benchmarks").parent
  return Result(
    path,
    workdir,
    method,
    use,
    found["benchmark"],
    True,
    scores,
    config,
    _settings(config, workdir / written.name, written),
    _provenance(found),
  )


def _provenance(found: Mapping[str, Any]) -> dict[str, str]:
  values = {key: str(value) for key, value in found["provenance"].items()}
  return values | {"checkpoint": found["checkpoint"]}


def _phase(path: pathlib.Path, checkpoint: str) -> pathlib.Path:
  """Folder of the phase, where it was, of a path of a checkpoint."""
  parents = pathlib.Path(checkpoint).parents
  if len(parents) < 2 or not parents[1].name:
    raise UserError(
      f"{path}: checkpoint", shorten(checkpoint), "PHASE/checkpoints/STEP"
    )
  return parents[1]


def _split(
  path: pathlib.Path, name: str, config: Mapping[str, Any]
) -> tuple[str, str]:
  """Method and use of a result by its name and the config of its phase."""
  match = _NAME.fullmatch(name)
  if not match:
    raise UserError(
      f"{path}: name",
      shorten(name),
      f"one that begins with one of {', '.join(METHODS)}",
      "move the file away",
    )
  method, use = match[1], match[2] or ""
  if method == "lower" and config["model"]["compressor"]["name"] == "full":
    method = "full_voco"  # as it was called before there was `voco_causal`
  return method, use


def read_config(path: pathlib.Path) -> dict[str, Any]:
  """The config.json of a phase, with the keys that tables need.

  Raises:
    UserError: it cannot be used.
  """
  words = "copy it from beside the checkpoints, where training writes it"
  with files.remedy(words):
    return _check_config(files.read_json(path, dict, UserError), path)


def _check_config(config: dict[str, Any], where: Any) -> dict[str, Any]:
  for group in {**_CONFIG, **_CONFIG_MAY}:
    found: Any = config
    for name in filter(None, group.split(".")):
      found = found.get(name, {})
    name = f"{where}: {group}" if group else where
    needed, optional = _CONFIG.get(group, {}), _CONFIG_MAY.get(group)
    files.check_fields(found, name, needed, UserError, optional)
  return config


def _data_set(
  config: Mapping[str, Any], split: str, evaluation: Mapping[str, Any] | None
) -> str:
  """Name of a data set, with what makes it another one.

  Args:
    config: of the phase.
    split: that was asked about.
    evaluation: keys of the config that it was asked with; None is the phase's.
  """
  data, evaluation = config["data"], evaluation or config["evaluation"]
  name = data["source"]
  if path := evaluation.get("path"):
    name = pathlib.PurePath(path).name
  elif name == "grid_vqa":
    size = data.get("grid_size", "?")
    name += f" {size}x{size}"
  elif name == "llava_json":
    name = pathlib.PurePath(data.get("path", "")).name or name
  if split != "test":
    name += f", {split}"
  if first := evaluation.get("max_records"):
    name += f", first {first}"
  return name


def _settings(
  config: Mapping[str, Any],
  phase: pathlib.Path,
  written: pathlib.Path,
  after: tuple[pathlib.Path, ...] = (),
) -> dict[str, str]:
  """Keys of a phase and of those it started from, as 'PHASE.KEY': JSON.

  Args:
    config: of the phase.
    phase: its folder.
    written: where that folder was when config.init_from was written. The phase
      before lies in the same direction now, or is not looked for.
    after: folders of phases that started from this one; not read again.
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
  after = (*after, phase)
  origin = config.get("init_from")
  settings = _of_origin(origin, phase, written, after) | settings
  training = config.get("training", {})
  if training.get("distill_weight"):
    taught = _of_origin(training.get("teacher"), phase, written, after)
    settings |= {f"teacher's {key}": value for key, value in taught.items()}
  return settings


def _of_origin(
  origin: str | None,
  phase: pathlib.Path,
  written: pathlib.Path,
  after: tuple[pathlib.Path, ...],
) -> dict[str, str]:
  """Settings of a phase that another started from, if it is still there."""
  if not origin:
    return {}
  way = os.path.relpath(origin, written)
  before = pathlib.Path(os.path.normpath(phase / way))
  if before in after or not os.path.isfile(before / "config.json"):
    return {}
  first = read_config(before / "config.json")
  return _settings(first, before, pathlib.Path(origin), after)


def _flat(config: Mapping[str, Any], prefix="") -> Iterator[tuple[str, Any]]:
  for key, value in config.items():
    if isinstance(value, Mapping):
      yield from _flat(value, f"{prefix}{key}.")
    else:
      yield prefix + key, value
