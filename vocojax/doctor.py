"""Checks a machine, a workdir and data before a run; changes none of them.

  python -m vocojax.doctor
  python -m vocojax.doctor --config=FILE --workdir=DIR [--thorough]

One line a check: packages, devices, memory, disk; with --workdir or
--checkpoint every checkpoint; with --config the model and every record of the
training data. Each ends in OK, or in a warning or an error with its remedy.
The exit status is 1 if there is an error. Read next: health/findings.py.
"""

import importlib
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

from absl import flags, logging

from vocojax import cli
from vocojax.config import Config, phases
from vocojax.core import files
from vocojax.errors import UserError, one_line
from vocojax.health.findings import Finding, count, size

_CONFIG = cli.define_config(required=False)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of a run; its checkpoints and disk are checked."
)
_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", None, "A phase folder, or one step of it, to check."
)
_THOROUGH = flags.DEFINE_bool(
  "thorough",
  False,
  "Decode all images, not those of 1,000 records; read the arrays of all "
  "steps, not of the newest.",
)
_LIST = flags.DEFINE_string(
  "list", None, "File to write: all records with something wrong, one a line."
)
_PLOT = flags.DEFINE_string(
  "plot", None, "PNG file to write: lengths of conversations."
)


def main() -> int:
  logging.set_verbosity(logging.ERROR)
  plan = phases(_CONFIG.value) if _CONFIG.value is not None else ()
  for flag in (_LIST, _PLOT):
    _check_output(flag.name, flag.value, bool(plan))
  doctor = _Doctor()
  doctor.look("packages", _packages())
  doctor.look("devices", _devices())
  # What else needs JAX leaves the accelerators alone.
  os.environ["JAX_PLATFORMS"] = "cpu"
  if "jax" in sys.modules:  # it has read the variable already
    sys.modules["jax"].config.update("jax_platforms", "cpu")
  doctor.look("host memory", _memory(plan))
  doctor.look("disk", _disk(plan))
  doctor.look("checkpoints", _checkpoints())
  doctor.look("data", _data(plan))
  number = doctor.number
  print(
    f"{count(number['error'], 'error')}, {count(number['warning'], 'warning')}"
  )
  return int(number["error"] > 0)


def _check_output(name: str, path: str | None, has_data: bool) -> None:
  if not path:
    return
  if not has_data:
    raise UserError(
      f"--{name}", "no --config", "one, which names the data", "add it"
    )
  folder = files.expand_user(path, UserError).absolute().parent
  if not folder.is_dir():
    raise UserError(
      f"--{name}={path}", f"no folder {folder}", "one", "make it first"
    )


class _Doctor:
  """Prints lines as they come, and counts the findings among them."""

  def __init__(self):
    self.number = {"OK": 0, "warning": 0, "error": 0}

  def look(self, name: str, lines: Iterable[Finding | str]) -> None:
    """Makes one check; that it cannot be made is a finding, too."""
    try:
      for line in lines:
        self._print(line)
    except UserError as e:
      self._print(Finding(name, "", "error", str(e)))

  def _print(self, line: Finding | str) -> None:
    if isinstance(line, Finding):
      self.number[line.status] += 1
    print(line, flush=True)


def _import(name: str) -> Any:
  """A module of vocojax whose packages may be missing, or not fit together.

  Raises:
    UserError: it cannot be imported.
  """
  try:
    return importlib.import_module(f"vocojax.{name}")
  except Exception as e:  # such packages raise nearly anything
    raise UserError(
      f"vocojax.{name}",
      f"{type(e).__name__}: {e}",
      "a module that can be imported",
      "correct the packages named above",
    ) from e


def _packages() -> Iterator[Finding]:
  yield from _import("health.versions").check()


def _devices() -> Iterator[Finding]:
  yield from _import("health.machine").devices()


def _memory(plan: tuple[Config, ...]) -> Iterator[Finding]:
  yield _import("health.machine").memory(plan)


def _disk(plan: tuple[Config, ...]) -> Iterator[Finding]:
  """Sizes of the models, and of the disk that their checkpoints go to."""
  sizes = []
  for config in plan:
    parameters, nbytes = _import("health.checkpoints").sizes(config)
    sizes.append((config.training.keep_checkpoints, nbytes))
    yield Finding(
      f"model of {config.name}",
      f"{parameters:,} parameters, {size(nbytes)} a checkpoint",
    )
  if _WORKDIR.value is None:
    return
  workdir = pathlib.Path(_WORKDIR.value)
  needed = 0
  if sizes:
    # A new one is written before the oldest is deleted.
    needed = sum(keep * n for keep, n in sizes) + max(n for _, n in sizes)
    needed -= _import("health.checkpoints").bytes_on_disk(workdir)
  yield _import("health.machine").disk(workdir, max(0, needed))


def _checkpoints() -> Iterator[Finding]:
  if _CHECKPOINT.value is None and _WORKDIR.value is None:
    return
  checkpoints = _import("health.checkpoints")
  given = []
  if _CHECKPOINT.value is not None:
    given.append(pathlib.Path(_CHECKPOINT.value))
  if _WORKDIR.value is not None:
    found = checkpoints.folders(pathlib.Path(_WORKDIR.value))
    given += found
    if not found:
      yield Finding("checkpoints", f"none yet in {_WORKDIR.value}")
  for path in given:
    yield from checkpoints.check(path, _THOROUGH.value)


def _data(plan: tuple[Config, ...]) -> Iterator[Finding | str]:
  """Each data set once, however many phases train on it."""
  if not plan:
    return
  data = _import("health.data")
  seen, surveys = set(), {}
  for config in plan:
    key = (config.data, config.prompt, config.model.vision)
    if key in seen:
      continue
    seen.add(key)
    surveys[config] = found = _survey(data, config)
    yield from data.findings(found, config)
    yield from data.histogram(found.lengths, config.data.max_text_length)
  if _LIST.value:
    lines = [one_line(x) for found in surveys.values() for x in found.wrong]
    path = files.expand_user(_LIST.value, UserError)
    files.write_atomic(path, "".join(f"{line}\n" for line in lines))
  if _PLOT.value:
    path = files.expand_user(_PLOT.value, UserError)
    with files.storage(path):
      data.plot(surveys, path)


def _survey(data: Any, config: Config) -> Any:
  """Opens the data of a phase as training does, and goes through it."""
  assemble, sources = _import("assemble"), _import("data.sources")
  source = sources.make_source(config.data, config.data.train_split)
  with tempfile.TemporaryDirectory() as folder:
    # Training may have to make a tokenizer, and leaves it in its workdir.
    workdir = pathlib.Path(_WORKDIR.value or folder)
    if not (workdir / "tokenizer").is_dir():
      workdir = pathlib.Path(folder)
    tokenizer = assemble.tokenizer_for(config, source, workdir)
  # Raises if their vocabularies do not agree.
  stream = assemble.make_model(config, tokenizer).stream
  sample = len(source) if _THOROUGH.value else data.SAMPLE
  return data.survey(
    source, tokenizer, config, (stream.start, stream.stride), sample
  )


if __name__ == "__main__":
  cli.run(main, __doc__)
