"""Each mistake on a command line is one line that names it; see cli.py."""

import glob
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from tests import runs
from vocojax import cli

PROGRAM = """
import os
import signal
import sys
import time
from absl import flags
from vocojax import cli
from vocojax.errors import DataError

CONFIG = cli.define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
SHARDS = flags.DEFINE_integer("shards", 1, "Parts.")
flags.mark_flag_as_required("workdir")


class Interrupted:
  def __del__(self):  # what is raised in it is ignored
    os.kill(os.getpid(), signal.SIGINT)


def main():
  config = CONFIG.value
  print("workdir", WORKDIR.value)
  print("steps", config.training.steps, "freeze", config.optimizer.freeze)
  print("phase", config.phase.to_dict())
  if WORKDIR.value == "bad":
    raise DataError("cat.png", "no\\n image", "one", "replace it")
  if WORKDIR.value == "bug":
    raise ValueError("a bug")
  if WORKDIR.value == "wait":
    print("ready", flush=True)
    sys.stdin.read()
  if WORKDIR.value == "ignored":
    Interrupted()
    time.sleep(20)
  if WORKDIR.value == "status":
    return 7


if __name__ == "__main__":
  cli.run(main, "Does little.")
"""

ASKING = """
from absl import flags
from vocojax import cli

IMAGE = flags.DEFINE_string("image", None, "A file.", required=True)


def main(arguments):
  print(IMAGE.value, arguments)


if __name__ == "__main__":
  cli.run(main, "Asks.", arguments=True)
"""

DEVICES = """
import jax
from vocojax import cli


def main():
  print(jax.devices()[0].platform)


if __name__ == "__main__":
  cli.run(main, "Names the platform.")
"""

COMPILING = """
import os
import signal
import threading
import jax
import jax.numpy as jnp
from vocojax import cli


def slow(x):
  for i in range(200):
    x = jnp.sort(jnp.sin(x * i) + x[::-1])
  return x


def main():
  jax.config.update("jax_platforms", "cpu")
  lowered = jax.jit(slow).lower(jnp.ones(64))
  threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
  lowered.compile()


if __name__ == "__main__":
  cli.run(main, "Compiles for seconds.")
"""

CONFIG = """
from vocojax.config import default_config


def get_config():
  c = default_config()
  c.training.steps = 10
  c.phases = ("full", "voco")
  c.phase.full = {"seed": 1, "data": {"batch_size": 4}}
  c.phase.voco = {"seed": 2}
  return c
"""

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("cli")
  (path / "program.py").write_text(PROGRAM)
  (path / "asking.py").write_text(ASKING)
  (path / "good.py").write_text(CONFIG)
  return path


def start(folder, *arguments, program="program.py"):
  return subprocess.Popen(
    [sys.executable, program, *arguments],
    cwd=folder,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def run(folder, *arguments, config="good.py", workdir="there"):
  first = [f"--config={config}", f"--workdir={workdir}"]
  process = start(folder, *first, *arguments)
  out, err = process.communicate(timeout=60)
  return process.returncode, out, err


def test_overrides_reach_the_config(folder):
  status, out, err = run(
    folder,
    "--config.training.steps=5",
    "--config.optimizer.freeze=('^llm/',)",
    "--config.phase.voco.seed=3",
    "--config.phase.voco.training.accumulate=2",  # not in the file's phase
  )
  assert status == 0, err
  assert "steps 5 freeze ('^llm/',)" in out
  assert (
    "phase {'full': {'data': {'batch_size': 4}, 'seed': 1}, "
    "'voco': {'seed': 3, 'training': {'accumulate': 2}}}" in out
  )


def error(folder, *arguments, **flags):
  """Runs with a mistake; returns the error that its one line holds."""
  status, _, err = run(folder, *arguments, **flags)
  assert status == 2, err
  return runs.printed_error(err)


@pytest.mark.parametrize(
  ("argument", "where", "got", "fix"),
  [
    (
      "--config.training.stepz=5",
      "config.training.stepz",
      "an unknown key",
      "write 'config.training.steps'",
    ),
    (
      "--config.learning_rate=1",
      "config.learning_rate",
      "an unknown key",
      "write 'config.optimizer.learning_rate'",
    ),
    (
      "--config.phase.voco.trainin.steps=5",
      "config.phase.voco.trainin.steps",
      "an unknown key",
      "write 'config.phase.voco.training.steps'",
    ),
    (
      "--config.phase.vocoo.seed=5",
      "config.phase.vocoo.seed",
      "a key of phase 'vocoo', which is not run",
      "write config.phase.voco",
    ),
    (
      "--config.seed.x=5",
      "config.seed.x",
      "an unknown key",
      "write 'config.seed'",
    ),
    ("--config.=5", "config.", "an unknown key", None),
    (
      "--config.seed=5",
      "config.seed",
      "one value for all phases",
      "set config.phase.full.seed and so on",
    ),
    ("--config.training.steps=abc", "config.training.steps", "'abc'", None),
    ("--config.optimizer.b1=abc", "config.optimizer.b1", "'abc'", None),
    ("--config.data.flip_images=no_", "config.data.flip_images", "'no_'", None),
    (
      "--config.phase.full.data.batch_size=x",
      "config.phase.full.data.batch_size",
      "'x'",
      None,
    ),
    (
      "--config.optimizer.freeze=('a', b c",
      "config.optimizer.freeze",
      "\"('a', b c\"",
      None,
    ),
    (
      "--config.training={'steps': 5}",
      "config.training",
      "one value",
      "set them one by one",
    ),
    (
      "--config.phase.full=5",
      "config.phase.full",
      "one value",
      "set them one by one",
    ),
    (
      "--config.phases=voco,fulll",
      "config.phases",
      "'fulll'",
      "write 'full'",
    ),
    (
      "--config.phases=full  --config.phase.voco.seed=5",
      "config.phase.voco.seed",
      "a key of phase 'voco', which is not run",
      "leave it out, or add the phase to config.phases",
    ),
    ("--config=good.py", "--config=good.py", "it twice", "leave one out"),
    ("--workdri=x", "--workdri", "an unknown flag", "write --workdir"),
    ("--shards=many", "--shards", "'many'", None),
    ("--workdir", "--workdir", "no value", None),
    ("leftover", "leftover", "a word", "write flags as --name=value"),
  ],
)
def test_wrong_argument(folder, argument, where, got, fix):
  found = error(folder, *argument.split("  "))
  assert (found.where, found.got) == (where, got)
  assert fix is None or found.fix == fix


@pytest.mark.parametrize(
  ("argument", "expected"),
  [
    ("--config.training.steps=abc", "int, such as 10"),
    ("--config.optimizer.b1=abc", "float, such as 0.9"),
    ("--config.data.flip_images=abc", "bool, such as False"),
    ("--config.optimizer.freeze=('a', b", "tuple, such as ('^vision/',)"),
    ("--shards=many", "an integer"),
  ],
)
def test_wrong_value_of_an_argument(folder, argument, expected):
  assert error(folder, argument).expected == expected


@pytest.mark.parametrize(
  ("name", "text", "where", "got"),
  [
    ("nope.py", None, "--config=nope.py", "no such file"),
    ("", None, "--config=", "no such file"),
    (".", None, "--config=.", "no such file"),
    ("syntax.py", "x = 1\ny = = 2\n", "syntax.py:2", "SyntaxError: "),
    ("name.py", "x = 1\n\ny = z\n", "name.py:3", "NameError: name 'z'"),
    ("empty.py", "", "empty.py", "KeyError: 'get_config'"),
    (
      "inner.py",
      "def get_config():\n  return 1 / 0\n",
      "inner.py:2",
      "ZeroDivisionError: ",
    ),
    (
      "io.py",
      "def get_config():\n  return open('absent')\n",
      "io.py:2",
      "FileNotFoundError: ",
    ),
    (
      "none.py",
      "def get_config():\n  pass\n",
      "none.py: get_config()",
      "NoneType",
    ),
  ],
)
def test_wrong_config_file(folder, name, text, where, got):
  if text is not None:
    (folder / name).write_text(text)
  found = error(folder, config=name)
  assert found.where == where
  assert found.got.startswith(got)


@pytest.mark.parametrize(
  ("arguments", "where", "got"),
  [
    ([], "--config", "nothing"),
    (["--config=good.py"], "--workdir", "nothing"),
    (["--workdir=x", "--config.seed=1"], "--config", "nothing"),
    (
      ["--config.name=1", "--config=good.py"],
      "config.name",
      "an unknown key",
    ),
    (["--config"], "--config", "no value"),
  ],
)
def test_missing_flags(folder, arguments, where, got):
  process = start(folder, *arguments)
  _, err = process.communicate(timeout=60)
  assert process.returncode == 2, err
  found = runs.printed_error(err)
  assert (found.where, found.got) == (where, got)


@pytest.mark.parametrize(
  ("words", "found"),
  [
    (["--image=x"], "x []"),
    (["--image=x", "is it red ?"], "x ['is it red ?']"),
    (["is it red ?", "--image", "x"], "x ['is it red ?']"),
    (["a", "--image=x", "b"], "x ['a', 'b']"),
    (["--image=x", "--", "--dashes", "b"], "x ['--dashes', 'b']"),
  ],
)
def test_arguments_that_are_no_flags(folder, words, found):
  process = start(folder, *words, program="asking.py")
  out, err = process.communicate(timeout=60)
  assert (process.returncode, out, err) == (0, f"{found}\n", "")


@pytest.mark.parametrize(
  ("words", "where", "got"),
  [
    (["a", "--imagee=x"], "--imagee", "an unknown flag"),
    (["a"], "--image", "nothing"),
    (["a", "--image"], "--image", "no value"),
  ],
)
def test_mistakes_beside_arguments(folder, words, where, got):
  process = start(folder, *words, program="asking.py")
  _, err = process.communicate(timeout=60)
  assert process.returncode == 2, err
  found = runs.printed_error(err)
  assert (found.where, found.got) == (where, got)


def test_error_of_the_program_itself(folder):
  status, _, err = run(folder, workdir="bad")
  assert (status, err) == (
    2,
    "error: cat.png: got no image, expected one. Fix: replace it\n",
  )


def test_bug_keeps_its_trace(folder):
  status, _, err = run(folder, workdir="bug")
  assert status == 1
  assert err.startswith("Traceback") and "ValueError: a bug" in err


def test_status_is_passed_on(folder):
  assert run(folder, workdir="status")[0] == 7


def test_interrupt(folder):
  with runs.interruptible():
    process = start(folder, "--config=good.py", "--workdir=wait")
  while process.stdout.readline() != "ready\n":
    assert process.poll() is None
  process.send_signal(signal.SIGINT)
  _, err = process.communicate(timeout=60)
  assert (process.returncode, err) == (130, "error: interrupted\n")


PROGRAMS = [
  f"vocojax.{path.stem}"
  for path in sorted((ROOT / "vocojax").glob("*.py"))
  if "cli.run(" in path.read_text() and path.stem != "cli"
]


@pytest.mark.parametrize("module", PROGRAMS)
def test_interrupt_while_importing(module):
  assert len(PROGRAMS) >= 10
  with runs.interruptible():
    process = runs.start(module)
  maps = pathlib.Path(f"/proc/{process.pid}/maps")
  runs.wait_until(lambda: "lib-dynload" in maps.read_text(), 60)
  process.send_signal(signal.SIGINT)
  out, err = process.communicate(timeout=60)
  assert (process.returncode, out, err) == (130, "", "error: interrupted\n")


def test_interrupt_that_python_ignored(folder):
  with runs.interruptible():
    process = start(folder, "--config=good.py", "--workdir=ignored")
  _, err = process.communicate(timeout=60)
  assert (process.returncode, err) == (130, "error: interrupted\n")


def test_interrupt_while_compiling(folder):
  """JAX frees its devices at exit, though XLA compiles for them."""
  (folder / "compiling.py").write_text(COMPILING)
  with runs.interruptible():
    process = start(folder, program="compiling.py")
  _, err = process.communicate(timeout=120)
  assert (process.returncode, err) == (130, "error: interrupted\n")


def test_help_lists_only_own_flags(folder):
  process = start(folder, "--help")
  out, err = process.communicate(timeout=60)
  assert (process.returncode, err) == (0, "")
  assert "Does little." in out
  for words in ("--config:", "--workdir: Folder", "--shards", "voco_1tok"):
    assert words in out
  assert "verbosity" not in out
  assert out.count("\n") < 15


@pytest.mark.skipif(
  any(glob.glob(pattern) for pattern in cli._ACCELERATORS),
  reason="JAX rightly looks for the accelerator of this machine",
)
def test_absent_tpu_is_not_looked_for(folder):
  """libtpu, which the tests install, would say much about it."""
  pytest.importorskip("libtpu")
  (folder / "devices.py").write_text(DEVICES)
  done = subprocess.run(
    [sys.executable, "devices.py"],
    cwd=folder,
    env={k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
  )
  assert (done.stdout, done.stderr) == ("cpu\n", "")
