"""MME: two yes/no questions about every image. Read next: mmbench.py."""

import collections
import os
import pathlib
from collections.abc import Iterator, Mapping

from vocojax.core.files import path_inside, remedy, write_atomic
from vocojax.errors import DataError, shorten
from vocojax.evals.benchmarks.base import (
  SHORT_ANSWER,
  Question,
  Score,
  image_file,
)
from vocojax.evals.benchmarks.files import (
  LLAVA_EVAL,
  data_file,
  read_jsonl,
  text_lines,
)

PERCEPTION = (
  *("existence", "count", "position", "color", "posters", "celebrity"),
  *("scene", "landmark", "artwork", "OCR"),
)
COGNITION = (
  *("commonsense_reasoning", "numerical_calculation", "text_translation"),
  "code_reasoning",
)
_RELEASE = "MME_Benchmark_release_version"
_SUFFIX = "Please answer yes or no."
_MME = (
  f"{_RELEASE} comes on request, see the branch Evaluation of "
  "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models"
)


class Mme:
  """Fourteen subtasks of up to 200 points.

  A subtask has 100 points for accuracy and 100 for accuracy+, the part of its
  images of which both answers are right. The perception total, of ten
  subtasks, is what is reported.

  The two questions of an image share their id in LLaVA's file; here they end
  in '#1' and '#2'.
  """

  name = "mme"
  headline = "perception"
  max_new_tokens = 128

  def __init__(self, folder: str | os.PathLike):
    """Reads FOLDER, which is laid out as LLaVA's playground/data/eval/MME.

    Raises:
      DataError: a file is missing or is not what it should be, a subtask is
        missing, or an image has not two questions.
    """
    asked = data_file(folder, "llava_mme.jsonl", LLAVA_EVAL)
    self.files: tuple[pathlib.Path, ...] = (asked,)
    self._release = asked.parent / _RELEASE
    # By subtask and name of the official text file: {id: line}.
    self._images: dict[tuple[str, str], dict[str, dict]]
    self._images = collections.defaultdict(dict)
    fields = {"question_id": str, "image": str, "text": str}
    for where, line in read_jsonl(asked, fields, LLAVA_EVAL):
      path = line["question_id"]
      subtask, _, name = path.partition("/")
      file = name.rpartition("/")[2].partition(".")[0] + ".txt"
      pair = self._images[subtask, file]
      pair[f"{path}#{len(pair) + 1}"] = {**line, "where": where}
    found = {subtask for subtask, _ in self._images}
    for subtask in PERCEPTION + COGNITION:
      if subtask not in found:
        raise DataError(
          asked,
          f"no question of {subtask}",
          "all subtasks",
          f"take the official file; {LLAVA_EVAL}",
        )
    for key, pair in self._images.items():
      self._pair(*key, pair)

  def _pair(self, subtask: str, file: str, pair: dict[str, dict]) -> None:
    """Checks one image's questions and adds the official ones and answers."""
    where = next(iter(pair.values()))["where"]
    if len(pair) != 2:
      raise DataError(
        where,
        f"{len(pair)} questions about {subtask}/{file}",
        "two",
        f"take the official file; {LLAVA_EVAL}",
      )
    with remedy(f"take the official file; {LLAVA_EVAL}"):
      folder = path_inside(self._release, subtask, f"{where}: question_id")
    if os.path.isdir(folder / "questions_answers_YN"):
      folder /= "questions_answers_YN"
    path = data_file(folder, file, _MME)
    self.files += (path,)
    official = dict(_answers(path))
    for line in pair.values():
      key = _bare(line["text"])
      if key not in official:
        raise DataError(
          line["where"],
          f"question {shorten(key)}, which is not in {path}",
          "one that is",
          f"take the official files; {_MME}",
        )
      line["question"], line["answer"] = official[key]

  def _lines(self) -> Iterator[tuple[str, str, dict]]:
    for (subtask, _), pair in self._images.items():
      for id_, line in pair.items():
        yield subtask, id_, line

  def questions(self) -> Iterator[Question]:
    for subtask, id_, line in self._lines():
      yield Question(
        id=id_,
        prompt=line["text"],
        images=(
          image_file(
            self._release, line["image"], f"{line['where']}: image", _MME
          ),
        ),
        reference={"answer": line["answer"].lower(), "category": subtask},
      )

  def score(self, predictions: Mapping[str, str]) -> Iterator[Score]:
    """Accuracy, accuracy+ and points of every subtask; both totals."""
    right = collections.defaultdict(list)
    for (subtask, _), pair in self._images.items():
      answers = [
        yes_no_other(_cell(predictions[id_])) == line["answer"].lower()
        for id_, line in pair.items()
      ]
      right[subtask].append(sum(answers))
    points = {}
    for subtask, counts in right.items():
      accuracy = 100 * sum(counts) / (2 * len(counts))
      plus = 100 * sum(count == 2 for count in counts) / len(counts)
      points[subtask] = accuracy + plus
      yield f"{subtask}/accuracy", accuracy
      yield f"{subtask}/accuracy_plus", plus
      yield f"{subtask}/points", points[subtask]
    yield "perception", sum(points[subtask] for subtask in PERCEPTION)
    yield "cognition", sum(points[subtask] for subtask in COGNITION)

  def write_submission(
    self, predictions: Mapping[str, str], folder: pathlib.Path
  ) -> list[pathlib.Path]:
    """Writes what the official calculation.py reads: SUBTASK.txt each.

    A line is file, question, answer and prediction, in which tabs and line
    ends, which would break it, are spaces; so they are for `score`.
    """
    texts = collections.defaultdict(list)
    for (subtask, file), pair in self._images.items():
      for id_, line in pair.items():
        said = _cell(predictions[id_])
        cells = (file, line["question"], line["answer"], said)
        texts[subtask].append("\t".join(cells) + "\n")
    paths = []
    for subtask, lines in texts.items():
      paths.append(folder / f"{subtask}.txt")
      write_atomic(paths[-1], "".join(lines))
    return paths


def yes_no_other(answer: str) -> str:
  """'yes' or 'no' if the first four characters hold it, in this order."""
  start = answer.lower()[:4]
  if "yes" in start:
    return "yes"
  return "no" if "no" in start else "other"


def _cell(text: str) -> str:
  return text.translate(dict.fromkeys(map(ord, "\t\r\n"), " "))


def _bare(question: str) -> str:
  """A question without what was added to it.

  Some official questions have two spaces before "Please": both go.
  """
  question = question.replace(SHORT_ANSWER.strip(), "")
  return question.replace(_SUFFIX, "").strip()


def _answers(path: pathlib.Path) -> Iterator[tuple[str, tuple[str, str]]]:
  """(bare question, (question, answer)) of every line."""
  with text_lines(path, _MME) as lines:
    for number, line in enumerate(lines, 1):
      if not line.strip():
        continue
      question, _, answer = line.strip().partition("\t")
      if answer.lower() not in ("yes", "no"):
        raise DataError(
          f"{path}:{number}",
          shorten(line.strip()[-50:]),
          "a question, a tab and Yes or No",
          f"take the official file; {_MME}",
        )
      yield _bare(question), (question, answer)
