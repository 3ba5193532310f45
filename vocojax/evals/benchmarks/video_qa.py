"""MSVD-QA, MSRVTT-QA, ActivityNet-QA: free answers about videos.

Read next: judge.py.
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from vocojax.core.files import path_inside, remedy
from vocojax.data.video import find_video
from vocojax.errors import DataError, shorten
from vocojax.evals.benchmarks import vqa_text
from vocojax.evals.benchmarks.base import Question, Score, accuracies
from vocojax.evals.benchmarks.files import (
  ID,
  add_unique,
  data_file,
  read_json,
  with_fields,
)
from vocojax.evals.benchmarks.judge import Judge

_ANSWER = (str, int, float)
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
    questions: dict[str, tuple[Question, str]],
    folder: pathlib.Path,
    judge: Judge | None,
  ):
    """Use `msvd`, `msrvtt` or `activitynet`.

    Args:
      name: key in the registry.
      files: question and answer files.
      questions: by id: the question, and the name of its video without the
        ending.
      folder: of the videos.
      judge: None for string matches alone.
    """
    self.name = name
    self.headline = "judge_accuracy" if judge else "match"
    self.files = files
    self.judged: dict[str, Any] | None = None
    self._questions = questions
    self._folder = folder
    self._judge = judge

  def questions(self) -> Iterator[Question]:
    with remedy(f"take the official files; {_ORIGIN}"):
      for id_, (question, name) in self._questions.items():
        where = f"{self.files[0]}: question {id_}"
        video = find_video(path_inside(self._folder, name, where))
        yield dataclasses.replace(question, video=video)

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
  found: dict[str, tuple[Question, str]] = {}
  fields = {"video_id": ID, "question": str, "answer": _ANSWER, "id": ID}
  for i, entry in enumerate(read_json(path, list, _ORIGIN)):
    where = f"{path}: record {i}"
    with_fields(where, entry, fields, _ORIGIN)
    question = Question(
      id=str(entry["id"]),
      prompt=entry["question"],
      reference={"answer": str(entry["answer"])},
    )
    video = str(entry["video_id"])
    add_unique(found, question.id, (question, video), where)
  return VideoQa(name, (path,), found, path.parent / "video", judge)


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
      known,
      f"{len(answers):,} answers",
      f"{len(questions):,}, one for each question in {asked}",
      f"take the official files; {_ORIGIN}",
    )
  found: dict[str, tuple[Question, str]] = {}
  for i, (entry, truth) in enumerate(zip(questions, answers, strict=True)):
    where = f"{asked}: record {i}"
    fields = {"video_name": ID, "question": str, "question_id": ID}
    with_fields(where, entry, fields, _ORIGIN)
    where_known = f"{known}: record {i}"
    with_fields(
      where_known, truth, {"answer": _ANSWER}, _ORIGIN, {"question_id": ID}
    )
    id_ = str(entry["question_id"])
    if (answered := str(truth.get("question_id", id_))) != id_:
      raise DataError(
        where_known,
        f"an answer to question {shorten(answered)}",
        f"to {shorten(id_)}, as {asked} is ordered",
        f"take the official files; {_ORIGIN}",
      )
    question = Question(
      id=id_,
      prompt=entry["question"],
      reference={"answer": str(truth["answer"])},
    )
    video = f"v_{entry['video_name']}"
    add_unique(found, id_, (question, video), where)
  folder = asked.parent / "all_test"
  return VideoQa("activitynet_qa", (asked, known), found, folder, judge)
