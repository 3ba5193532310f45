"""Converting a 7B at full size: memory and speed. Read next: random_llava.py.

  python -m benchmarks.convert_7b --workdir=DIR [--repeats=3] [--tokenizer=DIR]

Needs 45 GB of disk. DIR/source, the model with random weights, stays for the
next run; what else is written is removed. In turn, `repeats` times:

- copy: plain reads and writes of the model's files, until they are on disk;
- conversion: `python -m vocojax.convert` from start to exit, and until its
  checkpoint is on disk.

Both begin with nothing of the source in the page cache. Memory is the kernel's
mark of the most that was resident at once, mapped files included; what the page
cache holds besides is not in it. At the end, the plan of the way back is made
from the last checkpoint.
"""

import argparse
import dataclasses
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks import random_llava, tables

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_CHUNK = 2**24  # bytes that the copy reads at once
_SAMPLE_SECONDS = 0.02


@dataclasses.dataclass(frozen=True)
class Usage:
  """What a program took."""

  seconds: float
  peak_bytes: int  # resident, mapped files included
  anonymous_bytes: int  # resident without mapped files
  output: str


@dataclasses.dataclass(frozen=True)
class Result:
  """Of all repetitions."""

  source_bytes: int
  checkpoint_bytes: int
  copy_seconds: list[float]
  conversions: list[Usage]
  plan: Usage  # of the way back


def run(*arguments: str) -> Usage:
  """Runs `python ARGUMENTS`; progress and errors go to the terminal.

  Raises:
    subprocess.CalledProcessError: it failed.
  """
  command = [sys.executable, *arguments]
  with tempfile.TemporaryFile("w+") as stdout:
    start = time.perf_counter()
    process = subprocess.Popen(
      command,
      cwd=_ROOT,
      env=os.environ | {"JAX_PLATFORMS": "cpu"},
      stdout=stdout,
    )
    peak, anonymous = 0, 0
    while process.poll() is None:
      memory = _memory(process.pid)
      # A high-water mark; it starts anew when the child becomes `command`.
      peak = memory.get("VmHWM", peak)
      anonymous = max(anonymous, memory.get("RssAnon", 0))
      time.sleep(_SAMPLE_SECONDS)
    seconds = time.perf_counter() - start
    stdout.seek(0)
    output = stdout.read()
  if process.returncode:
    raise subprocess.CalledProcessError(process.returncode, command, output)
  return Usage(seconds, peak, anonymous, output)


def _memory(pid: int) -> dict[str, int]:
  """Bytes by the names of /proc/PID/status; a dead process has none."""
  lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
  fields = (line.split() for line in lines)
  return {f[0][:-1]: int(f[1]) * 1024 for f in fields if f[-1] == "kB"}


def files(folder: pathlib.Path) -> list[pathlib.Path]:
  return sorted(p for p in folder.rglob("*") if p.is_file())


def num_bytes(folder: pathlib.Path) -> int:
  return sum(p.stat().st_size for p in files(folder))


def flush(folder: pathlib.Path) -> None:
  """Returns when the files of `folder` are on disk."""
  for path in files(folder):
    with path.open("rb") as file:
      os.fsync(file.fileno())


def forget(folder: pathlib.Path) -> None:
  """Takes the files of `folder` out of the page cache."""
  flush(folder)  # what is still to be written stays in
  for path in files(folder):
    with path.open("rb") as file:
      os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(source: pathlib.Path, target: pathlib.Path) -> float:
  """Seconds until a copy of all files is on disk."""
  buffer = memoryview(bytearray(_CHUNK))
  start = time.perf_counter()
  target.mkdir()
  for path in files(source):
    with path.open("rb", buffering=0) as reader:
      with (target / path.name).open("wb", buffering=0) as writer:
        while count := reader.readinto(buffer):
          writer.write(buffer[:count])
  flush(target)
  return time.perf_counter() - start


def measure(
  workdir: pathlib.Path,
  size: str,
  tokenizer: pathlib.Path | None,
  repeats: int,
) -> Result:
  """Makes the model in `workdir` and takes the figures."""
  source, scratch = workdir / "source", workdir / "scratch"
  random_llava.write(source, random_llava.SIZES[size], tokenizer)
  shutil.rmtree(scratch, ignore_errors=True)  # of a run that was stopped
  checkpoint, duplicate = scratch / "checkpoint", scratch / "copy"
  copy_seconds, conversions = [], []
  try:
    for _ in range(repeats):
      shutil.rmtree(scratch, ignore_errors=True)
      scratch.mkdir()
      forget(source)
      copy_seconds.append(copy(source, duplicate))
      shutil.rmtree(duplicate)
      forget(source)
      usage = run(
        "-m", "vocojax.convert", f"--source={source}", f"--out={checkpoint}"
      )
      start = time.perf_counter()
      flush(checkpoint)
      seconds = usage.seconds + time.perf_counter() - start
      conversions.append(dataclasses.replace(usage, seconds=seconds))
    forget(checkpoint)
    plan = run(
      "-m",
      "vocojax.convert",
      f"--source={checkpoint}",
      f"--out={scratch / 'back'}",
      "--to=llava_hf",
      "--dry_run",
    )
    return Result(
      num_bytes(source),
      num_bytes(checkpoint),
      copy_seconds,
      conversions,
      plan,
    )
  finally:
    shutil.rmtree(scratch, ignore_errors=True)


def report(r: Result) -> str:
  """A Markdown table, the last row of medians, and the plan's last line."""
  rows = []
  for copied, usage in zip(r.copy_seconds, r.conversions, strict=True):
    copy_speed = r.source_bytes / copied / 1e6
    speed = r.source_bytes / usage.seconds / 1e6
    rows.append(
      [
        copy_speed,
        speed,
        speed / copy_speed,
        usage.peak_bytes / 2**30,
        usage.anonymous_bytes / 2**30,
      ]
    )
  medians = [statistics.median(column) for column in zip(*rows, strict=True)]
  table = [
    [name, f"{row[0]:.0f}", f"{row[1]:.0f}", *(f"{x:.2f}" for x in row[2:])]
    for name, row in [*enumerate(rows, 1), ("median", medians)]
  ]
  head = ["repetition", "copy MB/s", "conversion MB/s", "conversion / copy"]
  return "\n".join(
    [
      tables.markdown([*head, "peak GiB", "peak anonymous GiB"], table),
      "",
      f"source: {r.source_bytes / 1e9:.2f} GB",
      f"checkpoint: {r.checkpoint_bytes / 1e9:.2f} GB",
      f"plan of the way back: {r.plan.seconds:.1f} s, peak "
      f"{r.plan.peak_bytes / 2**30:.2f} GiB; its last line:",
      *r.plan.output.splitlines()[-1:],
    ]
  )


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--size", choices=random_llava.SIZES, default="7b")
  parser.add_argument("--tokenizer", type=pathlib.Path)
  args = parser.parse_args()
  workdir = args.workdir.expanduser().absolute()
  result = measure(workdir, args.size, args.tokenizer, args.repeats)
  print("\n" + report(result) + "\n")
  tables.print_provenance("benchmarks.convert_7b")


if __name__ == "__main__":
  main()
