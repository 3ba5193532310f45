"""MSVD-QA, MSRVTT-QA, ActivityNet-QA: free answers about videos.

Read next: judge.py.
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from vocojax.errors import DataError
from vocojax.evals.benchmarks import vqa_text
from vocojax.evals.benchmarks.base import Question, Score, accuracies
from vocojax.evals.benchmarks.files import (
  add_unique,
  data_file,
  read_json,
  with_fields,
)
from vocojax.evals.benchmarks.judge import Judge

_FORMATS = (".mp4", ".avi", ".mov", ".mkv")
_ORIGIN = (
  "it is among the evaluation files of LLaMA-VID, see "
  "https://github.com/dvlab-research/LLaMA-VID"
)


class VideoQa:
  """Questions on videos, judged by a model or matched as strings.

  With a judge, `judge_accuracy` is the part of answers it calls right and
  `judge_score` their mean score of 0 to 5; an answer without a verdict is
  wrong, with score 0. Always there, and the headline without a judge: `match`,
  equal to the truth after the normalisation of the VQA challenge, and
  `contains`, the truth stands in the answer word for word.

  Attributes:
    judged: what `Judge.describe` says after `score`; None without a judge.
  """

  max_new_tokens = 1024

  def __init__(
    self,
    name: str,
    files: tuple[pathlib.Path, ...],
    questions: dict[str, tuple[Question, pathlib.Path]],
    judge: Judge | None,
  ):
    """Use `msvd`, `msrvtt` or `activitynet`.

    Args:
      name: key in the registry.
      files: question and answer files.
      questions: by id: the question, and its video without the ending.
      judge: None for string matches alone.
    """
    self.name = name
    self.headline = "judge_accuracy" if judge else "match"
    self.files = files
    self.judged: dict[str, Any] | None = None
    self._questions = questions
    self._judge = judge

  def questions(self) -> Iterator[Question]:
    for question, stem in self._questions.values():
      yield dataclasses.replace(question, video=_video_file(stem))

  def score(self, predictions: Mapping[str, str]) -> Iterator[Score]:
    """String match; accuracy and mean score by the judge, if there is one.

    Raises:
      JudgeError: the judge cannot be asked.
    """
    cases = [
      (question.prompt, question.reference["answer"], predictions[id_])
      for id_, (question, _) in self._questions.items()
    ]
    words = [
      (vqa_text.submitted(truth), vqa_text.submitted(said))
      for _, truth, said in cases
    ]
    equal = [((), float(truth == said)) for truth, said in words]
    inside = [((), float(f" {truth} " in f" {said} ")) for truth, said in words]
    yield from accuracies(equal, "match")
    yield from accuracies(inside, "contains")
    if self._judge:
      verdicts = self._judge.verdicts(cases)
      self.judged = self._judge.describe(verdicts)
      right = sum(v.right for v in verdicts if v)
      yield "judge_accuracy", 100 * right / len(verdicts)
      yield "judge_score", sum(v.score for v in verdicts if v) / len(verdicts)

  def write_submission(
    self, predictions: Mapping[str, str], folder: pathlib.Path
  ) -> list[pathlib.Path]:
    return []


def msvd(folder: str | os.PathLike, judge: Judge | None = None) -> VideoQa:
  """MSVD-QA: FOLDER/test_qa.json and FOLDER/video."""
  return _one_file("msvd_qa", folder, judge)


def msrvtt(folder: str | os.PathLike, judge: Judge | None = None) -> VideoQa:
  """MSRVTT-QA: FOLDER/test_qa.json and FOLDER/video."""
  return _one_file("msrvtt_qa", folder, judge)


def _one_file(
  name: str, folder: str | os.PathLike, judge: Judge | None
) -> VideoQa:
  path = data_file(folder, "test_qa.json", _ORIGIN)
  found: dict[str, tuple[Question, pathlib.Path]] = {}
  fields = ("video_id", "question", "answer", "id")
  for i, entry in enumerate(read_json(path, list, _ORIGIN)):
    where = f"{path} record {i}"
    with_fields(where, entry, fields, _ORIGIN)
    question = Question(
      id=str(entry["id"]),
      prompt=entry["question"],
      reference={"answer": str(entry["answer"])},
    )
    stem = path.parent / "video" / str(entry["video_id"])
    add_unique(found, question.id, (question, stem), where)
  return VideoQa(name, (path,), found, judge)


def activitynet(
  folder: str | os.PathLike, judge: Judge | None = None
) -> VideoQa:
  """ActivityNet-QA: FOLDER/test_q.json, test_a.json, and FOLDER/all_test.

  The n-th answer belongs to the n-th question.
  """
  asked = data_file(folder, "test_q.json", _ORIGIN)
  known = data_file(folder, "test_a.json", _ORIGIN)
  questions = read_json(asked, list, _ORIGIN)
  answers = read_json(known, list, _ORIGIN)
  if len(questions) != len(answers):
    raise DataError(
      f"{known}: found {len(answers)} answers, expected {len(questions)}, one "
      f"for each question in {asked}; {_ORIGIN}"
    )
  found: dict[str, tuple[Question, pathlib.Path]] = {}
  for i, (entry, truth) in enumerate(zip(questions, answers, strict=True)):
    where = f"{asked} record {i}"
    with_fields(
      where, entry, ("video_name", "question", "question_id"), _ORIGIN
    )
    with_fields(f"{known} record {i}", truth, ("answer",), _ORIGIN)
    id_ = str(entry["question_id"])
    if str(truth.get("question_id", id_)) != id_:
      raise DataError(
        f"{known} record {i}: answers question {truth['question_id']}, "
        f"expected {id_}, as {asked} is ordered; {_ORIGIN}"
      )
    question = Question(
      id=id_,
      prompt=entry["question"],
      reference={"answer": str(truth["answer"])},
    )
    stem = asked.parent / "all_test" / f"v_{entry['video_name']}"
    add_unique(found, id_, (question, stem), where)
  return VideoQa("activitynet_qa", (asked, known), found, judge)


def _video_file(stem: pathlib.Path) -> pathlib.Path:
  """The file of a video, whatever its format.

  Raises:
    DataError: there is none.
  """
  for ending in _FORMATS:
    path = stem.with_name(stem.name + ending)
    if path.is_file():
      return path
  raise DataError(
    f"{stem}: no such video, neither {' nor '.join(_FORMATS)}; {_ORIGIN}"
  )
