"""Compiles for TPUs that are not there, and says what would happen on them.

  python -m vocojax.aot --config=configs/voco_1tok.py --topology=v5e:4x4
  python -m vocojax.aot --config=FILE --topology=v5e:2x2 --what=serve

For the training step, or with --what=serve for the engine's programs: memory of
a chip, collectives, operations against the ideal, and the least time that the
chip's peaks allow. Exit status 1 if it does not fit. Needs libtpu and a few
minutes. Read next: ahead/measure.py.
"""

import dataclasses
import json
import sys
from typing import Any

import jax
from absl import flags

from vocojax import assemble, cli
from vocojax.ahead import measure, picture, programs, search, topology
from vocojax.ahead.measure import DoesNotFitError, Measurement
from vocojax.ahead.topology import GIB
from vocojax.config import Config
from vocojax.core import files
from vocojax.errors import UserError
from vocojax.training import sharding

_CONFIG = cli.define_config()
_TOPOLOGY = flags.DEFINE_string(
  "topology",
  None,
  "Chips, such as v5e:4x4, v5p:4x4x4, v6e:16x16 or v4:2x2x1.",
  required=True,
)
_WHAT = flags.DEFINE_enum(
  "what", "train", ["train", "serve"], "Which programs to compile."
)
_SAMPLES = flags.DEFINE_integer(
  "samples_per_chip",
  None,
  "Text rows of a step, or slots of the engine, divided by chips; by default "
  "config.data.batch_size or config.evaluation.batch_size is.",
  lower_bound=1,
)
_MAX_BATCH = flags.DEFINE_bool(
  "max_batch",
  False,
  "Also look for the most samples a chip that fit: a few more compilations.",
)
_PLOT = flags.DEFINE_string("plot", None, "PNG file: memory by use.")
_JSON = flags.DEFINE_string("json", None, "File for all figures.")


def main() -> int:
  # Nothing is to run, least of all on a device that another program may need.
  jax.config.update("jax_platforms", "cpu")
  if _MAX_BATCH.value and _WHAT.value == "serve":
    raise UserError("--max_batch", "--what=serve", "--what=train", "drop it")
  config = assemble.plan(_CONFIG.value)[-1]
  chip, devices = topology.describe(_TOPOLOGY.value)
  mesh = sharding.make_mesh(config.mesh, devices)
  config = _with_batch(config, len(devices))
  samples = config.data.batch_size / len(devices)
  sizes = " x ".join(f"{axis} {n}" for axis, n in mesh.shape.items())
  title = (
    f"{config.name} on {_TOPOLOGY.value}: {len(devices)} chips as {sizes}, "
    f"{samples:g} {'samples' if _WHAT.value == 'train' else 'slots'} a chip"
  )
  print(title)
  measured, failed = [], ""
  for program in getattr(programs, _WHAT.value)(config, mesh):
    try:
      measured.append(measure.compile_program(program))
      print(_describe(measured[-1], chip), flush=True)
    except DoesNotFitError as e:
      failed = str(
        UserError(
          program.name,
          f"{e}: does not fit",
          f"at most {chip.hbm / GIB:.2f} GiB",
          _remedy(program, config, chip),
        )
      )
      print(f"error: {failed}", file=sys.stderr)
  report: dict[str, Any] = {"title": title, "does_not_fit": failed}
  if _MAX_BATCH.value:
    report |= _search(config, mesh, chip, None if failed else measured[0])
  report["programs"] = [m.as_json(chip) for m in measured]
  if _JSON.value:
    path = files.expand_user(_JSON.value)
    files.write_atomic(path, json.dumps(report, indent=1))
  if _PLOT.value and measured:
    picture.draw(measured, chip, title, files.expand_user(_PLOT.value))
  return 1 if failed else 0


def _with_batch(config: Config, chips: int) -> Config:
  """The config with as many rows, or slots, as are asked for."""
  size = config.data.batch_size
  if _WHAT.value == "serve":
    size = config.evaluation.batch_size
  if _SAMPLES.value:
    size = _SAMPLES.value * chips
  data = dataclasses.replace(config.data, batch_size=size)
  return dataclasses.replace(config, data=data)


def _describe(m: Measurement, chip: topology.Chip) -> str:
  """A paragraph about one program."""
  seconds = m.seconds(chip)
  slowest = max(seconds, key=lambda resource: seconds[resource])
  name = m.program.name
  lines = [
    f"{name}, compiled in {m.compile_seconds:.0f} s",
    f"  memory: peak {m.peak_bytes / GIB:.2f} GiB of {chip.hbm / GIB:.2f} a "
    f"chip ({m.peak_bytes / chip.hbm:.0%}); arguments "
    f"{m.argument_bytes / GIB:.2f}, temporaries {m.temporary_bytes / GIB:.2f}",
  ]
  for use, size in m.bytes_by_use.items():
    if size:
      lines.append(f"    {size / GIB:8.3f} GiB  {use}")
  lines.append(
    f"  operations: {m.work.flops / 1e12:.2f} TFLOP in matrix products, "
    f"{m.work.flops / m.program.ideal_flops:.2f} x the ideal "
    f"{m.program.ideal_flops / 1e12:.2f}"
  )
  if m.work.kernels:
    names = ", ".join(f"{n} x {k}" for k, n in m.work.kernels.items())
    lines.append(
      f"  kernels, not among these: {names}, estimated at "
      f"{m.work.kernel_flops / 1e12:.2f} TFLOP"
    )
  for loop in m.work.unknown_loops:
    lines.append(f"    loop {loop} of unknown length counted as one turn")
  lines.append("  collectives, whole arrays:")
  for kind, dtype, in_loop, times, nbytes in measure.table(m.work):
    where = "in loops" if in_loop else "outside loops"
    lines.append(
      f"    {nbytes / GIB:8.3f} GiB  {times:5} x {kind} {dtype} {where}"
    )
  parts = ", ".join(f"{r} {1000 * s:.1f} ms" for r, s in seconds.items())
  lines.append(
    f"  time: at least {1000 * seconds[slowest]:.1f} ms, bound by {slowest} "
    f"({parts}; peaks {chip.flops / 1e12:.0f} TFLOP/s, "
    f"{chip.hbm_bandwidth / 1e9:.0f} GB/s, {chip.ici_bandwidth / 1e9:.0f} GB/s)"
  )
  return "\n".join(lines)


def _remedy(program: programs.Program, config: Config, chip) -> str:
  """What to change so that it fits."""
  held = sum(program.argument_bytes.values())
  chips = "a topology with more chips"
  if config.mesh.data > 1:
    chips += ", config.mesh.fsdp in place of config.mesh.data"
  if held > 0.9 * chip.hbm:
    how = f"use {chips}, or chips with more memory, since what it is called "
    how += f"with takes {held / GIB:.2f} GiB"
    if _WHAT.value == "train":
      how += (
        "; config.optimizer.first_moment_dtype=bfloat16, or adafactor or lion "
        "as config.optimizer.name, need less optimiser state"
      )
    return how
  less = "lower --samples_per_chip"
  if _WHAT.value == "train":
    less += " (or raise config.training.accumulate with it)"
    if config.model.remat != "full":
      less += f", set config.model.remat=full (now {config.model.remat})"
  return f"{less}, lower config.data.max_text_length, or use {chips}"


def _search(config: Config, mesh, chip, first: Measurement | None) -> dict:
  """Looks for the largest batch and prints it."""

  def compile_with(samples: int) -> Measurement:
    size = samples * mesh.size
    data = dataclasses.replace(config.data, batch_size=size)
    [program] = programs.train(dataclasses.replace(config, data=data), mesh)
    return measure.compile_program(program)

  found = search.largest(
    compile_with,
    first,
    max(1, config.data.batch_size // mesh.size),
    chip.hbm,
    lambda line: print(f"  {line}", file=sys.stderr, flush=True),
  )
  if found is None:
    print("largest batch: not even 1 sample a chip fits")
    return {"max_samples_per_chip": 0}
  best, m = found
  print(
    f"largest batch: {best} samples a chip, peak {m.peak_bytes / GIB:.2f} GiB"
  )
  return {"max_samples_per_chip": best, "max_batch": m.as_json(chip)}


if __name__ == "__main__":
  cli.run(main, __doc__)
