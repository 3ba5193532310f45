"""What every `python -m vocojax.X` does around its main. Read next: config.py.

Flags are absl's and the config is a `config_flags` flag, as in most JAX
programs. Added here: a mistake of the user is one line on stderr and exit
status 2; a mistake of ours keeps its stack trace.

  FLAGS_CONFIG = cli.define_config()

  def main() -> None:
    config = FLAGS_CONFIG.value

  if __name__ == "__main__":
    cli.run(main, "Trains a model.")
"""

import contextlib
import functools
import glob
import importlib.util
import operator
import os
import pathlib
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, cast

import ml_collections
from absl import flags, logging
from ml_collections import config_dict, config_flags

from vocojax import config as config_lib
from vocojax.errors import ConfigError, UserError, shorten

# Flags defined through this module belong to the program that defines them,
# and so they are in its --help.
flags.disclaim_key_flags()

# TPUs and GPUs as Linux shows them.
_ACCELERATORS = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia*", "/dev/kfd")

_HERE = pathlib.Path(__file__).resolve().parent
# Beside the package in a checkout, and in it where it is installed.
CONFIG_FOLDER = next(
  folder
  for folder in (_HERE / "configs", _HERE.parent / "configs")
  if (folder / "voco_1tok.py").is_file()
)


def run(
  main: Callable[..., int | None], usage: str, arguments: bool = False
) -> NoReturn:
  """Parses the command line, calls `main` and exits with what it returns.

  Args:
    main: the program; None or 0 is success.
    usage: one or a few sentences for --help.
    arguments: whether there may be arguments that are no flags, such as a
      question; `main` is then called with a list of them. They may stand
      before, between and after flags; after `--` all are arguments.

  Raises:
    SystemExit: always, but for Ctrl-C, which ends the process at once with
      status 130; status 2 is a user's mistake.
  """
  logging.use_absl_handler()
  _skip_absent_tpu()
  before = signal.getsignal(signal.SIGINT)
  if before is not signal.SIG_IGN:  # as that of a shell's background job is
    signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    _run(main, usage, arguments)
  finally:
    signal.signal(signal.SIGINT, before)


def _run(
  main: Callable[..., int | None], usage: str, arguments: bool
) -> NoReturn:
  if {"--help", "-help", "-h"} & set(sys.argv[1:]):
    print(_help(usage))
    sys.exit(0)
  before = sys.unraisablehook
  sys.unraisablehook = functools.partial(_interrupt_again, before)
  try:
    rest = _parse_flags()
    if arguments:
      sys.exit(main(rest))
    if rest:
      raise UserError(
        rest[0], "a word", "flags only", "write flags as --name=value"
      )
    sys.exit(main())
  except UserError as e:
    message, status = str(e), 2
  except KeyboardInterrupt as e:
    message, status = str(e) or "interrupted", 130
  finally:
    sys.unraisablehook = before
  print(f"error: {message}", file=sys.stderr)
  if status == 130:
    # At once: the end of Python waits for threads that save, and the end of
    # JAX for XLA, which Ctrl-C does not stop while it compiles.
    with contextlib.suppress(OSError):
      sys.stdout.flush()
      sys.stderr.flush()
    os._exit(status)
  sys.exit(status)


def _interrupt_again(otherwise: Callable[[Any], Any], ignored: Any) -> None:
  """Ctrl-C that came where Python ignores exceptions comes once more.

  Such as in JAX's callback of the garbage collector: the program would run on.
  """
  if not issubclass(ignored.exc_type, KeyboardInterrupt):
    otherwise(ignored)
    return
  main, number = threading.main_thread().ident, signal.SIGINT
  threading.Timer(0.1, signal.pthread_kill, (main, number)).start()


def define_config(required: bool = True) -> flags.FlagHolder:
  """Defines `--config=FILE` and `--config.KEY=VALUE`.

  Returns:
    A holder whose `.value` is, once flags are parsed, a locked ConfigDict; None
    if the file is not `required` and was not given.
  """
  holder = config_flags.DEFINE_config_file(
    "config", None, "Config file; --config.KEY=VALUE changes one of its keys."
  )
  flags.FLAGS["config"].parser = _ConfigParser()
  if required:
    flags.mark_flag_as_required("config")
  return holder


class _ConfigParser(flags.ArgumentParser):
  """Loads a config file and checks the keys that the command line changes.

  Stands in for the parser of `config_flags`, which delays or reformats what
  goes wrong in the file and cannot say which key was meant.

  Attributes:
    phases: those that the file runs, whatever the command line says.
  """

  phases: tuple[str, ...] = ()

  def parse(self, argument: str) -> ml_collections.ConfigDict:
    if flags.FLAGS["config"].present:
      raise ConfigError(
        f"--config={argument}", "it twice", "one file", "leave one out"
      )
    config = _load(argument)
    self.phases = tuple(config.get("phases") or ())
    for key in _overrides():
      _prepare_key(config, key)
    return config.lock()


def _overrides() -> list[str]:
  """Keys that the command line sets."""
  matches = (re.match(r"--?(?:no)?config\.([^=]*)", a) for a in sys.argv[1:])
  return [match[1] for match in matches if match]


def _load(path: str) -> ml_collections.ConfigDict:
  """Runs a config file, or one of `CONFIG_FOLDER` by its bare name.

  Raises:
    ConfigError: there is no such file, or it is no working config.
  """
  name = pathlib.PurePath(path).name.removesuffix(".py")
  known = CONFIG_FOLDER / f"{name}.py"
  if not pathlib.Path(path).is_file():
    if path not in (name, f"configs/{name}.py") or not known.is_file():
      near = config_lib.nearest(name, _known_configs().split(", "))
      raise ConfigError(
        f"--config={path}",
        "no such file",
        "a config file",
        f"write {near}" if near else f"choose from {_known_configs()}",
      )
    path = str(known)
  try:
    config = config_lib.load_module(path)
  except ConfigError:
    raise
  except Exception as e:
    line = getattr(e, "lineno", None)
    for frame in traceback.extract_tb(e.__traceback__):
      if frame.filename == path:
        line = frame.lineno
    where = path if line is None else f"{path}:{line}"
    raise ConfigError(
      where,
      f"{type(e).__name__}: {e}",
      "Python that defines get_config()",
      "correct it; configs/voco_1tok.py is an example",
    ) from e
  if not isinstance(config, ml_collections.ConfigDict):
    raise ConfigError(
      f"{path}: get_config()",
      type(config).__name__,
      "a ConfigDict",
      "return what vocojax.config.default_config() does, changed",
    )
  return config


def _prepare_key(config: ml_collections.ConfigDict, key: str) -> None:
  """Makes sure that `config.<key>` can be set.

  A phase holds only the keys in which it differs. A key that it does not hold
  yet is copied into it, so that the command line can change it for the phase.

  Raises:
    ConfigError: the key is unknown or a group.
  """
  phase, names = _split_phase(key)
  if not _has(config, names):
    prefix = "config" if phase is None else f"config.phase.{phase}"
    where = f"config.{key}"
    raise config_lib.unknown_key(where, where, _keys(config, prefix))
  value = _value(config, names)
  if isinstance(value, ml_collections.ConfigDict):
    raise ConfigError(
      f"config.{key}",
      "one value",
      "a value of each key, since it is a group of keys",
      "set them one by one",
    )
  if phase is None:
    return
  if value is None:  # but typed
    owner = _value(config, names[:-1])
    value = config_dict.placeholder(owner.get_type(names[-1]))
  group = config.phase
  with config.unlocked():
    for name in (phase, *names[:-1]):
      if name not in group:
        group[name] = ml_collections.ConfigDict()
      group = group[name]
    if names[-1] not in group:
      group[names[-1]] = value


def _split_phase(key: str) -> tuple[str | None, list[str]]:
  """The phase that a key is of, if it is of one, and the names of the rest."""
  names = key.split(".")
  if len(names) > 2 and names[0] == "phase":
    return names[1], names[2:]
  return None, names


def _check_effects(
  config: ml_collections.ConfigDict, file_phases: tuple[str, ...]
) -> None:
  """Makes sure that every key set on the command line matters.

  Args:
    config: with what the command line sets.
    file_phases: those that the file runs.

  Raises:
    ConfigError: a phase is not known, a key is of a phase that is not run, or
      every phase that is has its own value for it.
  """
  # `a,b` comes as one name.
  phases = tuple(x for name in config.phases for x in name.split(","))
  config.phases = phases
  known = sorted({*file_phases, *config.phase})
  for name in phases:
    if name not in known:
      near = config_lib.nearest(name, known)
      raise ConfigError(
        "config.phases",
        repr(name),
        f"phases of the config: {', '.join(known) or 'it has none'}",
        f"write {near!r}" if near else "choose from these",
      )
  for key in _overrides():
    phase, names = _split_phase(key)
    if phase is not None and phase not in phases:
      near = config_lib.nearest(phase, phases)
      raise ConfigError(
        f"config.{key}",
        f"a key of phase {phase!r}, which is not run",
        f"one of config.phases: {', '.join(phases) or 'there are none'}",
        f"write config.phase.{near}"
        if near
        else "leave it out, or add the phase to config.phases",
      )
    own = [p for p in phases if _has(config, ["phase", p, *names])]
    if phase is None and phases and own == list(phases):
      raise ConfigError(
        f"config.{key}",
        "one value for all phases",
        f"a value for each, since {', '.join(phases)} have their own",
        f"set config.phase.{phases[0]}.{key} and so on",
      )


def _has(config: ml_collections.ConfigDict, names: list[str]) -> bool:
  for name in names:
    if not isinstance(config, ml_collections.ConfigDict) or name not in config:
      return False
    config = config[name]
  return True


def _value(config: Any, names: list[str]) -> Any:
  return functools.reduce(operator.getitem, names, config)


def _keys(config: ml_collections.ConfigDict, prefix: str) -> Iterator[str]:
  for name, value in config.items():
    yield f"{prefix}.{name}"
    if isinstance(value, ml_collections.ConfigDict):
      yield from _keys(value, f"{prefix}.{name}")


def _parse_flags() -> list[str]:
  """Parses sys.argv into absl's FLAGS; every mistake is a UserError.

  Returns:
    What is no flag.
  """
  flags.FLAGS.set_gnu_getopt(True)  # flags may follow what is no flag
  try:
    rest = flags.FLAGS(sys.argv)[1:]
  except flags.UnrecognizedFlagError as e:
    if e.flagname.startswith("config.") and "config" in flags.FLAGS:
      raise _missing("--config") from e
    near = config_lib.nearest(e.flagname, flags.FLAGS)
    raise UserError(
      f"--{e.flagname}",
      "an unknown flag",
      f"such a flag as --{near}" if near else "a flag of this program",
      f"write --{near}" if near else "see --help for all flags",
    ) from e
  except flags.Error as e:
    raise _reworded(str(e)) from e
  config = flags.FLAGS["config"] if "config" in flags.FLAGS else None
  if config is not None and config.value is not None:
    _check_effects(config.value, cast(_ConfigParser, config.parser).phases)
  return rest


def _reworded(message: str) -> UserError:
  """absl's message as an error with fields."""
  if match := re.search(r"Flag (--\w+) must have a value other than", message):
    return _missing(match[1])
  if match := re.match(r"Missing value for flag (--[\w.]+)", message):
    return UserError(
      match[1], "no value", f"{match[1]}=VALUE", "see --help for its meaning"
    )
  match = re.match(r"flag (--[\w.]+)=(.*?): ", message, re.DOTALL)
  if not match:
    return UserError("flags", message, "flags as in --help", "correct them")
  flag, found = match.groups()
  if flag.startswith("--config.") and "config" in flags.FLAGS:
    flag = flag.removeprefix("--")
    *groups, name = flag.split(".")[1:]
    owner = _value(flags.FLAGS["config"].value, groups)
    expected = owner.get_type(name).__name__
    if owner[name] is not None:
      expected += f", such as {owner[name]!r}"
  else:
    parser = flags.FLAGS[flag.removeprefix("--")].parser
    choices = getattr(parser, "enum_values", ("true", "false"))
    expected = parser.syntactic_help or " or ".join(choices)
  return UserError(flag, shorten(found), expected, "correct it")


def _missing(flag: str) -> UserError:
  what = f", such as {_known_configs()}" if flag == "--config" else ""
  return UserError(
    flag, "nothing", f"{flag}=VALUE", f"give it{what}; --help lists all flags"
  )


def _skip_absent_tpu() -> None:
  """Keeps JAX from looking for a TPU, in many words, where there is none.

  The tests install libtpu on machines without one, for vocojax.aot.
  """
  if (
    os.environ.get("JAX_PLATFORMS")
    or importlib.util.find_spec("libtpu") is None
  ):
    return
  if not any(glob.glob(pattern) for pattern in _ACCELERATORS):
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:  # it has read the variable already
      sys.modules["jax"].config.update("jax_platforms", "cpu")


def _known_configs() -> str:
  names = sorted(p.stem for p in CONFIG_FOLDER.glob("*.py"))
  return ", ".join(name for name in names if name != "__init__")


def _help(usage: str) -> str:
  lines = [usage, "", "Flags:"]
  for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0]):
    default = "" if flag.default is None else f" (default {flag.default!r})"
    lines.append(f"  --{flag.name}: {flag.help}{default}")
  if "config" in flags.FLAGS:
    lines += ["", f"Configs: {_known_configs()}"]
    lines.append("Keys of a config: vocojax/config.py lists and explains them.")
  return "\n".join(lines)
