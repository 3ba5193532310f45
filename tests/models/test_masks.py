"""The two-stage mask and its positions against literal matrices."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import builders
from vocojax.models import compressors, masks

# BOS, six patches, two separators, two VoCo tokens, newline, five text tokens,
# by the rule of the original: up to the last VoCo token plain causal, after it
# from the first VoCo token on.
ORIGINAL = """
  1................
  11...............
  111..............
  1111.............
  11111............
  111111...........
  1111111..........
  11111111.........
  111111111........
  1111111111.......
  11111111111......
  .........111.....
  .........1111....
  .........11111...
  .........111111..
  .........1111111.
  .........11111111
"""


def _joint_mask(image_group_ids, segment_ids, text_group_ids, visible):
  arrays = (
    jnp.asarray(x, jnp.int32)
    for x in (image_group_ids, segment_ids, text_group_ids)
  )
  shown = np.broadcast_to(visible, (*np.shape(image_group_ids), len(visible)))
  return np.asarray(
    masks.two_stage_mask(*masks.joint_tokens(*arrays, jnp.asarray(shown)))
  )


def _toy_mask():
  visible = np.arange(11) >= 9
  return _joint_mask([[1]], [[1] * 6], [[1] * 6], visible)[0]


def test_equals_the_literal_matrix_of_the_original():
  rows = ORIGINAL.split()
  expected = np.array([[c == "1" for c in row] for row in rows])
  assert expected.shape == (17, 17)
  np.testing.assert_array_equal(_toy_mask(), expected)


def test_equals_the_matrix_in_its_docstring():
  lines = masks.two_stage_mask.__doc__.splitlines()
  header = next(i for i, x in enumerate(lines) if x.split()[:1] == ["B"])
  names = "".join(lines[header].split())
  matrix = []
  for name, line in zip(names, lines[header + 1 :], strict=False):
    label, *cells = line.split()
    assert label == name
    matrix.append([c == "1" for c in "".join(cells)])
  assert len(matrix) == 17
  np.testing.assert_array_equal(_toy_mask(), np.array(matrix))


def test_packed_row_with_two_groups_an_empty_slot_and_padding():
  """Slots of 2 tokens, the second visible; `-` marks an empty slot."""
  # columns: image 1 (g1), image 2 (empty), image 3 (g2), then text of
  # segments 1 (g1), 2 (g1), 3 (text only), 4 (g2) and padding.
  expected = """
    10 00 00 00 00 0 00 0
    11 00 00 00 00 0 00 0
    00 00 00 00 00 0 00 0
    00 00 00 00 00 0 00 0
    00 00 10 00 00 0 00 0
    00 00 11 00 00 0 00 0
    01 00 00 10 00 0 00 0
    01 00 00 11 00 0 00 0
    01 00 00 00 10 0 00 0
    01 00 00 00 11 0 00 0
    00 00 00 00 00 1 00 0
    00 00 01 00 00 0 10 0
    00 00 01 00 00 0 11 0
    00 00 00 00 00 0 00 0
  """
  rows = [x.replace(" ", "") for x in expected.strip().splitlines()]
  mask = _joint_mask(
    [[1, 0, 2]],
    [[1, 1, 2, 2, 3, 4, 4, 0]],
    [[1, 1, 1, 1, 0, 2, 2, 0]],
    np.array([False, True]),
  )[0]
  np.testing.assert_array_equal(mask, [[c == "1" for c in r] for r in rows])


@pytest.mark.parametrize("seed", range(8))
def test_text_mask_is_the_text_rows_of_the_joint_mask(seed):
  rng = np.random.default_rng(seed)
  F, A, T, B = int(rng.integers(1, 4)), 5, 9, 4
  visible = rng.random(A) < 0.5
  visible[rng.integers(A)] = True
  vlm = builders.model()
  rows = builders.random_rows(rng, B, F, T)
  batch = builders.batch(rng, vlm, rows, T)
  layout = [
    jnp.asarray(batch[k])
    for k in ("image_group_ids", "segment_ids", "text_group_ids")
  ]
  joint = _joint_mask(*layout, visible)
  columns = np.concatenate([np.tile(visible, F), np.ones(T, bool)])
  of_tokens = jnp.repeat(layout[0], int(visible.sum()), axis=1)
  text = masks.text_mask(of_tokens, *layout[1:])
  np.testing.assert_array_equal(text, joint[:, -T:][:, :, columns])
  # Nothing of an image is lost by looking at visible columns only.
  assert not joint[:, -T:][:, :, ~columns].any()


@pytest.mark.parametrize("k", [1, 2, 128])
def test_positions_of_the_original_layout(k):
  config = builders.model_config(
    {
      "vision.image_size": 336,
      "vision.patch_size": 14,
      "compressor.num_voco_tokens": k,
    }
  )
  tokens = compressors.StreamTokens((1,), (29871, 13), 32000)
  stream = compressors.image_stream(config, tokens)
  assert stream.length == 579 + k
  assert stream.visible == tuple(range(579, 579 + k))
  groups, text = jnp.ones((1, 1), jnp.int32), jnp.ones((1, 5), jnp.int32)
  strides = jnp.array([[stream.stride]])
  positions = masks.text_positions(groups, text, text, stream.start, strides)
  np.testing.assert_array_equal(positions[0], 579 + k + np.arange(5))
  np.testing.assert_array_equal(masks.image_offsets(groups, strides), [[0]])


def test_positions_with_several_images_and_segments():
  """8 positions before the VoCo tokens; text follows those of all images."""
  groups = jnp.array([[1, 1, 2, 1, 0, 2], [0, 0, 0, 0, 0, 0]])
  segments = jnp.array(
    [[1, 1, 2, 2, 2, 3, 4, 4, 0], [1, 1, 2, 2, 2, 2, 2, 2, 2]]
  )
  text = jnp.array([[1, 1, 2, 2, 2, 0, 1, 1, 0], [0] * 9])
  for strides, offsets, expected in (
    # All images are 2 tokens, ...
    ([2, 2, 2, 2, 2, 2], [0, 2, 0, 4, 2], [14, 15, 12, 13, 14, 0, 14, 15]),
    # ... or those of the first group 3, and those of the second 1.
    ([3, 3, 1, 3, 0, 1], [0, 3, 0, 6, 1], [17, 18, 10, 11, 12, 0, 17, 18]),
  ):
    strides = jnp.array([strides, [0] * 6])
    found = masks.image_offsets(groups, strides)
    np.testing.assert_array_equal(found[0, [0, 1, 2, 3, 5]], offsets)
    positions = masks.text_positions(groups, segments, text, 8, strides)
    np.testing.assert_array_equal(positions[0, :8], expected)
    np.testing.assert_array_equal(positions[1], [0, 1, 0, 1, 2, 3, 4, 5, 6])


def test_full_shows_the_whole_stream_and_bos_can_be_shown():
  full = compressors.image_stream(
    builders.model_config({"compressor.name": "full"}), builders.TOKENS
  )
  assert (full.before, full.after) == ((1,), ())
  assert full.visible == tuple(range(5)) and full.stride == full.length == 5
  bos = compressors.image_stream(
    builders.model_config(
      {"compressor.text_sees_bos": True, "compressor.num_voco_tokens": 2}
    ),
    builders.TOKENS,
  )
  assert bos.visible == (0, 7, 8) and bos.stride == 2 and bos.length == 9
