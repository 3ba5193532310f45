"""The official files of all benchmarks. Read next: checkpoint_kinds.py."""

import dataclasses
import functools
import pathlib
import tempfile
from typing import Any

from tests.evals.benchmarks import (
  test_multiple_choice,
  test_short_answers,
  test_video_qa,
  test_yes_no,
)
from tests.evals.benchmarks.conftest import Folder
from tests.fuzz import documents, files
from tests.fuzz.kinds import Case, Kind, Parts, attempt
from vocojax.evals.benchmarks import judge, registry


def _vqav2(folder: Folder) -> None:
  lines = [
    {"question_id": i, "image": "a.jpg", "text": f"Q{i} ?", "category": "x"}
    for i in (7, 8, 6)
  ]
  folder.jsonl("llava_vqav2_mscoco_test-dev2015.jsonl", lines[:2])
  folder.jsonl("llava_vqav2_mscoco_test2015.jsonl", lines)
  folder.images("test2015/a.jpg")


def _scienceqa(folder: Folder) -> None:
  value = "<image>\nContext: N/A\nQuestion: Q?\nOptions: (A) x (B) y\n"
  turns = [{"from": "human", "value": value}, {"from": "gpt", "value": "z"}]
  asked = [{"id": str(i), "conversations": turns} for i in range(3)]
  for entry in asked[:2]:
    entry["image"] = "image.png"
  folder.json("llava_test_CQM-A.json", asked)
  problem = {"choices": ["x", "y"], "answer": 1, "subject": "natural science"}
  folder.json("problems.json", {str(i): problem for i in range(3)})
  folder.images("images/test/image.png")


def _activitynet(folder: Folder) -> None:
  entries = [
    {"question_id": f"x_{i}", "video_name": "n", "question": f"q{i}"}
    for i in range(2)
  ]
  folder.json("test_q.json", entries)
  folder.json(
    "test_a.json",
    [{"question_id": x["question_id"], "answer": "yes"} for x in entries],
  )
  folder.images("all_test/v_n.mp4")


_FOLDERS = {
  "gqa": test_short_answers.gqa_folder,
  "vqav2": _vqav2,
  "vqav2_val": test_short_answers.vqa_val_folder,
  "pope": test_yes_no.pope_folder,
  "mme": functools.partial(test_yes_no.mme_folder, images=1),
  "mmbench": test_multiple_choice.mmbench_folder,
  "mmbench_cn": functools.partial(
    test_multiple_choice.mmbench_folder, name="dev_cn_20231003"
  ),
  "seed": test_multiple_choice.seed_folder,
  "scienceqa": _scienceqa,
  "msvd_qa": test_video_qa.video_folder,
  "msrvtt_qa": test_video_qa.video_folder,
  "activitynet_qa": _activitynet,
}


def _make(folder: pathlib.Path) -> Parts:
  assert _FOLDERS.keys() == {*registry.IMAGE, *registry.VIDEO}
  for name, write in _FOLDERS.items():
    write(Folder(folder / name))
  return _read(folder)


def _read(folder: pathlib.Path) -> Parts:
  """All that is asked and scored of each benchmark."""
  return {
    name: attempt(functools.partial(_read_one, name, folder / name))
    for name in _FOLDERS
  }


def _read_one(name: str, folder: pathlib.Path) -> tuple:
  bench = registry.open_benchmark(name, folder)
  questions = list(bench.questions())
  answers = {q.id: "Yes. A" for q in questions}
  with tempfile.TemporaryDirectory() as temporary:
    bench.write_submission(answers, pathlib.Path(temporary))
  scores = list(bench.score(answers))
  media = [
    [x if isinstance(x, bytes) else os.path.relpath(x, folder) for x in found]
    for q in questions
    for found in ([*q.images, *filter(None, [q.video])],)
  ]
  texts = [(q.id, q.prompt, dict(q.reference)) for q in questions]
  return texts, media, scores


_SERVER = judge.Server("http://127.0.0.1:9/v1", "none", attempts=1)
_JUDGED = [("what is it ?", "a dog", said) for said in ("a dog", "a cat", "?")]


def _make_verdicts(folder: pathlib.Path) -> Parts:
  right = {}
  known = judge.Judge(_SERVER, folder / "verdicts.jsonl")
  for i, case in enumerate(_JUDGED):
    verdict = judge.Verdict(i == 0, 5 - i, "2025-01-01")
    known._keep(known._key(case), verdict, "m\u00fcsli")
    right[case[2]] = dataclasses.astuple(verdict)
  return right


def _read_verdicts(folder: pathlib.Path) -> Parts:
  """The server is not there, so what is forgotten is an error."""
  known = judge.Judge(_SERVER, folder / "verdicts.jsonl")
  return {
    case[2]: attempt(lambda case=case: _verdict(known, case))
    for case in _JUDGED
  }


def _verdict(known: judge.Judge, case: tuple[str, str, str]) -> Any:
  (found,) = known.verdicts([case])
  return found and dataclasses.astuple(found)


_TABLE = files.one_of("mmbench*/*.tsv")
_LINES = files.one_of("mme/**/*.txt")


def _tables(pick: files.Pick) -> dict[str, Case]:
  def change(name, function, declared="refuse"):
    return name, (declared, files.changes(pick, function, known=False))

  return dict(
    (
      change("latin1", lambda x, rng: x.replace(b"?", b"\xe9", 1)),
      change("utf16", lambda x, rng: x.decode().encode("utf-16")),
      change("nul", lambda x, rng: x.replace(b"\n", b"\0\n", 2), "either"),
      change("bits", files.flip_bits, "either"),
      change("bytes", files.set_bytes, "either"),
      change("cut", files.cut, "either"),
      change("long_line", lambda x, rng: x[:-1] + b"x" * 2**20, "either"),
      change("quote", lambda x, rng: x + b'9\t"', "either"),
    )
  ) | {
    "byte_order_mark": (
      "read",
      files.changes(pick, lambda x, rng: b"\xef\xbb\xbf" + x),
    ),
  }


_JSON = files.one_of("**/*.json", "**/*.jsonl")
_CASES: dict[str, Case] = {
  **documents.cases(_JSON),
  **{f"tsv_{k}": v for k, v in (files.cases(_TABLE) | _tables(_TABLE)).items()},
  **{f"txt_{k}": v for k, v in (files.cases(_LINES) | _tables(_LINES)).items()},
}
del _CASES["txt_zeros"], _CASES["txt_noise"]
KINDS = {
  "benchmark": Kind(
    _make, _read, _CASES, (*documents.DRAWN, "tsv_bits", "txt_bits")
  ),
  "verdicts": Kind(
    _make_verdicts,
    _read_verdicts,
    documents.cases(files.one_of("verdicts.jsonl")),
    documents.DRAWN,
  ),
}
