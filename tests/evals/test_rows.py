"""Rows of tables: seeds joined, bounds found, settings told apart by name.

Read next: test_tables.py.
"""

import json

import numpy as np
import pytest

from tests.evals import results
from tests.evals.results import made, row, rows, section, write_seeds
from vocojax.evals import intervals


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
  assert "lack a result `upper` or `lower`" in section(text, "Table 1")


def test_bounds_of_before_are_labelled(tmp_path):
  """When `full` was the upper bound, and the lower one its weights."""
  values = results.config("voco", "voco")
  results.evaluation(tmp_path / "a", values, "voco", 0.9)
  results.old_bounds(tmp_path / "a", 0.5, 1.0)
  text = made(tmp_path)
  assert row(text, "Table 1", "VoCo-1")[1:3] == [
    "90.0<br>80.0 % (bounds: full)",
    "80.0 % (bounds: full)",
  ]
  for label, score, kept in (
    ("LLaVA, all patches", "100.0", "100.0"),
    ("LLaVA's weights under the VoCo mask", "50.0", "0.0"),
  ):
    cells = row(text, "Table 1", label)
    assert cells[1] == f"{score}<br>{kept} % (bounds: full)"
  assert "is not the paper's" in section(text, "Table 1")
  # Made anew, those weights have a name of their own, and it is the same.
  path = tmp_path / "a" / "evaluation" / "lower.json"
  entry = json.loads(path.read_text()) | {"name": "full_voco"}
  path.unlink()
  path.with_name("full_voco.json").write_text(json.dumps(entry))
  again = made(tmp_path)
  assert section(again, "Table 1") == section(text, "Table 1")


def test_of_equally_near_bounds_the_papers(tmp_path):
  values = results.config("voco", "voco")
  results.evaluation(tmp_path / "a" / "voco", values, "voco", 0.9)
  results.old_bounds(tmp_path / "a" / "full", 0.5, 1.0)
  results.bounds(tmp_path / "a" / "upper", 0.4, 1.0)
  text = made(tmp_path)
  assert row(text, "Table 1", "VoCo-1")[1] == "90.0<br>83.3 %"
  assert row(text, "Table 1", "upper bound")[1] == "100.0<br>100.0 %"
  # Those of its own workdir are nearer.
  cells = row(text, "Table 1", "LLaVA, all patches")
  assert cells[1] == "100.0<br>100.0 % (bounds: full)"
  # The nearer ones are those of the same study.
  results.evaluation(tmp_path / "b", values, "voco", 0.9)
  results.old_bounds(tmp_path / "b", 0.5, 1.0)
  text = made(tmp_path)
  assert row(text, "Table 1", "VoCo-1")[1] == (
    "90.0<br>81.7 % (bounds: full in part)"
  )


def test_a_bound_without_its_other_is_none(tmp_path):
  """The upper bound of one kind does not go with the lower one of another."""
  values = results.config("voco", "voco")
  results.evaluation(tmp_path, values, "voco", 0.9)
  results.bounds(tmp_path, 0.4, 1.0)
  results.old_bounds(tmp_path, 0.5, 1.0)  # its `lower` replaces the other
  (tmp_path / "evaluation" / "full.json").unlink()
  assert row(made(tmp_path), "Table 1", "VoCo-1")[1] == "90.0<br>no bounds"


def test_a_layout_is_no_method(tmp_path):
  """`full` with prompt layout voco_v1 is not `full_voco`."""
  values = results.config("full", "full")
  results.evaluation(tmp_path, values, "full_voco_v1", 0.9)
  results.evaluation(tmp_path, values, "full_voco_voco_v1", 0.8)
  results.evaluation(tmp_path, values, "full_voco", 0.7)
  found = rows(made(tmp_path), "Table 4")
  assert found["LLaVA, all patches, voco_v1"][0][1].startswith("90.0<br>")
  label = "LLaVA's weights under the VoCo mask"
  assert found[f"{label}, voco_v1"][0][1].startswith("80.0<br>")
  assert row(made(tmp_path), "Table 1", label)[1].startswith("70.0<br>")


def test_phases_that_start_from_each_other(tmp_path):
  """They would be read for ever."""
  for one, other in (("a", "b"), ("b", "a")):
    origin = f"{results.HOME}/{tmp_path.name}/{other}"
    values = results.config(one, "voco", init_from=origin)
    results.write_phase(tmp_path, values)
  results.evaluation(tmp_path, values, "voco", 0.9)
  assert row(made(tmp_path), "Table 1", "VoCo-1")[0] == "1"


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


def test_distillation_is_named(tmp_path):
  for weight in (0.0, 0.5):
    values = results.config("voco", "voco")
    values["training"]["distill_weight"] = weight
    values["training"]["teacher"] = f"{results.HOME}/x/full"
    results.evaluation(tmp_path / f"l{weight}", values, "voco", 0.9)
  found = rows(made(tmp_path), "Table 1")
  assert {"VoCo-1", "VoCo-1, distilled 0.5 from full"} <= set(found)
