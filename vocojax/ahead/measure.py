"""Compiles a program and says what it takes. Read next: work.py, hlo.py."""

import collections
import dataclasses
import re
import time

import jax

from vocojax.ahead import hlo, memory, work
from vocojax.ahead.programs import Program
from vocojax.ahead.topology import Chip


class DoesNotFitError(Exception):
  """A program needs more memory than a chip has."""


@dataclasses.dataclass(frozen=True)
class Measurement:
  """Of one compiled program, on one chip.

  Attributes:
    program: what was compiled.
    peak_bytes: most memory in use at any time, arguments included.
    argument_bytes: as laid out on the chip, padding included.
    temporary_bytes: beside arguments and outputs, all at once.
    moved_bytes: arguments and outputs, each read or written once.
    carried_bytes: of arrays in it that are known, by use; see memory.py.
    work: what it executes.
    module: the compiled program.
    compile_seconds: time that it took.
  """

  program: Program
  peak_bytes: int
  argument_bytes: int
  temporary_bytes: int
  moved_bytes: int
  carried_bytes: dict[str, int]
  work: work.Work
  module: hlo.Module
  compile_seconds: float

  @property
  def bytes_by_use(self) -> dict[str, int]:
    """What makes up the peak."""
    known = {**self.program.argument_bytes, **self.carried_bytes}
    rest = self.peak_bytes - sum(known.values())
    return known | {memory.OTHER: max(0, rest)}

  def seconds(self, chip: Chip) -> dict[str, float]:
    """Least time of one call by each resource: the roofline."""
    received = sum(c.nbytes_received for c in self.work.collectives)
    return {
      "matrix units": (self.work.flops + self.work.kernel_flops) / chip.flops,
      "HBM": self.moved_bytes / chip.hbm_bandwidth,
      "ICI": received / chip.ici_bandwidth,
    }

  def as_json(self, chip: Chip) -> dict:
    """The figures, for a file."""
    columns = ("kind", "dtype", "in_loop", "times", "bytes")
    return {
      "program": self.program.name,
      "peak_bytes": self.peak_bytes,
      "argument_bytes": self.argument_bytes,
      "bytes_by_use": self.bytes_by_use,
      "temporary_bytes": self.temporary_bytes,
      "tokens": self.program.num_tokens,
      "ideal_flops": self.program.ideal_flops,
      "executed_flops": self.work.flops,
      "kernel_flops": self.work.kernel_flops,
      "collectives": [
        dict(zip(columns, row, strict=True)) for row in table(self.work)
      ],
      "kernels": dict(self.work.kernels),
      "unknown_loops": list(self.work.unknown_loops),
      "seconds": self.seconds(chip),
      "compile_seconds": self.compile_seconds,
    }


def table(counted: work.Work) -> list[tuple[str, str, bool, int, int]]:
  """(kind, dtype, in a loop, executions, bytes) of collectives, most first."""
  rows = collections.defaultdict(lambda: [0, 0])
  for c in counted.collectives:
    total = rows[c.kind, c.shapes[0].dtype, c.depth > 0]
    total[0] += c.times
    total[1] += c.nbytes
  found = [(*key, times, nbytes) for key, (times, nbytes) in rows.items()]
  return sorted(found, key=lambda row: -row[-1])


def compile_program(program: Program) -> Measurement:
  """Compiles, which may take minutes.

  Raises:
    DoesNotFitError: the compiler finds no way to fit it into memory.
  """
  with jax.set_mesh(program.mesh):
    lowered = program.lower()
  started = time.perf_counter()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as e:
    if "RESOURCE_EXHAUSTED" not in str(e):
      raise
    raise DoesNotFitError(_needed(str(e))) from e
  seconds = time.perf_counter() - started
  sizes, text = compiled.memory_analysis(), compiled.as_text()
  assert sizes is not None and text is not None  # a TPU's have both
  module = hlo.parse(text)
  return Measurement(
    program,
    sizes.peak_memory_in_bytes,
    sizes.argument_size_in_bytes,
    sizes.temp_size_in_bytes,
    sizes.argument_size_in_bytes + sizes.output_size_in_bytes,
    memory.carried(
      module,
      program.num_layers,
      program.arguments.get("trained parameters", {}),
    ),
    work.count(module),
    module,
    seconds,
  )


def _needed(message: str) -> str:
  """How much it lacks, in the compiler's words."""
  message = " ".join(message.split()).removeprefix("RESOURCE_EXHAUSTED: ")
  if found := re.search(r"Used [\d.]+\w of [\d.]+\w hbm", message):
    return found[0]
  return message.rstrip(".")[:200]
