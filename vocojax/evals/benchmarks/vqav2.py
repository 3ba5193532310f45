"""VQAv2: ten people's answers to every question. Read next: vqa_text.py.

The truths of test-dev are secret: there, a file for the server is all there
is. On the validation images the official rule gives a score at once.
"""

import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

from vocojax.core.files import write_atomic
from vocojax.errors import DataError, shorten
from vocojax.evals.benchmarks import vqa_text
from vocojax.evals.benchmarks.base import (
  SHORT_ANSWER,
  Question,
  Score,
  accuracies,
  image_file,
)
from vocojax.evals.benchmarks.files import (
  ID,
  LLAVA_EVAL,
  Kind,
  add_unique,
  data_file,
  read_json,
  read_jsonl,
  with_fields,
)

_VQA = "it is in the downloads of https://visualqa.org"
_COCO = "the images are in the downloads of https://cocodataset.org"
_ASKED = "llava_vqav2_mscoco_test-dev2015.jsonl"
_LISTED = "llava_vqav2_mscoco_test2015.jsonl"


class Vqav2:
  """Test-dev questions, scored by the challenge's server alone."""

  name = "vqav2"
  headline = ""
  max_new_tokens = 128

  def __init__(self, folder: str | os.PathLike):
    """Reads FOLDER, which is laid out as LLaVA's playground/data/eval/vqav2.

    Raises:
      DataError: a file is missing or is not what it should be.
    """
    asked = data_file(folder, _ASKED, LLAVA_EVAL)
    listed = data_file(folder, _LISTED, LLAVA_EVAL)
    self.files = (asked, listed)
    self._images = asked.parent / "test2015"
    self._questions: dict[str, dict] = {}
    fields = {"question_id": ID, "image": str, "text": str}
    for where, line in read_jsonl(asked, fields, LLAVA_EVAL):
      add_unique(self._questions, str(line["question_id"]), line, where)
    self._listed: dict[str, int | str] = {}
    for where, line in read_jsonl(listed, {"question_id": ID}, LLAVA_EVAL):
      id_ = line["question_id"]
      add_unique(self._listed, str(id_), id_, where)
    foreign = [id_ for id_ in self._questions if id_ not in self._listed]
    if foreign:
      raise DataError(
        asked,
        f"question {shorten(foreign[0])}, which is not in {listed}",
        "questions among all of test",
        f"take both official files; {LLAVA_EVAL}",
      )

  def questions(self) -> Iterator[Question]:
    for id_, line in self._questions.items():
      where = f"{self.files[0]}: question {id_}: image"
      image = image_file(self._images, line["image"], where, _COCO)
      yield Question(id=id_, prompt=line["text"], images=(image,))

  def score(self, predictions: Mapping[str, str]) -> Iterable[Score]:
    return ()

  def write_submission(
    self, predictions: Mapping[str, str], folder: pathlib.Path
  ) -> list[pathlib.Path]:
    """Writes the file for the server, which wants every question of test."""
    path = folder / "vqav2_test-dev2015_submission.json"
    entries = [
      {
        "question_id": id_,
        "answer": vqa_text.submitted(predictions.get(key, "")),
      }
      for key, id_ in self._listed.items()
    ]
    write_atomic(path, json.dumps(entries))
    return [path]


class Vqav2Val:
  """The validation images of 2014, asked as LLaVA asks test-dev."""

  name = "vqav2_val"
  headline = "accuracy"
  max_new_tokens = 128

  def __init__(self, folder: str | os.PathLike):
    """Reads the official files of validation in FOLDER; images in val2014.

    Raises:
      DataError: a file is missing or is not what it should be.
    """
    asked = data_file(
      folder, "v2_OpenEnded_mscoco_val2014_questions.json", _VQA
    )
    known = data_file(folder, "v2_mscoco_val2014_annotations.json", _VQA)
    self.files = (asked, known)
    self._images = asked.parent / "val2014"
    truths = _by_id(
      known,
      "annotations",
      {"answers": list},
      {"answer_type": str, "question_type": str},
    )
    self._questions: dict[str, tuple[dict, dict]] = {}
    fields = {"image_id": int, "question": str}
    entries = _by_id(asked, "questions", fields)
    for id_, entry in entries.items():
      if id_ not in truths:
        raise DataError(
          known,
          f"no annotation of question {shorten(id_)}",
          f"one for each question in {asked}",
          "take both files of val",
        )
      answers = truths[id_]["answers"]
      where = f"{known}: question {id_}: answers"
      if not answers:
        raise DataError(
          where,
          "none",
          "those of ten people",
          f"take the official file; {_VQA}",
        )
      for answer in answers:
        with_fields(where, answer, {"answer": str}, _VQA)
      self._questions[id_] = entry, truths[id_]

  def questions(self) -> Iterator[Question]:
    for id_, (entry, truth) in self._questions.items():
      name = f"COCO_val2014_{entry['image_id']:012}.jpg"
      where = f"{self.files[0]}: question {id_}: image_id"
      yield Question(
        id=id_,
        prompt=entry["question"] + SHORT_ANSWER,
        images=(image_file(self._images, name, where, _COCO),),
        reference={"answers": [a["answer"] for a in truth["answers"]]},
      )

  def score(self, predictions: Mapping[str, str]) -> Iterator[Score]:
    """Accuracy over all, and by type of answer and of question."""

    def results():
      for id_, (_, truth) in self._questions.items():
        groups = [
          f"{kind}/{truth[kind]}"
          for kind in ("answer_type", "question_type")
          if kind in truth
        ]
        answers = [a["answer"] for a in truth["answers"]]
        yield groups, accuracy(predictions[id_], answers)

    yield from accuracies(results(), "accuracy")

  def write_submission(
    self, predictions: Mapping[str, str], folder: pathlib.Path
  ) -> list[pathlib.Path]:
    """Writes the file that the official vqaEval reads."""
    path = folder / "v2_OpenEnded_mscoco_val2014_vocojax_results.json"
    entries = [
      {
        "question_id": entry["question_id"],
        "answer": vqa_text.submitted(predictions[id_]),
      }
      for id_, (entry, _) in self._questions.items()
    ]
    write_atomic(path, json.dumps(entries))
    return [path]


def accuracy(prediction: str, answers: Sequence[str]) -> float:
  """What the official rule gives an answer once it is handed in, in 0..1.

  Each person is left out in turn: how many of the others agree with the
  prediction, three being enough, on average. Where all people say the same,
  the rule leaves their words as they are, articles and all.
  """
  said = vqa_text.submitted(prediction)
  truths = [vqa_text.one_line(answer) for answer in answers]
  if len(set(truths)) > 1:
    truths = [_cleaned(truth) for truth in truths]
    said = _cleaned(said)
  agree = [truth.lower() == said.lower() for truth in truths]
  total = sum(agree)
  return sum(min(1, (total - own) / 3) for own in agree) / len(agree)


def _cleaned(text: str) -> str:
  return vqa_text.plain_words(vqa_text.punctuation(text))


def _by_id(
  path: pathlib.Path,
  key: str,
  fields: Mapping[str, Kind],
  optional: Mapping[str, Kind] | None = None,
) -> dict[str, dict]:
  content = read_json(path, dict, _VQA)
  entries = with_fields(path, content, {key: list}, _VQA)[key]
  fields = {"question_id": ID, **fields}
  found: dict[str, dict] = {}
  for i, entry in enumerate(entries):
    where = f"{path}: {key}[{i}]"
    entry = with_fields(where, entry, fields, _VQA, optional)
    add_unique(found, str(entry["question_id"]), entry, where)
  return found
