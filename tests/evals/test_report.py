"""The report of a made-up workdir: its numbers, pictures and complaints."""

import json
import os
import shutil
import statistics

import numpy as np
import pytest
from PIL import Image

from tests import disks
from tests.evals import conftest
from tests.fields import raises
from vocojax.errors import UserError
from vocojax.evals import report

PICTURES = ("answers", "attention", "curves", "scores")


def assert_drawn(path):
  """Fails unless the file is an image with more than one colour in it."""
  pixels = np.asarray(Image.open(path).convert("RGB"))
  assert pixels.shape[1] >= 900
  assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20


def test_numbers_and_pictures(make_workdir):
  workdir = make_workdir()
  path = report.write_report(workdir)
  text = path.read_text()
  assert path == workdir / "report.md"
  # 240 questions, 7 wrong with VoCo, 1 with full; the lower bound has 130.
  assert "**97.08 % of 240 questions answered right** (233)" in text
  assert "64 patches -> 1 token: 64 times fewer" in text
  # 2 * 3 layers * 2 heads * 16 numbers * 4 bytes; 64 times that uncompressed.
  assert "is 768 bytes (float32); of all its patches it would be 49,152" in text
  assert "98.4 % saved" in text
  # 100 * (233 - 130) / (239 - 130)
  assert "| **retention** |  |  | **94.5 %** |" in text
  assert "(voco - lower) / (upper - lower)" in text
  assert "| 130 | 240 | 54.17 % |" in text
  assert "| 239 | 240 | 99.58 % |" in text
  # 18 gaps of 5 steps of 2 s.
  speed = statistics.median(400 + step % 20 for step in range(10, 101, 5))
  assert f"| voco | 100 | 3 min 0 s | {speed:.0f} |" in text
  assert "| voco | 30 s | 8 |" in text
  assert "over all questions 7 of 240 are" in text
  assert "0123abc" in text and "jax 0.10.2, flax 0.12.8" in text
  for name in PICTURES:
    assert f"](report/{name}.png)" in text
    assert_drawn(workdir / "report" / f"{name}.png")


def test_matches_and_validation(make_workdir):
  """Both are newer than some results, which have neither."""
  workdir = make_workdir()
  text = report.write_report(workdir).read_text()
  assert "validation loss" not in text and "VQA challenge" not in text
  before = np.asarray(Image.open(workdir / "report/curves.png"))
  path = workdir / "evaluation" / "voco.json"
  newer = {"normalized_accuracy": 0.975, "normalized_correct": 234}
  newer |= {"median_answer_words": 11.5}
  path.write_text(json.dumps(json.loads(path.read_text()) | newer))
  losses = {20: 1.5, 40: 0.25, 60: 0.5, 80: None, 100: 0.75}
  with (workdir / "voco" / "metrics.jsonl").open("a") as file:
    for step, loss in losses.items():
      values = {"loss": loss, "token_accuracy": 0.5, "answer_accuracy": 0.625}
      line = {f"validation_{key}": x for key, x in values.items()}
      print(json.dumps({"step": step, "time": 1.7e9} | line), file=file)
  text = report.write_report(workdir).read_text()
  assert "97.50 % (234) are if case" in text
  assert "**Half of the true answers have 11.5 words or more" in text
  assert "| 233 | 240 | 97.08 % | 97.50 % |" in text
  assert "| 130 | 240 | 54.17 % | - |" in text
  assert "| voco, best | 40 | 0.2500 | 62.50 % |" in text
  assert "| voco, last | 100 | 0.7500 | 62.50 % |" in text
  assert "| upper, best" not in text
  after = np.asarray(Image.open(workdir / "report/curves.png")).astype(int)
  orange = (after[..., 0] > 200) & (after[..., 2] < 40)
  assert orange.sum() > 200
  assert not ((before[..., 0] > 200) & (before[..., 2] < 40)).any()
  path.write_text(
    json.dumps(json.loads(path.read_text()) | {"median_answer_words": "11"})
  )
  with raises(UserError, "field median_answer_words", "'11'"):
    report.write_report(workdir)


def test_categories(make_workdir):
  workdir = make_workdir()
  text = report.write_report(workdir).read_text()
  lines = conftest.predictions()
  columns = []
  for category in ("yes/no", "colour", "shape"):
    scores = []
    for name in ("lower", "voco", "upper"):
      right = [
        is_right
        for x, is_right in zip(
          lines, conftest.right_answers(name, lines), strict=True
        )
        if x["category"] == category
      ]
      scores.append(f"{100 * sum(right) / len(right):.2f} %")
    assert f"| {category} | {len(right)} | {' | '.join(scores)} |" in text
    columns.append(scores)
  # Exchanged columns would be noticed.
  assert len(set(zip(*columns, strict=True))) == 3


def test_cache_bytes_of_two_tokens_in_bfloat16(make_workdir):
  workdir = make_workdir(k=2, dtype="bfloat16")
  text = report.write_report(workdir).read_text()
  # 2 * 3 * 2 * 16 numbers * 2 bytes * 2 tokens, of 64 patches 24,576.
  assert "is 768 bytes (bfloat16)" in text
  assert "it would be 24,576: 96.9 % saved" in text
  assert "64 patches -> 2 tokens: 32 times fewer" in text
  assert "the first VoCo token" in text


@pytest.mark.parametrize("absent", [("upper",), ("lower",), ("upper", "lower")])
def test_absent_bounds_are_left_out(make_workdir, absent):
  workdir = make_workdir()
  for name in absent:
    (workdir / "evaluation" / f"{name}.json").unlink()
  text = report.write_report(workdir).read_text()
  assert "**retention**" not in text
  for name in absent:
    assert f"evaluation/{name}.json" in text
  assert "97.08 %" in text
  assert_drawn(workdir / "report" / "scores.png")


def test_upper_bound_not_above_lower(make_workdir):
  workdir = make_workdir()
  path = workdir / "evaluation" / "upper.json"
  upper = json.loads(path.read_text()) | {"accuracy": 130 / 240, "correct": 130}
  path.write_text(json.dumps(upper))
  text = report.write_report(workdir).read_text()
  assert "No retention: the upper bound (54.17 %) is not above" in text


def rename_bounds(workdir, phase, **names):
  """Gives results another name, and their phase."""
  for old, new in names.items():
    path = workdir / "evaluation" / f"{old}.json"
    entry = json.loads(path.read_text()) | {"phase": phase, "name": new}
    path.unlink()
    path.with_name(f"{new}.json").write_text(json.dumps(entry))


def test_bounds_of_before_are_labelled(make_workdir):
  """When `full` was the upper bound, and the lower one its weights."""
  workdir = make_workdir()
  rename_bounds(workdir, "full", upper="full", lower="lower")
  text = report.write_report(workdir).read_text()
  assert "| **retention** (bounds: full) |  |  | **94.5 %** |" in text
  assert "(voco - lower) / (full - lower)" in text
  assert "These bounds are not the paper's" in text
  assert "| lower: weights of full, text sees VoCo tokens only | 130 |" in text
  rename_bounds(workdir, "full", lower="full_voco")
  text = report.write_report(workdir).read_text()
  assert "(voco - full_voco) / (full - full_voco)" in text
  assert "| **retention** (bounds: full) |  |  | **94.5 %** |" in text


def test_llava_is_a_further_row(make_workdir):
  workdir = make_workdir()
  path = workdir / "evaluation" / "upper.json"
  entry = json.loads(path.read_text())
  entry |= {"phase": "full", "accuracy": 0.75, "correct": 180}
  path.with_name("full.json").write_text(json.dumps(entry))
  text = report.write_report(workdir).read_text()
  assert "| **retention** |  |  | **94.5 %** |" in text
  assert "| full: LLaVA, text sees every patch, no VoCo tokens | 180 |" in text
  assert "not the paper's" not in text


def test_bounds_of_two_phases_are_none(make_workdir):
  workdir = make_workdir()
  rename_bounds(workdir, "full", upper="full")
  text = report.write_report(workdir).read_text()
  assert "No retention: evaluation/upper.json not found." in text


def test_a_run_that_diverged(make_workdir):
  workdir = make_workdir()
  path = workdir / "voco" / "metrics.jsonl"
  lines = path.read_text().splitlines()
  last = json.loads(lines[-1])
  for loss in ("NaN", "null", "Infinity"):
    line = json.dumps(last | {"loss": 0.5}).replace("0.5", loss)
    path.write_text("\n".join([*lines[:-1], line]) + "\n")
    text = report.write_report(workdir).read_text()
    assert f"| {'inf' if loss == 'Infinity' else 'nan'} |" in text


def test_nothing_wrong(make_workdir):
  workdir = make_workdir(wrong=0)
  text = report.write_report(workdir).read_text()
  assert "No question of the test was answered wrong." in text


def test_command_of_the_run_is_repeated(make_workdir):
  workdir = make_workdir()
  path = workdir / "evaluation" / "voco.json"
  voco = json.loads(path.read_text())
  voco["provenance"]["command"] = "python -m vocojax.train --config=mine.py"
  path.write_text(json.dumps(voco))
  text = report.write_report(workdir).read_text()
  assert "\npython -m vocojax.train --config=mine.py\n" in text


def test_steps_logged_again_after_a_resume_count_once(make_workdir):
  workdir = make_workdir()
  path = workdir / "voco" / "metrics.jsonl"
  again = json.loads(path.read_text().splitlines()[-1]) | {"loss": 0.125}
  with path.open("a") as file:
    file.write(json.dumps(again | {"step": 50}) + "\n")
    file.write(json.dumps(again) + "\n")
  text = report.write_report(workdir).read_text()
  assert "| 0.1250 |" in text


def test_samples_are_varied_and_wrong_ones_come_last():
  lines = conftest.predictions()
  ids = [f"test-{i}" for i in range(12)]
  chosen = report.choose_samples(lines, ids)
  right = [report.is_correct(x) for x in chosen]
  known = [x for x in lines if x["record_id"] in ids]
  wrong = min(4, sum(not report.is_correct(x) for x in known))
  assert wrong > 0
  assert right == [True] * (12 - wrong) + [False] * wrong
  assert len({x["record_id"] for x in chosen}) > 8
  assert {x["category"] for x in chosen} == {"yes/no", "colour", "shape"}


REQUIRED = (
  "evaluation/voco.json",
  "evaluation/voco.predictions.jsonl",
  "evaluation/attention.npz",
  "voco/config.json",
  "voco/metrics.jsonl",
)


@pytest.mark.parametrize("name", REQUIRED)
@pytest.mark.parametrize(
  "content",
  [
    *(None, b"", b'{"half', b"3\n", b"\xff\xfe", "pipe"),
    *(b"[" * 5000, b"9" * 5000, b'{"title": "\\ud800"}'),
  ],
)
def test_missing_or_corrupt_file_is_named(make_workdir, name, content):
  workdir = make_workdir()
  path = workdir / name
  path.unlink()
  if content == "pipe":
    os.mkfifo(path)
  elif content is not None:
    path.write_bytes(content)
  with raises(UserError) as error:
    report.write_report(workdir)
  assert error.value.where.startswith(str(path))
  assert not (workdir / "report.md").exists()


@pytest.mark.parametrize(
  ("change", "where", "got"),
  [
    ({"accuracy": "0.9"}, ": field accuracy", "'0.9'"),
    ({"accuracy": 10**400}, ": field accuracy", "1000"),
    ({"total": 0}, ": total", "0"),
    ({"by_category": []}, ": field by_category", "[]"),
    ({"by_category": {"a": {"total": 1}}}, ": field correct", "nothing"),
    ({"phase": "../../elsewhere"}, ": phase", "'../../elsewhere'"),
    ({"phase": "/etc"}, ": phase", "'/etc'"),
    ({"provenance": None}, ": field provenance", "None"),
  ],
)
def test_a_result_of_wrong_types(make_workdir, change, where, got):
  workdir = make_workdir()
  path = workdir / "evaluation" / "voco.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  with raises(UserError, where, got, fix="vocojax.evaluate") as e:
    report.write_report(workdir)
  assert e.value.where.startswith(str(path))


@pytest.mark.parametrize(
  "change",
  [
    {"images": np.zeros((12, 64, 64), np.uint8)},
    {"images": np.zeros((12, 64, 64, 3), np.float32)},
    {"attention": np.zeros((3, 3, 2, 1, 64), np.float32)},
    {"attention": np.zeros((12, 0, 2, 1, 64), np.float32)},
    {"attention": np.full((12, 3, 2, 1, 64), "a")},
    {"record_ids": np.array([{}] * 12)},
    {"record_ids": np.array([])},
  ],
)
def test_arrays_of_wrong_types(make_workdir, change):
  workdir = make_workdir()
  path = workdir / "evaluation" / "attention.npz"
  np.savez(path, **dict(np.load(path)) | change)
  with raises(UserError, "attention.npz", fix="vocojax.evaluate"):
    report.write_report(workdir)


def test_arrays_that_unpack_to_much(make_workdir):
  workdir = make_workdir()
  path = workdir / "evaluation" / "attention.npz"
  arrays = dict(np.load(path)) | {"images": np.zeros((12, 2000, 2000, 3), "u1")}
  np.savez_compressed(path, **arrays)
  assert path.stat().st_size < 2**20
  with raises(UserError, "attention.npz", "bytes, packed"):
    report.write_report(workdir)


def test_a_full_or_read_only_disk(make_workdir, tmp_path):
  made = make_workdir()
  with disks.mounted(tmp_path / "disk", "8M") as disk:
    workdir = disk / "run"
    parts = ("evaluation", "upper", "voco")
    for name in parts:
      shutil.copytree(made / name, workdir / name)
    for leave in (0, 4096, 100_000):
      fill = disks.fill(disk, leave)
      with raises(UserError, got="No space left", fix="free some space"):
        report.write_report(workdir)
      names = {path.name for path in workdir.rglob("*") if path.is_file()}
      assert not any("part" in name or "lock" in name for name in names)
      assert "report.md" not in names
      fill.unlink()
    disks.remount(disk, "ro")
    with raises(UserError, got="Read-only file system"):
      report.write_report(workdir)
    disks.remount(disk, "rw")
    assert report.write_report(workdir).is_file()


def test_broken_line_is_numbered(make_workdir):
  workdir = make_workdir()
  path = workdir / "voco" / "metrics.jsonl"
  lines = path.read_text().splitlines()
  path.write_text("\n".join([*lines[:3], '{"step": 30}', *lines[3:]]))
  with raises(UserError, "metrics.jsonl:4: field loss", "nothing"):
    report.write_report(workdir)


def test_predictions_of_another_evaluation(make_workdir):
  workdir = make_workdir()
  path = workdir / "evaluation" / "voco.predictions.jsonl"
  path.write_text("\n".join(path.read_text().splitlines()[:-1]))
  expected = "233 of 240, as in voco.json"
  with raises(UserError, path.name, "232 right of 239", expected):
    report.write_report(workdir)


def test_attention_that_is_no_square(make_workdir):
  workdir = make_workdir()
  path = workdir / "evaluation" / "attention.npz"
  arrays = dict(np.load(path))
  np.savez(path, **arrays | {"attention": arrays["attention"][..., :60]})
  with raises(UserError, "attention map", "60 patches"):
    report.write_report(workdir)
