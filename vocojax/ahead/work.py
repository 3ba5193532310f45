"""What a compiled program executes, loops multiplied out. Next: loops.py.

XLA's own cost analysis counts the body of a loop once, which for a scan over 32
layers is 1/32 of the work.
"""

import collections
import dataclasses
import functools
import math
import re

import numpy as np

from vocojax.ahead import hlo, loops

_COLLECTIVES = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "collective-permute",
  "all-to-all",
  "ragged-all-to-all",
)


@dataclasses.dataclass(frozen=True)
class Collective:
  """One instruction that moves arrays between devices.

  Attributes:
    kind: without `-start`; a reduce-scatter that the compiler wrote as an
      all-reduce and a slice is a reduce-scatter.
    shapes: of its result on one device.
    group: devices that take part.
    times: how often it is executed in a step.
    depth: loops around it. The loop of a collective matmul, which sends one
      piece of an operand a turn, is not counted.
  """

  kind: str
  shapes: tuple[hlo.Shape, ...]
  group: int
  times: int
  depth: int

  @property
  def nbytes(self) -> int:
    """Of the whole arrays, as a group has them together, in all executions."""
    size = self.times * sum(shape.nbytes for shape in self.shapes)
    return size * self.group if self.kind == "reduce-scatter" else size

  @property
  def nbytes_received(self) -> int:
    """What one device receives at least, in all executions."""
    if self.kind == "collective-permute":
      return self.nbytes
    ways = 2 if self.kind == "all-reduce" else 1
    return ways * self.nbytes * (self.group - 1) // self.group


@dataclasses.dataclass(frozen=True)
class Work:
  """Of one device in one execution of a program.

  Attributes:
    flops: of matrix products and convolutions that are instructions.
    kernel_flops: of Pallas kernels, of which some give an estimate; the others
      count as nothing.
    collectives: as they stand in the program.
    kernels: executions of Pallas kernels by name. The compiler has some of its
      own, named `name`.
    unknown_loops: names of loops of unknown length, counted as one turn.
  """

  flops: int = 0
  kernel_flops: int = 0
  collectives: tuple[Collective, ...] = ()
  kernels: collections.Counter[str] = dataclasses.field(
    default_factory=collections.Counter
  )
  unknown_loops: tuple[str, ...] = ()

  def __add__(self, other: "Work") -> "Work":
    return Work(
      self.flops + other.flops,
      self.kernel_flops + other.kernel_flops,
      self.collectives + other.collectives,
      self.kernels + other.kernels,
      self.unknown_loops + other.unknown_loops,
    )

  def repeat(self, times: int, depth: int) -> "Work":
    """As the body of a loop."""
    return Work(
      self.flops * times,
      self.kernel_flops * times,
      tuple(
        dataclasses.replace(c, times=c.times * times, depth=c.depth + depth)
        for c in self.collectives
      ),
      collections.Counter({k: n * times for k, n in self.kernels.items()}),
      self.unknown_loops,
    )


def count(module: hlo.Module) -> Work:
  """Work of a whole program."""
  return _Counter(module).of(module.entry)


class _Counter:
  """Counts the work of computations, each once."""

  def __init__(self, module: hlo.Module):
    self._module = module
    self.of = functools.cache(self._count)

  def _count(self, name: str) -> Work:
    where = self._module.computations[name]
    total = Work()
    for x in where.instructions.values():
      total += self._instruction(where, x)
    return total

  def _instruction(self, where: hlo.Computation, x: hlo.Instruction) -> Work:
    match x.opcode:
      case "dot":
        return Work(_dot_flops(where, x))
      case "convolution":
        return Work(_convolution_flops(where, x))
      case "while":
        return self._loop(where, x)
      case "conditional":
        # Which one runs is not known; the one with most work is.
        return max(map(self.of, x.branches), key=lambda work: work.flops)
      case "call":
        return self.of(x.called("to_apply"))
      case "fusion":
        return self._fusion(x)
      case "async-start":
        return self.of(x.called("calls"))
      case "custom-call":
        if 'custom_call_target="tpu_custom_call"' in x.attributes:
          kernel = re.sub(r"\.\d+$", "", x.name)
          estimate = re.search(r'"cost_estimate":\{"flops":"(\d+)"', x.backend)
          return Work(
            kernel_flops=int(estimate[1]) if estimate else 0,
            kernels=collections.Counter({kernel: 1}),
          )
    kind = x.opcode.removesuffix("-start")
    if kind in _COLLECTIVES and not _goes_on(where, x):
      return Work(collectives=(_collective(kind, x),))
    return Work()

  def _loop(self, where: hlo.Computation, x: hlo.Instruction) -> Work:
    times = loops.trip_count(self._module, where, x)
    body = self.of(x.called("body"))
    depth = 0 if "windowed_dot_general" in x.called("body") else 1
    if times is not None:
      return body.repeat(times, depth)
    return body.repeat(1, depth) + Work(unknown_loops=(x.name,))

  def _fusion(self, x: hlo.Instruction) -> Work:
    name = x.called("calls")
    work = self.of(name)
    if "all-reduce-scatter" not in name:
      return work
    scattered = tuple(
      dataclasses.replace(c, kind="reduce-scatter", shapes=x.shapes)
      for c in work.collectives
    )
    return dataclasses.replace(work, collectives=scattered)


def _goes_on(where: hlo.Computation, x: hlo.Instruction) -> bool:
  """Whether this is a later piece of a collective that has been started.

  While an asynchronous collective is under way, it stands in fusions with what
  is computed in the meantime, also within loops.
  """
  return "async_collective_fusion_config" in x.backend and not any(
    x.name in user.operands and '"AsyncCollectiveStart"' in user.attributes
    for user in where.instructions.values()
  )


def _collective(kind: str, x: hlo.Instruction) -> Collective:
  shapes = x.shapes
  if x.opcode.endswith("-start") and kind != "all-reduce":
    # (operands, results, what the platform needs to wait)
    shapes = shapes[len(x.operands) : 2 * len(x.operands)]
  return Collective(kind, shapes, _group_size(x), 1, 0)


def _group_size(x: hlo.Instruction) -> int:
  """Devices of one group; the printer writes groups in three ways."""
  if pairs := x.attribute(r"source_target_pairs=\{\{(.*?)\}\}"):
    return pairs.count("},{") + 1
  if size := x.attribute(r"replica_groups=\[\d+,(\d+)\]<="):
    return int(size)
  if first := x.attribute(r"replica_groups=\{\{([\d,]*)\}"):
    return first.count(",") + 1
  mesh = x.attribute(r"replica_groups=mesh\[(.*?)\]")
  # An order of devices may stand between the mesh and its axes.
  axes = x.attribute(
    r"replica_groups=mesh\[.*?\](?:, device_ids=\(\S*\))? \{(.*?)\}"
  )
  if mesh is None or axes is None:
    raise ValueError(f"{x.name}: unknown replica_groups: {x.attributes[:200]}")
  sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", mesh)}
  # A part of an axis is printed as 'name':(product of what is before it)size.
  return math.prod(
    int(part) if part else sizes[name]
    for name, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", axes)
  )


def _numbers(text: str | None) -> list[int]:
  return [int(n) for n in re.findall(r"-?\d+", text or "")]


def _dot_flops(where: hlo.Computation, x: hlo.Instruction) -> int:
  left = where.operand(x, 0).shapes[0].dims
  contracted = _numbers(x.attribute(r"lhs_contracting_dims=\{([\d,]*)\}"))
  return 2 * x.shapes[0].size * math.prod(left[i] for i in contracted)


def _convolution_flops(where: hlo.Computation, x: hlo.Instruction) -> int:
  """As XLA's HloCostAnalysis: products with padding or holes are left out.

  A TPU's matrix products are convolutions, often with batch dimensions as
  spatial ones, of which only such a count makes sense.
  """
  left, right = (where.operand(x, i).shapes[0].dims for i in (0, 1))
  labels = x.attribute(r"dim_labels=(\S+?)(?:,|$)") or ""
  left_labels, right_labels, out_labels = re.split(r"_|->", labels)
  window = x.attribute(r"window=\{([^}]*)\}") or ""

  def option(key: str, default: str) -> list[str]:
    found = re.search(rf"\b{key}=(\S+)", window)
    count = len(right_labels) - 2
    return found[1].split("x") if found else [default] * count

  valid = 1
  for i, (pad, stride, left_gap, right_gap) in enumerate(
    zip(
      option("pad", "0_0"),
      option("stride", "1"),
      option("lhs_dilate", "1"),
      option("rhs_dilate", "1"),
      strict=True,
    )
  ):
    valid *= _valid_positions(
      left[left_labels.index(str(i))],
      right[right_labels.index(str(i))],
      x.shapes[0].dims[out_labels.index(str(i))],
      int(pad.split("_")[0]),
      int(stride),
      int(left_gap),
      int(right_gap),
    )
  groups = int(x.attribute(r"batch_group_count=(\d+)") or 1)
  return (
    2
    * valid
    * right[right_labels.index("i")]
    * right[right_labels.index("o")]
    * left[left_labels.index("b")]
    // groups
  )


@functools.cache
def _valid_positions(
  left: int,
  kernel: int,
  out: int,
  pad: int,
  stride: int,
  left_gap: int,
  right_gap: int,
) -> int:
  """Pairs of output and kernel positions that meet an input element."""
  outputs = np.arange(out) * stride - pad
  total = 0
  for k in range(kernel):
    at = outputs + k * right_gap
    inside = (at >= 0) & (at % left_gap == 0) & (at // left_gap < left)
    total += int(np.count_nonzero(inside))
  return total
