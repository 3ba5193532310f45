"""Evaluates a checkpoint on the held-out questions of its data set.

  python -m vocojax.evaluate --checkpoint=WORKDIR/voco

Writes WORKDIR/evaluation/NAME.json and the answers, and the report again. With
`--compressor=voco` on a `full` checkpoint it gives the lower bound. Read next:
evals/answers.py.
"""

import dataclasses
import pathlib

from absl import flags, logging

from vocojax import assemble, cli
from vocojax.data.sources import make_source
from vocojax.errors import CheckpointError
from vocojax.evals import answers
from vocojax.evals.report import write_report
from vocojax.models.compressors import image_stream
from vocojax.training import checkpoint, loop, sharding

_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", None, "Phase folder of a workdir, or one step of it."
)
_COMPRESSOR = flags.DEFINE_enum(
  "compressor",
  None,
  ["voco", "full"],
  "What text sees of the image; by default what the checkpoint was trained "
  "with.",
)


def evaluate(
  loaded: checkpoint.Loaded,
  workdir: pathlib.Path,
  compressor: str,
  command: str,
) -> dict:
  """Scores a checkpoint, writes the result and prints it in one line."""
  config = loaded.config
  trained = config.model.compressor.name
  model_config = dataclasses.replace(
    config.model,
    compressor=dataclasses.replace(config.model.compressor, name=compressor),
  )
  config = dataclasses.replace(config, model=model_config)
  model = assemble.make_model(config, loaded.tokenizer)
  mesh = sharding.make_mesh(config.mesh)
  params, missing = checkpoint.load_params(
    str(loaded.path), loop.abstract_params(model, mesh), config.model
  )
  if missing:
    raise CheckpointError(
      f"{loaded.path}: lacks {missing[0]} and {len(missing) - 1} more "
      f"parameters of a {compressor!r} model; train one from it with "
      "config.init_from"
    )
  name, title = _NAMES[trained, compressor]
  source = make_source(config.data, config.evaluation.split)
  found = answers.answer_questions(
    config, model, params, loaded.tokenizer, source, title
  )
  result = answers.write(
    workdir / "evaluation",
    name,
    title,
    found,
    config,
    loaded.path,
    assemble.provenance(command),
  )
  seen = len(image_stream(config.model, model.tokens).visible)
  print(
    f"{title}: {result['accuracy']:.2%} of {result['total']} answers right, "
    f"{config.model.vision.num_patches} patches as {seen} token"
    f"{'s' if seen > 1 else ''}, {result['seconds']:.1f} s"
  )
  return result


_NAMES = {
  ("voco", "voco"): ("voco", "VoCo"),
  ("full", "full"): ("full", "upper bound, all patches"),
  ("full", "voco"): ("lower", "lower bound, the same under the VoCo mask"),
  ("voco", "full"): ("voco_full", "VoCo weights, all patches"),
}


def main() -> None:
  logging.set_verbosity(logging.WARNING)
  loaded = checkpoint.load(_CHECKPOINT.value)
  workdir = loaded.path.parents[2]
  compressor = _COMPRESSOR.value or loaded.config.model.compressor.name
  command = assemble.command_line("vocojax.evaluate")
  evaluate(loaded, workdir, compressor, command)
  if (workdir / "evaluation" / "voco.json").exists():
    print(f"report: {write_report(workdir)}")


if __name__ == "__main__":
  flags.mark_flag_as_required("checkpoint")
  cli.run(main, __doc__)
