"""Checks a machine, a workdir and data before a run; changes none of them.

  python -m vocojax.doctor
  python -m vocojax.doctor --config=FILE --workdir=DIR [--thorough]

One line a check: packages, devices, memory, disk; with --workdir or
--checkpoint every checkpoint; with --config the memory of the run, what it
starts from and every record of the training data. Each ends in OK, or in a
warning or an error with its remedy. The exit status is 1 if there is an error.
Read next: health/findings.py.
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
from vocojax.config import Config
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


def main() -> int:
  logging.set_verbosity(logging.ERROR)
  listed = _list_path()
  doctor = _Doctor()
  doctor.look("packages", _packages())
  devices: list[Any] = []
  doctor.look("devices", _devices(devices))
  # What else needs JAX leaves the accelerators alone, with as many devices.
  settings: dict[str, Any] = {"jax_platforms": "cpu"}
  if devices and devices[0].platform != "cpu":
    settings["jax_num_cpu_devices"] = len(devices)
  for name, value in settings.items():
    os.environ[name.upper()] = str(value)
    if jax := sys.modules.get("jax"):  # it has read the variables already
      jax.config.update(name, value)
  with tempfile.TemporaryDirectory() as scratch:
    plan: list[Config] = []
    doctor.look("config", _plan(scratch, plan))
    doctor.look("host memory", _memory(plan, devices))
    doctor.look("disk", _disk(plan))
    doctor.look("checkpoints", _checkpoints())
    made: list[Any] = []
    doctor.look("training", _phases(plan, scratch, made))
    doctor.look("data", _data(made, listed))
  number = doctor.number
  print(
    f"{count(number['error'], 'error')}, {count(number['warning'], 'warning')}"
  )
  return int(number["error"] > 0)


def _list_path() -> pathlib.Path | None:
  if not _LIST.value:
    return None
  if _CONFIG.value is None:
    raise UserError(
      "--list", "no --config", "one, which names the data", "add it"
    )
  path = files.expand_user(_LIST.value, UserError)
  if not path.absolute().parent.is_dir():
    raise UserError(
      f"--list={_LIST.value}",
      f"no folder {path.absolute().parent}",
      "one",
      "make it first",
    )
  return path


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


def _devices(found: list[Any]) -> Iterator[Finding]:
  finding, devices = _import("health.machine").devices()
  found += devices
  yield finding


def _plan(scratch: str, plan: list[Config]) -> Iterator[Finding]:
  """The phases as training resolves them, which may write to `scratch`."""
  if _WORKDIR.value and files.expand_user(_WORKDIR.value).is_dir():
    for path in files.expand_user(_WORKDIR.value).absolute().iterdir():
      pathlib.Path(scratch, path.name).symlink_to(path)
  if _CONFIG.value is not None:
    plan += _import("assemble").plan(_CONFIG.value, scratch)
  yield from ()


def _memory(plan: list[Config], devices: list[Any]) -> Iterator[Finding]:
  if plan:
    yield from _import("health.training_memory").check(plan, devices)
  else:
    yield _import("health.machine").host_memory({})


def _disk(plan: list[Config]) -> Iterator[Finding]:
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


def _phases(
  plan: list[Config], scratch: str, made: list[Any]
) -> Iterator[Finding]:
  """What each phase starts from and is taught by, as training finds it."""
  if not plan:
    return
  for phase in _import("assemble").make_phases(plan, pathlib.Path(scratch)):
    made.append(phase)
    config, training = phase.config, phase.config.training
    found = config.init_from or "nothing, so all parameters are random"
    if pathlib.Path(found).parent == pathlib.Path(scratch):
      found = f"phase {pathlib.Path(found).name}"
    if training.distill_weight:
      found += f"; its teacher is {training.teacher}"
    yield Finding(f"start of {config.name}", found)


def _data(
  made: list[Any], listed: pathlib.Path | None
) -> Iterator[Finding | str]:
  """Each data set once, however many phases train on it."""
  if not made:
    return
  data = _import("health.data")
  seen, wrong = set(), []
  for phase in made:
    config, stream = phase.config, phase.model.stream
    key = (config.data, config.evaluation, config.prompt, config.model.vision)
    if key in seen:
      continue
    seen.add(key)
    sample = len(phase.source) if _THOROUGH.value else data.SAMPLE
    found = data.survey(
      phase.source,
      phase.tokenizer,
      config,
      (stream.start, stream.stride),
      sample,
    )
    wrong += found.wrong
    yield from data.findings(found, config)
  if listed:
    files.write_atomic(listed, "".join(f"{one_line(x)}\n" for x in wrong))


if __name__ == "__main__":
  cli.run(main, __doc__)
