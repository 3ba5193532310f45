"""The paper's tables from files on disk: its own scores give its own rates."""

import json
import re

import numpy as np
import pytest

from tests.evals import results
from tests.evals.test_retention import BOUNDS, TABLE_1
from vocojax.errors import UserError
from vocojax.evals import intervals, tables

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


def section(text, title):
  """What stands under a heading that begins so."""
  [found] = [x for x in text.split("\n## ") if x.startswith(title)]
  return found


def rows(text, title):
  """Cells of the rows of a section, by their first cell; a list of each."""
  found = {}
  for line in section(text, title).splitlines():
    if line.startswith("| "):
      label, *cells = (x.strip() for x in line.strip("| ").split(" | "))
      found.setdefault(label, []).append(cells)
  return found


def row(text, title, label):
  [cells] = rows(text, title)[label]
  return cells


def made(folder):
  path = tables.write_tables(folder)
  assert path == folder / "tables.md"
  return path.read_text()


def write_published_bounds(folder):
  values = results.config("full", "full")
  for name, (lower, upper) in BOUNDS.items():
    results.benchmark(folder / "a", values, NAMES[name], {"score": upper})
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


def write_seeds(folder, scores):
  """(lower, voco, upper) of each seed, each seed in its workdir."""
  for seed, (lower, voco, upper) in enumerate(scores):
    results.bounds(folder / f"s{seed}", lower, upper, seed)
    values = results.config("voco", "voco", seed)
    results.evaluation(folder / f"s{seed}", values, "voco", voco)


def test_seeds_are_one_row_with_an_interval(tmp_path):
  write_seeds(tmp_path, [(0.5, 0.9, 1.0), (0.5, 0.92, 1.0), (0.5, 0.94, 1.0)])
  # 4.303 * 2 / sqrt(3), and twice that for retention, 2 * (x - 50).
  assert row(made(tmp_path), "Table 1", "VoCo-1") == [
    "3",
    "92.0 ± 5.0<br>84.0 ± 9.9 %",
    "84.0 ± 9.9 %",
    "83.7 %",
  ]


def test_retention_is_of_each_seed(tmp_path):
  write_seeds(tmp_path, [(0.4, 0.8, 0.8), (0.2, 0.32, 0.4)])
  # 100 and 60; of the means it would be 86.7. 12.706 * 28.28 / sqrt(2).
  cells = row(made(tmp_path), "Table 1", "VoCo-1")
  assert cells[2] == "80.0 ± 254.1 %"


@pytest.mark.parametrize(
  ("count", "quantile"), [(2, 12.706), (3, 4.303), (6, 2.571), (31, 2.042)]
)
def test_interval_by_hand(count, quantile):
  values = [1.0] * (count - 1) + [1.0 + count]
  # Mean 2; squared deviations add up to count * (count - 1).
  found = intervals.mean(values)
  assert found.value == pytest.approx(2)
  assert found.half_width == pytest.approx(quantile)
  assert found.count == count


def test_interval_holds_the_truth_19_times_of_20():
  rng = np.random.default_rng(0)
  for count in (2, 4, 10):
    draws = [
      intervals.mean(x) for x in rng.normal(3, 2, (4000, count)).tolist()
    ]
    held = np.mean([abs(m.value - 3) <= m.half_width for m in draws])
    assert held == pytest.approx(0.95, abs=0.012)


def test_one_seed_has_no_interval(tmp_path):
  write_seeds(tmp_path, [(0.5, 0.9, 1.0)])
  cells = row(made(tmp_path), "Table 1", "VoCo-1")
  assert cells[:3] == ["1", "90.0<br>80.0 %", "80.0 %"]


def test_the_same_seed_twice_is_one(tmp_path):
  write_seeds(tmp_path, [(0.5, 0.9, 1.0)])
  values = results.config("voco", "voco")
  results.evaluation(tmp_path / "copy", values, "voco", 0.8)
  cells = row(made(tmp_path), "Table 1", "VoCo-1")
  assert cells[:2] == ["1", "85.0<br>70.0 %"]


def test_a_row_without_bounds_says_so(tmp_path):
  values = results.config("voco", "voco")
  results.evaluation(tmp_path / "a", values, "voco", 0.9)
  results.bounds(tmp_path / "b", 0.5, 1.0, seed=1)  # of another seed
  text = made(tmp_path)
  cells = row(text, "Table 1", "VoCo-1")
  assert cells[1:3] == ["90.0<br>no bounds", "-"]
  assert "lack a result `full` or `lower`" in section(text, "Table 1")


def test_a_useless_upper_bound_is_named(tmp_path):
  write_seeds(tmp_path, [(0.5, 0.9, 0.5)])
  cells = row(made(tmp_path), "Table 1", "VoCo-1")
  assert cells[1:3] == ["90.0<br>upper bound not above lower", "-"]


def test_the_nearest_bounds_of_the_seed(tmp_path):
  write_seeds(tmp_path / "near", [(0.5, 0.9, 1.0)])
  results.bounds(tmp_path / "far" / "full", 0.1, 0.95)
  values = results.config("avgpool", "avgpool")
  results.evaluation(tmp_path / "far" / "pool", values, "avgpool", 0.8)
  text = made(tmp_path)
  assert row(text, "Table 1", "VoCo-1")[1] == "90.0<br>80.0 %"
  # 70 of 85.
  assert row(text, "Table 1", "avg-pool-1")[1] == "80.0<br>82.4 %"
  # As near to one as to the other, with other scores; then with the same.
  values = results.config("qformer", "qformer")
  results.evaluation(tmp_path / "elsewhere", values, "qformer", 0.6)
  text = made(tmp_path)
  cells = row(text, "Table 1", "Q-Former-1")
  assert cells[1:3] == ["60.0<br>several bounds", "-"]
  assert "'several bounds' lie as near" in section(text, "Table 1")
  results.bounds(tmp_path / "far" / "full", 0.5, 1.0)
  cells = row(made(tmp_path), "Table 1", "Q-Former-1")
  assert cells[1] == "60.0<br>20.0 %"


def test_rates_are_between_their_own_bounds(tmp_path):
  """As `vocojax.report runs/rates` finds them, see benchmarks/study.py."""
  for rate, scores in (
    (0.01, (0.2, 0.6, 0.7)),
    (0.02, (0.3, 0.7, 0.8)),
    (0.04, (0.1, 0.5, 0.6)),
  ):
    lower, middle, upper = scores
    folder = tmp_path / str(rate) / "seed0"
    change = {"optimizer__learning_rate": rate}
    results.bounds(folder / "full", lower, upper, **change)
    values = results.config("voco", "voco", **change)
    results.evaluation(folder / "voco_1", values, "voco", middle)
  text = made(tmp_path)
  for rate in (0.01, 0.02, 0.04):
    label = f"VoCo-1, voco.optimizer.learning_rate={rate}"
    assert row(text, "Table 1", label)[1].endswith("<br>80.0 %")


def test_average_says_of_how_many(tmp_path):
  write_seeds(tmp_path, [(0.5, 0.9, 1.0)])
  values = results.config(
    "voco", "voco", k=1, data__source="grid_vqa", data__grid_size=3
  )
  results.evaluation(tmp_path / "grid", values, "voco", 0.7)
  text = made(tmp_path)
  [header] = [x for x in rows(text, "Table 1")["model"] if "easy_vqa" in x]
  assert header[1:3] == ["easy_vqa", "grid_vqa 3x3"]
  cells = row(text, "Table 1", "VoCo-1")
  assert cells[1:4] == ["90.0<br>80.0 %", "70.0<br>no bounds", "80.0 % of 1"]


def test_average_is_of_seeds_that_have_all_columns(tmp_path):
  write_seeds(tmp_path, [(0.5, 0.9, 1.0), (0.5, 0.6, 1.0)])
  grid = {"data__source": "grid_vqa", "data__grid_size": 2}
  results.bounds(tmp_path / "g0", 0.5, 1.0, **grid)
  values = results.config("voco", "voco", **grid)
  results.evaluation(tmp_path / "g0", values, "voco", 0.8)
  # 80 and 60 of seed 0; seed 1 has 20 in one column.
  assert row(made(tmp_path), "Table 1", "VoCo-1")[3] == "70.0 %"


def test_other_settings_are_other_rows(tmp_path):
  for steps, accuracy in ((100, 0.8), (300, 0.9)):
    values = results.config("voco", "voco", training__steps=steps)
    results.evaluation(tmp_path / f"steps{steps}", values, "voco", accuracy)
  found = rows(made(tmp_path), "Table 1")
  assert found["VoCo-1, voco.training.steps=100"][0][1].startswith("80.0<br>")
  assert found["VoCo-1, voco.training.steps=300"][0][1].startswith("90.0<br>")


def test_what_most_have_is_not_named(tmp_path):
  """One row that differs leaves the names of the others as they are."""
  frozen, free = ["^vision/"], []
  for seed in (0, 1):
    folder = tmp_path / f"seed{seed}"
    results.bounds(folder / "full", 0.5, 1.0, seed, optimizer__freeze=frozen)
    for name, freeze, k in (
      ("voco_1", frozen, 1),
      ("voco_1_free", free, 1),
      ("voco_2", frozen, 2),
    ):
      values = results.config("voco", "voco", seed, k, optimizer__freeze=freeze)
      results.evaluation(folder / name, values, "voco", 0.8)
      # Another column has only one of them.
      if name == "voco_1":
        results.benchmark(folder / name, values, "gqa", {"accuracy": 50.0})
  text = made(tmp_path)
  found = {x for x in rows(text, "Table 1") if x.startswith("VoCo-")}
  other = "VoCo-1, voco.optimizer.freeze=[]"
  assert {"VoCo-1", "VoCo-2", other} < found
  assert len(rows(text, "Table 1")["VoCo-1"]) == 2  # and GQA
  assert row(text, "Table 2", "VoCo-2")[0] == "2"


def test_a_row_has_one_name_in_all_columns(tmp_path):
  for steps in (100, 300):
    values = results.config("voco", "voco", training__steps=steps)
    folder = tmp_path / f"steps{steps}"
    results.evaluation(folder, values, "voco", 0.8)
    if steps == 300:
      path = results.evaluation(folder, values, "voco", 0.7)
      other = json.loads(path.read_text()) | {"split": "validation"}
      path.with_name("voco_int8.json").write_text(json.dumps(other))
  found = rows(made(tmp_path), "Table 1")
  assert "VoCo-1, voco.training.steps=100" in found
  cells = found["VoCo-1"][0]  # as most results have it
  assert len([c for c in cells if "no bounds" in c]) == 2


def test_teachers_are_told_apart(tmp_path):
  for steps in (100, 300):
    teacher = results.config("full", "full", training__steps=steps)
    results.write_phase(tmp_path / f"teacher{steps}", teacher)
    values = results.config("voco", "voco")
    values["training"]["distill_weight"] = 0.5
    values["training"]["teacher"] = f"{results.HOME}/teacher{steps}/full"
    results.evaluation(tmp_path / f"voco{steps}", values, "voco", 0.9)
  found = rows(made(tmp_path), "Table 1")
  label = "VoCo-1, distilled 0.5 from full, teacher's full.training.steps="
  assert {f"{label}100", f"{label}300"} <= set(found)


def test_settings_of_the_phase_before_count(tmp_path):
  for steps, accuracy in ((100, 0.8), (300, 0.9)):
    name = f"run{steps}"
    first = results.config("full", "full", training__steps=steps)
    results.write_phase(tmp_path / name, first)
    values = results.config(
      "voco", "voco", init_from=f"{results.HOME}/{name}/full"
    )
    results.evaluation(tmp_path / name, values, "voco", accuracy)
  found = rows(made(tmp_path), "Table 1")
  assert "VoCo-1, full.training.steps=100" in found
  assert "VoCo-1, full.training.steps=300" in found


def test_what_only_costs_time_makes_no_other_row(tmp_path):
  for seed, batch in enumerate((32, 64)):
    values = results.config(
      "voco",
      "voco",
      seed,
      evaluation__batch_size=batch,
      training__log_every=seed + 1,
      data__num_workers=seed,
    )
    # k says nothing of a phase that shows everything.
    first = results.config("full", "full", seed, k=1 + seed)
    workdir = tmp_path / f"s{seed}"
    results.write_phase(workdir, first)
    values["init_from"] = f"{results.HOME}/s{seed}/full"
    results.evaluation(workdir, values, "voco", 0.9)
  assert row(made(tmp_path), "Table 1", "VoCo-1")[0] == "2"


def test_keys_of_another_version_do_no_harm(tmp_path):
  values = results.config("voco", "voco", news__key=[1, {"a": None}])
  del values["optimizer"]
  results.evaluation(tmp_path / "a", values, "voco", 0.9, brand_new=3)
  assert row(made(tmp_path), "Table 1", "VoCo-1")[0] == "1"


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
  values = results.config("full", "full", k=8)
  for name, accuracy in (("full_int8", 0.8), ("lower_int8", 0.2)):
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
  values = results.config("full", "full")
  for name, factor in (("full", 1.0), ("lower", 0.5)):
    results.evaluation(
      tmp_path, values, name, 0.8, {x: factor * y for x, y in parts.items()}
    )
  values = results.config("voco", "voco")
  kinds = {"color": 0.9, "shape": 0.45}
  results.evaluation(tmp_path, values, "voco", 0.8, kinds)
  cells = row(made(tmp_path), "easy_vqa by kind", "VoCo-1")
  assert cells[1:] == ["90.0<br>100.0 %", "45.0<br>50.0 %", "75.0 %"]


def test_distillation_is_named(tmp_path):
  for weight in (0.0, 0.5):
    values = results.config("voco", "voco")
    values["training"]["distill_weight"] = weight
    values["training"]["teacher"] = f"{results.HOME}/x/full"
    results.evaluation(tmp_path / f"l{weight}", values, "voco", 0.9)
  found = rows(made(tmp_path), "Table 1")
  assert {"VoCo-1", "VoCo-1, distilled 0.5 from full"} <= set(found)


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
  with pytest.raises(UserError, match=r"tiny, text .* lacks way .none., ex"):
    tables.write_tables(tmp_path)
  path.write_text(json.dumps({"rows": [lines[0], {}]}))
  with pytest.raises(UserError, match=r"efficiency\.json: rows\[1\]"):
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


@pytest.mark.parametrize("content", [b"", b'{"half', b"3", b"\xff\xfe", b"{}"])
@pytest.mark.parametrize(
  "name", ["evaluation/voco.json", "voco/config.json", "result.json"]
)
def test_a_bad_file_is_named(tmp_path, name, content):
  values = results.config("voco", "voco")
  results.evaluation(tmp_path / "a", values, "voco", 0.9)
  path = tmp_path / "a" / name
  if name == "result.json":
    path = results.benchmark(tmp_path / "b", values, "gqa", {"accuracy": 50.0})
  path.write_bytes(content)
  with pytest.raises(UserError) as error:
    tables.write_tables(tmp_path)
  assert str(path) in str(error.value)
  assert "\n" not in str(error.value)
  assert not (tmp_path / "tables.md").exists()


def test_a_missing_config_is_named(tmp_path):
  values = results.config("voco", "voco")
  results.evaluation(tmp_path, values, "voco", 0.9)
  (tmp_path / "voco" / "config.json").unlink()
  with pytest.raises(UserError, match=r"voco/config\.json: cannot be read"):
    tables.write_tables(tmp_path)


def test_an_unknown_name_is_refused(tmp_path):
  values = results.config("voco", "voco")
  results.evaluation(tmp_path, values, "mystery", 0.9)
  with pytest.raises(UserError, match=r"mystery\.json: name 'mystery'"):
    tables.write_tables(tmp_path)


def test_nothing_found(tmp_path):
  with pytest.raises(UserError, match=r"python -m vocojax\.evaluate"):
    tables.write_tables(tmp_path)
  with pytest.raises(UserError, match="no such folder"):
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
