"""What is asked of the engine and what comes back. Read next: engine.py."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import transformers

from vocojax.core import files
from vocojax.data import images, prompt
from vocojax.data.images import ImageLike
from vocojax.errors import UserError, shorten
from vocojax.inference.cache import CacheOrigin, VocoCache, image_hash
from vocojax.inference.sampling import Sampling
from vocojax.inference.text import AnswerText


@dataclasses.dataclass(frozen=True)
class Request:
  """A question, or a conversation that ends in one.

  Attributes:
    turns: (question, answer) each; the last answer is None.
    images: a cache, or one or several images to compress first; None for text
      alone.
    max_new_tokens: the answer ends after so many tokens, or where its row is
      full.
    sampling: how tokens are chosen.
    stop: strings that end the answer; the text is cut before them.
    stop_token_ids: tokens that end the answer, besides `</s>`.
    on_text: called with each new piece of the text; together they are the text.
  """

  turns: Sequence[tuple[str, str | None]]
  images: VocoCache | ImageLike | Sequence[ImageLike] | None = None
  max_new_tokens: int = 64
  sampling: Sampling = dataclasses.field(default_factory=Sampling)
  stop: tuple[str, ...] = ()
  stop_token_ids: tuple[int, ...] = ()
  on_text: Callable[[str], None] | None = None


FinishReason = Literal["eos", "stop", "length"]


@dataclasses.dataclass(frozen=True)
class Result:
  """An answer.

  Attributes:
    text: without white space at its ends.
    token_ids: all tokens chosen, with the one that ended the answer.
    finish_reason: `</s>`, a stop string or token, or no room for more.
    num_prompt_tokens: tokens of text read.
    num_image_tokens: tokens that stood for the images.
  """

  text: str
  token_ids: tuple[int, ...]
  finish_reason: FinishReason
  num_prompt_tokens: int
  num_image_tokens: int


@dataclasses.dataclass(frozen=True)
class Room:
  """What a row of the engine can hold, and how prompts are laid out.

  Attributes:
    tokenizer: of the checkpoint.
    layout: of its prompts.
    strip_newlines: as in `config.prompt`.
    vocab_size: without padding.
    origin: of the caches that can be read.
    max_images: of one request.
    num_image_tokens: of one image, at most.
    max_text_length: tokens of a prompt and its answer together.
  """

  tokenizer: transformers.PreTrainedTokenizerFast
  layout: prompt.Layout
  strip_newlines: Literal["original", "none"]
  vocab_size: int
  origin: CacheOrigin
  max_images: int
  num_image_tokens: int
  max_text_length: int


@dataclasses.dataclass
class Job:
  """A request on its way through the engine."""

  index: int
  request: Request
  cache: VocoCache | None
  prompt_ids: list[int]
  room: Room
  text: AnswerText
  token_ids: list[int] = dataclasses.field(default_factory=list)

  @property
  def num_image_tokens(self) -> int:
    if self.cache is None:
      return 0
    return self.cache.num_images * self.cache.num_voco_tokens

  def push(self, token: int) -> Result | None:
    """Takes the next token; the result if it was the last."""
    self.token_ids.append(token)
    reason = self._reason_to_end(token)
    if reason is None:
      return None
    return Result(
      self.text.finish(),
      tuple(self.token_ids),
      reason,
      len(self.prompt_ids),
      self.num_image_tokens,
    )

  def _reason_to_end(self, token: int) -> FinishReason | None:
    if token == self.room.tokenizer.eos_token_id:
      return "eos"
    if token in self.request.stop_token_ids or self.text.push(token):
      return "stop"
    count = len(self.token_ids)
    # The last token is never read, so it needs no slot.
    full = len(self.prompt_ids) + count > self.room.max_text_length
    if count == self.request.max_new_tokens or full:
      return "length"
    return None


def prepare(
  request: Request, cache: VocoCache | None, index: int, room: Room
) -> Job:
  """Checks a request and lays out its prompt.

  Args:
    request: the request.
    cache: of its images.
    index: its number.
    room: what it must fit into.

  Raises:
    UserError: it cannot be answered.
  """
  _check_fields(request, room)
  if cache is not None:
    _check_cache(cache, room)
  ids, _ = prompt.encode(
    room.layout,
    room.tokenizer,
    request.turns,
    num_images=0 if cache is None else cache.num_images,
    strip_newlines=room.strip_newlines,
  )
  if len(ids) > room.max_text_length:
    raise UserError(
      "prompt",
      f"{len(ids)} tokens",
      f"at most {room.max_text_length}",
      "shorten it, or set max_text_length to more",
    )
  text = AnswerText(room.tokenizer, request.stop, request.on_text)
  return Job(index, request, cache, ids, room, text)


def _check_fields(request: Request, room: Room) -> None:
  if not request.turns:
    raise UserError("turns", "none", "at least one", "ask a question")
  for i, (question, answer) in enumerate(request.turns):
    where = "question" if len(request.turns) == 1 else f"question {i}"
    last = i + 1 == len(request.turns)
    if not question.strip():
      raise UserError(where, "an empty text", "a question", "ask something")
    files.refuse_surrogates(question, where, UserError)
    if (answer is None) != last:
      raise UserError(
        f"answer {i}",
        shorten(answer),
        "None, as the last answer" if last else "text",
        "give all turns but the last an answer",
      )
    files.refuse_surrogates(answer or "", f"answer {i}", UserError)
  if request.max_new_tokens < 1:
    raise UserError(
      "max_new_tokens",
      f"{request.max_new_tokens}",
      "at least 1",
      "set it to more",
    )
  for token in request.stop_token_ids:
    if not 0 <= token < room.vocab_size:
      raise UserError(
        "stop_token_ids",
        f"{token}",
        f"tokens of the model, 0 to {room.vocab_size - 1}",
        "correct it",
      )
  if "" in request.stop:
    raise UserError("stop", "an empty text", "a text", "leave it out")


def _check_cache(cache: VocoCache, room: Room) -> None:
  cache.check(room.origin, "images")
  if cache.num_images > room.max_images:
    raise UserError(
      "images",
      f"{cache.num_images}",
      f"at most {room.max_images}",
      "leave some out, or set max_images to more",
    )
  if cache.num_voco_tokens > room.num_image_tokens:
    raise UserError(
      "images",
      f"{cache.num_voco_tokens} tokens each",
      f"at most {room.num_image_tokens}",
      "truncate the cache, or set num_voco_tokens to more",
    )


def as_list(images: ImageLike | Sequence[ImageLike]) -> list[ImageLike]:
  """One or several images as a list."""
  if isinstance(images, ImageLike):
    return [images]
  return list(images)


def read_image(
  image: ImageLike, size: int, pad_to_square: bool
) -> tuple[np.ndarray, str]:
  """Pixels uint8 [size, size, 3] as the model wants them, and the image's hash.

  Raises:
    DataError: it is not an image, or too large.
  """
  name = ""
  if isinstance(image, str | os.PathLike):
    name = str(image)
    image = files.read_bytes(files.expand_user(name), limit=images.MAX_BYTES)
  pixels = images.ImageProcessor(size, pad_to_square)(image, name)
  return pixels, image_hash(image)
