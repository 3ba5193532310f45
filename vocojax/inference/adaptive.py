"""Answers from as few VoCo tokens as will do. Read next: engine.py.

The first m VoCo tokens of a cache are what a model with k = m makes of the
image, so one cache holds answers from 1, 2, 4, ... and k tokens. A question is
put to them in this order, until what the model would say first no longer
changes. V vocabulary.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

from vocojax.config import budgets
from vocojax.errors import UserError
from vocojax.inference.cache import VocoCache
from vocojax.inference.engine import Engine
from vocojax.inference.requests import Request, Result


@dataclasses.dataclass(frozen=True)
class Answer:
  """A result, and the VoCo tokens of each image that it was read from.

  Their number is 0 where there are no images.
  """

  result: Result
  num_voco_tokens: int


def run(
  engine: Engine, requests: Sequence[Request], threshold: float
) -> list[Answer]:
  """Answers each request from the fewest tokens that settle it.

  A request is settled by m tokens if the first token of its answer is
  distributed as it was with the number before, up to `threshold` in total
  variation: no event, such as an answer that begins with 'yes', changed its
  probability by more. (It is symmetric, and 0 to 1 in any vocabulary; KL has no
  upper end and hangs on tokens that nobody would say.) Then the answer is read
  from m tokens, or from all if none settles it. What does not change may be
  wrong all the same, and later words of an answer are not looked at.

  Each number that is tried costs one pass over the prompt.

  Args:
    engine: with the compressor 'voco'.
    requests: all are held in memory until the last is settled.
    threshold: 0 to 1.

  Raises:
    UserError: a request cannot be answered, or tokens of this engine be cut.
  """
  if not 0 <= threshold <= 1:
    raise UserError(
      "threshold", f"{threshold}", "a total variation, 0 to 1", "correct it"
    )
  if not engine.num_voco_tokens:
    raise UserError(
      "adaptive",
      "an engine whose image tokens cannot be cut",
      "compressor 'voco'",
      "load another checkpoint",
    )
  # With text_sees_bos a cache begins with one more token.
  others = engine.num_image_tokens - engine.num_voco_tokens
  caches = [_cache(engine, request) for request in requests]
  numbers = [
    budgets(cache.num_voco_tokens - others) if cache else (0,)
    for cache in caches
  ]
  settled = [0 if len(own) == 1 else None for own in numbers]
  before: dict[int, Float32[np.ndarray, " V"]] = {}

  def cut(i: int, rank: int) -> Request:
    cache = caches[i]
    images = cache and cache.truncate(numbers[i][rank] + others)
    return dataclasses.replace(requests[i], images=images)

  for rank in range(max(map(len, numbers), default=0)):
    asked = [i for i, at in enumerate(settled) if at is None]
    now = engine.foretell([cut(i, rank) for i in asked])
    for i, probabilities in zip(asked, now, strict=True):
      if rank and total_variation(probabilities, before[i]) <= threshold:
        settled[i] = rank
      elif rank + 1 == len(numbers[i]):
        settled[i] = rank
      before[i] = probabilities
  chosen = [at or 0 for at in settled]
  results = engine.run([cut(i, rank) for i, rank in enumerate(chosen)])
  return [
    Answer(result, own[rank])
    for result, own, rank in zip(results, numbers, chosen, strict=True)
  ]


def total_variation(
  a: Float32[np.ndarray, " V"], b: Float32[np.ndarray, " V"]
) -> float:
  """Largest difference between the probabilities of an event, 0 to 1."""
  return float(np.abs(a - b).sum() / 2)


def _cache(engine: Engine, request: Request) -> VocoCache | None:
  if request.images is None or isinstance(request.images, VocoCache):
    return request.images
  return engine.compress(request.images)
