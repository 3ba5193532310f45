"""POPE: is it in the image, yes or no. Read next: mme.py."""

import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping

from vocojax.errors import DataError, shorten
from vocojax.evals.benchmarks.base import Question, Score, image_file
from vocojax.evals.benchmarks.files import (
  ID,
  LLAVA_EVAL,
  add_unique,
  data_file,
  read_jsonl,
)

CATEGORIES = ("adversarial", "popular", "random")
_POPE = (
  "it is in output/coco of https://github.com/AoiDragon/POPE at commit "
  "e3e39262c85a6a83f26cf5094022a782cb0df58d, the one LLaVA's questions are of"
)
_COCO = "val2014 is in the downloads of https://cocodataset.org"


class Pope:
  """Three samples of objects that are not there, each with those that are.

  The n-th question of a category has the n-th label of its file. LLaVA pairs
  them so, by the order of the answers; here it is the order of the questions,
  so answers may come in any. A ratio over nothing is 0.
  """

  name = "pope"
  headline = "mean_f1"
  max_new_tokens = 128

  def __init__(self, folder: str | os.PathLike):
    """Reads FOLDER, which is laid out as LLaVA's playground/data/eval/pope.

    Raises:
      DataError: a file is missing or is not what it should be.
    """
    asked = data_file(folder, "llava_pope_test.jsonl", LLAVA_EVAL)
    self._images = asked.parent / "val2014"
    self._questions: dict[str, dict] = {}
    by_category: dict[str, list[str]] = {name: [] for name in CATEGORIES}
    fields = {"question_id": ID, "image": str, "text": str, "category": str}
    for where, line in read_jsonl(asked, fields, LLAVA_EVAL):
      id_ = str(line["question_id"])
      add_unique(self._questions, id_, line, where)
      if line["category"] not in by_category:
        raise DataError(
          f"{where}: field category",
          shorten(line["category"]),
          f"one of {', '.join(CATEGORIES)}",
          f"take the official file; {LLAVA_EVAL}",
        )
      by_category[line["category"]].append(id_)
    self.files: tuple[pathlib.Path, ...] = (asked,)
    self._labels: dict[str, str] = {}
    for category, ids in by_category.items():
      path = data_file(folder, f"coco/coco_pope_{category}.json", _POPE)
      self.files += (path,)
      self._pair(path, ids)

  def _pair(self, path: pathlib.Path, ids: list[str]) -> None:
    fields = {"image": str, "label": str}
    lines = list(read_jsonl(path, fields, _POPE))
    if len(lines) != len(ids):
      raise DataError(
        path,
        f"{len(lines):,} labels",
        f"{len(ids):,}, one for each question in {self.files[0]}",
        f"take the official file; {_POPE}",
      )
    for id_, (where, line) in zip(ids, lines, strict=True):
      image = self._questions[id_]["image"]
      if line["image"] != image or line["label"] not in ("yes", "no"):
        raise DataError(
          where,
          f"image {shorten(line['image'])} and label {shorten(line['label'])}",
          f"{shorten(image)}, as question {id_} asks, and yes or no",
          f"take the official file; {_POPE}",
        )
      self._labels[id_] = line["label"]

  def questions(self) -> Iterator[Question]:
    for id_, line in self._questions.items():
      where = f"{self.files[0]}: question {id_}: image"
      yield Question(
        id=id_,
        prompt=line["text"],
        images=(image_file(self._images, line["image"], where, _COCO),),
        reference={"answer": self._labels[id_], "category": line["category"]},
      )

  def score(self, predictions: Mapping[str, str]) -> Iterator[Score]:
    """Five figures in percent for each category, and the mean of the F1."""
    f1 = []
    for category in CATEGORIES:
      pairs = [
        (yes_or_no(predictions[id_]), self._labels[id_])
        for id_, line in self._questions.items()
        if line["category"] == category
      ]
      figures = dict(_figures(pairs))
      f1.append(figures["f1"])
      for name, value in figures.items():
        yield f"{category}/{name}", value
    yield "mean_f1", sum(f1) / len(f1)

  def write_submission(
    self, predictions: Mapping[str, str], folder: pathlib.Path
  ) -> list[pathlib.Path]:
    return []


def yes_or_no(answer: str) -> str:
  """'no' if the first sentence has the word No, no or not; else 'yes'.

  A word ends at a space, commas left out: neither "NO" nor "no!" is one.
  """
  words = answer.split(".")[0].replace(",", "").split(" ")
  return "no" if {"No", "not", "no"} & set(words) else "yes"


def _figures(pairs: Iterable[tuple[str, str]]) -> Iterator[Score]:
  """Accuracy, precision, recall and F1 of 'yes', and how often it is said."""
  pairs = list(pairs)
  right = sum(said == truth for said, truth in pairs)
  hits = sum(said == truth == "yes" for said, truth in pairs)
  said_yes = sum(said == "yes" for said, _ in pairs)
  is_yes = sum(truth == "yes" for _, truth in pairs)
  yield "accuracy", 100 * _ratio(right, len(pairs))
  yield "precision", 100 * _ratio(hits, said_yes)
  yield "recall", 100 * _ratio(hits, is_yes)
  # The harmonic mean of the two, multiplied out.
  yield "f1", 100 * _ratio(2 * hits, said_yes + is_yes)
  yield "yes_ratio", 100 * _ratio(said_yes, len(pairs))


def _ratio(part: int, whole: int) -> float:
  return part / whole if whole else 0.0
