"""Shows what VoCo tokens read of an image, and what can be read from them.

  python -m vocojax.look --checkpoint=WORKDIR/voco --out=DIR [--images=DIR]

Writes DIR/voco_1.png and so on: for each VoCo token, its attention over the
patches of some images by layer, and rolled up through the layers. The images
are the first of the evaluation split or of a folder.
Without --images also DIR/probe.png and DIR/probe.json: how well a linear probe
of the VoCo tokens' keys and values tells color and shape on held-out images.
Read next: models/rollout.py, evals/probe.py.
"""

import dataclasses
import itertools
import json
import pathlib

import jax
import numpy as np
from absl import flags, logging
from jaxtyping import UInt8

from vocojax import assemble, cli
from vocojax.config import Config
from vocojax.core.files import expand_user, storage, write_atomic
from vocojax.data import pipeline
from vocojax.data.images import ImageProcessor
from vocojax.data.sources import make_source
from vocojax.errors import CheckpointError, UserError
from vocojax.evals import look_plots, probe
from vocojax.inference.folder import find_images
from vocojax.models import layers, rollout
from vocojax.training import checkpoint

SHOWN = 4  # images of a picture
TRAIN, TEST = 2000, 1000  # images that a probe is fitted to, and tried on

_CHECKPOINT = flags.DEFINE_string(
  "checkpoint",
  None,
  "Phase folder of a workdir, or one step of it.",
  required=True,
)
_OUT = flags.DEFINE_string("out", None, "Folder to write.", required=True)
_IMAGES = flags.DEFINE_string(
  "images",
  None,
  "Folder of images to look at instead of the evaluation split.",
)


def main() -> None:
  logging.set_verbosity(logging.WARNING)
  loaded = checkpoint.load(_CHECKPOINT.value)
  config = loaded.config
  if config.model.compressor.name != "voco":
    raise CheckpointError(
      loaded.path,
      f"compressor {config.model.compressor.name!r}",
      "'voco', whose VoCo tokens are shown",
      "name another phase",
    )
  out = _make_folder(_OUT.value)
  model, params = assemble.load_model(loaded, config)
  pixels = _pixels(config)
  _draw_reading(model, params, pixels, out)
  if _IMAGES.value is None:
    _probe(loaded, model, params, out)


def _make_folder(path: str) -> pathlib.Path:
  folder = expand_user(path, UserError)
  with storage(folder):
    folder.mkdir(parents=True, exist_ok=True)
  return folder


def _pixels(config: Config) -> UInt8[np.ndarray, "n S S 3"]:
  """The first images of --images or of the evaluation split."""
  size = config.model.vision.image_size
  if _IMAGES.value is not None:
    paths = find_images(_IMAGES.value)[:SHOWN]
    processor = ImageProcessor(size, config.data.pad_to_square)
    return np.stack([processor(path) for path in paths])
  source = make_source(config, config.evaluation.split)
  records = pipeline.eval_records(
    source, size, config.data, config.prompt.layout
  )
  found = (pixels[0] for _, pixels in records if len(pixels))
  if not (first := list(itertools.islice(found, SHOWN))):
    raise UserError(
      f"config.evaluation.split={config.evaluation.split}",
      "no images",
      "some to look at",
      "name some with --images",
    )
  return np.stack(first)


def _draw_reading(model, params, pixels, out: pathlib.Path) -> None:
  """A picture for each VoCo token."""
  stream = model.stream
  with layers.mesh_of(params["llm"]["norm"]["scale"]):
    attention = jax.jit(
      lambda params, images: rollout.stream_attention(model, params, images)
    )(params, pixels)
  mixed = rollout.of_last_cache(attention)
  first = len(stream.before)
  patches = slice(first, first + stream.num_image_tokens)
  k = model.config.compressor.num_voco_tokens
  for i, row in enumerate(stream.visible[-k:], 1):
    look_plots.reading(
      pixels,
      np.asarray(attention[:, :, row, patches]),
      np.asarray(mixed[:, row, patches]),
      out / f"voco_{i}.png",
    )
  names = "voco_1.png" if k == 1 else f"voco_1.png to voco_{k}.png"
  print(f"reading: {out}, {names}")


def _probe(loaded, model, params, out: pathlib.Path) -> None:
  """Fits probes to training images and tries them on held-out ones."""
  config = loaded.config
  splits = {
    name: (make_source(config, split), limit)
    for name, split, limit in (
      ("train", config.data.train_split, TRAIN),
      ("test", config.evaluation.split, TEST),
    )
  }
  train, test = (
    probe.read(config, model, params, source, limit)
    for source, limit in splits.values()
  )
  scores = probe.scores(train, test)
  if not scores:
    print(f"probe: no questions about color or shape in {config.data.source}")
    return
  look_plots.probe_bars(scores, out / "probe.png")
  result = {
    "checkpoint": str(loaded.path),
    "step": loaded.step,
    "data": dataclasses.asdict(config.data),
    "test_split": config.evaluation.split,
    "train_images": len(train.labels),
    "test_images": len(test.labels),
    "numbers": {kind: getattr(train, kind).shape[1] for kind in probe.FEATURES},
    "scores": {name: dataclasses.asdict(x) for name, x in scores.items()},
    "provenance": assemble.provenance(assemble.command_line("vocojax.look")),
  }
  write_atomic(out / "probe.json", json.dumps(result, indent=1) + "\n")
  for name, score in scores.items():
    voco, patch = (score.accuracy[kind] for kind in probe.FEATURES)
    print(
      f"{name}: {voco:.1%} from VoCo tokens, {patch:.1%} from the mean patch, "
      f"{score.majority:.1%} by the most frequent answer"
    )
  print(f"probe: {out / 'probe.json'}")


if __name__ == "__main__":
  cli.run(main, __doc__)
