"""Benchmarks in their official files, small, about the images of runs.py.

Read next: test_evaluate_benchmarks.py.
"""

import json
import pathlib
import shutil

from tests import runs
from tests.data import videos
from vocojax.evals.benchmarks.base import SHORT_ANSWER
from vocojax.evals.benchmarks.mme import COGNITION, PERCEPTION

_RELEASE = "MME_Benchmark_release_version"
QUESTIONS = (
  "what color is this ?",
  "is it green ?",
  "what color is this ? number 2",
  "is this number 1 ?",
)
VIDEO_FRAMES = (3, 23, 12, 40)  # at 5 a second: 1, 5, 3 and 8 are taken


def _write(path: pathlib.Path, content: str) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(content)


def _jsonl(path: pathlib.Path, entries) -> None:
  _write(path, "".join(json.dumps(entry) + "\n" for entry in entries))


def _copy_image(folder: pathlib.Path, index: int, to: pathlib.Path) -> None:
  to.parent.mkdir(parents=True, exist_ok=True)
  shutil.copy(folder / f"{index % runs.NUM_RECORDS}.png", to)


def gqa(
  folder: pathlib.Path, data: pathlib.Path, num_images: int, truths=()
) -> None:
  """Every question about every image, in an order that mixes the images.

  Args:
    folder: has the images of `runs.write_data`.
    data: is written to.
    num_images: each is asked about four times.
    truths: of the first questions; the others have 'nothing'.
  """
  lines, known = [], {}
  for q, question in enumerate(QUESTIONS):
    for i in range(num_images):
      id_ = str(len(lines))
      lines.append(
        {
          "question_id": id_,
          "image": f"n{i}.png",
          "text": question + SHORT_ANSWER,
          "category": "default",
        }
      )
      known[id_] = {
        "answer": truths[int(id_)] if int(id_) < len(truths) else "nothing",
        "types": {"structural": "verify" if q % 2 else "query"}
        | {"semantic": "attr", "detailed": "x"},
        "isBalanced": True,
      }
  _jsonl(data / "llava_gqa_testdev_balanced.jsonl", lines)
  _write(data / "data/testdev_balanced_questions.json", json.dumps(known))
  for i in range(num_images):
    _copy_image(folder, i, data / f"data/images/n{i}.png")


def mme(folder: pathlib.Path, data: pathlib.Path) -> None:
  """One image in each subtask; its answers are Yes and No."""
  lines = []
  for i, subtask in enumerate(PERCEPTION + COGNITION):
    name = f"{subtask}/{i}.png"
    _copy_image(folder, i, data / _RELEASE / name)
    questions = (QUESTIONS[1], QUESTIONS[3])
    truth = "".join(
      f"{question} Please answer yes or no.\t{answer}\n"
      for question, answer in zip(questions, ("Yes", "No"), strict=True)
    )
    _write(data / _RELEASE / subtask / f"{i}.txt", truth)
    for question in questions:
      text = question + SHORT_ANSWER
      lines.append({"question_id": name, "image": name, "text": text})
  _jsonl(data / "llava_mme.jsonl", lines)


def msvd(data: pathlib.Path, answers=()) -> None:
  """Two questions about each of four videos, asked in turns.

  Args:
    data: is written to.
    answers: the truths.
  """
  entries = []
  for question in QUESTIONS[:2]:
    for i in range(len(VIDEO_FRAMES)):
      entries.append(
        {
          "id": len(entries),
          "video_id": f"vid{i}",
          "question": question,
          "answer": [*answers, *["nothing"] * 8][len(entries)],
        }
      )
  _write(data / "test_qa.json", json.dumps(entries))
  (data / "video").mkdir(exist_ok=True)
  for i, count in enumerate(VIDEO_FRAMES):
    videos.write(
      data / f"video/vid{i}.{'avi' if i % 2 else 'mp4'}",
      count,
      levels=lambda n, i=i: ((n * 37) % 256, 80 * i, 255 - 6 * n),
    )
