"""Evaluates a checkpoint on the held-out questions of its data set.

  python -m vocojax.evaluate --checkpoint=WORKDIR/voco

Writes WORKDIR/evaluation/NAME.json and the answers, and the report again. With
`--compressor=voco` on a `full` checkpoint it gives the lower bound. A
checkpoint whose prompt layout this version lacks is refused unless `--layout`
names one; NAME then ends in it, as it does in `int8` with `--int8`. Read next:
evals/answers.py.
"""

import jax
from absl import flags, logging

from vocojax import assemble, cli
from vocojax.data import prompt
from vocojax.evals.report import write_report
from vocojax.training import checkpoint, distributed

distributed.define_flags()
_CHECKPOINT = flags.DEFINE_string(
  "checkpoint",
  None,
  "Phase folder of a workdir, or one step of it.",
  required=True,
)
_COMPRESSOR = flags.DEFINE_enum(
  "compressor",
  None,
  ["voco", "full"],
  "What text sees of the image; by default what the checkpoint was trained "
  "with.",
)
_LAYOUT = flags.DEFINE_enum(
  "layout",
  None,
  list(prompt.LAYOUTS),
  "Prompt layout, on purpose another than the checkpoint was trained with.",
)
_INT8 = flags.DEFINE_bool(
  "int8",
  False,
  "Answers from 8-bit caches, as vocojax.compress --int8 stores them.",
)


def main() -> None:
  logging.set_verbosity(logging.WARNING)
  with distributed.joined():
    distributed.ignore_preemption()
    _run()


def _run() -> None:
  loaded = checkpoint.load(_CHECKPOINT.value, _LAYOUT.value or "")
  workdir = loaded.path.parents[2]
  compressor = _COMPRESSOR.value or loaded.config.model.compressor.name
  command = assemble.command_line("vocojax.evaluate")
  assemble.evaluate(loaded, workdir, compressor, command, _INT8.value)
  if jax.process_index():
    return
  if (workdir / "evaluation" / "voco.json").exists():
    print(f"report: {write_report(workdir)}")


if __name__ == "__main__":
  cli.run(main, __doc__)
