"""Asks a model the questions of a benchmark; every answer is on disk at once.

Questions about one image or video are asked one after the other, so that it is
read and compressed once; the answers do not depend on that. Images are read by
threads while the model works. Of several processes each asks its own block and
has a file of its own. Read next: benchmarks/base.py, answers.py.
"""

import collections
import concurrent.futures
import dataclasses
import itertools
import pathlib
import sys
from collections.abc import Iterator, Sequence

import jax
import numpy as np
import tqdm
import transformers
from absl import logging
from jaxtyping import UInt8

from vocojax.config import Config
from vocojax.data import prompt
from vocojax.data.video import read_frames
from vocojax.errors import DataError, UserError, shorten
from vocojax.evals.benchmarks.base import Benchmark, Question
from vocojax.evals.benchmarks.predictions import (
  PredictionWriter,
  check_complete,
)
from vocojax.inference.engine import Engine
from vocojax.inference.requests import Request, read_image
from vocojax.training import distributed

_READERS = 4  # threads that decode images and videos
_AHEAD = 16  # images or videos that are being read, or wait


def collect(benchmark: Benchmark) -> list[Question]:
  """All questions; those about the same image or video are neighbours.

  Raises:
    DataError: an image or video is missing, or a question has no text.
  """
  groups: dict[tuple, list[Question]] = {}
  for question in benchmark.questions():
    if not question.prompt.strip():
      raise DataError(
        f"question {shorten(question.id)}",
        "no text",
        "a question",
        "take the official files of the benchmark",
      )
    group = groups.setdefault(_shown(question), [])
    if group:  # what is equal is kept once
      question = dataclasses.replace(question, images=group[0].images)
    group.append(question)
  return [question for group in groups.values() for question in group]


def _shown(question: Question) -> tuple:
  return question.images, question.video


def longest_prompt(
  questions: Sequence[Question],
  config: Config,
  tokenizer: transformers.PreTrainedTokenizerFast,
) -> int:
  """Tokens of the longest question as it is asked.

  Raises:
    DataError: the prompt layout leaves questions out.
  """
  layout = prompt.LAYOUTS[config.prompt.layout]
  return max(
    len(
      prompt.encode(
        layout,
        tokenizer,
        [(question.prompt, None)],
        num_images=max(1, len(question.images)),
        strip_newlines=config.prompt.strip_newlines,
      )[0]
    )
    for question in questions
  )


@dataclasses.dataclass(frozen=True)
class Asker:
  """A model and how it is asked.

  Attributes:
    engine: has room for the longest question and answer.
    config: of the checkpoint.
    max_new_tokens: an answer is cut there.
    int8: answer from caches of 8-bit numbers.
    title: names the model in the progress bar.
  """

  engine: Engine
  config: Config
  max_new_tokens: int
  int8: bool
  title: str

  def answer(
    self, questions: Sequence[Question], folder: pathlib.Path, model_id: str
  ) -> tuple[dict[str, str], int]:
    """The answers of all processes to all questions.

    Those in `folder` are kept, by however many processes they were written, and
    the rest is asked. Where `config.data.on_bad_record` is 'skip', an image or
    video that cannot be read is logged, and what is asked about it answered
    with nothing; such answers are not kept.

    Args:
      questions: from `collect`.
      folder: gets a file of answers from each process.
      model_id: stands in the files; others are not continued.

    Returns:
      Them, and how many are nothing for want of the image or video.

    Raises:
      DataError: an image cannot be read, or a file of answers cannot be used.
    """
    index, count = jax.process_index(), jax.process_count()
    ids = [question.id for question in questions]
    where = str(folder)
    writer = PredictionWriter(_file(folder, index), model_id)
    found = {_file(folder, index).name: writer.answered}
    if index == 0:
      found |= _left_over(folder, count, model_id)
    done = _merge(folder, distributed.gather(found))
    left = [question for question in questions if question.id not in done]
    check_complete(done | {q.id: "" for q in left}, ids, where)
    n = len(left)
    block = left[n * index // count : n * (index + 1) // count]
    bad = self._ask(block, writer)
    writer.flush()
    answered = _merge(folder, distributed.gather(found))
    bad = [id_ for part in distributed.gather(bad) for id_ in part]
    answered |= dict.fromkeys(bad, "")
    check_complete(answered, ids, where)
    return answered, len(bad)

  def _ask(
    self, questions: Sequence[Question], writer: PredictionWriter
  ) -> list[str]:
    """Writes all answers; returns the ids of what could not be asked."""
    asked: list[Question] = []
    bad: list[str] = []
    requests = self._requests(questions, asked, bad)
    with tqdm.tqdm(
      total=len(questions),
      desc=f"answers of {self.title}",
      unit="question",
      mininterval=1 if sys.stderr.isatty() else 20,
      dynamic_ncols=True,
      disable=jax.process_index() > 0 or not questions,
    ) as bar:
      for i, result in self.engine.generate(requests):
        writer.add(asked[i].id, asked[i].prompt, result.text)
        bar.update()
    return bad

  def _requests(
    self, questions: Sequence[Question], asked: list[Question], bad: list[str]
  ) -> Iterator[Request]:
    """Requests in the order of `asked`; both lists are filled on the way."""
    for batch in self._batches(questions, bad):
      cache = self.engine.compress([x for _, pixels in batch for x in pixels])
      if self.int8:
        cache = cache.quantize()
      first = 0
      for group, pixels in batch:
        own = cache.select(range(first, first + len(pixels)))
        first += len(pixels)
        for question in group:
          asked.append(question)
          yield Request(
            [(question.prompt, None)], own, max_new_tokens=self.max_new_tokens
          )

  def _batches(
    self, questions: Sequence[Question], bad: list[str]
  ) -> Iterator[list[tuple[list[Question], np.ndarray]]]:
    """Neighbours with as many images as are compressed together."""
    batch: list[tuple[list[Question], np.ndarray]] = []
    size = 0
    for group, pixels in self._read(questions):
      if isinstance(pixels, UserError):
        if self.config.data.on_bad_record == "stop":
          raise pixels
        logging.warning("answered with nothing: %s", pixels)
        bad += [question.id for question in group]
        continue
      if batch and size + len(pixels) > self.engine.compress_batch:
        yield batch
        batch, size = [], 0
      batch.append((group, pixels))
      size += len(pixels)
    if batch:
      yield batch

  def _read(
    self, questions: Sequence[Question]
  ) -> Iterator[tuple[list[Question], np.ndarray | UserError]]:
    """Questions about the same, and its pixels, which are read ahead."""
    pool = concurrent.futures.ThreadPoolExecutor(_READERS)
    waiting: collections.deque = collections.deque()
    try:
      for _, group in itertools.groupby(questions, _shown):
        members = list(group)
        waiting.append((members, pool.submit(self._pixels, members[0])))
        if len(waiting) > _AHEAD:
          members, pixels = waiting.popleft()
          yield members, pixels.result()
      for members, pixels in waiting:
        yield members, pixels.result()
    finally:
      pool.shutdown(cancel_futures=True)

  def _pixels(
    self, question: Question
  ) -> UInt8[np.ndarray, "F S S 3"] | UserError:
    """What is asked about, or what is wrong with it."""
    size = self.config.model.vision.image_size
    data = self.config.data
    try:
      if question.video:
        return read_frames(
          question.video, data.max_images, size, data.pad_to_square
        )
      read = (read_image(i, size, data.pad_to_square) for i in question.images)
      return np.stack([pixels for pixels, _ in read])
    except DataError as e:
      return e.within(f"question {question.id}")
    except UserError:  # such as a library that is not installed
      raise
    except Exception as e:  # what libraries raise on a damaged file is anything
      return DataError(
        f"question {question.id}",
        f"{type(e).__name__}: {e}",
        "an image or a video that can be read",
        "replace the file",
      )


def _file(folder: pathlib.Path, process: int) -> pathlib.Path:
  return folder / f"predictions{f'-{process}' if process else ''}.jsonl"


def _left_over(
  folder: pathlib.Path, count: int, model_id: str
) -> dict[str, dict[str, str]]:
  """Answers by file, of a run that had more processes than `count`."""
  own = {_file(folder, process) for process in range(count)}
  found = {}
  for path in sorted(folder.glob("predictions*.jsonl")):
    if path not in own:
      found[path.name] = PredictionWriter(path, model_id).answered
  return found


def _merge(
  folder: pathlib.Path, parts: Sequence[dict[str, dict[str, str]]]
) -> dict[str, str]:
  """The answers in the files of all processes.

  Raises:
    DataError: a question is answered in two of them.
  """
  answers: dict[str, str] = {}
  files: dict[str, str] = {}
  for part in parts:
    for name, answered in part.items():
      for id_ in answered:
        if id_ in answers:
          raise DataError(
            folder / name,
            f"question {shorten(id_)}, which {files[id_]} answers, too",
            "one answer to a question",
            "delete one of the lines",
          )
        files[id_] = name
      answers |= answered
  return answers
