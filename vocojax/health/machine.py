"""Devices, memory and disk. Read next: checkpoints.py."""

import collections
import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator

import psutil

from vocojax.config import Config
from vocojax.core import files
from vocojax.health.findings import Finding, size

# JAX starts in a process of its own: a driver may hang or abort, and memory
# that it takes is given back. It takes what it needs, not most of a GPU.
_PROBE = """
import json, jax
print(json.dumps([
  [d.platform, d.device_kind, (d.memory_stats() or {}).get("bytes_limit", 0)]
  for d in jax.devices()
]))
"""
PROBE_SECONDS = 120.0
# Files that stand for an accelerator: pattern, its name, the extra for it.
_FILES = (
  ("nvidia[0-9]*", "an NVIDIA GPU", "gpu"),
  ("accel[0-9]*", "a TPU", "tpu"),
  ("vfio/[0-9]*", "a TPU", "tpu"),
)
_CGROUP = pathlib.Path("/sys/fs/cgroup/memory.max")
_SPARE = 2**30  # bytes that something else may need meanwhile


def devices(
  dev: pathlib.Path = pathlib.Path("/dev"), timeout: float = PROBE_SECONDS
) -> Iterator[Finding]:
  """What JAX computes on, and whether it misses what is in the machine."""
  try:
    process = subprocess.run(
      [sys.executable, "-c", _PROBE],
      env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
      capture_output=True,
      text=True,
      timeout=timeout,
      check=False,
    )
  except subprocess.TimeoutExpired:
    yield Finding(
      "devices",
      f"JAX did not start in {timeout:g} s",
      "error",
      "end other programs that use the accelerator; on a TPU slice of several "
      "hosts start this on all of them at once (--worker=all)",
    )
    return
  if process.returncode:
    said = process.stderr.strip().splitlines() or ["no message"]
    asked = os.environ.get("JAX_PLATFORMS")
    yield Finding(
      "devices",
      f"JAX does not start ({said[-1][:300]})",
      "error",
      "correct the packages named above or the driver"
      + (f", or unset JAX_PLATFORMS, which is {asked!r}" if asked else ""),
    )
    return
  found = [tuple(d) for d in json.loads(process.stdout.splitlines()[-1])]
  described = ", ".join(
    f"{number} x {kind} ({platform}{f', {size(limit)} each' if limit else ''})"
    for (platform, kind, limit), number in collections.Counter(found).items()
  )
  if any(platform != "cpu" for platform, _, _ in found):
    yield Finding("devices", described)
  else:
    yield _cpu_only(described, dev)


def _cpu_only(described: str, dev: pathlib.Path) -> Finding:
  """JAX found the CPU alone: is there more?"""
  for pattern, name, extra in _FILES:
    for file in sorted(dev.glob(pattern)):
      asked = os.environ.get("JAX_PLATFORMS")
      driver = " and a driver 580 or newer" if extra == "gpu" else ""
      return Finding(
        "devices",
        f"{described}, but {file} says that there is {name}",
        "warning" if asked else "error",
        f"unset JAX_PLATFORMS, which is {asked!r}"
        if asked
        else f"{sys.executable} -m pip install -e '.[{extra}]' in the folder "
        f"of vocojax installs JAX for it; it needs a user who may open {file}"
        f"{driver}",
      )
  return Finding("devices", described)


def memory(configs: tuple[Config, ...] = ()) -> Finding:
  """Free memory of the host, against the batches that wait in it."""
  machine = psutil.virtual_memory()
  total, free = machine.total, machine.available
  if _CGROUP.is_file() and (limit := _CGROUP.read_text().strip()) != "max":
    total = min(total, int(limit))  # of the container
    used = int(_CGROUP.with_name("memory.current").read_text())
    lines = _CGROUP.with_name("memory.stat").read_text().splitlines()
    # Files that were read lately, which make way for programs.
    used -= int(dict(map(str.split, lines)).get("inactive_file", 0))
    free = min(free, max(0, total - used))
  needed = max(map(_waiting_batches, configs), default=0)
  found = f"{size(free)} free of {size(total)}"
  if needed:
    found += f", {size(needed)} for batches that are prepared ahead"
  if free >= needed + _SPARE:
    return Finding("host memory", found)
  return Finding(
    "host memory",
    found,
    "error" if free < needed else "warning",
    "end other programs, or lower config.data.prefetch_batches",
  )


def _waiting_batches(config: Config) -> int:
  data, side = config.data, config.model.vision.image_size
  row = data.max_images * side * side * 3 + 4 * 4 * data.max_text_length
  return row * data.batch_size * (data.prefetch_batches + 1)


def disk(workdir: pathlib.Path, needed: int = 0) -> Finding:
  """Free space where a run writes, against what its checkpoints take.

  Args:
    workdir: it need not exist yet, and is not created.
    needed: bytes that the run will write; 0 if unknown.
  """
  folder = files.expand_user(workdir).absolute()
  while not folder.exists():
    folder = folder.parent
  check = f"disk of {workdir}"
  if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
    return Finding(
      check,
      f"{folder} cannot be written to",
      "error",
      "choose another --workdir, or make it a folder that can be written to",
    )
  free = shutil.disk_usage(folder).free
  found = f"{size(free)} free"
  if needed:
    found += f", the checkpoints of this run take up to {size(needed)}"
  if free >= needed + _SPARE:
    return Finding(check, found)
  return Finding(
    check,
    found,
    "error" if free < max(needed, 2**20) else "warning",
    "free some space, choose another --workdir, or lower "
    "config.training.keep_checkpoints",
  )
