"""Reads the text of a compiled program (post-optimisation HLO). Next: loops.py.

Only what is needed to count work is kept: of every instruction its result
shapes, operation, operands and attributes. What the operations mean:
https://openxla.org/xla/operation_semantics; how they are printed:
xla/hlo/ir/hlo_instruction.cc.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

_BITS = {
  "pred": 8, "token": 0, "opaque": 0,
  "s4": 4, "u4": 4, "f4e2m1fn": 4,
  "s8": 8, "u8": 8, "f8e4m3fn": 8, "f8e5m2": 8, "f8e8m0fnu": 8,
  "s16": 16, "u16": 16, "f16": 16, "bf16": 16,
  "s32": 32, "u32": 32, "f32": 32,
  "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{[^}]*?(?:S\((\d+)\))?\})?")
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Shape:
  """One array; a tuple is several of them.

  Attributes:
    dtype: as HLO names it.
    dims: its dimensions.
    space: memory in which it lies; 0 is the device's main memory, HBM.
  """

  dtype: str
  dims: tuple[int, ...]
  space: int = 0

  @property
  def size(self) -> int:
    return math.prod(self.dims)

  @property
  def nbytes(self) -> int:
    return self.size * _BITS[self.dtype] // 8

  def __str__(self) -> str:
    return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line.

  Attributes:
    name: without `%`.
    shapes: of its result; a tuple's arrays one after the other.
    opcode: such as `dot`.
    operands: names of its operands.
    literal: what stands in the parentheses, such as the value of a constant.
    attributes: what follows them, but for the next two.
    backend: its backend_config.
  """

  name: str
  shapes: tuple[Shape, ...]
  opcode: str
  operands: tuple[str, ...]
  literal: str
  attributes: str
  backend: str

  def attribute(self, pattern: str) -> str | None:
    """The group of a regular expression that is found in the attributes."""
    match = re.search(pattern, self.attributes)
    return match[1] if match else None

  def called(self, key: str) -> str:
    """Name of the computation `key=%name`."""
    name = self.attribute(rf"\b{key}=%([\w.\-]+)")
    assert name is not None, (self.name, key)
    return name

  @property
  def branches(self) -> list[str]:
    """Computations of a conditional."""
    listed = self.attribute(r"branch_computations=\{([^}]*)\}")
    if listed is not None:
      return _NAME.findall(listed)
    return [self.called("true_computation"), self.called("false_computation")]


@dataclasses.dataclass
class Computation:
  """Instructions by name; the last one printed as ROOT is its result."""

  name: str
  instructions: dict[str, Instruction]
  root: str = ""

  @property
  def result(self) -> Instruction:
    return self.instructions[self.root]

  def operand(self, instruction: Instruction, i: int) -> Instruction:
    return self.instructions[instruction.operands[i]]


@dataclasses.dataclass
class Module:
  """A whole program: what one device executes."""

  computations: dict[str, Computation]
  entry: str

  def instructions(self) -> Iterator[Instruction]:
    for computation in self.computations.values():
      yield from computation.instructions.values()

  def shapes_with(self, first: int, second: int) -> set[Shape]:
    """Results with two dimensions of these sizes, fused ones included."""

    def has_both(dims: tuple[int, ...]) -> bool:
      if first == second:
        return dims.count(first) > 1
      return first in dims and second in dims

    return {
      shape
      for instruction in self.instructions()
      for shape in instruction.shapes
      if has_both(shape.dims)
    }


def parse(text: str) -> Module:
  """Reads `jax.stages.Compiled.as_text()`."""
  computations: dict[str, Computation] = {}
  current, entry = None, ""
  # What the author of a kernel noted about it is printed on lines of its own.
  for line in re.sub(r'\n(?="|\}\})', " ", text).splitlines():
    if current is None:
      if head := _HEAD.match(line):
        current = computations[head[2]] = Computation(head[2], {})
        if head[1]:
          entry = head[2]
    elif line.startswith("}"):
      current = None
    else:
      instruction = _instruction(line)
      current.instructions[instruction.name] = instruction
      if line.lstrip().startswith("ROOT "):
        current.root = instruction.name
  return Module(computations, entry)


def _instruction(line: str) -> Instruction:
  left, right = line.split(" = ", 1)
  right, _, backend = right.partition(", backend_config=")
  right = re.sub(r"/\*.*?\*/", "", right)
  end = _closing(right, 0) + 1 if right[0] == "(" else right.index(" ")
  kind, rest = right[:end], right[end:].lstrip()
  start = rest.index("(")
  stop = _closing(rest, start)
  literal = rest[start + 1 : stop]
  return Instruction(
    left.split()[-1].lstrip("%"),
    tuple(
      Shape(dtype, tuple(int(d) for d in dims.split(",") if d), int(space or 0))
      for dtype, dims, space in _SHAPE.findall(kind)
    ),
    rest[:start],
    tuple(_NAME.findall(literal)),
    literal,
    rest[stop + 1 :],
    backend,
  )


def _closing(text: str, start: int) -> int:
  """Index of the parenthesis that closes the one at `start`."""
  depth = 0
  for i in range(start, len(text)):
    depth += {"(": 1, ")": -1}.get(text[i], 0)
    if not depth:
      return i
  raise ValueError(f"no closing parenthesis: {text[:200]}")
