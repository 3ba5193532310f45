"""Kills training again and again, and starts it twice in one workdir.

  python -m tests.kill_runs --kills=50 --pairs=10

A killed run must end bit for bit like one that never was, and leave nothing
behind; of two runs in one workdir, one must go on as if it were alone. Data is
prepared by two worker processes. `tests/training/test_kill_runs.py` does the
same with few kills. Read next: `tests/training/test_resume.py`.
"""

import argparse
import collections
import os
import pathlib
import random
import re
import socket
import subprocess
import tempfile
import time

from tests import runs
from tests.training import test_resume

PHASES = ("full", "voco")
# What a chain of runs ends with at the latest, so that it is compared.
KILLS_OF_A_CHAIN = 5


def prepare(folder: pathlib.Path) -> None:
  """Data, the configuration and a run that nothing disturbs."""
  test_resume.prepare(folder)
  (folder / "tmp").mkdir()
  process = start(folder, "uninterrupted")
  test_resume.finish(process)
  assert_nothing_left(folder, "uninterrupted")


def start(folder: pathlib.Path, workdir: str) -> subprocess.Popen:
  return runs.start(
    "vocojax.train",
    f"--config={folder / 'two.py'}",
    f"--workdir={folder / workdir}",
    "--config.data.num_workers=2",
    **runs.cached(folder),
    TMPDIR=str(folder / "tmp"),
  )


def wait_for_moment(
  process: subprocess.Popen, workdir: pathlib.Path, rng: random.Random
) -> str:
  """Waits until the run is to be killed; what it is doing then."""

  def saved() -> int:
    return sum(
      max(test_resume.steps(workdir / name), default=0) for name in PHASES
    )

  def saving() -> bool:
    return any(test_resume.half_written(workdir / name) for name in PHASES)

  def has_workers() -> bool:
    return len(runs.children(process.pid)) >= 3

  kind = rng.choice(("start", "workers", "steps", "steps", "save"))
  before = saved()
  conditions = {
    "start": lambda: True,
    "workers": has_workers,
    "steps": lambda: saved() > before,
    "save": saving,
  }
  end = time.monotonic() + 300
  while process.poll() is None and not conditions[kind]():
    assert time.monotonic() < end, kind
    time.sleep(0.0005)
  # Starting takes seconds, saving milliseconds.
  time.sleep(
    rng.uniform(0, {"start": 6, "workers": 4, "steps": 0.2}.get(kind, 0.004))
  )
  return kind


def kill(process: subprocess.Popen, others: set[str]) -> bool:
  """Kills a run and checks that nothing lives on; False if it had ended."""
  workers = runs.children(process.pid)
  memory = runs.shared_memory() - others
  process.kill()
  # Its output ends with the last of its processes.
  _, err = process.communicate(timeout=100)
  runs.wait_until(lambda: not runs.running(workers), 60)
  runs.wait_until(lambda: not memory & runs.unused_memory(), 300)
  assert process.returncode in (0, -9), err
  return process.returncode == -9


def run_chain(
  folder: pathlib.Path, workdir: str, kills: int, rng: random.Random
) -> collections.Counter:
  """A run that is killed some times, then ends; when it was killed."""
  moments = collections.Counter()
  while moments.total() < kills:
    others = runs.shared_memory()
    process = start(folder, workdir)
    moment = wait_for_moment(process, folder / workdir, rng)
    if not kill(process, others):
      break  # it was done before that many kills
    moments[moment] += 1
  _, err = test_resume.finish(start(folder, workdir))
  assert "error" not in err, err
  assert_same(folder, workdir)
  return moments


def run_pair(
  folder: pathlib.Path, workdir: str, rng: random.Random
) -> subprocess.Popen:
  """Two runs at once; one is refused, the other is killed once and ends."""
  others = runs.shared_memory()
  both = [start(folder, workdir)]
  time.sleep(rng.choice((0, rng.uniform(0, 1))))
  both.append(start(folder, workdir))
  runs.wait_until(lambda: any(p.poll() is not None for p in both), 300)
  second = next(p for p in both if p.poll() is not None)
  first = next(p for p in both if p is not second)
  out, err = second.communicate(timeout=100)
  assert (second.returncode, out) == (2, ""), err
  found = runs.printed_error(err)
  assert found.where == str(folder / workdir)
  who = re.fullmatch(r"training by process (\d+) on (.+) since .*", found.got)
  assert who, found.got
  assert who.groups() == (str(first.pid), socket.gethostname())
  if rng.random() < 0.5:
    wait_for_moment(first, folder / workdir, rng)
    kill(first, others)
    first = start(folder, workdir)
  _, err = test_resume.finish(first)
  assert "error" not in err, err
  assert_same(folder, workdir)
  return second


def assert_same(folder: pathlib.Path, workdir: str) -> None:
  """As the run that nothing disturbed, and no file more."""
  for name in PHASES:
    test_resume.assert_same_end(
      folder / workdir / name, folder / "uninterrupted" / name
    )
  assert_nothing_left(folder, workdir)


def assert_nothing_left(folder: pathlib.Path, workdir: str) -> None:
  expected = {"full", "voco"}
  for name in PHASES:
    expected |= {f"{name}/{x}" for x in ("checkpoints", "tensorboard")}
    expected |= {f"{name}/{x}" for x in ("config.json", "metrics.jsonl")}
    kept = {test_resume.STEPS, test_resume.best(folder / workdir / name)}
    expected |= {f"{name}/checkpoints/{step}" for step in kept}
  found = {
    str(path.relative_to(folder / workdir))
    for pattern in ("*", "*/*", "*/checkpoints/*")
    for path in (folder / workdir).glob(pattern)
  }
  assert found == expected
  unfinished = [
    path
    for path in (folder / workdir).rglob("*")
    if re.search(r"\.part$|tmp|__lock", path.name)
  ]
  assert not unfinished
  assert not os.listdir(folder / "tmp")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--kills", type=int, default=50)
  parser.add_argument("--pairs", type=int, default=10)
  parser.add_argument("--seed", type=int, default=0)
  options = parser.parse_args()
  rng = random.Random(options.seed)
  began = time.monotonic()
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(temporary)
    prepare(folder)
    moments, chains = collections.Counter(), 0
    while moments.total() < options.kills:
      kills = min(KILLS_OF_A_CHAIN, options.kills - moments.total())
      moments += run_chain(folder, f"chain{chains}", kills, rng)
      chains += 1
      print(f"{moments.total()} kills: {dict(moments)}", flush=True)
    for i in range(options.pairs):
      second = run_pair(folder, f"pair{i}", rng)
      print(f"pair {i}: process {second.pid} was refused", flush=True)
  print(
    f"{moments.total()} kills in {chains} chains, {options.pairs} pairs: all "
    f"bit-equal, nothing left ({time.monotonic() - began:.0f} s)"
  )


if __name__ == "__main__":
  main()
