"""GridVQA: answers, pictures and splits, checked from the outside."""

import collections
import io
import itertools
import pickle

import numpy as np
import pytest
from PIL import Image

from vocojax.config import load_module, phases
from vocojax.data import sources
from vocojax.data.tfds import grid_vqa
from vocojax.errors import ConfigError, DataError

STEPS = {"left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}
PLURALS = {p: s for s, p in grid_vqa.SHAPES.items()}


def answered(question, grid):
  """What the question's words say of a grid; another way than the builder's."""
  cells = {
    (r, c): cell for r, row in enumerate(grid) for c, cell in enumerate(row)
  }
  objects = [cell for cell in cells.values() if cell]

  def named(cell):
    if cell is None:
      return "none"
    return cell[["color", "shape"].index(words[1])]

  def number(phrase):
    if phrase in PLURALS:
      return sum(shape == PLURALS[phrase] for _, shape in objects)
    color, word = phrase.split()
    assert word == "objects"
    return sum(c == color for c, _ in objects)

  words = question.removesuffix(" ?").split()
  if "row" in words:
    return named(cells[int(words[7]) - 1, int(words[9]) - 1])
  if words[:2] == ["how", "many"]:
    return str(number(" ".join(words[2:-2])))
  if words[:3] == ["is", "there", "a"]:
    return "yes" if tuple(words[3:]) in objects else "no"
  if words[:2] == ["are", "there"]:
    first, second = " ".join(words[3:]).split(" than ")
    return "yes" if number(first) > number(second) else "no"
  # what A is the object SIDE (of) the COLOR SHAPE
  [(r, c)] = [at for at, cell in cells.items() if cell == tuple(words[-2:])]
  down, right = STEPS[words[5]]
  return named(cells[r + down, c + right])


@pytest.mark.parametrize("grid_size", [2, 3, 4])
def test_answers_are_right(grid_size):
  kinds = collections.Counter()
  for grid, rng in itertools.islice(
    grid_vqa.grids(grid_size, "validation"), 200
  ):
    grid_vqa.draw(grid, rng)
    asked = grid_vqa.questions(grid, rng)
    assert len(dict(asked)) == len(asked)
    for question, answer in asked:
      assert answer == answered(question, grid), (question, grid)
      kinds["row" if " row " in question else question.split()[0]] += 1
  assert kinds["row"] == 200 * 8
  assert min(kinds[k] for k in ("how", "is", "are", "what")) > 300


@pytest.mark.parametrize("grid_size", [2, 3, 4])
def test_a_guess_from_the_question_scores_low(grid_size):
  """The likeliest answer to each question, which is known of the same ones."""
  answers = collections.defaultdict(collections.Counter)
  kinds = collections.defaultdict(collections.Counter)
  for grid, rng in grid_vqa.grids(grid_size, "test"):
    grid_vqa.draw(grid, rng)
    for question, answer in grid_vqa.questions(grid, rng):
      answers[question][answer] += 1
      kinds[question.split()[0]][answer] += 1
  # 'is there a', 'are there more', 'how many'.
  assert 0.44 < kinds["is"]["yes"] / kinds["is"].total() < 0.56
  assert 0.44 < kinds["are"]["yes"] / kinds["are"].total() < 0.58
  [(_, most)] = kinds["how"].most_common(1)
  assert most / kinds["how"].total() < 0.42
  best = sum(max(c.values()) for c in answers.values())
  assert best / sum(c.total() for c in answers.values()) < 0.42


def test_pictures_show_the_grid():
  size = grid_vqa.SIZE
  names = list(grid_vqa.COLORS)
  palette = np.array(list(grid_vqa.COLORS.values()), float)
  for grid_size in (2, 3, 4):
    pitch = size / grid_size
    for grid, rng in itertools.islice(grid_vqa.grids(grid_size, "test"), 50):
      image = grid_vqa.draw(grid, rng).astype(float)
      assert image.shape == (size, size, 3)
      for r, c in itertools.product(range(grid_size), repeat=2):
        part = image[
          round(r * pitch) : round((r + 1) * pitch),
          round(c * pitch) : round((c + 1) * pitch),
        ].reshape(-1, 3)
        part = part[np.abs(part - 240).max(1) > 40]
        if grid[r][c] is None:
          assert not len(part)
          continue
        # Without brightness, which varies.
        flat = part - part.mean(1, keepdims=True)
        known = palette - palette.mean(1, keepdims=True)
        distance = ((flat[:, None] - known) ** 2).sum(2)
        found = collections.Counter(names[i] for i in distance.argmin(1))
        assert found.most_common(1)[0][0] == grid[r][c][0]


def test_an_arrangement_is_in_one_split(monkeypatch):
  # With so many draws some would be met by chance.
  for name in grid_vqa._SPLITS:
    monkeypatch.setitem(grid_vqa._SPLITS, name, 1500)
  drawn = {
    name: [g for g, _ in grid_vqa.grids(2, name)] for name in grid_vqa._SPLITS
  }
  for one, other in itertools.combinations(drawn.values(), 2):
    assert not set(one) & set(other)
  # Sparse ones, of which there are 49, are trained on as often as they are
  # drawn: 4 * 0.8 * 0.2 ** 3 + 0.2 ** 4.
  sparse = [
    sum(c is not None for row in grid for c in row) < 2
    for grid in drawn["train"]
  ]
  assert np.mean(sparse) == pytest.approx(0.0272, abs=0.01)
  monkeypatch.setattr(
    grid_vqa, "_PARTS", dict.fromkeys(grid_vqa._PARTS, range(100))
  )
  assert {g for g, _ in grid_vqa.grids(2, "train")} & set(drawn["test"])


def test_every_word_is_known():
  words = grid_vqa.words()
  assert len(words) == len(set(words)) == 53
  for grid_size in (2, 3, 4):
    for grid, rng in itertools.islice(grid_vqa.grids(grid_size, "test"), 300):
      for text in itertools.chain(*grid_vqa.questions(grid, rng)):
        assert set(text.split()) <= set(words), text


def test_source(tmp_path, monkeypatch):
  monkeypatch.setattr(
    grid_vqa, "_SPLITS", {"train": 30, "validation": 5, "test": 10}
  )
  source = sources.grid_vqa(3, "test", tmp_path)
  assert len(source) == 10 and source[4].id == "test/4"
  grid, rng = list(grid_vqa.grids(3, "test"))[4]
  pixels = grid_vqa.draw(grid, rng)
  [png] = source[4].images
  np.testing.assert_array_equal(Image.open(io.BytesIO(png)), pixels)
  turns = [turn for (turn,) in source[4].conversations]
  assert turns == grid_vqa.questions(grid, rng)
  assert pickle.loads(pickle.dumps(source))[4] == source[4]
  with pytest.raises(DataError) as e:
    sources.grid_vqa(3, "dev", tmp_path)
  assert (e.value.where, e.value.got) == ("grid_vqa", "no split 'dev'")
  assert e.value.expected.startswith("'train', 'validation', 'test', or a sl")


def test_grid_size_is_checked():
  config = load_module("configs/gridvqa.py")
  config.data.grid_size = 5
  with pytest.raises(ConfigError) as e:
    phases(config)
  assert (e.value.where, e.value.got) == ("config.data.grid_size", "5")
