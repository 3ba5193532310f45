"""What the pictures of the report must not get wrong."""

import numpy as np
from PIL import Image

from vocojax.evals import plots


def pixels(path):
  return np.asarray(Image.open(path).convert("RGB")).astype(int)


def maps(tmp_path, attention):
  path = tmp_path / "attention.png"
  images = np.full((len(attention), 8, 8, 3), 255, np.uint8)
  plots.attention_maps(images, attention.astype(np.float32), path)
  return pixels(path)


def test_attention_is_where_the_patch_is(tmp_path):
  attention = np.zeros((1, 1, 1, 1, 4))
  attention[..., 1] = 1  # top right of 2 x 2
  picture = maps(tmp_path, attention)
  red = (picture[..., 0] > 100) & (picture[..., 1] < 80)
  rows, columns = np.nonzero(red)
  # Panels of equal width: image, layer 1, all layers; the last two have it.
  width = picture.shape[1] / 3
  assert set((columns // width).astype(int)) == {1, 2}
  assert (columns % width > 0.4 * width).all()
  # Square panels below a title of two lines.
  assert rows.max() < picture.shape[0] - 0.4 * width


def test_attention_of_first_token_and_mean_over_heads(tmp_path):
  attention = np.random.default_rng(0).random((2, 3, 2, 2, 4))
  one = maps(tmp_path, attention[:, :, :, :1])
  assert (maps(tmp_path, attention) == one).all()
  mean = attention[:, :, :, :1].mean(axis=2, keepdims=True)
  # Single pixels may round the other way.
  assert np.abs(maps(tmp_path, mean) - one).max() <= 1
  assert np.abs(maps(tmp_path, attention[:, :, :, 1:]) - one).max() > 1


def test_deep_models_show_some_layers(tmp_path):
  assert maps(tmp_path, np.ones((1, 32, 2, 1, 4)) / 5).shape[1] >= 900


def grid(tmp_path, *samples):
  path = tmp_path / "answers.png"
  image = np.full((8, 8, 3), 255, np.uint8)
  plots.sample_grid([plots.Sample(image, *sample) for sample in samples], path)
  picture = pixels(path)
  red, green = picture[..., 0], picture[..., 1]
  return (green > red + 60).any(), (red > green + 60).any()


def test_right_is_green_and_wrong_is_red(tmp_path):
  right = ("what shape?", "circle", "circle", True)
  wrong = ("what shape?", "circle", "no", False)
  assert grid(tmp_path, right) == (True, False)
  assert grid(tmp_path, wrong) == (False, True)
  assert grid(tmp_path, right, wrong, right, right, right) == (True, True)


def test_any_text_can_be_drawn(tmp_path):
  """Dollars are no formulas, long text is cut and an answer may be empty."""
  long = "why would $x_1 cost so much " * 20
  assert grid(tmp_path, (long, "$1^", "", False)) == (False, True)


def test_a_single_logged_step(tmp_path):
  line = {
    "step": 1,
    "loss": 0.0,
    "token_accuracy": 0.5,
    "answer_accuracy": 0.25,
  }
  path = tmp_path / "curves.png"
  plots.curves({"voco": [line]}, path)
  picture = pixels(path)
  assert (picture[..., 2] > picture[..., 0] + 60).any()  # the blue point
