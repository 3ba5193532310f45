"""Trains a model, phase after phase, then evaluates it and writes a report.

  python -m vocojax.train --config=configs/easyvqa_1tok.py --workdir=DIR

Started again with the same workdir it resumes from the last checkpoint. SIGTERM
and Ctrl-C save one and stop it, with exit status 143 and 130. On several hosts
it is started on each, with the same workdir on a file system that all share.
Read next: training/loop.py.
"""

import pathlib

import jax
from absl import flags, logging

from vocojax import assemble, cli
from vocojax.config import Config
from vocojax.core import files
from vocojax.data.sources import make_source
from vocojax.evals.report import write_report
from vocojax.training import checkpoint, distributed, loop

_CONFIG = cli.define_config()
distributed.define_flags()
_WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "Folder for checkpoints, metrics and the report.",
  required=True,
)


def main() -> int:
  logging.set_verbosity(logging.WARNING)
  with distributed.joined():
    return _run(assemble.plan(_CONFIG.value, _WORKDIR.value))


def _run(plan: tuple[Config, ...]) -> int:
  """All phases and the evaluation; the exit status."""
  workdir = assemble.make_workdir(_WORKDIR.value)
  with distributed.held(workdir, "training"):
    return _run_alone(plan, workdir)


def _run_alone(plan: tuple[Config, ...], workdir: pathlib.Path) -> int:
  made_by = assemble.provenance(assemble.command_line("vocojax.train"))
  distributed.check_shared(workdir)
  if plan[-1].training.evaluate:
    # A mistake in it should not wait until everything is trained.
    make_source(plan[-1], plan[-1].evaluation.split)
  made = list(assemble.make_phases(plan, workdir))
  for phase in made:
    try:
      _train(phase)
    except loop.Stopped as e:
      if jax.process_index() == 0:
        print(e)
      return e.status
  if plan[-1].training.evaluate:
    _evaluate(plan, workdir, made_by)
  return 0


def _train(phase: loop.Phase) -> None:
  with files.storage(phase.folder):
    phase.folder.mkdir(exist_ok=True)
  loop.run(phase)
  if jax.process_index() == 0:
    files.write_atomic(phase.folder / "config.json", phase.config.to_json())


def _evaluate(
  plan: tuple[Config, ...], workdir: pathlib.Path, made_by: dict
) -> None:
  """The last phase and, if asked for, both bounds from a `voco_causal` one."""
  distributed.ignore_preemption()
  runs = [(plan[-1], plan[-1].model.compressor.name)]
  if plan[-1].evaluation.bounds:
    causal = [c for c in plan if c.model.compressor.name == "voco_causal"]
    for compressor in ("voco_causal", "voco") if causal else ():
      runs.append((causal[-1], compressor))
  for config, compressor in runs:
    loaded = checkpoint.load(str(workdir / config.name))
    assemble.evaluate(loaded, workdir, compressor, made_by)
  if plan[-1].model.compressor.name == "voco" and jax.process_index() == 0:
    print(f"report: {write_report(workdir)}")


if __name__ == "__main__":
  cli.run(main, __doc__)
