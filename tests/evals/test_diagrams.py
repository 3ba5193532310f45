"""The drawings of the README: right colours in right cells."""

import numpy as np
import pytest
from PIL import Image

from tests.evals.test_report import assert_drawn
from vocojax.evals import diagrams


def test_mask_is_drawn_cell_by_cell(tmp_path):
  path = tmp_path / "mask.png"
  mask = diagrams.toy_mask()
  diagrams.draw_mask(mask, diagrams.TOY_ROLES, path)
  assert_drawn(path)
  pixels = np.asarray(Image.open(path).convert("RGB"))
  # Dark green is used by 'text reads VoCo' only, 6 rows by 2 columns, and by
  # its legend. Each cell is square, so its area tells their number.
  dark_green = np.all(pixels == (0x2F, 0x8F, 0x4E), axis=-1).sum()
  light_blue = np.all(pixels == (0x8F, 0xB8, 0xDE), axis=-1).sum()
  assert light_blue / dark_green == pytest.approx(45 / 12, rel=0.15)


@pytest.mark.parametrize(("row", "column"), [(12, 3), (2, 13), (9, 14)])
def test_a_leak_is_not_drawn(tmp_path, row, column):
  mask = diagrams.toy_mask()
  mask[row, column] = True
  with pytest.raises(ValueError, match=r"sees"):
    diagrams.draw_mask(mask, diagrams.TOY_ROLES, tmp_path / "mask.png")


def test_two_streams(tmp_path):
  diagrams.draw_two_streams(tmp_path / "two_streams.png")
  assert_drawn(tmp_path / "two_streams.png")
