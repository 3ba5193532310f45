"""GQA: one-word answers about scenes, exact match. Read next: vqav2.py."""

import json
import os
import pathlib
from collections.abc import Iterator, Mapping

from vocojax.errors import DataError
from vocojax.evals.benchmarks.base import (
  Question,
  Score,
  accuracies,
  image_file,
)
from vocojax.evals.benchmarks.files import (
  LLAVA_EVAL,
  add_unique,
  data_file,
  read_json,
  read_jsonl,
  with_fields,
)

_GQA = "it is in the download of https://cs.stanford.edu/people/dorarad/gqa"


class Gqa:
  """The balanced questions of testdev.

  An answer is right if it is the truth, character by character, once its case
  and periods at its end are gone: LLaVA does that before it calls the official
  eval.py. Scores are those eval.py can give without the files that testdev
  lacks.
  """

  name = "gqa"
  headline = "accuracy"
  max_new_tokens = 128

  def __init__(self, folder: str | os.PathLike):
    """Reads FOLDER, which is laid out as LLaVA's playground/data/eval/gqa.

    Raises:
      DataError: a file is missing or is not what it should be.
    """
    asked = data_file(folder, "llava_gqa_testdev_balanced.jsonl", LLAVA_EVAL)
    known = data_file(folder, "data/testdev_balanced_questions.json", _GQA)
    self.files = (asked, known)
    self._images = known.parent / "images"
    truths = read_json(known, dict, _GQA)
    self._questions: dict[str, tuple[dict, dict]] = {}
    fields = ("question_id", "image", "text")
    for where, line in read_jsonl(asked, fields, LLAVA_EVAL):
      id_ = str(line["question_id"])
      if id_ not in truths:
        raise DataError(
          f"{where}: question {id_!r} is not in {known}; the two files are of "
          "different splits, take both of testdev"
        )
      truth = with_fields(
        f"{known} question {id_}", truths[id_], ("answer", "types"), _GQA
      )
      add_unique(self._questions, id_, (line, truth), where)
      with_fields(
        f"{known} question {id_}: types",
        truth["types"],
        ("structural", "semantic"),
        _GQA,
      )
    for id_, truth in truths.items():
      with_fields(f"{known} question {id_}", truth, (), _GQA)
      if truth.get("isBalanced", True) and id_ not in self._questions:
        raise DataError(
          f"{asked}: lacks question {id_!r} of {known}, expected all that are "
          f"balanced; {LLAVA_EVAL}"
        )

  def questions(self) -> Iterator[Question]:
    for id_, (line, truth) in self._questions.items():
      image = image_file(self._images, line["image"], _GQA)
      yield Question(
        id=id_,
        prompt=line["text"],
        images=(image,),
        reference={"answer": truth["answer"], "types": truth["types"]},
      )

  def score(self, predictions: Mapping[str, str]) -> Iterator[Score]:
    """Accuracy over all, binary and open questions, and by type."""

    def results():
      for id_, (_, truth) in self._questions.items():
        if not truth.get("isBalanced", True):
          continue
        types = truth["types"]
        groups = ["open" if types["structural"] == "query" else "binary"]
        for kind in ("structural", "semantic"):
          groups.append(f"{kind}/{types[kind]}")
        yield groups, float(_cleaned(predictions[id_]) == truth["answer"])

    yield from accuracies(results(), "accuracy")

  def write_submission(
    self, predictions: Mapping[str, str], folder: pathlib.Path
  ) -> list[pathlib.Path]:
    """Writes the file that the official eval.py reads."""
    path = folder / "testdev_balanced_predictions.json"
    entries = [
      {"questionId": id_, "prediction": _cleaned(predictions[id_])}
      for id_ in self._questions
    ]
    path.write_text(json.dumps(entries), encoding="utf-8")
    return [path]


def _cleaned(answer: str) -> str:
  return answer.rstrip(".").lower()
