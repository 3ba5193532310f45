"""A data set like LLaVA's mix, drawn at random. Next: `packing.py`.

`PARTS` are the parts of llava_v1_5_mix665k: shares are those of its file, turns
and words a turn are rough figures for each data set. Turns are Poisson, words
log-normal with sigma 0.6. With the layout `voco_v1` a record has 300 tokens on
average, 6 % are text only, and the longest fill a row: a record takes turns
until it would exceed `max_words`, as the long ones of the mix do.
"""

import json
import pathlib

import numpy as np
from PIL import Image

from vocojax.data import prompt, tokenizer

# Name, records in thousands, has an image, turns, words of a question and of an
# answer.
PARTS = (
  ("LLaVA conversation", 58, True, 4.5, 12, 30),
  ("LLaVA detail", 23, True, 1, 14, 160),
  ("LLaVA reasoning", 77, True, 1, 18, 190),
  ("ShareGPT", 40, False, 3.5, 50, 300),
  ("VQAv2", 83, True, 5.4, 10, 1),
  ("GQA", 72, True, 13, 12, 1),
  ("OKVQA", 9, True, 1, 20, 1),
  ("OCR-VQA", 80, True, 10, 10, 5),
  ("A-OKVQA", 66, True, 1, 60, 1),
  ("TextCaps", 22, True, 1, 80, 18),
  ("RefCOCO", 48, True, 6, 22, 18),
  ("Visual Genome", 86, True, 11, 20, 17),
)
_SIGMA = 0.6
_TURN_TOKENS = 6  # of a turn, besides its words
WORDS = (
  "a about all also an and any are as at be because been but by can come could "
  "day do even find first for from get give go have he her here him his how I "
  "if in into is it its just know like look make man many may me more my new "
  "no not now of on one only or other our out people picture say see she show "
  "so some street table take tell than that the their them then there these "
  "they thing think this time to two under up use very want water way we well "
  "what when where which who will with window woman would year yes you your"
).split()


def draw(rng: np.random.Generator, max_words: int) -> tuple[list[int], bool]:
  """Words of each text of a record, question and answer in turn, and image."""
  shares = np.array([part[1] for part in PARTS])
  _, _, image, turns, *means = PARTS[
    rng.choice(len(PARTS), p=shares / shares.sum())
  ]
  words = []
  for _ in range(1 + rng.poisson(turns - 1)):
    # The mean of a log-normal variable is exp(mu + sigma^2 / 2).
    drawn = [rng.lognormal(np.log(m) - _SIGMA**2 / 2, _SIGMA) for m in means]
    turn = [max(1, round(x)) for x in drawn]
    if words and sum(words) + sum(turn) > max_words:
      break
    words += [min(n, max_words // 2) for n in turn]
    max_words -= _TURN_TOKENS
  return words, image


def entry(rng: np.random.Generator, i: int, image: str, max_words: int) -> dict:
  """A record of the JSON file; `image` is its file if it has one."""
  words, has_image = draw(rng, max_words)
  texts = [" ".join(rng.choice(WORDS, n)) for n in words]
  turns = [
    {"from": ("human", "gpt")[k % 2], "value": text}
    for k, text in enumerate(texts)
  ]
  if has_image:
    turns[0]["value"] = f"{prompt.IMAGE_MARKER}\n{turns[0]['value']}"
  record = {"id": f"r{i}", "conversations": turns}
  return record | ({"image": image} if has_image else {})


def write(
  folder: pathlib.Path, num_records: int, max_words: int, num_images: int = 0
) -> pathlib.Path:
  """Writes data.json and a tokenizer of one id a word; returns the former.

  Args:
    folder: to write to.
    num_records: of data.json.
    max_words: of a record.
    num_images: JPEGs of about 640x480 that records share; 0 writes none.
  """
  rng = np.random.default_rng(0)
  for i in range(num_images):
    _photo(rng).save(folder / f"{i}.jpg", quality=90)
  entries = [
    entry(rng, i, f"{i % max(num_images, 1)}.jpg", max_words)
    for i in range(num_records)
  ]
  path = folder / "data.json"
  path.write_text(json.dumps(entries))
  layout = prompt.LAYOUTS["voco_v1"]
  texts = [*WORDS, layout.text_opening, layout.question_end]
  tokenizer.build_word_level(texts).save_pretrained(folder / "tokenizer")
  return path


def _photo(rng: np.random.Generator) -> Image.Image:
  """A part of one of scikit-image's photos, so large that it is enlarged."""
  import skimage.data

  names = ("astronaut", "chelsea", "coffee", "rocket")
  photo = Image.fromarray(getattr(skimage.data, rng.choice(names))())
  width, height = 640, int(rng.choice([427, 480, 480, 640]))
  if rng.random() < 0.25:
    width, height = height, width
  left, top = (int(rng.integers(0, n // 4)) for n in photo.size)
  photo = photo.crop((left, top, photo.width, photo.height))
  return photo.resize((width, height), Image.Resampling.LANCZOS)
