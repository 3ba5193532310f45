"""What a linear probe reads back from VoCo tokens. Read next: look_plots.py.

For each thing that can be asked about an image (the color of the object, the
shape in row 1 column 2), a linear map is fitted from the state of the VoCo
tokens to the answers of training images, and tried on images that neither it
nor the model has seen. What a linear map finds is there in plain sight; what it
does not find may still be there. n images, d numbers of each, C answers.
"""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from absl import logging
from jaxtyping import Array, Float, Float32, Float64, UInt8

from vocojax.config import Config
from vocojax.data import pipeline
from vocojax.data.sources import Record, Source
from vocojax.errors import DataError
from vocojax.models import layers
from vocojax.models.vlm import VisionLanguageModel

FEATURES = ("voco", "mean_patch")
_FEWEST = 20  # labelled training images that a probe is fitted to
# Weights of the penalty; features have unit variance and a mean product of 1.
_PENALTIES = np.logspace(-5, 2, 15)
_CELL = re.compile(r"what (\w+) is the object in (row \d+ column \d+) \?")
_COLOR = re.compile(r"what color is the \w+\?|what is the color of the \w+\?")
_SHAPE = re.compile(r"what shape .*|what is the \w+ shape\?")


@dataclasses.dataclass(frozen=True)
class Read:
  """Of some images.

  Attributes:
    voco: keys and values of the VoCo tokens in all layers.
    mean_patch: mean of what stands for the patches at the first layer.
    labels: what is known of each image, by name.
  """

  voco: Float32[np.ndarray, "n d1"]
  mean_patch: Float32[np.ndarray, "n d2"]
  labels: list[dict[str, str]]


@dataclasses.dataclass(frozen=True)
class Score:
  """How well one thing can be told, as parts of the held-out images.

  Attributes:
    num_train: labelled images that the probe was fitted to.
    num_test: labelled images that it was tried on.
    num_answers: different answers among the former.
    accuracy: by `FEATURES`.
    majority: of always saying the most frequent answer.
    shuffled: of a probe of `voco` fitted to answers of other images.
  """

  num_train: int
  num_test: int
  num_answers: int
  accuracy: Mapping[str, float]
  majority: float
  shuffled: float


def labels_of(record: Record) -> dict[str, str]:
  """Color and shape, of the object or of each cell, from what is asked.

  Of easy-VQA's and GridVQA's questions only those that say of no other object
  what is meant.
  """
  found = {}
  for conversation in record.conversations:
    question, answer = conversation[0]
    if cell := _CELL.fullmatch(question):
      found[f"{cell[1]}, {cell[2]}"] = answer
    elif _COLOR.fullmatch(question):
      found["color"] = answer
    elif "object" not in question and _SHAPE.fullmatch(question):
      found["shape"] = answer
  return found


def read(
  config: Config,
  model: VisionLanguageModel,
  params,
  source: Source,
  limit: int,
) -> Read:
  """State and labels of the first `limit` records, of the first image each.

  Raises:
    DataError: a record is bad, and the config says to stop; or none has an
      image.
  """

  @jax.jit
  def state(params, images: UInt8[Array, "N S S 3"]):
    cache, _ = model.compress(params, images)
    first = len(model.stream.before)
    patches = model.embed_images(params, images)[
      :, first : first + model.stream.num_image_tokens
    ]
    kept = [
      x.swapaxes(0, 1).reshape(len(images), -1)
      for x in (cache.keys, cache.values)
    ]
    return kept, patches.mean(axis=1)

  records = pipeline.eval_records(
    source,
    config.model.vision.image_size,
    config.data,
    config.prompt.layout,
    logging.warning,
  )
  labelled = (
    (pixels[0], labels_of(record)) for record, pixels in records if len(pixels)
  )
  voco, patch, labels = [], [], []
  labelled = itertools.islice(labelled, limit)
  with layers.mesh_of(params["llm"]["norm"]["scale"]):
    while batch := list(
      itertools.islice(labelled, config.evaluation.batch_size)
    ):
      (keys, values), mean = state(params, np.stack([x for x, _ in batch]))
      voco.append(np.concatenate([keys, values], axis=1, dtype=np.float32))
      patch.append(np.asarray(mean, np.float32))
      labels += [known for _, known in batch]
  if not voco:
    raise DataError(
      f"config.data.source={config.data.source}",
      "no record with an image",
      "some to fit a probe to",
      "name images with --images, which are looked at without a probe",
    )
  return Read(np.concatenate(voco), np.concatenate(patch), labels)


def scores(train: Read, test: Read) -> dict[str, Score]:
  """A probe of everything that enough training images tell of, by name."""
  names = {name for known in train.labels for name in known}
  found = {}
  for name in sorted(names):
    rows, answers = _known(train, name)
    test_rows, truth = _known(test, name)
    if len(rows) < _FEWEST or not len(test_rows):
      continue
    accuracy = {}
    for kind in FEATURES:
      features, held_out = getattr(train, kind), getattr(test, kind)
      said = classify(features[rows], answers, held_out[test_rows])
      accuracy[kind] = float(np.mean(said == truth))
    order = np.random.default_rng(0).permutation(len(answers))
    said = classify(train.voco[rows], answers[order], test.voco[test_rows])
    values, counts = np.unique(answers, return_counts=True)
    found[name] = Score(
      len(rows),
      len(test_rows),
      len(values),
      accuracy,
      float(np.mean(truth == values[counts.argmax()])),
      float(np.mean(said == truth)),
    )
  return found


def _known(data: Read, name: str) -> tuple[np.ndarray, np.ndarray]:
  """Images of which it is known, and what."""
  rows = [i for i, known in enumerate(data.labels) if name in known]
  return np.array(rows, int), np.array([data.labels[i][name] for i in rows])


def classify(
  features: Float[np.ndarray, "n d"],
  answers: Sequence[str] | np.ndarray,
  held_out: Float[np.ndarray, "m d"],
) -> np.ndarray:
  """Answers of a ridge regression to one column for each answer.

  The penalty is the one with the least squared error when each training image
  is left out in turn.

  Returns:
    An answer for each row of `held_out`.
  """
  values, index = np.unique(np.asarray(answers), return_inverse=True)
  x = np.asarray(features, np.float64)
  center, scale = x.mean(0), x.std(0)
  # What hardly varies is rounding, not to be blown up.
  scale = np.where(scale > 1e-6 * scale.max(initial=0), scale, np.inf)
  scale = scale * np.sqrt(x.shape[1])
  ridge = Ridge((x - center) / scale, np.eye(len(values))[index])
  penalty = min(_PENALTIES, key=ridge.left_out_error)
  said = ridge.predict(penalty, (held_out - center) / scale)
  return values[np.argmax(said, axis=1)]


class Ridge:
  """Ridge regressions with an intercept that is not penalised."""

  def __init__(
    self, x: Float64[np.ndarray, "n d"], y: Float64[np.ndarray, "n C"]
  ):
    """Takes the columns of `x` as centered."""
    self._mean = y.mean(0)
    self._y = y - self._mean
    self._u, self._s, self._vt = np.linalg.svd(x, full_matrices=False)
    self._projected = self._u.T @ self._y

  def left_out_error(self, penalty: float) -> float:
    """Sum of squares of each row's error when it alone is left out.

    In closed form, from the residuals and leverages of all rows.
    """
    kept = self._s**2 / (self._s**2 + penalty)
    leverage = self._u**2 @ kept + 1 / len(self._u)
    residual = self._y - self._u @ (kept[:, None] * self._projected)
    return float(np.sum((residual / (1 - leverage)[:, None]) ** 2))

  def predict(
    self, penalty: float, x: Float64[np.ndarray, "m d"]
  ) -> Float64[np.ndarray, "m C"]:
    shrunk = self._s / (self._s**2 + penalty)
    weights = self._vt.T @ (shrunk[:, None] * self._projected)
    return x @ weights + self._mean
