"""The report of a made-up workdir: its numbers, pictures and complaints."""

import json
import statistics

import numpy as np
import pytest
from PIL import Image

from tests.evals import conftest
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


def test_categories(make_workdir):
  workdir = make_workdir()
  text = report.write_report(workdir).read_text()
  lines = conftest.predictions()
  columns = []
  for category in ("yes/no", "colour", "shape"):
    scores = []
    for name in ("lower", "voco", "full"):
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


@pytest.mark.parametrize("absent", [("full",), ("lower",), ("full", "lower")])
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
  path = workdir / "evaluation" / "full.json"
  full = json.loads(path.read_text()) | {"accuracy": 130 / 240, "correct": 130}
  path.write_text(json.dumps(full))
  text = report.write_report(workdir).read_text()
  assert "No retention: the upper bound (54.17 %) is not above" in text


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
@pytest.mark.parametrize("content", [None, b"", b'{"half', b"3\n", b"\xff\xfe"])
def test_missing_or_corrupt_file_is_named(make_workdir, name, content):
  workdir = make_workdir()
  path = workdir / name
  if content is None:
    path.unlink()
  else:
    path.write_bytes(content)
  with pytest.raises(UserError) as error:
    report.write_report(workdir)
  assert str(path) in str(error.value)
  assert "\n" not in str(error.value)
  assert not (workdir / "report.md").exists()


def test_broken_line_is_numbered(make_workdir):
  workdir = make_workdir()
  path = workdir / "voco" / "metrics.jsonl"
  lines = path.read_text().splitlines()
  path.write_text("\n".join([*lines[:3], '{"step": 30}', *lines[3:]]))
  with pytest.raises(UserError, match=r"metrics.jsonl, line 4: .*loss"):
    report.write_report(workdir)


def test_predictions_of_another_evaluation(make_workdir):
  workdir = make_workdir()
  path = workdir / "evaluation" / "voco.predictions.jsonl"
  path.write_text("\n".join(path.read_text().splitlines()[:-1]))
  with pytest.raises(UserError, match=r"232 right of 239, voco\.json has 233"):
    report.write_report(workdir)


def test_attention_that_is_no_square(make_workdir):
  workdir = make_workdir()
  path = workdir / "evaluation" / "attention.npz"
  arrays = dict(np.load(path))
  np.savez(path, **arrays | {"attention": arrays["attention"][..., :60]})
  with pytest.raises(UserError, match="60 patches"):
    report.write_report(workdir)
