"""What the memory of a chip is used for. Read next: measure.py.

What a program is called with is known exactly. The TPU compiler does not tell
what it puts where, but the loop of the backward pass carries what is saved and
what is summed up, and its arrays are in the program's text.
"""

import jax

from vocojax.ahead import hlo, loops

GRADIENTS = "gradients of the layers"
SAVED = "activations saved for the backward pass"
COPIES = "copies of layers' parameters"
OTHER = "other temporaries"


def carried(module: hlo.Module, num_layers: int, params) -> dict[str, int]:
  """Bytes of stacked arrays that the largest loop over layers carries, by use.

  Args:
    module: the program of one device.
    num_layers: of the language model; the last may be outside of the loop.
    params: trained parameters, shapes with shardings.
  """
  slices = {
    tuple(sorted(x.sharding.shard_shape(x.shape)[1:]))
    for x in jax.tree.leaves(params)
    if x.ndim > 1 and x.shape[0] == num_layers
  }
  entry = module.computations[module.entry]
  found: dict[str, int] = {}
  for loop in entry.instructions.values():
    if loop.opcode != "while":
      continue
    turns = loops.trip_count(module, entry, loop)
    if turns is not None and turns in (num_layers, num_layers - 1):
      uses = _uses(module, entry, loop, {num_layers, turns}, slices)
      found = max(found, uses, key=lambda uses: sum(uses.values()))
  return found


def _uses(
  module: hlo.Module,
  entry: hlo.Computation,
  loop: hlo.Instruction,
  stacked: set[int],
  slices: set[tuple[int, ...]],
) -> dict[str, int]:
  body = module.computations[loop.called("body")]
  start = entry.operand(loop, 0)
  uses = dict.fromkeys((GRADIENTS, SAVED, COPIES), 0)
  for i, shape in enumerate(loop.shapes):
    is_argument = entry.operand(start, i).opcode == "parameter"
    is_stacked = bool(shape.dims) and shape.dims[0] in stacked
    if is_argument or not is_stacked or shape.space:
      continue
    if tuple(sorted(shape.dims[1:])) not in slices:
      uses[SAVED] += shape.nbytes
    elif loops.passes_on(module, body, i):
      uses[COPIES] += shape.nbytes
    else:
      uses[GRADIENTS] += shape.nbytes
  return uses
