"""TPU chips and slices that need not be there. Read next: measure.py.

The TPU compiler is in the package `libtpu` and runs on any x86 machine.
"""

import dataclasses
import importlib.metadata
import importlib.util
import os
import re

import jax
from jax.experimental import topologies

from vocojax.errors import UserError, shorten

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """What one chip can do.

  Attributes:
    flops: bf16 operations a second, peak.
    hbm: bytes of memory that a program may use: a little less than is sold;
      what the compiler of libtpu 0.0.42 says.
    hbm_bandwidth: bytes a second.
    ici_bandwidth: bytes a second that it can receive from other chips of the
      slice, over all its links.
    options: for a topology in which a chip is one device.
    example: a topology.
  """

  flops: float
  hbm: float
  hbm_bandwidth: float
  ici_bandwidth: float
  options: dict
  example: str


# Peaks from https://cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e, "key
# chip specifications". Interconnect is given there for all links of a chip, one
# way in Gbit/s (v4 2400, v5e 1600, v5p 4800, v6e 3200) or both ways in GB/s.
CHIPS = {
  "v4": Chip(
    275e12,
    30.75 * GIB,
    1200e9,
    300e9,
    {"chip_config_name": "megacore"},
    "v4:2x2x1",
  ),
  "v5e": Chip(197e12, 15.75 * GIB, 819e9, 200e9, {}, "v5e:4x4"),
  "v5p": Chip(459e12, 95.74 * GIB, 2765e9, 600e9, {}, "v5p:2x2x1"),
  "v6e": Chip(918e12, 31.25 * GIB, 1600e9, 400e9, {}, "v6e:4x4"),
}


def describe(name: str) -> tuple[Chip, list]:
  """The chip and the devices of a topology such as 'v5e:4x4'.

  Raises:
    UserError: there is no such topology, or no TPU compiler.
  """
  generation, _, layout = name.partition(":")
  chip = CHIPS.get(generation)
  directions = chip.example.count("x") if chip else 0
  if not chip or not re.fullmatch(rf"\d+(x\d+){{{directions}}}", layout):
    examples = ", ".join(chip.example for chip in CHIPS.values())
    raise UserError(
      "--topology",
      shorten(name),
      f"a chip and how many there are in each direction, such as {examples}",
      "correct it",
    )
  if importlib.util.find_spec("libtpu") is None:
    raise UserError(
      "--topology",
      "no TPU compiler",
      "libtpu to be installed",
      f'run pip install "{_libtpu_requirement()}"',
    )
  # Without these libtpu asks the metadata server of a TPU machine.
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  # Several may compile at once: none of them opens a chip.
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  options = dict(chip.options)
  if set(layout.split("x")) == {"1"}:
    options["chips_per_host_bounds"] = (1, 1, 1)
  try:
    topology = topologies.get_topology_desc(
      platform="tpu", topology_name=name, **options
    )
  except jax.errors.JaxRuntimeError as e:
    raise UserError(
      "--topology",
      f"{shorten(name)} ({e})",
      f"one that exists, such as {chip.example}",
      "correct it",
    ) from e
  return chip, list(topology.devices)


def _libtpu_requirement() -> str:
  """The libtpu that the installed JAX asks for."""
  for requirement in importlib.metadata.requires("jax") or ():
    if match := re.match(r"(libtpu[^;]*);.*extra == .tpu", requirement):
      return match[1].strip()
  return "libtpu"
