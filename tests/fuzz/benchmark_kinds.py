"""The official files of all benchmarks. Read next: checkpoint_kinds.py."""

import dataclasses
import functools
import os
import pathlib
import tempfile

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
  entry = {"conversations": turns, "image": "image.png"}
  folder.json("llava_test_CQM-A.json", [entry | {"id": x} for x in "012"])
  problem = {"choices": ["x", "y"], "answer": 1, "subject": "natural science"}
  folder.json("problems.json", {x: problem for x in "012"})
  folder.images("images/test/image.png")


def _activitynet(folder: Folder) -> None:
  asked = [{"question_id": x, "video_name": "n", "question": x} for x in "ab"]
  known = [{"question_id": x, "answer": "yes"} for x in "ab"]
  folder.json("test_q.json", asked)
  folder.json("test_a.json", known)
  folder.images("all_test/v_n.mp4")


_MMBENCH = test_multiple_choice.mmbench_folder
_FOLDERS = {
  "gqa": test_short_answers.gqa_folder,
  "vqav2": _vqav2,
  "vqav2_val": test_short_answers.vqa_val_folder,
  "pope": test_yes_no.pope_folder,
  "mme": functools.partial(test_yes_no.mme_folder, images=1),
  "mmbench": _MMBENCH,
  "mmbench_cn": functools.partial(_MMBENCH, name="dev_cn_20231003"),
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
  return {x: attempt(_read_one, x, folder / x) for x in _FOLDERS}


def _read_one(name: str, folder: pathlib.Path) -> tuple:
  """All that a benchmark asks, shows, scores and hands in."""
  bench = registry.open_benchmark(name, folder)
  questions = list(bench.questions())
  media = [
    x if isinstance(x, bytes) else os.path.relpath(x, folder)
    for q in questions
    for x in (*q.images, *filter(None, [q.video]))
  ]
  answers = {q.id: "Yes. A" for q in questions}
  with tempfile.TemporaryDirectory() as temporary:
    bench.write_submission(answers, pathlib.Path(temporary))
  texts = [(q.id, q.prompt, dict(q.reference)) for q in questions]
  return texts, media, list(bench.score(answers))


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

  def verdict(case: tuple[str, str, str]) -> tuple:
    (found,) = known.verdicts([case])
    assert found
    return dataclasses.astuple(found)

  return {case[2]: attempt(verdict, case) for case in _JUDGED}


def _tables(prefix: str, *patterns: str) -> dict[str, Case]:
  """Mutations of tables, which have no checksum: no value is known."""
  pick = files.one_of(*patterns)
  other = {
    "latin1": ("refuse", lambda x, rng: x.replace(b"?", b"\xe9", 1)),
    "utf16": ("refuse", lambda x, rng: x.decode().encode("utf-16")),
    "nul": ("either", lambda x, rng: x.replace(b"\n", b"\0\n", 2)),
    "long_line": ("either", lambda x, rng: x[:-1] + b"x" * 2**20),
    "quote": ("either", lambda x, rng: x + b'9\t"'),
  }
  bom = files.changes(pick, lambda x, rng: b"\xef\xbb\xbf" + x)
  result: dict[str, Case] = files.cases(pick, known=False)
  for name, (declared, change) in other.items():
    result[name] = declared, files.changes(pick, change, known=False)
  result["byte_order_mark"] = "read", bom
  return {f"{prefix}_{name}": case for name, case in result.items()}


KINDS = {
  "benchmark": Kind(
    _make,
    _read,
    documents.cases(files.one_of("**/*.json", "**/*.jsonl"))
    | _tables("table", "mmbench*/*.tsv", "mme/**/*.txt"),
    (*documents.DRAWN, "table_bits"),
  ),
  "verdicts": Kind(
    _make_verdicts,
    _read_verdicts,
    documents.cases(files.one_of("verdicts.jsonl")),
    documents.DRAWN,
  ),
}
