"""The linear probe: on data whose answer is known, and on real questions."""

import collections

import easy_vqa
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.evals.test_report import assert_drawn
from tests.inference import engines
from vocojax.data import pipeline
from vocojax.data.sources import Record, make_source
from vocojax.data.tfds import grid_vqa
from vocojax.evals import look_plots, plots, probe

COLORS = np.array(["blue", "green", "red", "yellow"])


def synthetic(num_train, num_test, width, noise=0.1):
  """Features that hold a color linearly, far from 0, and the colors."""
  rng = np.random.default_rng(0)
  index = rng.integers(0, 4, num_train + num_test)
  x = rng.normal(0, 1, (4, width))[index]
  x = x + noise * rng.normal(0, 1, x.shape)
  x = (3 * x + 100).astype(np.float32)
  answers = COLORS[index]
  return x[:num_train], answers[:num_train], x[num_train:], answers[num_train:]


@pytest.mark.parametrize("width", [8, 500])  # fewer and more than images
def test_what_is_there_is_found(width):
  x, answers, held_out, truth = synthetic(200, 400, width)
  x[:, 3] = held_out[:, 3] = 7  # says nothing
  assert np.mean(probe.classify(x, answers, held_out) == truth) == 1


def test_noise_gives_chance():
  rng = np.random.default_rng(1)
  noise = rng.normal(0, 1, (8400, 20)).astype(np.float32)
  answers = rng.choice(COLORS, 8400)
  said = probe.classify(noise[:400], answers[:400], noise[400:])
  assert np.mean(said == answers[400:]) == pytest.approx(0.25, abs=0.02)


def test_penalty_suits_the_noise():
  """As many numbers as images, mostly noise: unpenalised it fits that."""
  x, answers, held_out, truth = synthetic(150, 2000, 150, noise=4.0)
  assert np.mean(probe.classify(x, answers, held_out) == truth) > 0.8


def test_units_of_features_do_not_matter():
  x, answers, held_out, _ = synthetic(150, 2000, 30, noise=4.0)
  rng = np.random.default_rng(4)
  scale, offset = np.exp(rng.normal(0, 2, 30)), rng.normal(0, 1000, 30)
  np.testing.assert_array_equal(
    probe.classify(x * scale + offset, answers, held_out * scale + offset),
    probe.classify(x, answers, held_out),
  )


@pytest.mark.parametrize("width", [4, 30])
def test_left_out_error_by_leaving_out(width):
  rng = np.random.default_rng(2)
  x, y = rng.normal(0, 1, (12, width)), rng.normal(0, 1, (12, 2))
  x -= x.mean(0)
  penalty, expected = 0.7, 0.0

  def solve(x, y):
    return np.linalg.solve(x.T @ x + penalty * np.eye(width), x.T @ y)

  for i in range(12):
    kept = np.arange(12) != i
    center, mean = x[kept].mean(0), y[kept].mean(0)
    weights = solve(x[kept] - center, y[kept] - mean)
    expected += np.sum((y[i] - mean - (x[i] - center) @ weights) ** 2)
  ridge = probe.Ridge(x, y)
  assert ridge.left_out_error(penalty) == pytest.approx(expected)
  held_out = rng.normal(0, 1, (3, width))
  np.testing.assert_allclose(
    ridge.predict(penalty, held_out),
    held_out @ solve(x, y - y.mean(0)) + y.mean(0),
  )


def record(*turns):
  return Record("r", (), tuple((turn,) for turn in turns))


def test_labels_of_grid_questions():
  grid, rng = next(iter(grid_vqa.grids(2, "test")))
  expected = {
    f"{attribute}, row {r + 1} column {c + 1}": cell[i] if cell else "none"
    for r, cells in enumerate(grid)
    for c, cell in enumerate(cells)
    for i, attribute in enumerate(("color", "shape"))
  }
  asked = grid_vqa.questions(grid, rng)
  assert probe.labels_of(record(*asked)) == expected
  # Another object says which one is meant.
  for attribute, answer in (("shape", "square"), ("color", "red")):
    question = f"what {attribute} is the object left of the red circle ?"
    assert probe.labels_of(record((question, answer))) == {}


def test_labels_of_easy_vqa():
  asked = collections.defaultdict(list)
  for question, answer, image in zip(
    *easy_vqa.get_test_questions(), strict=True
  ):
    asked[image].append((question, answer))
  colors = {"red", "green", "blue", "black", "gray", "teal", "brown", "yellow"}
  seen = collections.Counter()
  for turns in asked.values():
    labels = probe.labels_of(record(*turns))
    told = {answer for _, answer in turns} - {"yes", "no"}
    assert set(labels.values()) == told
    assert labels.get("color", "red") in colors
    seen.update(labels.keys())
  assert min(seen["color"], seen["shape"]) > 700


def test_scores():
  x, answers, held_out, truth = synthetic(300, 1000, 12)
  rng = np.random.default_rng(3)

  def data(features, words):
    noise = rng.normal(0, 1, (len(features), 5)).astype(np.float32)
    labels = [{"color": str(w)} for w in words]
    for known in labels[:10]:
      known["rare"] = "x"
    return probe.Read(features, noise, labels)

  found = probe.scores(data(x, answers), data(held_out, truth))
  assert set(found) == {"color"}  # too few tell the other
  score = found["color"]
  assert (score.num_train, score.num_test, score.num_answers) == (300, 1000, 4)
  assert score.accuracy["voco"] == 1
  assert score.accuracy["mean_patch"] == pytest.approx(0.25, abs=0.06)
  values, counts = np.unique(answers, return_counts=True)
  assert score.majority == np.mean(truth == values[counts.argmax()])


def test_shuffled_answers_give_chance():
  """Features are as many as in `test_scores`, but each image has its own."""
  x, answers, held_out, truth = synthetic(400, 4000, 12, noise=1.0)
  train = probe.Read(x, x, [{"color": str(w)} for w in answers])
  test = probe.Read(held_out, held_out, [{"color": str(w)} for w in truth])
  score = probe.scores(train, test)["color"]
  assert score.accuracy["voco"] > 0.9
  assert score.shuffled == pytest.approx(0.25, abs=0.06)


def test_only_images_of_which_it_is_known_count():
  x, answers, held_out, truth = synthetic(300, 200, 12)
  features = np.concatenate([-x, x])
  labels = [{}] * 300 + [{"color": str(w)} for w in answers]
  train = probe.Read(features, features, labels)
  test = probe.Read(held_out, held_out, [{"color": str(w)} for w in truth])
  score = probe.scores(train, test)["color"]
  assert score.num_train == 300 and score.accuracy["voco"] == 1


def test_read_is_the_state_of_each_image(tmp_path):
  config, model, params, _ = engines.setup(tmp_path, k=2)
  params = jax.tree.map(jnp.asarray, params)
  source = make_source(config, "train[:6]")
  found = probe.read(config, model, params, source, 5)  # batches of 4
  assert len(found.labels) == len(found.voco) == len(found.mean_patch) == 5
  images = [
    pixels[:1]
    for _, pixels in pipeline.eval_records(
      source, 64, config.data, config.prompt.layout
    )
  ]
  first = len(model.stream.before)
  for i in (0, 4):
    image = jnp.asarray(images[i])
    cache, _ = model.compress(params, image)
    state = np.concatenate([cache.keys.ravel(), cache.values.ravel()])
    np.testing.assert_allclose(found.voco[i], state, atol=1e-5)
    stream = model.embed_images(params, image)[0]
    mean = stream[first : first + 16].mean(0)
    np.testing.assert_allclose(found.mean_patch[i], mean, atol=1e-5)


def test_bars(tmp_path, monkeypatch):
  drawn, save = [], plots.save

  def keep(figure, path):
    drawn.append(figure)
    save(figure, path)

  monkeypatch.setattr(plots, "save", keep)

  def score(voco, patch, majority):
    accuracy = {"voco": voco, "mean_patch": patch}
    return probe.Score(50, 100, 4, accuracy, majority, 0.2)

  scores = {
    "color, row 1 column 1": score(0.9, 0.5, 0.25),
    "color, row 1 column 2": score(0.8, 0.4, 0.3),
    "shape, row 1 column 1": score(0.7, 0.6, 0.35),
  }
  look_plots.probe_bars(scores, tmp_path / "probe.png")
  assert_drawn(tmp_path / "probe.png")
  color, shape = drawn[0].axes
  heights = [bar.get_height() for bar in color.patches]
  assert heights == pytest.approx([90, 80, 50, 40, 25, 30])
  assert [x.get_text() for x in color.get_xticklabels()] == ["1, 1", "1, 2"]
  heights = [bar.get_height() for bar in shape.patches]
  assert heights == pytest.approx([70, 60, 35])
  # 1.96 * sqrt(0.9 * 0.1 / 100) on either side.
  low, high = color.collections[0].get_segments()[0][:, 1]
  assert (low, high) == pytest.approx((84.12, 95.88))
