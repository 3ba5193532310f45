"""The paper's tables from files on disk: its own scores give its own rates."""

import json
import os
import re

import pytest

from tests import disks
from tests.evals import results
from tests.evals.results import made, row, rows, section, write_seeds
from tests.evals.test_retention import BOUNDS, TABLE_1
from tests.fields import raises
from vocojax.errors import UserError
from vocojax.evals import tables

NAMES = dict(
  zip(
    BOUNDS,
    ("gqa", "mmbench", "mme", "pope", "seed", "scienceqa", "vqav2"),
    strict=True,
  )
)
# k: MMB, GQA, VQAv2, SEED of the paper's table 2; mean retention by hand; as
# published.
SWEEP = {
  128: ((61.0, 59.8, 76.9, 59.1), "97.7", 97.7),
  64: ((60.5, 60.4, 75.4, 56.3), "93.7", 93.7),
  32: ((59.4, 60.2, 75.3, 56.2), "92.6", 92.6),
  16: ((58.6, 59.4, 75.4, 56.2), "91.3", 91.3),
  8: ((58.7, 59.2, 75.3, 56.3), "91.2", 91.3),
  4: ((60.4, 58.4, 74.5, 56.0), "90.5", 90.4),
  2: ((60.1, 57.7, 73.5, 55.0), "87.7", 87.8),
  1: ((58.8, 57.0, 72.3, 53.7), "83.8", 83.8),
}


def write_published_bounds(folder):
  values = results.config("upper", "voco_causal")
  for name, (lower, upper) in BOUNDS.items():
    results.benchmark(
      folder / "a", values, NAMES[name], {"score": upper}, use="upper"
    )
    results.benchmark(
      folder / "a", values, NAMES[name], {"score": lower}, use="lower"
    )


def test_table_1_of_the_paper(tmp_path):
  write_published_bounds(tmp_path)
  labels = {"VoCo": "voco", "AvgPool": "avgpool", "Q-Former": "qformer"}
  for method, (scores, _) in TABLE_1.items():
    values = results.config(labels[method], labels[method])
    for name, score in zip(BOUNDS, scores, strict=True):
      results.benchmark(
        tmp_path / method, values, NAMES[name], {"score": score}
      )
  text = made(tmp_path)
  for label, average in (
    ("VoCo-1", 83.7),
    ("avg-pool-1", 64.1),
    ("Q-Former-1", 57.2),
  ):
    cells = row(text, "Table 1", label)
    assert cells[-1] == f"{average} %"
    published = row(text, "Table 1", f"{label}, paper")
    assert published[1:] == cells[1:]
  for label in ("upper bound", "lower bound"):
    published = row(text, "Table 1", f"{label}, paper")
    assert published[1:] == row(text, "Table 1", label)[1:]
  kept = [x.split("<br>")[1] for x in row(text, "Table 1", "VoCo-1")[1:-1]]
  published = (82.5, 87.5, 81.2, 88.4, 80.0, 81.0, 85.2)
  assert kept == [f"{value} %" for value in published]
  # Scores stand under their own names, above retention.
  [header] = rows(text, "Table 1")["model"]
  assert dict(zip(header, row(text, "Table 1", "VoCo-1"), strict=True))[
    "MME"
  ].startswith("1323.3<br>81.2")


def test_table_2_of_the_paper(tmp_path):
  write_published_bounds(tmp_path)
  for k, (scores, _, _) in SWEEP.items():
    values = results.config("voco", "voco", k=k)
    for name, score in zip(
      ("MMB", "GQA", "VQAv2", "SEED"), scores, strict=True
    ):
      results.benchmark(
        tmp_path / f"k{k}", values, NAMES[name], {"score": score}
      )
  text = made(tmp_path)
  for k, (_, by_hand, published) in SWEEP.items():
    assert row(text, "Table 2", f"VoCo-{k}")[-1] == f"{by_hand} %"
    # Scores are published with one decimal.
    assert float(by_hand) == pytest.approx(published, abs=0.11)
    assert row(text, "Table 2", f"VoCo-{k}, paper")[-1] == f"{published} %"
  assert "105.7 %" in row(text, "Table 2", "VoCo-128")[4]


def test_other_uses(tmp_path):
  results.bounds(tmp_path / "a", 0.5, 1.0, k=8)
  values = results.config("voco", "voco", k=8)
  values["model"]["compressor"]["train_num_voco_tokens"] = "elastic"
  uses = {"": 0.9, "_m4": 0.8, "_m1": 0.7, "_adaptive": 0.85, "_int8": 0.89}
  for use, accuracy in uses.items():
    results.evaluation(tmp_path / "a", values, f"voco{use}", accuracy)
  read = {"mean_k": 2.34}
  results.evaluation(tmp_path / "a", values, "voco_adaptive", 0.85, **read)
  # Bounds used otherwise are no bounds.
  values = results.config("upper", "voco_causal", k=8)
  for name, accuracy in (("upper_int8", 0.8), ("lower_int8", 0.2)):
    results.evaluation(tmp_path / "a", values, name, accuracy)
  text = made(tmp_path)
  found = {x: y[0][1] for x, y in rows(text, "Table 4").items()}
  ours = {x: y for x, y in found.items() if x.startswith("VoCo-8")}
  assert ours == {
    "VoCo-8 elastic, cut to 1": "70.0<br>40.0 %",
    "VoCo-8 elastic, cut to 4": "80.0<br>60.0 %",
    "VoCo-8 elastic, adaptive, 2.3 tokens on average": "85.0<br>70.0 %",
    "VoCo-8 elastic, int8": "89.0<br>78.0 %",
  }
  first = rows(text, "Table 1")
  assert "VoCo-8 elastic" in first and "VoCo-8 elastic, int8" not in first
  assert row(text, "Table 4", "VoCo-32, cut to 4, paper")[-1] == "88.0 %"


def test_kinds_of_questions(tmp_path):
  parts = {"color": 0.9, "shape": 0.6}
  values = results.config("upper", "voco_causal")
  for name, factor in (("upper", 1.0), ("lower", 0.5)):
    results.evaluation(
      tmp_path, values, name, 0.8, {x: factor * y for x, y in parts.items()}
    )
  values = results.config("voco", "voco")
  kinds = {"color": 0.9, "shape": 0.45}
  results.evaluation(tmp_path, values, "voco", 0.8, kinds)
  cells = row(made(tmp_path), "easy_vqa by kind", "VoCo-1")
  assert cells[1:] == ["90.0<br>100.0 %", "45.0<br>50.0 %", "75.0 %"]


def test_efficiency(tmp_path):
  write_seeds(tmp_path, [(0.5, 0.9, 1.0)])
  costs = {"none": (0, 0, 0.4, 4e12), "full": (9, 8e6, 0.2, 2e12)}
  costs["voco"] = (1, 1e6, 0.1, 1e12)
  fields = "cached_tokens cached_bytes seconds operations".split()
  lines = [
    dict(zip(fields, numbers, strict=True))
    | {"size": "tiny", "way": way, "text_length": 32, "answer_length": 16}
    for way, numbers in costs.items()
  ]
  path = tmp_path / "efficiency.json"
  path.write_text(json.dumps({"rows": lines}))
  text = made(tmp_path)
  found = rows(text, "Table 7")
  assert found["tiny, text of 32 + 16 tokens"] == [
    ["no cache", "0", "0", "400.0", "4"],
    ["full cache", "9", "8", "200.0 (50.0 %)", "2 (50.0 %)"],
    ["VoCo cache", "1", "1 (87.5 %)", "100.0 (75.0 %)", "1 (75.0 %)"],
  ]
  # As published.
  assert found["7B, paper"][2][2:] == [
    "0.525 (99.8 %)",
    "134.0 (69.6 %)",
    "0.5 (94.8 %)",
  ]
  path.write_text(json.dumps({"rows": lines[1:]}))
  with raises(UserError, "32 + 16 tokens", "no row of way 'none'"):
    tables.write_tables(tmp_path)
  for bad, where in (
    ([lines[0], {}], ": rows[1]: field size"),
    ([lines[0] | {"operations": "1"}], ": rows[0]: field operations"),
    ([3], ": rows[0]"),
    ({}, ": field rows"),
  ):
    path.write_text(json.dumps({"rows": bad}))
    with raises(UserError, f"efficiency.json{where}", fix="benchmarks.eff"):
      tables.write_tables(tmp_path)


def test_video(tmp_path):
  values = results.config("voco", "voco", k=2)
  judged = {"judge_accuracy": 50.25, "judge_score": 2.5, "match": 30.0}
  results.benchmark(tmp_path, values, "msvd_qa", judged)
  results.benchmark(tmp_path, values, "msrvtt_qa", {"match": 20.0})
  text = made(tmp_path)
  assert row(text, "Table 8", "VoCo-2") == [
    *("64", "2", "1", "50.2 / 2.5", "match 20.0", "-"),
  ]
  published = rows(text, "Table 8")["VoCo, paper"]
  assert published[0][3:5] == ["72.3 / 3.9", "61.1 / 3.5"]
  assert "VoCo-2" not in rows(text, "Table 1")


@pytest.mark.parametrize(
  "content",
  [
    *(b"", b'{"half', b"3", b"\xff\xfe", b"{}", "pipe"),
    *(b"[" * 5000, b'{"a": ' * 900 + b"1" + b"}" * 900, b"9" * 5000),
  ],
)
@pytest.mark.parametrize(
  "name", ["evaluation/voco.json", "voco/config.json", "result.json"]
)
def test_a_bad_file_is_named(tmp_path, name, content):
  values = results.config("voco", "voco")
  results.evaluation(tmp_path / "a", values, "voco", 0.9)
  path = tmp_path / "a" / name
  if name == "result.json":
    path = results.benchmark(tmp_path / "b", values, "gqa", {"accuracy": 50.0})
  path.unlink()
  if content == "pipe":
    os.mkfifo(path)
  else:
    path.write_bytes(content)
  with raises(UserError) as error:
    tables.write_tables(tmp_path)
  assert error.value.where.startswith(str(path))
  assert not (tmp_path / "tables.md").exists()


@pytest.mark.parametrize(
  ("change", "where"),
  [
    ({"accuracy": None}, ": field accuracy"),
    ({"accuracy": 10**400}, ": field accuracy"),
    ({"by_category": {"a": 3}}, ": by_category: 'a'"),
    ({"by_category": {"a": {"correct": 1, "total": 0}}}, ": by_category: 'a'"),
    ({"checkpoint": "7"}, ": checkpoint"),
    ({"checkpoint": ["7"]}, ": field checkpoint"),
    ({"provenance": "x"}, ": field provenance"),
    ({"mean_k": "4"}, ": field mean_k"),
    ({"name": 4}, ": field name"),
  ],
)
def test_a_result_of_wrong_types(tmp_path, change, where):
  values = results.config("voco", "voco")
  path = results.evaluation(tmp_path, values, "voco", 0.9)
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  with raises(UserError, f"voco.json{where}", fix="evaluate that checkpoint"):
    tables.write_tables(tmp_path)


@pytest.mark.parametrize(
  ("group", "change", "where"),
  [
    ("", {"seed": "0"}, ": field seed"),
    ("", {"model": []}, ": field model"),
    ("", {"init_from": 3}, ": field init_from"),
    ("", {"training": 3}, ": field training"),
    ("data", {"source": None}, ": data: field source"),
    ("data", {"grid_size": "2"}, ": data: field grid_size"),
    ("model", {"compressor": {}}, ": model.compressor: field name"),
    ("training", {"distill_weight": "1"}, ": training: field distill_weight"),
    ("training", {"teacher": {}}, ": training: field teacher"),
    ("evaluation", {"max_records": []}, ": evaluation: field max_records"),
  ],
)
def test_a_config_of_wrong_types(tmp_path, group, change, where):
  values = results.config("voco", "voco")
  (values[group] if group else values).update(change)
  broken = json.dumps(values)
  values = results.config("voco", "voco")
  results.evaluation(tmp_path, values, "voco", 0.9)
  (tmp_path / "voco" / "config.json").write_text(broken)
  with raises(UserError, f"config.json{where}", fix="copy it from beside"):
    tables.write_tables(tmp_path)


def test_a_folder_of_any_name(tmp_path):
  """Names of files are bytes, of which some are no text."""
  folder = tmp_path / os.fsdecode(b"caf\xe9")
  write_seeds(folder, [(0.5, 0.9, 1.0)])
  assert "caf\\udce9/s0/evaluation" in made(tmp_path)


def test_a_full_or_read_only_disk(tmp_path):
  with disks.mounted(tmp_path / "disk", "4M") as disk:
    write_seeds(disk, [(0.5, 0.9, 1.0)])
    for leave in (0, 4096, 12_000):
      fill = disks.fill(disk, leave)
      with raises(UserError, got="No space left", fix="free some space"):
        tables.write_tables(disk)
      assert not list(disk.rglob("*.part")) + list(disk.rglob("tables.md"))
      fill.unlink()
    disks.remount(disk, "ro")
    with raises(UserError, got="Read-only file system"):
      tables.write_tables(disk)
    disks.remount(disk, "rw")
    assert tables.write_tables(disk).is_file()


def test_a_missing_config_is_named(tmp_path):
  values = results.config("voco", "voco")
  results.evaluation(tmp_path, values, "voco", 0.9)
  (tmp_path / "voco" / "config.json").unlink()
  with raises(UserError, "voco/config.json", "no such file"):
    tables.write_tables(tmp_path)


def test_an_unknown_name_is_refused(tmp_path):
  values = results.config("voco", "voco")
  results.evaluation(tmp_path, values, "mystery", 0.9)
  with raises(UserError, "mystery.json: name", "'mystery'"):
    tables.write_tables(tmp_path)


def test_nothing_found(tmp_path):
  with raises(UserError, got="no results", fix="python -m vocojax.evaluate"):
    tables.write_tables(tmp_path)
  with raises(UserError, "nowhere", "no such folder"):
    tables.write_tables(tmp_path / "nowhere")


def test_sources(tmp_path):
  write_seeds(tmp_path, [(0.5, 0.9, 1.0)])
  text = section(made(tmp_path), "Sources")
  assert re.search(
    r"\| s0/evaluation/voco\.json \| VoCo-1 \| easy_vqa \| 0 \| "
    r"voco/checkpoints/100 \| 0123abc \| 1 x cpu \|",
    text,
  )
  assert results.HOME not in text
