"""ScienceQA-IMG: school questions that come with an image.

Read next: video_qa.py.
"""

import os
import pathlib
import re
from collections.abc import Iterator, Mapping

from vocojax.errors import DataError, shorten
from vocojax.evals.benchmarks.base import (
  OPTION_LETTER,
  Question,
  Score,
  accuracies,
  image_file,
)
from vocojax.evals.benchmarks.files import (
  ID,
  LLAVA_EVAL,
  add_unique,
  data_file,
  read_json,
  with_fields,
)

_SQA = "it is in data/scienceqa of https://github.com/lupantech/ScienceQA"
_LETTERS = "ABCDE"
_BEGINNING = re.compile(r"[A-E]\. ")
# The official pattern: any character but a newline may follow the letter, and
# one must.
_SENTENCE = re.compile(r"The answer is ([A-Z]).")


class ScienceQa:
  """The test questions with an image.

  Those without are not asked: LLaVA's scripts count them as wrong in the
  accuracy over all, and no paper reports that.
  """

  name = "scienceqa"
  headline = "img_accuracy"
  max_new_tokens = 1024

  def __init__(self, folder: str | os.PathLike):
    """Reads FOLDER, laid out as LLaVA's playground/data/eval/scienceqa.

    Raises:
      DataError: a file is missing or is not what it should be.
    """
    asked = data_file(folder, "llava_test_CQM-A.json", LLAVA_EVAL)
    known = data_file(folder, "problems.json", _SQA)
    self.files = (asked, known)
    self._images = asked.parent / "images" / "test"
    problems = read_json(known, dict, _SQA)
    self._questions: dict[str, tuple[dict, dict]] = {}
    for i, entry in enumerate(read_json(asked, list, LLAVA_EVAL)):
      where = f"{asked}: record {i}"
      fields = {"id": ID, "conversations": list}
      optional = {"image": (str, type(None))}
      with_fields(where, entry, fields, LLAVA_EVAL, optional)
      if entry.get("image") is None:
        continue
      first = next(iter(entry["conversations"]), None)
      with_fields(
        f"{where}: conversations[0]", first, {"value": str}, LLAVA_EVAL
      )
      id_ = str(entry["id"])
      if id_ not in problems:
        raise DataError(
          f"{where}: id",
          f"{shorten(id_)}, which is not in {known}",
          "one that is",
          f"take the official file; {_SQA}",
        )
      problem = with_fields(
        f"{known}: problem {id_}",
        problems[id_],
        {"choices": list, "answer": int},
        _SQA,
        {"subject": str},
      )
      count = min(len(problem["choices"]), len(_LETTERS))
      if not 0 <= problem["answer"] < count:
        raise DataError(
          f"{known}: problem {id_}: answer",
          str(problem["answer"]),
          f"one of its {count} choices, from 0",
          f"take the official file; {_SQA}",
        )
      add_unique(self._questions, id_, (entry, problem), where)
    if not self._questions:
      raise DataError(
        asked,
        "no question with an image",
        "some",
        f"take the official file; {LLAVA_EVAL}",
      )

  def questions(self) -> Iterator[Question]:
    for id_, (entry, problem) in self._questions.items():
      where = f"{self.files[0]}: question {id_}: image"
      text = entry["conversations"][0]["value"].replace("<image>", "").strip()
      yield Question(
        id=id_,
        prompt=text + OPTION_LETTER,
        images=(image_file(self._images, entry["image"], where, _SQA),),
        reference={
          "answer": _LETTERS[problem["answer"]],
          "choices": problem["choices"],
        },
      )

  def score(self, predictions: Mapping[str, str]) -> Iterator[Score]:
    """Accuracy, also by subject, and how many answers have no letter."""
    said = {id_: letter(predictions[id_]) for id_ in self._questions}

    def results():
      for id_, (_, problem) in self._questions.items():
        groups = []
        if "subject" in problem:
          groups.append(f"subject/{problem['subject']}")
        yield groups, float(said[id_] == _LETTERS[problem["answer"]])

    yield from accuracies(results(), "img_accuracy")
    yield "failed", 100 * list(said.values()).count("") / len(said)

  def write_submission(
    self, predictions: Mapping[str, str], folder: pathlib.Path
  ) -> list[pathlib.Path]:
    return []


def letter(answer: str) -> str:
  """The letter of an answer by the official rule, '' if it has none.

  A letter alone; a letter, a period and a space at the beginning; or the
  sentence "The answer is X." exactly once, anywhere.
  """
  if len(answer) == 1 and answer in _LETTERS:
    return answer
  if _BEGINNING.match(answer):
    return answer[0]
  found = _SENTENCE.findall(answer)
  return found[0] if len(found) == 1 else ""
