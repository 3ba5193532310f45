"""A tiny engine with random weights, and random requests for it.

Read next: test_engine.py.
"""

import pathlib

import numpy as np

from tests import runs
from tests.models import builders
from vocojax import assemble, config
from vocojax.data import tokenizer
from vocojax.inference.cache import VocoCache
from vocojax.inference.engine import Engine
from vocojax.inference.requests import Request
from vocojax.inference.sampling import Sampling

TEXT_LENGTH = 80  # with the images, more than one chunk of attention.py
MAX_IMAGES = 2
IMAGE_SIZE = 64


def setup(folder: pathlib.Path, compressor: str = "voco", k: int = 3):
  """Config, model, parameters and tokenizer; writes data to the folder."""
  if not (folder / "data.json").exists():
    runs.write_data(folder)
  path = runs.write_config(folder, "engine.py", runs.ONE_PHASE)
  (c,) = config.phases(config.load_module(str(path)))
  c = assemble.with_compressor(c, compressor, k)
  words = tokenizer.load_tokenizer(c.data.tokenizer)
  model = assemble.make_model(c, words)
  return c, model, builders.init(model), words


def engine(folder: pathlib.Path, **sizes) -> Engine:
  parts = setup(folder)
  sizes = {"slots": 5, "prefill_rows": 2, "compress_batch": 3} | sizes
  return Engine(
    *parts, max_images=MAX_IMAGES, max_text_length=TEXT_LENGTH, **sizes
  )


def pictures(rng: np.random.Generator, count: int) -> list[np.ndarray]:
  shape = (IMAGE_SIZE, IMAGE_SIZE, 3)
  return [rng.integers(0, 256, shape, np.uint8) for _ in range(count)]


def random_turns(rng: np.random.Generator, words: list[str]):
  """One or two questions of 1 to 34 words."""
  lengths = rng.integers(
    1, rng.choice([3, 12, 34]), rng.integers(1, 3), int, True
  )
  texts = [" ".join(rng.choice(words, n)) for n in lengths]
  return (
    [(texts[0], "it is red"), (texts[1], None)]
    if texts[1:]
    else [(texts[0], None)]
  )


def random_requests(
  rng: np.random.Generator, engine: Engine, cache: VocoCache, count: int
) -> list[Request]:
  """Of all kinds: with caches cut or not, images, and text alone."""
  vocabulary = engine.tokenizer.get_vocab()
  words = sorted(w for w in vocabulary if not w.startswith("<"))
  raw = pictures(rng, 4)
  requests = []
  for _ in range(count):
    n = rng.integers(0, MAX_IMAGES, endpoint=True)
    kind = rng.integers(4)
    index = rng.integers(0, cache.num_images, n).tolist()
    images = cache.select(index) if n else None
    if images is not None and kind == 1:
      images = images.truncate(int(rng.integers(1, 4)))
    elif images is not None and kind == 2:
      images = images.quantize()
    elif n and kind == 3:
      images = [raw[i % 4] for i in index]
    requests.append(
      Request(
        random_turns(rng, words),
        images,
        max_new_tokens=int(rng.choice([1, 2, 5, 9, 30, 70])),
        sampling=Sampling(
          temperature=float(rng.choice([0, 0, 0.7, 1.5])),
          top_k=int(rng.choice([0, 0, 1, 6])),
          top_p=float(rng.choice([1, 1, 0.6, 0.95])),
          seed=int(rng.integers(0, 2**32)),
        ),
        stop=tuple(rng.choice(words, rng.integers(0, 2)).tolist()),
        stop_token_ids=tuple(
          rng.integers(4, len(vocabulary), rng.integers(0, 2)).tolist()
        ),
      )
    )
  return requests
