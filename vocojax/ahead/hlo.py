"""Reads the text of a compiled program (post-optimisation HLO). Next: work.py.

Only what is needed to count work is kept: of every instruction its result
shapes, operation, operands and attributes, and how often a loop runs.

The text's grammar: https://openxla.org/xla/operation_semantics and the printer
in xla/hlo/ir/hlo_instruction.cc.
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

  def trip_count(self, where: Computation, loop: Instruction) -> int | None:
    """How often the body of a `while` in `where` runs; None if unknown.

    XLA writes it down only on some platforms. Else the loop must count: its
    condition compares an element of the carried tuple with a bound, its body
    adds a constant to that element, and it starts from a constant.
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.backend):
      return int(known[1])
    body = self.computations[loop.called("body")]
    test = self.computations[loop.called("condition")]
    start = where.operand(loop, 0)
    if start.opcode != "tuple" or body.result.opcode != "tuple":
      return None

    def initial(value: "_Linear") -> int | None:
      """A constant, or an element that the loop passes on as it found it."""
      if value.element is None:
        return value.offset
      if not self.passes_on(body, value.element):
        return None
      found = self._linear(where, start.operands[value.element])
      if found is None or found.element is not None:
        return None
      return found.offset + value.offset

    compared = self._comparison(test)
    if compared is None:
      return None
    counter, bound, direction = compared
    if counter.element is None:
      counter, bound = bound, counter
      direction = {"GT": "LT", "GE": "LE"}.get(direction, "")
    if counter.element is None or direction not in ("LT", "LE", "NE"):
      return None
    step = self._linear(body, body.result.operands[counter.element])
    first = self._linear(where, start.operands[counter.element])
    limit = initial(bound)
    if (
      step is None
      or first is None
      or limit is None
      or step.element != counter.element
      or step.offset <= 0
      or first.element is not None
    ):
      return None
    distance = limit - counter.offset - first.offset + (direction == "LE")
    return max(0, -(-distance // step.offset))

  def passes_on(self, body: Computation, element: int) -> bool:
    """Whether the body of a loop leaves an element of its tuple as it was."""
    result = body.result.operands[element]
    return self._linear(body, result) == _Linear(element, 0)

  def _comparison(self, test: Computation):
    """Both sides and the direction of a loop's condition."""
    result, where, arguments = test.result, test, None
    if result.opcode == "fusion":
      arguments = [self._linear(test, name) for name in result.operands]
      where = self.computations[result.called("calls")]
      result = where.result
    if result.opcode != "compare":
      return None
    sides = [self._linear(where, name, arguments) for name in result.operands]
    if None in sides:
      return None
    return *sides, result.attribute(r"direction=(\w+)")

  def _linear(
    self,
    where: Computation,
    name: str,
    arguments: "list[_Linear | None] | None" = None,
  ) -> "_Linear | None":
    """An integer as element of the computation's tuple plus a constant."""
    x = where.instructions[name]

    def operand(i: int) -> "_Linear | None":
      return self._linear(where, x.operands[i], arguments)

    match x.opcode:
      case "constant" if re.fullmatch(r"-?\d+", x.literal):
        return _Linear(None, int(x.literal))
      case "parameter" if arguments is not None:
        return arguments[int(x.literal)]
      case "copy" | "bitcast" | "convert":
        return operand(0)
      case "add":
        a, b = operand(0), operand(1)
        if a is None or b is None or (a.element and b.element):
          return None
        element = b.element if a.element is None else a.element
        return _Linear(element, a.offset + b.offset)
      case "fusion":
        called = self.computations[x.called("calls")]
        given = [operand(i) for i in range(len(x.operands))]
        return self._linear(called, called.root, given)
      case "get-tuple-element":
        index = int(x.attribute(r"index=(\d+)") or 0)
        source = where.operand(x, 0)
        if source.opcode == "parameter" and arguments is None:
          return _Linear(index, 0)
        if source.opcode == "fusion":
          called = self.computations[source.called("calls")]
          given = [
            self._linear(where, name, arguments) for name in source.operands
          ]
          return self._linear(called, called.result.operands[index], given)
    return None


@dataclasses.dataclass(frozen=True)
class _Linear:
  """`element` of a computation's tuple, if any, plus `offset`."""

  element: int | None
  offset: int


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
