"""Asks a model every question of a split and compares its answers as strings.

Read next: inference/generate.py, report.py (which reads what is written here).
"""

import collections
import dataclasses
import functools
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator

import jax
import numpy as np
import tqdm
import transformers
from absl import logging

from vocojax.config import Config
from vocojax.data import pipeline, prompt
from vocojax.data.sources import Record, Source
from vocojax.inference.generate import generate
from vocojax.models.vlm import VisionLanguageModel

ROWS_PER_RECORD = 8  # text rows in one call, for each record of a batch
KEPT_IMAGES = 8  # records whose attention is kept, from the first
KEPT_WRONG = 4  # further records, of those with a wrong answer


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """What came out.

  Attributes:
    predictions: one dict a question: record_id, question, answer, prediction,
      category.
    seconds: compression and answering, without compilation.
    kept: images, attention [L, H, K, patches] and id of some records.
  """

  predictions: list[dict[str, str]]
  seconds: float
  kept: list[tuple[np.ndarray, np.ndarray, str]]

  @property
  def correct(self) -> int:
    return sum(p["answer"] == p["prediction"] for p in self.predictions)


def category(question: str, answer: str) -> str:
  """Yes/no, colour or shape: what easy-VQA asks, judged by its words."""
  if answer in ("yes", "no"):
    return "yes/no"
  return "color" if "color" in question else "shape"


def answer_questions(
  config: Config,
  model: VisionLanguageModel,
  params,
  tokenizer: transformers.PreTrainedTokenizerFast,
  source: Source,
  title: str,
) -> Evaluation:
  """Compresses each image once and answers all its questions from the cache.

  Each conversation's first question is asked; its answer is the truth.
  """
  evaluation = config.evaluation
  batch = evaluation.batch_size
  rows = batch * ROWS_PER_RECORD
  compress = jax.jit(model.compress)
  answer = jax.jit(
    functools.partial(
      generate,
      model,
      max_new_tokens=evaluation.max_new_tokens,
      eos_token_id=tokenizer.eos_token_id,
    )
  )
  predictions, kept = [], []
  total = min(len(source), evaluation.max_records or len(source))
  seconds = 0.0
  warm = False
  bar = tqdm.tqdm(
    total=total,
    desc=f"answers of {title}",
    unit="image",
    mininterval=1 if sys.stderr.isatty() else 20,
    dynamic_ncols=True,
  )
  for records, images in _batches(config, source, total):
    padding = batch - len(images)
    images = np.pad(images, ((0, padding), *[(0, 0)] * 4))
    started = time.perf_counter()
    cache, weights = compress(params, images.reshape(-1, *images.shape[2:]))
    asked = _prompts(config, tokenizer, records)
    outputs = []
    for first in range(0, len(asked), rows):
      arrays = _rows(config, tokenizer, asked[first : first + rows], rows)
      if not warm:  # compile outside the measured time
        jax.block_until_ready(answer(params, cache, *arrays))
        started = time.perf_counter()
        jax.block_until_ready(
          compress(params, images.reshape(-1, *images.shape[2:]))
        )
        warm = True
      outputs.append(np.asarray(answer(params, cache, *arrays)))
    seconds += time.perf_counter() - started
    texts = _decode(tokenizer, np.concatenate(outputs)[: len(asked)])
    found = [
      {
        "record_id": records[i].id,
        "question": question,
        "answer": truth,
        "prediction": text,
        "category": category(question, truth),
      }
      for (i, question, truth, _), text in zip(asked, texts, strict=True)
    ]
    _keep(kept, records, images, weights, model, found)
    predictions += found
    bar.update(len(records))
  bar.close()
  return Evaluation(predictions, seconds, kept)


def _batches(
  config: Config, source: Source, total: int
) -> Iterator[tuple[list[Record], np.ndarray]]:
  """Records in order with their images uint8 [records, F, S, S, 3]."""
  data = config.data
  records, images = [], []
  pairs = pipeline.eval_records(
    source, config.model.vision.image_size, data, logging.warning
  )
  for number, (record, pixels) in enumerate(pairs):
    if number == total:
      break
    slots = data.max_images - len(pixels)
    records.append(record)
    images.append(np.pad(pixels, ((0, slots), *[(0, 0)] * 3)))
    if len(records) == config.evaluation.batch_size:
      yield records, np.stack(images)
      records, images = [], []
  if records:
    yield records, np.stack(images)


def _prompts(config, tokenizer, records):
  """(index in batch, question, truth, (ids, number of images)) each."""
  asked = []
  for i, record in enumerate(records):
    for conversation in record.conversations:
      question, truth = conversation[0]
      ids, _ = prompt.encode(
        prompt.LAYOUTS[config.prompt.layout],
        tokenizer,
        [(question, None)],
        has_image=bool(record.images),
        strip_newlines=config.prompt.strip_newlines,
      )
      asked.append((i, question, truth, (ids, len(record.images))))
  return asked


def _rows(config, tokenizer, asked, rows: int):
  """image_index [rows, F], prompt_ids [rows, T] and prompt_lengths [rows].

  T is rounded up to a multiple of 16, so that few programs are compiled.
  """
  F = config.data.max_images
  longest = max(len(ids) for *_, (ids, _) in asked)
  T = -(-longest // 16) * 16
  index = np.full((rows, F), -1, np.int32)
  ids = np.full((rows, T), tokenizer.pad_token_id, np.int32)
  lengths = np.ones(rows, np.int32)
  for row, (i, _, _, (tokens, images)) in enumerate(asked):
    index[row, :images] = i * F + np.arange(images)
    ids[row, : len(tokens)] = tokens
    lengths[row] = len(tokens)
  return index, ids, lengths


def _decode(tokenizer, tokens: np.ndarray) -> list[str]:
  texts = []
  for row in tokens.tolist():
    if tokenizer.eos_token_id in row:
      row = row[: row.index(tokenizer.eos_token_id)]
    texts.append(tokenizer.decode(row, skip_special_tokens=True).strip())
  return texts


def _keep(kept, records, images, weights, model, found) -> None:
  """Keeps the first records, then some with a wrong answer."""
  wrong = {p["record_id"] for p in found if p["answer"] != p["prediction"]}
  before = len(model.stream.before)
  patches = slice(before, before + model.stream.num_image_tokens)
  for i, record in enumerate(records):
    first = len(kept) < KEPT_IMAGES
    if first or (record.id in wrong and len(kept) < KEPT_IMAGES + KEPT_WRONG):
      slot = i * images.shape[1]
      attention = np.asarray(weights[:, slot, :, :, patches], np.float32)
      kept.append((images[i, 0], attention, record.id))


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
  folder.mkdir(parents=True, exist_ok=True)
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
    "accuracy": evaluation.correct / total,
    "correct": evaluation.correct,
    "total": total,
    "seconds": evaluation.seconds,
    "by_category": dict(groups),
    "provenance": provenance,
  }
  lines = [json.dumps(p) + "\n" for p in evaluation.predictions]
  _write(folder / f"{name}.predictions.jsonl", "".join(lines).encode())
  if name == "voco":
    images, attention, ids = zip(*evaluation.kept, strict=True)
    part = folder / "attention.part.npz"
    np.savez(
      part,
      images=np.stack(images),
      attention=np.stack(attention),
      record_ids=np.array(ids),
    )
    os.replace(part, folder / "attention.npz")
  _write(folder / f"{name}.json", json.dumps(result, indent=1).encode())
  return result


def _write(path: pathlib.Path, content: bytes) -> None:
  """Whole or not at all."""
  part = path.with_name(path.name + ".part")
  part.write_bytes(content)
  os.replace(part, path)
