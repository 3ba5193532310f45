"""SEED-Bench: multiple choice on images and video frames.

Read next: scienceqa.py.
"""

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

_SEED = (
  "DATASET.md of https://github.com/AILab-CVC/SEED-Bench says where to get it"
)


class SeedBench:
  """Questions on images, and on the middle frame of videos.

  An answer is right if it is the letter and nothing else, as in LLaVA's
  script: "A." is wrong. The score over all questions is what is reported.
  """

  name = "seed"
  headline = "all"
  max_new_tokens = 128

  def __init__(self, folder: str | os.PathLike):
    """Reads FOLDER, laid out as LLaVA's playground/data/eval/seed_bench.

    Raises:
      DataError: a file is missing or is not what it should be.
    """
    asked = data_file(folder, "llava-seed-bench.jsonl", LLAVA_EVAL)
    known = data_file(folder, "SEED-Bench.json", _SEED)
    self.files = (asked, known)
    lines: dict[str, dict] = {}
    fields = {"question_id": ID, "image": str, "text": str}
    for where, line in read_jsonl(asked, fields, LLAVA_EVAL):
      add_unique(lines, str(line["question_id"]), line, where)
    content = read_json(known, dict, _SEED)
    kinds = {"questions": list, "question_type": dict}
    with_fields(known, content, kinds, _SEED)
    kinds = dict.fromkeys(content["question_type"], ID)
    with_fields(
      f"{known}: question_type", content["question_type"], kinds, _SEED
    )
    self._types = {id_: name for name, id_ in content["question_type"].items()}
    self._questions: dict[str, tuple[dict, dict]] = {}
    fields = {"question_id": ID, "answer": str, "data_type": str}
    fields |= {"question_type_id": ID}
    for i, truth in enumerate(content["questions"]):
      where = f"{known}: questions[{i}]"
      with_fields(where, truth, fields, _SEED)
      id_ = str(truth["question_id"])
      if id_ not in lines or truth["question_type_id"] not in self._types:
        type_ = shorten(truth["question_type_id"])
        raise DataError(
          where,
          f"question {shorten(id_)} of type {type_}",
          f"one that {asked} asks, of a type that is named",
          f"take the official file; {_SEED}",
        )
      add_unique(self._questions, id_, (lines[id_], truth), where)
    if len(lines) > len(self._questions):
      foreign = next(id_ for id_ in lines if id_ not in self._questions)
      raise DataError(
        known,
        f"{len(self._questions):,} questions without {shorten(foreign)}",
        f"the {len(lines):,} of {asked}",
        "take the first release (19,242 questions, in the history of the data "
        f"set); {_SEED}",
      )

  def questions(self) -> Iterator[Question]:
    folder = self.files[0].parent
    for id_, (line, truth) in self._questions.items():
      where = f"{self.files[0]}: question {id_}: image"
      yield Question(
        id=id_,
        prompt=line["text"],
        images=(image_file(folder, line["image"], where, _SEED),),
        reference={"answer": truth["answer"], "category": self._type(truth)},
      )

  def _type(self, truth: dict) -> str:
    return self._types[truth["question_type_id"]]

  def score(self, predictions: Mapping[str, str]) -> Iterator[Score]:
    """Accuracy over all, image and video questions, and by type."""

    def results():
      for id_, (_, truth) in self._questions.items():
        groups = (truth["data_type"], f"type/{self._type(truth)}")
        yield groups, float(predictions[id_] == truth["answer"])

    yield from accuracies(results(), "all")

  def write_submission(
    self, predictions: Mapping[str, str], folder: pathlib.Path
  ) -> list[pathlib.Path]:
    """Writes the lines that the official notebook and leaderboard read."""
    path = folder / "seed_bench_submission.jsonl"
    lines = [
      json.dumps(
        {"question_id": truth["question_id"], "prediction": predictions[id_]}
      )
      for id_, (_, truth) in self._questions.items()
    ]
    write_atomic(path, "\n".join(lines) + "\n")
    return [path]
