"""Answers a file of questions with all slots busy. Read next: engine.py.

Jobs about the same image are asked one after the other, so that each image is
compressed once and few caches are in memory. The answers do not depend on this:
a result never depends on what else the engine is doing.
"""

import collections
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence

import tqdm

from vocojax.errors import DataError, UserError
from vocojax.inference.engine import Engine
from vocojax.inference.jobs import Answers, Job
from vocojax.inference.lookup import Found, Lookup, join
from vocojax.inference.requests import Request

_SHOWN = 20  # errors on the terminal; all are in the file of answers


@dataclasses.dataclass
class Batch:
  """Jobs on their way through an engine.

  Attributes:
    make_request: of turns, cache and fields of `jobs.FIELDS`.
    num_answers: how many were written.
    size: what an image was and what it became.
    errors: what went wrong, and how many jobs have this error.
  """

  engine: Engine
  lookup: Lookup
  answers: Answers
  make_request: Callable[..., Request]
  num_answers: int = 0
  size: str = ""
  errors: collections.Counter[str] = dataclasses.field(
    default_factory=collections.Counter
  )

  def run(self, jobs: Sequence[Job]) -> None:
    """Writes an answer or an error for each job that has no answer yet.

    Raises:
      UserError: the store or the file of answers cannot be used.
    """
    left = [job for job in jobs if job.id not in self.answers.done]
    asked: list[Job] = []
    with tqdm.tqdm(
      total=len(jobs),
      initial=len(jobs) - len(left),
      unit="answer",
      mininterval=0.5 if sys.stderr.isatty() else 20,
      dynamic_ncols=True,
    ) as bar:
      for index, result in self.engine.generate(
        self._requests(left, asked, bar)
      ):
        self.answers.write(
          asked[index],
          answer=result.text,
          finish_reason=result.finish_reason,
        )
        self.num_answers += 1
        bar.update()

  def __str__(self) -> str:
    counts = self.lookup.counts
    line = f"{self.num_answers:,} answers, {self.errors.total():,} errors"
    if self.size:
      line += (
        f"; {counts['model']:,} images compressed, {counts['store']:,} from "
        f"the store: {self.size} each"
      )
    return line

  def _requests(
    self, jobs: Sequence[Job], asked: list[Job], bar: tqdm.tqdm
  ) -> Iterator[Request]:
    """Requests in the order of `asked`, which is filled on the way."""
    for chunk in _chunks(_grouped(jobs), self.engine.compress_batch):
      paths = list(dict.fromkeys(p for job in chunk for p in job.images))
      found = dict(zip(paths, self.lookup.find(paths), strict=True))
      for job in chunk:
        try:
          if job.error is not None:
            raise job.error
          images = [found[path] for path in job.images]
          cache = join(images)
          request = self.make_request(job.turns, cache, job.fields)
        except UserError as e:
          self._fail(job, e, bar)
          continue
        except Exception as e:  # whatever it is, the others are answered
          got = repr(e)[:200]
          error = DataError("line", got, "a question", "correct the line")
          self._fail(job, error, bar)
          continue
        if images and isinstance(images[0], Found):
          self.size = images[0].size
        asked.append(job)
        yield request

  def _fail(self, job: Job, error: UserError, bar: tqdm.tqdm) -> None:
    text = str(error)
    self.answers.write(job, error=text)
    # An image may have a thousand questions.
    if text not in self.errors and len(self.errors) < _SHOWN:
      bar.write(str(error.within(job.where)), file=sys.stderr)
    self.errors[text] += 1
    bar.update()


def _grouped(jobs: Sequence[Job]) -> Iterator[Job]:
  """All jobs; those with the same first image are neighbours."""
  groups: dict[tuple[str, ...], list[Job]] = {}
  for job in jobs:
    groups.setdefault(job.images[:1], []).append(job)
  for group in groups.values():
    yield from group


def _chunks(jobs: Iterator[Job], num_images: int) -> Iterator[list[Job]]:
  """Neighbours with at most `num_images` images between them, if possible."""
  chunk: list[Job] = []
  paths: set[str] = set()
  for job in jobs:
    if chunk and len(paths | set(job.images)) > num_images:
      yield chunk
      chunk, paths = [], set()
    chunk.append(job)
    paths |= set(job.images)
  if chunk:
    yield chunk
