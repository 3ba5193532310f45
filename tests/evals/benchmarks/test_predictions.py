"""Files of answers: crashes, doubles, strangers; results with their origin."""

import hashlib
import json
import os

import pytest

from tests import disks
from tests.fields import raises
from vocojax.errors import DataError, UserError
from vocojax.evals.benchmarks import files, registry
from vocojax.evals.benchmarks.base import accuracies
from vocojax.evals.benchmarks.judge import Judge, Server
from vocojax.evals.benchmarks.predictions import (
  PredictionWriter,
  check_complete,
  read_predictions,
)
from vocojax.evals.benchmarks.result import Asked, write_result
from vocojax.evals.benchmarks.video_qa import VideoQa


def line(id_, text, model="m", **more):
  entry = {"question_id": id_, "prompt": "?", "text": text, "model_id": model}
  return json.dumps(entry | more) + "\n"


def test_written_is_read_whatever_the_text(tmp_path):
  path = tmp_path / "a" / "gqa.jsonl"
  texts = {"1": "a\nb\u2028c", "2": '"', "3": "", "4": "猫"}
  writer = PredictionWriter(path, "m")
  for id_, text in texts.items():
    writer.add(id_, "what ?", text)
    assert read_predictions([path])[id_] == text  # on disk at once
  assert read_predictions([path]) == texts
  entry = json.loads(path.read_text().splitlines()[0])
  assert entry == {
    "question_id": "1",
    "prompt": "what ?",
    "text": "a\nb\u2028c",
    "model_id": "m",
  }


def test_order_and_number_ids_and_parts_do_not_matter(tmp_path):
  one, two = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
  one.write_text(line(3, "c") + line(1, "a"))
  two.write_text(line("2", "b"))
  found = read_predictions([one, two])
  assert found == {"1": "a", "2": "b", "3": "c"}
  check_complete(found, ["1", "2", "3"], "here")


@pytest.mark.parametrize("cut", [1, 5, 20, 60])
def test_cut_last_line_is_refused_and_resumed(tmp_path, cut):
  path = tmp_path / "gqa.jsonl"
  whole = line("1", "a") + line("2", "b")
  path.write_text(whole + line("3", "c")[:cut])
  with raises(DataError, "gqa.jsonl:3", "a line that is cut off"):
    read_predictions([path])
  writer = PredictionWriter(path, "m")
  assert writer.answered == {"1": "a", "2": "b"}
  assert path.read_text() == whole
  writer.add("3", "?", "again")
  assert read_predictions([path]) == {"1": "a", "2": "b", "3": "again"}


def test_missing_end_of_the_last_line_is_no_cut(tmp_path):
  path = tmp_path / "gqa.jsonl"
  path.write_text((line("1", "a") + line("2", "b")).rstrip("\n"))
  assert read_predictions([path]) == {"1": "a", "2": "b"}
  PredictionWriter(path, "m").add("3", "?", "c")
  assert read_predictions([path]) == {"1": "a", "2": "b", "3": "c"}


@pytest.mark.parametrize(
  ("content", "where", "got"),
  [
    (line("1", "a") + '{"ques\n' + line("2", "b"), ":2", "Unterminated string"),
    (line("1", "a") + line("1", "a"), ":2", "question '1' a second time"),
    (line("1", "a") + line(1, "b"), ":2", "question '1' a second time"),
    (line("1", "a") + "null\n", ":2", "None"),
    (line("1", "a") + '{"text": "a"}\n', ":2: field question_id", "nothing"),
    (line("1", None), ":1: field text", "None"),
    (line("1", ["a"]), ":1: field text", "['a']"),
    (line({}, "a"), ":1: field question_id", "{}"),
    (line("1", "\ud800"), ":1", "half of a surrogate pair"),
    (line("1", "a", more=float("nan")), ":1", "NaN"),
    ("[" * 5000 + "\n", ":1", "nested too deep"),
    ("9" * 5000 + "\n", ":1", "5000 digits"),
  ],
)
def test_bad_lines_are_named(tmp_path, content, where, got):
  path = tmp_path / "gqa.jsonl"
  path.write_text(content)
  for reader in (
    lambda: read_predictions([path]),
    lambda: PredictionWriter(path, "m"),
  ):
    with raises(DataError, f"gqa.jsonl{where}", got, fix="delete"):
      reader()
  assert path.read_text() == content


def test_answers_are_in_a_regular_file(tmp_path):
  """A pipe would be waited for."""
  path = tmp_path / "gqa.jsonl"
  os.mkfifo(path)
  for reader in (
    lambda: read_predictions([path]),
    lambda: PredictionWriter(path, "m"),
  ):
    with raises(DataError, "gqa.jsonl"):
      reader()
  path.unlink()
  path.mkdir()
  with raises(DataError, "gqa.jsonl", "Is a directory"):
    PredictionWriter(path, "m")


def test_a_full_disk_leaves_whole_answers(tmp_path):
  with disks.mounted(tmp_path / "disk", "1M") as disk:
    path = disk / "gqa.jsonl"
    writer = PredictionWriter(path, "m")
    with raises(DataError, "gqa.jsonl", "No space left", fix="free some space"):
      for i in range(1000):
        writer.add(str(i), "?", "a" * 10_000)
    kept = writer.answered
    assert 50 < len(kept) < 200
    assert read_predictions([path]) == kept
    disks.remount(disk, "size=2M")
    again = PredictionWriter(path, "m")
    assert again.answered == kept
    again.add("last", "?", "b")
    assert read_predictions([path]) == kept | {"last": "b"}
    disks.remount(disk, "ro")
    with raises(DataError, "gqa.jsonl", "Read-only file system"):
      PredictionWriter(path, "m")


def test_same_question_in_two_parts_is_refused(tmp_path):
  one, two = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
  one.write_text(line("1", "a"))
  two.write_text(line("1", "a"))
  with raises(DataError, "2.jsonl:1", "question '1' a second time"):
    read_predictions([one, two])


def test_another_model_does_not_continue(tmp_path):
  path = tmp_path / "gqa.jsonl"
  path.write_text(line("1", "a", model="C/step 5"))
  with raises(DataError, "gqa.jsonl:1: field model_id", "'C/step 5'", "'m'"):
    PredictionWriter(path, "m")
  assert path.read_text() == line("1", "a", model="C/step 5")


def test_missing_and_foreign_answers_are_named(tmp_path):
  ids = [str(i) for i in range(6)]
  got = "no answer to '1', '2', '3' and 2 more"
  with raises(DataError, "p", got, "all 6 questions"):
    check_complete({"0": ""}, ids, "p")
  complete = dict.fromkeys(ids, "")
  with raises(DataError, "p", "answers to 'x', which the benchmark"):
    check_complete(complete | {"x": ""}, ids, "p")
  with raises(DataError, "nowhere.jsonl", "no such file"):
    read_predictions([tmp_path / "nowhere.jsonl"])


def test_accuracies():
  results = [(("b", "a"), 1.0), (("a",), 0.0), ((), 0.5), (("b",), 0.5)]
  found = list(accuracies(results, "all"))
  assert found == [("all", 50.0), ("a", 50.0), ("b", 75.0)]


def test_data_hash_is_of_names_and_contents(folder):
  a, b = folder.text("a.json", "1"), folder.text("x/b.json", "2")
  by_hand = "".join(
    f"{name} {hashlib.sha256(content).hexdigest()}\n"
    for name, content in (("a.json", b"1"), ("b.json", b"2"))
  )
  expected = hashlib.sha256(by_hand.encode()).hexdigest()
  assert files.data_hash([b, a]) == files.data_hash([a, b]) == expected
  folder.text("x/b.json", "3")
  assert files.data_hash([a, b]) != expected


def test_result_holds_scores_and_origin(folder, tmp_path):
  path = folder.text("q.json", "{}")
  tiny = VideoQa("tiny", (path,), {}, tmp_path, None)
  asked = Asked(
    checkpoint="work/voco/checkpoints/5",
    config={"name": "voco"},
    layout="voco_v1/1",
    data=str(folder.path),
    settings={"k": 2},
    provenance={"commit": "abc"},
  )
  out = tmp_path / "out" / "tiny.json"
  scores = [("match", 50.0), ("contains", 75.0)]
  written = write_result(out, tiny, 4, 1, scores, asked)
  assert json.loads(out.read_text()) == written
  assert written == {
    "benchmark": "tiny",
    "headline": "match",
    "value": 50.0,
    "scores": {"match": 50.0, "contains": 75.0},
    "num_questions": 4,
    "bad_records": 1,
    "checkpoint": "work/voco/checkpoints/5",
    "prompt_layout": "voco_v1/1",
    "settings": {"k": 2},
    "data": {
      "folder": str(folder.path),
      "files": 1,
      "sha256": files.data_hash([path]),
    },
    "provenance": {"commit": "abc"},
    "config": {"name": "voco"},
  }
  for bad in ([("contains", 1.0)], [("match", float("nan"))], scores * 2):
    with pytest.raises(ValueError, match="tiny"):
      write_result(out, tiny, 4, 0, bad, asked)


def test_registry_names_what_there_is(folder):
  with raises(UserError, "--benchmark", "'mmvet'", "gqa, vqav2, "):
    registry.open_benchmark("mmvet", folder.path)
  judge = Judge(Server("http://localhost/v1", "m"), folder.path / "j.jsonl")
  with raises(UserError, "--benchmark=gqa", "a judge"):
    registry.open_benchmark("gqa", folder.path, judge)


@pytest.mark.parametrize(
  ("name", "file"),
  [
    ("gqa", "llava_gqa_testdev_balanced.jsonl"),
    ("vqav2", "llava_vqav2_mscoco_test-dev2015.jsonl"),
    ("vqav2_val", "v2_OpenEnded_mscoco_val2014_questions.json"),
    ("pope", "llava_pope_test.jsonl"),
    ("mme", "llava_mme.jsonl"),
    ("mmbench", "mmbench_dev_20230712.tsv"),
    ("mmbench_cn", "mmbench_dev_cn_20231003.tsv"),
    ("seed", "llava-seed-bench.jsonl"),
    ("scienceqa", "llava_test_CQM-A.json"),
    ("msvd_qa", "test_qa.json"),
    ("msrvtt_qa", "test_qa.json"),
    ("activitynet_qa", "test_q.json"),
  ],
)
def test_missing_file_is_named_with_its_origin(folder, name, file):
  where = str(folder.path / file)
  with raises(DataError, where, "no such file", fix="https://"):
    registry.open_benchmark(name, folder.path)
