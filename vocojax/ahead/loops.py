"""How often a loop of a compiled program runs. Read next: work.py.

XLA writes it down only on some platforms. Else the loop must count: its
condition compares an element of the tuple that it carries with a bound, and its
body adds a constant to that element.
"""

import dataclasses
import re

from vocojax.ahead.hlo import Computation, Instruction, Module


@dataclasses.dataclass(frozen=True)
class _Linear:
  """`element` of the tuple that a computation is given, if any, + `offset`."""

  element: int | None
  offset: int


def trip_count(
  module: Module, where: Computation, loop: Instruction
) -> int | None:
  """How often the body of a `while` in `where` runs; None if unknown."""
  if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.backend):
    return int(known[1])
  body = module.computations[loop.called("body")]
  start = where.operand(loop, 0)
  if start.opcode != "tuple" or body.result.opcode != "tuple":
    return None

  def first(element: int) -> int | None:
    found = _linear(module, where, start.operands[element])
    return None if found is None or found.element is not None else found.offset

  compared = _comparison(module, module.computations[loop.called("condition")])
  if compared is None:
    return None
  counter, bound, direction = compared
  if counter.element is None:
    counter, bound = bound, counter
    direction = {"GT": "LT", "GE": "LE"}.get(direction, "")
  if counter.element is None or direction not in ("LT", "LE", "NE"):
    return None
  limit = bound.offset
  if bound.element is not None:  # a bound that the loop carries along
    carried = first(bound.element)
    if carried is None or not passes_on(module, body, bound.element):
      return None
    limit += carried
  begin = first(counter.element)
  step = _linear(module, body, body.result.operands[counter.element])
  if begin is None or step is None or step.element != counter.element:
    return None
  if step.offset <= 0:
    return None
  distance = limit - counter.offset - begin + (direction == "LE")
  return max(0, -(-distance // step.offset))


def passes_on(module: Module, body: Computation, element: int) -> bool:
  """Whether the body of a loop leaves an element of its tuple as it was."""
  result = body.result.operands[element]
  return _linear(module, body, result) == _Linear(element, 0)


def _comparison(
  module: Module, test: Computation
) -> tuple[_Linear, _Linear, str] | None:
  """Both sides and the direction of a loop's condition."""
  result, where, given = test.result, test, None
  if result.opcode == "fusion":
    given = [_linear(module, test, name) for name in result.operands]
    where = module.computations[result.called("calls")]
    result = where.result
  if result.opcode != "compare":
    return None
  left, right = (_linear(module, where, x, given) for x in result.operands)
  if left is None or right is None:
    return None
  return left, right, result.attribute(r"direction=(\w+)") or ""


def _linear(
  module: Module,
  where: Computation,
  name: str,
  given: list[_Linear | None] | None = None,
) -> _Linear | None:
  """What an integer is, as far as it is that simple.

  Args:
    module: the program.
    where: the computation of the instruction.
    name: the instruction.
    given: parameters of a fusion; None where `where` is given one tuple.
  """
  x = where.instructions[name]

  def operand(i: int) -> _Linear | None:
    return _linear(module, where, x.operands[i], given)

  match x.opcode:
    case "constant" if re.fullmatch(r"-?\d+", x.literal):
      return _Linear(None, int(x.literal))
    case "parameter" if given is not None:
      return given[int(x.literal)]
    case "copy" | "bitcast" | "convert":
      return operand(0)
    case "add":
      a, b = operand(0), operand(1)
      if a is None or b is None or None not in (a.element, b.element):
        return None
      element = b.element if a.element is None else a.element
      return _Linear(element, a.offset + b.offset)
    case "fusion":
      called = module.computations[x.called("calls")]
      inner = [operand(i) for i in range(len(x.operands))]
      return _linear(module, called, called.root, inner)
    case "get-tuple-element":
      index = int(x.attribute(r"index=(\d+)") or 0)
      source = where.operand(x, 0)
      if source.opcode == "parameter" and given is None:
        return _Linear(index, 0)
      if source.opcode == "fusion":
        called = module.computations[source.called("calls")]
        inner = [_linear(module, where, o, given) for o in source.operands]
        return _linear(module, called, called.result.operands[index], inner)
  return None
