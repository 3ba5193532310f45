"""How processes find each other, and launch/local_multiprocess.sh.

What they do together is in test_multihost.py.
"""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests import runs
from tests.training import test_resume
from vocojax.training import distributed

ENDLESS = """\
  c.training.update(steps=100000, checkpoint_every=3, keep_checkpoints=1)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("distributed")
  runs.write_data(folder)
  runs.write_config(folder, "one.py", ENDLESS + runs.ONE_PHASE)
  return folder


PROGRAM = """
import sys
import jax
from absl import flags
from vocojax.training import distributed

distributed.define_flags()
{start}
with distributed.joined():
  found = distributed.gather({value})
  print(distributed.name(), found, jax.distributed.is_initialized())
"""


def run_program(
  variables: dict[str, str], value: str, start: str = "flags.FLAGS([''])"
) -> subprocess.Popen:
  """A program that joins the others and gathers what each has."""
  unset = ("JOB_COMPLETION_INDEX", "TPU_WORKER_HOSTNAMES")
  env = {k: v for k, v in os.environ.items() if k not in unset}
  return subprocess.Popen(
    [sys.executable, "-c", PROGRAM.format(value=value, start=start)],
    cwd=runs.ROOT,
    env=env | {"JAX_PLATFORMS": "cpu"} | variables,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def slurm(task: int, count: int) -> dict[str, str]:
  """What srun sets, as far as JAX reads it."""
  return {
    "SLURM_JOB_ID": str(os.getpid()),  # the port depends on it
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": str(count),
    "SLURM_PROCID": str(task),
    "SLURM_LOCALID": "0",
  }


@pytest.mark.slow
def test_tasks_of_a_scheduler_find_each_other():
  tasks = [run_program(slurm(i, 2), f"'é' * {i + 1}") for i in range(2)]
  alone = run_program(slurm(0, 1), "1")
  for i, task in enumerate(tasks):
    out, err = task.communicate(timeout=100)
    assert task.returncode == 0, err
    assert f"process {i} of 2 ['é', 'éé'] True\n" in out
  # JAX would take all GPUs but one away from it.
  out, err = alone.communicate(timeout=100)
  assert (out, err) == ("process 0 of 1 [1] False\n", "")


@pytest.mark.slow
def test_process_whose_others_do_not_come(folder):
  """JAX aborts then."""
  code = "distributed.JOIN_SECONDS = 3; flags.FLAGS(['', {}])".format(
    "'--coordinator_address=localhost:9', '--num_processes=2', '--process_id=1'"
  )
  process = run_program({}, "1", code)
  out, err = process.communicate(timeout=100)
  assert process.returncode != 0 and out == ""
  found = runs.printed_error(err.splitlines()[-1] + "\n")
  assert found.where == "the other processes of this run"
  assert found.expected == "all of them within 3 s"


@pytest.mark.slow
def test_pods_that_cannot_find_each_other():
  """JAX only warns of the missing package, and each pod would train alone."""
  pods = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
  alone = run_program(pods, "1")
  fourth = run_program(pods | {"JOB_COMPLETION_INDEX": "3"}, "1")
  assert alone.communicate(timeout=100) == ("process 0 of 1 [1] False\n", "")
  _, err = fourth.communicate(timeout=100)
  assert "UserError: JOB_COMPLETION_INDEX=3: got a pod of " in err


@pytest.fixture(scope="module")
def program(folder):
  forks = runs.Forks(folder, "vocojax.train")
  yield forks
  forks.close()


@pytest.mark.parametrize(
  "arguments, where, got",
  [
    (
      ["--num_processes=2", "--process_id=1"],
      "--coordinator_address",
      "nothing",
    ),
    (
      ["--coordinator_address=a:1", "--num_processes=2", "--process_id=2"],
      "--process_id",
      "2",
    ),
    (
      ["--coordinator_address=a", "--num_processes=2", "--process_id=1"],
      "--coordinator_address",
      "'a'",
    ),
  ],
)
def test_flags_that_do_not_go_together(program, folder, arguments, where, got):
  status, out, err = program.run(
    f"--config={folder / 'one.py'}", f"--workdir={folder / 'x'}", *arguments
  )
  found = runs.printed_error(err)
  assert (status, out, found.where, found.got) == (2, "", where, got)


SCRIPT = runs.ROOT / "launch" / "local_multiprocess.sh"


def test_script_dry_run():
  options = ["--processes", "3", "--devices", "2", "--dry-run"]
  done = subprocess.run(
    [SCRIPT, *options, "--", "--config=a.py", "--workdir=x y"],
    capture_output=True,
    text=True,
  )
  assert (done.returncode, done.stderr) == (0, "")
  assert done.stdout.splitlines() == [
    "env JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=2 .venv/bin/python -u -m "
    "vocojax.train --config=a.py --workdir=x\\ y "
    "--coordinator_address=localhost:8476 --num_processes=3 "
    f"--process_id={i} "
    for i in range(3)
  ]


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--"], "no flags of vocojax.train; they come after --, see --help"),
    (["--fast"], "--fast: unknown; flags of vocojax.train come after --"),
    (
      ["--processes", "0", "--", "a"],
      "--processes: found '0', expected a positive whole number",
    ),
    (["--devices"], "--devices: found '', expected a positive whole number"),
  ],
)
def test_script_refuses(arguments, message):
  done = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True)
  assert (done.returncode, done.stderr) == (2, f"error: {message}\n")


def test_a_second_ctrl_c_is_one_as_elsewhere():
  with runs.interruptible(), distributed.Preemption() as preemption:
    assert not preemption.arrived()
    os.kill(os.getpid(), signal.SIGINT)
    assert preemption.arrived()
    assert preemption.cause() == signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)
      time.sleep(1)


def test_an_ignored_ctrl_c_stays_ignored():
  """As in a job in a shell's background."""
  before = signal.signal(signal.SIGINT, signal.SIG_IGN)
  try:
    with distributed.Preemption() as preemption:
      os.kill(os.getpid(), signal.SIGINT)
      assert not preemption.arrived()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
  finally:
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_script_runs_and_ctrl_c_saves_and_ends_all(folder):
  """In a copy whose environment is this one."""
  copy = folder / "copy"
  (copy / ".venv" / "bin").mkdir(parents=True)
  shutil.copytree(runs.ROOT / "launch", copy / "launch")
  for name in ("vocojax", "configs"):
    (copy / name).symlink_to(runs.ROOT / name)
  digest = hashlib.sha256()
  for name in ("setup.py", "constraints.txt"):
    shutil.copy(runs.ROOT / name, copy)
    digest.update((copy / name).read_bytes())
  (copy / ".venv" / "installed-cpu").write_text(digest.hexdigest() + "\n")
  python = copy / ".venv" / "bin" / "python"
  python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
  python.chmod(0o755)
  with runs.interruptible():
    script = subprocess.Popen(
      [
        copy / "launch" / "local_multiprocess.sh",
        "--devices",
        "1",
        "--",
        f"--config={folder / 'one.py'}",
        f"--workdir={folder / 'script'}",
      ],
      env=os.environ | runs.cached(folder),
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      start_new_session=True,
    )
  phase = folder / "script" / "voco"
  test_resume.wait_for(script, lambda: test_resume.steps(phase))
  os.killpg(script.pid, signal.SIGINT)  # what Ctrl-C does
  out, err = (x.decode() for x in script.communicate(timeout=60))
  assert script.returncode == 130
  assert err == ""
  assert all(re.match(r"\[[01]\] |$", x) for x in out.split("\n")), out
  assert "[0] voco: stopped by Ctrl-C after step " in out, out
  assert "Traceback" not in out and "error" not in out, out
  listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True)
  assert f"--workdir={folder / 'script'}" not in listed.stdout
