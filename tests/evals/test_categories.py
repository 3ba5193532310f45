"""Kinds of questions of our data sets."""

import pytest

from vocojax.evals.categories import category


@pytest.mark.parametrize(
  ("source", "question", "answer", "expected"),
  [
    ("easy_vqa", "what color is the shape?", "blue", "color"),
    ("easy_vqa", "what is the blue shape?", "circle", "shape"),
    ("easy_vqa", "is there a blue shape?", "yes", "yes/no"),
    ("llava_json", "is there a blue shape?", "no", "yes/no"),
    ("llava_json", "what color is the shape?", "blue", "other"),
    (
      "grid_vqa",
      "what color is the object in row 1 column 2 ?",
      "none",
      "color",
    ),
    ("grid_vqa", "what shape is the object in row 1 column 2 ?", "x", "shape"),
    (
      "grid_vqa",
      "what shape is the object left of the red circle ?",
      "none",
      "shape of a neighbour",
    ),
    ("grid_vqa", "how many red objects are there ?", "2", "count"),
    ("grid_vqa", "is there a red circle ?", "no", "existence"),
    ("grid_vqa", "are there more circles than squares ?", "no", "comparison"),
  ],
)
def test_category(source, question, answer, expected):
  assert category(source, question, answer) == expected
