"""What a benchmark is: questions, scores, submission. Read next: registry.py.

The seam to the model is here:

  benchmark = registry.open_benchmark("gqa", folder)
  questions = list(benchmark.questions())
  writer = PredictionWriter(path, model_id)
  for question in questions:
    if question.id not in writer.answered:
      writer.add(question.id, question.prompt, ask(question))
  predictions = read_predictions([path])
  check_complete(predictions, (q.id for q in questions), str(path))
  scores = benchmark.score(predictions)

With several hosts each keeps a file of its own, and one reads them all.
"""

import collections
import dataclasses
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

from vocojax.core.files import path_inside, remedy
from vocojax.errors import DataError

Score = tuple[str, float]  # name, value in the benchmark's own unit

# What LLaVA-1.5 puts after a question.
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
OPTION_LETTER = (
  "\nAnswer with the option's letter from the given choices directly."
)


@dataclasses.dataclass(frozen=True)
class Question:
  """One question as it is asked.

  Attributes:
    id: unique in its benchmark.
    prompt: text of the user's turn as LLaVA-1.5 asks it, newlines included;
      whether they stay is decided where it is tokenised.
    images: encoded image files: their bytes, or their paths.
    video: file of the video; None where `images` are asked about.
    reference: what scoring knows about it, such as answer and category.
  """

  id: str
  prompt: str
  images: tuple[bytes | pathlib.Path, ...] = ()
  video: pathlib.Path | None = None
  reference: Mapping[str, Any] = dataclasses.field(
    default_factory=dict, hash=False
  )


@runtime_checkable
class Benchmark(Protocol):
  """A benchmark on disk.

  Attributes:
    name: its key in the registry.
    headline: name of the score that papers report; '' if it can only be
      submitted.
    max_new_tokens: longest answer in the protocol that is followed.
    files: question and annotation files, which the data hash is over.
  """

  @property
  def name(self) -> str: ...

  @property
  def headline(self) -> str: ...

  @property
  def max_new_tokens(self) -> int: ...

  @property
  def files(self) -> tuple[pathlib.Path, ...]: ...

  def questions(self) -> Iterator[Question]:
    """All questions in the order of the official file.

    Cheap, and it looks for every image: one pass before the first answer
    finds what is missing.

    Raises:
      DataError: an image or video is missing.
    """
    ...

  def score(self, predictions: Mapping[str, str]) -> Iterable[Score]:
    """Scores by the official rule; nothing where the answers are secret.

    Args:
      predictions: the answer to each question id; `predictions.check_complete`
        has passed.
    """
    ...

  def write_submission(
    self, predictions: Mapping[str, str], folder: pathlib.Path
  ) -> list[pathlib.Path]:
    """Writes what the official script or server reads.

    Returns:
      The files written; none where there is nothing to hand in.
    """
    ...


def image_file(
  folder: pathlib.Path, name: str, where: str, origin: str
) -> pathlib.Path:
  """Path of an image that is there, inside `folder`.

  Raises:
    DataError: it is not, with `origin`, which says where to get it; or the
      name, which stands at `where`, leads elsewhere.
  """
  with remedy(f"take the official files; {origin}"):
    path = path_inside(folder, name, where)
    if not os.path.isfile(path):
      raise DataError(path, "no such image", "an image file")
  return path


def accuracies(
  results: Iterable[tuple[Iterable[str], float]], total: str
) -> Iterator[Score]:
  """Mean score in percent, over all questions and over each group.

  Args:
    results: names of the groups a question belongs to, and its score in 0..1.
    total: name of the mean over all questions, which comes first.
  """
  sums: dict[str, float] = collections.defaultdict(float)
  counts: dict[str, int] = collections.Counter()
  for groups, value in results:
    for group in (total, *groups):
      sums[group] += value
      counts[group] += 1
  names = sorted(counts, key=lambda name: (name != total, name))
  for name in names:
    yield name, 100 * sums[name] / counts[name]
