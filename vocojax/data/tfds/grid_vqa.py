"""TFDS builder of GridVQA: coloured shapes in a grid, with questions.

An image has G x G cells, each empty or with one object; questions are about
positions, numbers, existence, comparison and relation. Everything follows from
the seed of an image, and an arrangement belongs to one split only. Read next:
../sources.py, which reads it.
"""

import collections
import dataclasses
import io
import itertools
import zlib
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image, ImageDraw

from vocojax.data.tfds.features import image_with_questions

SIZE = 64  # pixels a side
COLORS = {
  "red": (215, 40, 40),
  "green": (40, 165, 60),
  "blue": (45, 80, 215),
  "yellow": (230, 200, 40),
}
SHAPES = {  # and their plurals
  "circle": "circles",
  "square": "squares",
  "triangle": "triangles",
}
NONE = "none"  # answer about an empty cell
_EMPTY = 0.2  # part of the cells without an object
_FINE = 4  # drawn so many times larger, then averaged
_BACKGROUND = (240, 240, 240)
_SPLITS = {"train": 20_000, "validation": 500, "test": 1_000}
# Hundredths of all arrangements, by their checksum.
_PARTS = {
  "train": range(15, 100),
  "validation": range(10, 15),
  "test": range(10),
}
_CELLS_ASKED = 4  # for their color, and as many for their shape
_OTHERS = 2  # questions of each other kind
_SIDES = {
  "left of": (0, -1),
  "right of": (0, 1),
  "above": (-1, 0),
  "below": (1, 0),
}

Cell = tuple[str, str] | None  # color and shape
Grid = tuple[tuple[Cell, ...], ...]
Question = tuple[str, str]  # and its answer


@dataclasses.dataclass
class GridConfig(tfds.core.BuilderConfig):
  """How many cells a side."""

  name: str
  grid_size: int = 2


BUILDERS = [GridConfig(f"{g}x{g}", grid_size=g) for g in (2, 3, 4)]


class GridVqa(tfds.core.GeneratorBasedBuilder):
  """Images with G x G cells and 16 questions each, or nearly."""

  VERSION = tfds.core.Version("1.1.0")
  RELEASE_NOTES: ClassVar = {
    "1.0.0": "Grids of 2, 3 and 4 cells a side.",
    "1.1.0": "Arrangements of all splits are distributed alike.",
  }
  BUILDER_CONFIGS: ClassVar = BUILDERS
  # TFDS looks beside the code for checksums of downloads, of which there are
  # none; the search needs importlib_resources, which it does not install.
  code_path = None

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description="Questions about coloured shapes in a grid.",
      features=image_with_questions(SIZE),
      disable_shuffling=True,  # record i is image i
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing to download
    return {split: self._generate_examples(split) for split in _SPLITS}

  def _generate_examples(self, split: str):
    for i, (grid, rng) in enumerate(
      grids(self.builder_config.grid_size, split)
    ):
      file = io.BytesIO()
      Image.fromarray(draw(grid, rng)).save(file, "PNG")
      file.seek(0)
      asked = [{"question": q, "answer": a} for q, a in questions(grid, rng)]
      yield i, {"image_id": i, "image": file, "questions": asked}


def grids(
  grid_size: int, split: str
) -> Iterator[tuple[Grid, np.random.Generator]]:
  """The arrangements of a split, each with what its drawing is to use."""
  for i in range(_SPLITS[split]):
    rng = np.random.default_rng([grid_size, list(_SPLITS).index(split), i])
    grid = _arrange(grid_size, rng)
    while zlib.crc32(repr(grid).encode()) % 100 not in _PARTS[split]:
      grid = _arrange(grid_size, rng)
    yield grid, rng


def _arrange(grid_size: int, rng: np.random.Generator) -> Grid:
  colors, shapes = list(COLORS), list(SHAPES)

  def cell() -> Cell:
    if rng.random() < _EMPTY:
      return None
    return colors[rng.integers(len(colors))], shapes[rng.integers(len(shapes))]

  side = range(grid_size)
  return tuple(tuple(cell() for _ in side) for _ in side)


def draw(grid: Grid, rng: np.random.Generator) -> np.ndarray:
  """uint8 [SIZE, SIZE, 3]; places, sizes and brightness vary a little."""
  full = SIZE * _FINE
  image = Image.new("RGB", (full, full), _BACKGROUND)
  pen = ImageDraw.Draw(image)
  pitch = full / len(grid)
  for row, cells in enumerate(grid):
    for column, cell in enumerate(cells):
      size = pitch * rng.uniform(0.55, 0.75)
      x, y = (
        pitch * i + rng.uniform(0.05 * pitch, 0.95 * pitch - size)
        for i in (column, row)
      )
      light = rng.integers(-20, 21)
      if cell:
        color, shape = cell
        fill = tuple(int(np.clip(c + light, 0, 255)) for c in COLORS[color])
        _draw_shape(pen, shape, (x, y, x + size, y + size), fill)
  return np.asarray(image.reduce(_FINE))


def _draw_shape(pen, shape: str, box, fill) -> None:
  left, top, right, bottom = box
  if shape == "circle":
    pen.ellipse(box, fill)
  elif shape == "square":
    pen.rectangle(box, fill)
  else:
    top_corner = ((left + right) / 2, top)
    pen.polygon([top_corner, (right, bottom), (left, bottom)], fill)


def questions(grid: Grid, rng: np.random.Generator) -> list[Question]:
  """What is asked about an image; answers of a kind are balanced."""
  asked = [
    *_positions(grid, rng),
    *_counts(grid, rng),
    *_existence(grid, rng),
    *_comparisons(grid, rng),
    *_relations(grid, rng),
  ]
  return list(dict.fromkeys(asked))


def words() -> list[str]:
  """Every word of questions and answers, about grids of any size."""
  numbers = map(str, range(max(c.grid_size for c in BUILDERS) ** 2 + 1))
  asked = (
    "what is the object in row column how many objects are there is a more "
    "than color shape yes no the ?"
  )
  names = [*COLORS, *SHAPES, *SHAPES.values(), NONE, *numbers, asked, *_SIDES]
  return sorted(set(" ".join(names).split()))


def _choose(rng: np.random.Generator, options):
  options = list(options)
  return options[rng.integers(len(options))]


def _answer(cell: Cell, attribute: str) -> str:
  if not cell:
    return NONE
  return cell[0] if attribute == "color" else cell[1]


def _positions(grid: Grid, rng: np.random.Generator) -> Iterator[Question]:
  """Color and shape of some cells; rows and columns count from 1."""
  places = list(itertools.product(range(len(grid)), repeat=2))
  for attribute in ("color", "shape"):
    for i in rng.permutation(len(places))[:_CELLS_ASKED]:
      row, column = places[i]
      yield (
        f"what {attribute} is the object in row {row + 1} column "
        f"{column + 1} ?",
        _answer(grid[row][column], attribute),
      )


def _numbers(grid: Grid) -> dict[str, int]:
  """How many there are of each color and shape, as a question names them."""
  objects = [cell for row in grid for cell in row if cell]
  seen = collections.Counter(itertools.chain(*objects))
  return {f"{c} objects": seen[c] for c in COLORS} | {
    plural: seen[shape] for shape, plural in SHAPES.items()
  }


def _counts(grid: Grid, rng: np.random.Generator) -> Iterator[Question]:
  """The number is drawn first, then what there is so many of."""
  numbers = _numbers(grid)
  for _ in range(_OTHERS):
    number = _choose(rng, sorted(set(numbers.values())))
    what = _choose(rng, [w for w, n in numbers.items() if n == number])
    yield f"how many {what} are there ?", str(number)


def _existence(grid: Grid, rng: np.random.Generator) -> Iterator[Question]:
  """Half yes; what is missing often shares its color with what is there."""
  present = sorted({cell for row in grid for cell in row if cell})
  absent = sorted(set(itertools.product(COLORS, SHAPES)) - set(present))
  for _ in range(_OTHERS):
    yes = bool(present) and (not absent or rng.random() < 0.5)
    options = present if yes else absent
    if not yes and present and rng.random() < 0.5:
      known = {color for color, _ in present}
      options = [x for x in absent if x[0] in known] or absent
    color, shape = _choose(rng, options)
    yield f"is there a {color} {shape} ?", "yes" if yes else "no"


def _comparisons(grid: Grid, rng: np.random.Generator) -> Iterator[Question]:
  """Half yes, where numbers differ; no is fewer or as many, half each."""
  numbers = _numbers(grid)
  kinds = [list(numbers)[: len(COLORS)], list(numbers)[len(COLORS) :]]
  for _ in range(_OTHERS):
    pairs = list(itertools.permutations(_choose(rng, kinds), 2))
    wanted = _choose(rng, [1, 1, 0, -1])
    fitting = [
      (a, b) for a, b in pairs if np.sign(numbers[a] - numbers[b]) == wanted
    ]
    a, b = _choose(rng, fitting or pairs)
    yes = numbers[a] > numbers[b]
    yield f"are there more {a} than {b} ?", "yes" if yes else "no"


def _relations(grid: Grid, rng: np.random.Generator) -> Iterator[Question]:
  """About the neighbour of an object that there is one of."""
  side = range(len(grid))
  objects = collections.Counter(cell for row in grid for cell in row if cell)
  possible = [
    (f"{name} the {' '.join(cell)}", grid[row + down][column + on])
    for row, cells in enumerate(grid)
    for column, cell in enumerate(cells)
    for name, (down, on) in _SIDES.items()
    if cell
    and objects[cell] == 1
    and row + down in side
    and column + on in side
  ]
  for i in rng.permutation(len(possible))[:_OTHERS]:
    place, neighbour = possible[i]
    attribute = _choose(rng, ["color", "shape"])
    answer = _answer(neighbour, attribute)
    yield f"what {attribute} is the object {place} ?", answer
