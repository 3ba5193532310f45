"""The pictures beside the tables: what is drawn, point by point."""

import numpy as np
import pytest

from tests.evals import results
from tests.evals.test_report import assert_drawn
from vocojax.evals import paper, plots, table_plots, tables


@pytest.fixture
def draw(tmp_path, monkeypatch):
  """Writes the tables; returns the figures by name."""
  figures = {}

  def keep(figure, path):
    figures[path.stem] = figure
    plots.save(figure, path)

  def write():
    monkeypatch.setattr(table_plots, "save", keep)
    text = tables.write_tables(tmp_path).read_text()
    for name in figures:
      assert f"](tables/{name}.png)" in text
      assert_drawn(tmp_path / "tables" / f"{name}.png")
    return figures

  return write


def evaluate(folder, name, scores, k=1, **distill):
  """A result of compressor `voco` for each seed."""
  for seed, score in enumerate(scores):
    values = results.config("voco", "voco", seed, k=k)
    values["training"] |= distill
    results.evaluation(folder / f"{name}_s{seed}", values, "voco", score)


def assert_points(line, expected):
  np.testing.assert_allclose(line.get_xydata(), expected)


def band(axis, index):
  """Lowest and highest of a band at its first x."""
  vertices = axis.collections[index].get_paths()[0].vertices
  x = vertices[:, 0].min()
  ys = vertices[vertices[:, 0] == x, 1]
  return ys.min(), ys.max()


def test_bars_with_their_intervals(tmp_path, draw):
  results.bounds(tmp_path / "b", 0.5, 1.0)
  evaluate(tmp_path, "a", (0.9, 0.92, 0.94))
  figures = draw()
  assert set(figures) == {"methods"}
  [axis] = figures["methods"].axes
  labels = [x.get_text() for x in axis.get_yticklabels()]
  assert labels == ["upper bound", "VoCo-1", "lower bound"]
  bars = {
    labels[round(bar.get_y() + bar.get_height() / 2)]: bar.get_width()
    for bar in axis.patches
  }
  assert bars == pytest.approx(
    {"upper bound": 100, "VoCo-1": 92, "lower bound": 50}
  )
  texts = [x.get_text() for x in axis.texts]
  assert texts == ["100.0", "92.0 ± 5.0", "50.0"]
  [whisker] = axis.collections  # the bounds have one seed
  [[left, right]] = whisker.get_segments()
  # 4.303 * 2 / sqrt(3) on either side, at the second bar.
  assert left == pytest.approx([92 - 4.969, 1], abs=1e-3)
  assert right == pytest.approx([92 + 4.969, 1], abs=1e-3)


def test_sweep_has_a_band_and_the_papers_line(tmp_path, draw):
  for seed in range(3):
    results.bounds(tmp_path / f"b{seed}", 0.5, 1.0, seed)
  evaluate(tmp_path, "k1", (0.8, 0.82, 0.84))
  evaluate(tmp_path, "k4", (0.9, 0.9, 0.9), k=4)
  mean, score = draw()["sweep"].axes[:2]
  ours, published = mean.lines
  assert_points(ours, [(1, 64), (4, 80)])
  assert band(mean, 0) == pytest.approx((64 - 9.938, 64 + 9.938), abs=1e-2)
  expected = sorted((k, a) for k, (_, a) in paper.SWEEP.items())
  assert_points(published, expected)
  assert_points(score.lines[0], [(1, 82), (4, 90)])
  assert band(score, 0) == pytest.approx((82 - 4.969, 82 + 4.969), abs=1e-2)
  levels = {x.get_text(): x.get_position()[1] for x in score.texts}
  assert levels == pytest.approx({"upper bound": 100, "lower bound": 50})


def test_cut_tokens_are_a_line_of_their_own(tmp_path, draw):
  evaluate(tmp_path, "k8", (0.9,), k=8)
  values = results.config("voco", "voco", k=8)
  for m, accuracy in ((1, 0.7), (4, 0.8)):
    results.evaluation(tmp_path / "k8_s0", values, f"voco_m{m}", accuracy)
  _, score = draw()["sweep"].axes[:2]
  [line] = score.lines  # k = 8 alone makes no line of what was trained
  assert line.get_label() == "VoCo-8, cut"
  assert_points(line, [(1, 70), (4, 80), (8, 90)])


def test_distillation(tmp_path, draw):
  evaluate(tmp_path, "none", (0.8, 0.82))
  for weight in (0.5, 2.0):
    evaluate(
      tmp_path,
      f"l{weight}",
      (0.9, 0.9 + 0.02 * weight),
      distill_weight=weight,
      teacher="runs/a/full",
    )
  figures = draw()
  assert set(figures) == {"methods", "distillation"}
  [axis] = figures["distillation"].axes
  [line] = axis.lines
  assert line.get_label() == "VoCo-1, teacher full"
  assert_points(line, [(0, 81), (0.5, 90.5), (2, 92)])
