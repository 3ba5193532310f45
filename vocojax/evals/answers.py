"""Asks a model every question of a split and compares its answers as strings.

Every turn of a conversation is a question, with the true answers before it in
the context. An answer is right if it is the true one to the letter; matches.py
counts those too that are spelled otherwise.

Of several processes each asks its own block of the records, with an engine of
its own. Read next: inference/engine.py, report.py (which reads what is written
here).
"""

import collections
import dataclasses
import functools
import io
import json
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import tqdm
import transformers
from absl import logging

from vocojax.config import Config
from vocojax.core.files import write_atomic
from vocojax.data import pipeline, prompt
from vocojax.data.sources import Record, Source
from vocojax.errors import DataError, UserError
from vocojax.evals import matches
from vocojax.evals.categories import category
from vocojax.inference import adaptive
from vocojax.inference.engine import Engine, Request
from vocojax.models import layers
from vocojax.models.vlm import VisionLanguageModel
from vocojax.training import distributed

SLOTS_PER_RECORD = 2  # questions answered at once, for each record of a batch
PREFILLS = 4  # calls that fill all slots: few, but none mostly empty
KEPT_IMAGES = 8  # records whose attention is kept, from the first
KEPT_WRONG = 4  # further records, of those with a wrong answer


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """What came out.

  Attributes:
    predictions: one dict a question: record_id, turn of its conversation (from
      1), question, answer, prediction, category; where it was adaptive,
      num_voco_tokens too. Markers such as <image> and </s> are left out.
    seconds: compression and answering, without compilation; of the slowest
      process.
    bad_records: how many were left out, or some questions of them.
    kept: image, attention [L, H, K, patches] and id of some records of the
      first process, where the compressor is 'voco'.
  """

  predictions: list[dict[str, Any]]
  seconds: float
  bad_records: int
  kept: list[tuple[np.ndarray, np.ndarray, str]]

  @property
  def correct(self) -> int:
    return sum(p["answer"] == p["prediction"] for p in self.predictions)


@dataclasses.dataclass
class _Asked:
  """A question on its way."""

  record_id: str
  turn: int  # of its conversation, from 1
  question: str
  truth: str
  prediction: str = ""
  num_voco_tokens: int = 0  # read for it, where that is adaptive


def answer_questions(
  config: Config,
  model: VisionLanguageModel,
  params,
  tokenizer: transformers.PreTrainedTokenizerFast,
  source: Source,
  title: str,
  int8: bool = False,
  is_adaptive: bool = False,
) -> Evaluation:
  """Compresses each image once and answers all its questions from the cache.

  With `int8` the cache is rounded to 8-bit numbers before. Where it
  `is_adaptive`, each question reads as few VoCo tokens as will do, see
  inference/adaptive.py.

  Raises:
    DataError: a record cannot be asked about and `config.data.on_bad_record` is
      'stop', or none can.
  """
  evaluation = config.evaluation
  slots = evaluation.batch_size * SLOTS_PER_RECORD
  engine = Engine(
    config,
    model,
    params,
    tokenizer,
    slots=slots,
    max_images=config.data.max_images,
    max_text_length=config.data.max_text_length + evaluation.max_new_tokens,
    compress_batch=evaluation.batch_size * config.data.max_images,
    prefill_rows=-(-slots // PREFILLS),
  )
  total = min(len(source), evaluation.max_records or len(source))
  index, count = jax.process_index(), jax.process_count()
  block = _Block(
    source, range(total)[total * index // count : total * (index + 1) // count]
  )
  bad = _BadRecords(config.data.on_bad_record)
  batches = _batches(config, block, bad)
  asked: list[_Asked] = []
  kept: list[tuple[str, np.ndarray]] = []
  bar = tqdm.tqdm(
    total=len(block),
    desc=f"answers of {title}",
    unit="image",
    mininterval=1 if sys.stderr.isatty() else 20,
    dynamic_ncols=True,
    disable=index > 0,
  )
  answer = functools.partial(
    _answer,
    engine,
    bad,
    max_new_tokens=evaluation.max_new_tokens,
    int8=int8,
    threshold=evaluation.adaptive_threshold if is_adaptive else None,
  )
  seconds = 0.0
  for number, (records, images) in enumerate(batches):
    if number == 0:  # compile outside the measured time
      answer(records, images)
    started = time.perf_counter()
    found = answer(records, images)
    seconds += time.perf_counter() - started
    _keep(kept, records, images, found)
    asked += found
    bar.update(len(records))
  bar.close()
  shown = functools.partial(_without_markers, _markers(tokenizer))
  predictions = [
    {
      "record_id": a.record_id,
      "turn": a.turn,
      "question": shown(a.question),
      "answer": shown(a.truth),
      "prediction": shown(a.prediction),
      "category": category(config.data.source, a.question, a.truth),
    }
    | ({"num_voco_tokens": a.num_voco_tokens} if is_adaptive else {})
    for a in asked
  ]
  blocks = distributed.gather((predictions, seconds, bad.count))
  predictions = [one for block in blocks for one in block[0]]
  if not predictions:
    raise DataError(
      f"config.evaluation.split={evaluation.split}",
      "no question that can be asked",
      "some",
      "name another split, or correct the records",
    )
  return Evaluation(
    predictions,
    max(seconds for _, seconds, _ in blocks),
    sum(count for _, _, count in blocks),
    _attention(model, params, kept),
  )


@dataclasses.dataclass(frozen=True)
class _Block:
  """The records of a source that one process asks about."""

  source: Source
  indices: range

  def __len__(self) -> int:
    return len(self.indices)

  def __getitem__(self, index: int) -> Record:
    return self.source[self.indices[index]]


class _BadRecords:
  """Counts and logs what is left out, unless it is to end the evaluation."""

  def __init__(self, rule: str):
    self._rule = rule
    self._messages: set[str] = set()
    self._asked_in_part: set[str] = set()
    self._unreadable = 0

  @property
  def count(self) -> int:
    return self._unreadable + len(self._asked_in_part)

  def log(self, message: str) -> None:
    """Counts a record that cannot be read."""
    self._unreadable += 1
    logging.warning("left out: %s", message)

  def take(self, record_id: str, error: UserError) -> None:
    """Raises `error`, or leaves the question of the record out."""
    if self._rule == "stop":
      raise error
    self._asked_in_part.add(record_id)
    if str(error) not in self._messages:  # the first batch is asked twice
      self._messages.add(str(error))
      logging.warning("left out: %s", error)


def _batches(
  config: Config, source: Source, bad: _BadRecords
) -> Iterator[tuple[list[Record], list[np.ndarray]]]:
  """Records in order with their images, uint8 [F, S, S, 3] each."""
  records, images = [], []
  pairs = pipeline.eval_records(
    source,
    config.model.vision.image_size,
    config.data,
    config.prompt.layout,
    bad.log,
  )
  for record, pixels in pairs:
    records.append(record)
    images.append(pixels)
    if len(records) == config.evaluation.batch_size:
      yield records, images
      records, images = [], []
  if records:
    yield records, images


def _answer(
  engine: Engine,
  bad: _BadRecords,
  records: list[Record],
  images: list[np.ndarray],
  max_new_tokens: int,
  int8: bool,
  threshold: float | None,
) -> list[_Asked]:
  """All questions of a batch of records, answered; `threshold` if adaptive."""
  flat = [image for pixels in images for image in pixels]
  cache = engine.compress(flat) if flat else None
  if cache is not None and int8:
    cache = cache.quantize()
  pairs, first = [], 0
  for record, pixels in zip(records, images, strict=True):
    own = range(first, first + len(pixels))
    first += len(pixels)
    one = cache.select(own) if cache is not None and own else None
    for conversation in record.conversations:
      questions, truths = zip(*conversation, strict=True)
      try:  # markers of later turns are counted, too
        questions = prompt.place_images(questions, len(pixels))
      except UserError as e:
        bad.take(record.id, e.within(f"record {record.id}"))
        continue
      for i, (question, truth) in enumerate(
        zip(questions, truths, strict=True)
      ):
        before = zip(questions[:i], truths, strict=False)
        turns = [*before, (question, None)]
        request = Request(turns, one, max_new_tokens=max_new_tokens)
        asked = _Asked(record.id, i + 1, question, truth.strip())
        pairs.append((asked, request))
  try:
    _ask(engine, pairs, threshold)
  except UserError:
    usable = [(a, r) for a, r in pairs if _can_be_asked(engine, a, r, bad)]
    if len(usable) == len(pairs):
      raise
    pairs = usable
    _ask(engine, pairs, threshold)
  return [one for one, _ in pairs]


def _markers(tokenizer: transformers.PreTrainedTokenizerFast) -> list[str]:
  """What stands for something else than its text."""
  added = tokenizer.added_tokens_decoder.values()
  return [prompt.IMAGE_MARKER, *(t.content for t in added if t.special)]


def _without_markers(markers: list[str], text: str) -> str:
  for marker in markers:
    text = text.replace(marker, "")
  return text.strip()


def _ask(
  engine: Engine,
  pairs: list[tuple[_Asked, Request]],
  threshold: float | None,
) -> None:
  """Fills in the answers."""
  asked, requests = [one for one, _ in pairs], [one for _, one in pairs]
  if threshold is None:
    for index, result in engine.generate(requests):
      asked[index].prediction = result.text
    return
  answers = adaptive.run(engine, requests, threshold)
  for one, answer in zip(asked, answers, strict=True):
    one.prediction = answer.result.text
    one.num_voco_tokens = answer.num_voco_tokens


def _can_be_asked(
  engine: Engine, one: _Asked, request: Request, bad: _BadRecords
) -> bool:
  try:
    engine.check(request)
  except UserError as e:
    bad.take(one.record_id, e.within(f"record {one.record_id}"))
    return False
  return True


def _keep(
  kept: list[tuple[str, np.ndarray]],
  records: list[Record],
  images: list[np.ndarray],
  found: list[_Asked],
) -> None:
  """Keeps the image of the first records, then of some with a wrong answer."""
  wrong = {a.record_id for a in found if a.truth != a.prediction}
  for record, pixels in zip(records, images, strict=True):
    room = KEPT_IMAGES + (KEPT_WRONG if record.id in wrong else 0)
    if len(pixels) and len(kept) < room:
      kept.append((record.id, pixels[0]))


def _attention(
  model: VisionLanguageModel, params, kept: list[tuple[str, np.ndarray]]
) -> list[tuple[np.ndarray, np.ndarray, str]]:
  """`Evaluation.kept` of some images."""
  if not kept or model.config.compressor.name != "voco":
    return []
  images = np.stack([pixels for _, pixels in kept])
  with layers.mesh_of(params["llm"]["norm"]["scale"]):
    _, weights = jax.jit(model.compress)(params, images)
  before = len(model.stream.before)
  patches = slice(before, before + model.stream.num_image_tokens)
  attention = np.asarray(weights[..., patches], np.float32)
  return [
    (images[i], attention[:, i], record_id)
    for i, (record_id, _) in enumerate(kept)
  ]


def write(
  folder: pathlib.Path,
  name: str,
  title: str,
  evaluation: Evaluation,
  config: Config,
  checkpoint: pathlib.Path,
  provenance: dict,
) -> dict:
  """Writes NAME.json, NAME.predictions.jsonl and attention.npz for 'voco'.

  Returns:
    What NAME.json holds.
  """
  groups: dict = collections.defaultdict(lambda: {"correct": 0, "total": 0})
  for p in evaluation.predictions:
    groups[p["category"]]["total"] += 1
    groups[p["category"]]["correct"] += p["answer"] == p["prediction"]
  total = len(evaluation.predictions)
  result = {
    "name": name,
    "title": title,
    "phase": config.name,
    "step": int(checkpoint.name),
    "checkpoint": str(checkpoint),
    "split": config.evaluation.split,
    "evaluation": dataclasses.asdict(config.evaluation),
    "accuracy": evaluation.correct / total,
    "correct": evaluation.correct,
    "total": total,
    **matches.summary(evaluation.predictions),
    "bad_records": evaluation.bad_records,
    "seconds": evaluation.seconds,
    "by_category": dict(groups),
    "provenance": provenance,
  }
  counts = collections.Counter(
    p["num_voco_tokens"]
    for p in evaluation.predictions
    if "num_voco_tokens" in p
  )
  if counts:
    result |= {
      "adaptive_threshold": config.evaluation.adaptive_threshold,
      "mean_k": sum(k * count for k, count in counts.items()) / total,
      "k_histogram": {str(k): counts[k] for k in sorted(counts)},
    }
  lines = [json.dumps(p) + "\n" for p in evaluation.predictions]
  write_atomic(folder / f"{name}.predictions.jsonl", "".join(lines))
  if name == "voco" and evaluation.kept:
    images, attention, ids = zip(*evaluation.kept, strict=True)
    content = io.BytesIO()
    np.savez(
      content,
      images=np.stack(images),
      attention=np.stack(attention),
      record_ids=np.array(ids),
    )
    write_atomic(folder / "attention.npz", content.getvalue())
  write_atomic(folder / f"{name}.json", json.dumps(result, indent=1))
  return result
