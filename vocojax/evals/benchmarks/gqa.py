"""GQA: one-word answers about scenes, exact match. Read next: vqav2.py."""

import json
import os
import pathlib
from collections.abc import Iterator, Mapping

from vocojax.core.files import write_atomic
from vocojax.errors import DataError, shorten
from vocojax.evals.benchmarks.base import (
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
    fields = {"question_id": ID, "image": str, "text": str}
    for where, line in read_jsonl(asked, fields, LLAVA_EVAL):
      id_ = str(line["question_id"])
      if id_ not in truths:
        raise DataError(
          where,
          f"question {shorten(id_)}, which is not in {known}",
          "files of the same split",
          "take both of testdev",
        )
      known_as = f"{known}: question {id_}"
      truth = with_fields(
        known_as, truths[id_], {"answer": str, "types": dict}, _GQA
      )
      add_unique(self._questions, id_, (line, truth), where)
      types = {"structural": str, "semantic": str}
      with_fields(f"{known_as}: types", truth["types"], types, _GQA)
    for id_, truth in truths.items():
      optional = {"isBalanced": bool}
      with_fields(f"{known}: question {id_}", truth, {}, _GQA, optional)
      if truth.get("isBalanced", True) and id_ not in self._questions:
        raise DataError(
          asked,
          f"no question {shorten(id_)}",
          f"all balanced ones of {known}",
          f"take the official file; {LLAVA_EVAL}",
        )

  def questions(self) -> Iterator[Question]:
    for id_, (line, truth) in self._questions.items():
      where = f"{self.files[0]}: question {id_}: image"
      image = image_file(self._images, line["image"], where, _GQA)
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
    write_atomic(path, json.dumps(entries))
    return [path]


def _cleaned(answer: str) -> str:
  return answer.rstrip(".").lower()
