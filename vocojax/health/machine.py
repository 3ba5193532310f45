"""Devices, memory and disk. Read next: checkpoints.py."""

import collections
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import psutil

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
_SPARE = 2**30  # bytes of a disk that something else may need meanwhile
_MARGIN = 1.15  # how far an estimate of memory may be off
# Uses that can be made less, and how.
_FEWER_ROWS = (
  "raise config.training.accumulate, lower config.data.batch_size or "
  "config.data.max_text_length, or set config.model.remat to 'full'"
)
_REMEDIES = {
  "activations": _FEWER_ROWS,
  "temporaries": _FEWER_ROWS,
  "batches ahead": "lower config.data.prefetch_batches",
  "a checkpoint to be written": "use a host with more memory, or more hosts",
}


@dataclasses.dataclass(frozen=True)
class Device:
  """A device as JAX sees it.

  Attributes:
    platform: 'cpu', 'gpu' or 'tpu'.
    kind: its name.
    memory: bytes that a program may use of its own; 0 is the host's.
  """

  platform: str
  kind: str
  memory: int


def devices(
  dev: pathlib.Path = pathlib.Path("/dev"), timeout: float = PROBE_SECONDS
) -> tuple[Finding, list[Device]]:
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
    finding = Finding(
      "devices",
      f"JAX did not start in {timeout:g} s",
      "error",
      "end other programs that use the accelerator; on a TPU slice of several "
      "hosts start this on all of them at once (--worker=all)",
    )
    return finding, []
  if process.returncode:
    said = process.stderr.strip().splitlines() or ["no message"]
    asked = os.environ.get("JAX_PLATFORMS")
    finding = Finding(
      "devices",
      f"JAX does not start ({said[-1][:300]})",
      "error",
      "correct the packages named above or the driver"
      + (f", or unset JAX_PLATFORMS, which is {asked!r}" if asked else ""),
    )
    return finding, []
  found = [Device(*d) for d in json.loads(process.stdout.splitlines()[-1])]
  described = ", ".join(
    f"{n} x {d.kind} ({d.platform}"
    f"{f', {size(d.memory)} each' if d.memory else ''})"
    for d, n in collections.Counter(found).items()
  )
  if any(d.platform != "cpu" for d in found):
    return Finding("devices", described), found
  return _cpu_only(described, dev), found


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


def host_memory(uses: dict[str, int]) -> Finding:
  """Free memory of the host, against what a run needs of it, by use."""
  machine = psutil.virtual_memory()
  total, free = machine.total, machine.available
  if _CGROUP.is_file() and (limit := _CGROUP.read_text().strip()) != "max":
    total = min(total, int(limit))  # of the container
    used = int(_CGROUP.with_name("memory.current").read_text())
    lines = _CGROUP.with_name("memory.stat").read_text().splitlines()
    # Files that were read lately, which make way for programs.
    used -= int(dict(map(str.split, lines)).get("inactive_file", 0))
    free = min(free, max(0, total - used))
  found = f"{size(free)} free of {size(total)}"
  return fits("host memory", found, uses, free)


def fits(check: str, found: str, uses: dict[str, int], free: int) -> Finding:
  """An error where memory does not suffice, a warning where it is close."""
  needed = sum(uses.values())
  if needed:
    parts = ", ".join(f"{use} {size(n)}" for use, n in uses.items() if n)
    found += f", a run takes about {size(needed)} ({parts})"
  if free >= needed * _MARGIN:
    return Finding(check, found)
  remedy = "use more devices or larger ones, with config.mesh.fsdp -1"
  less = {use: n for use, n in uses.items() if use in _REMEDIES}
  if needed - sum(less.values()) < free:
    remedy = _REMEDIES[max(less, key=lambda use: less[use])]
  return Finding(check, found, "error" if free < needed else "warning", remedy)


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
