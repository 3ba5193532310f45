"""What a model is asked with that training had not. Read next: engine.py."""

import sys
from collections.abc import Sequence

import tqdm
import transformers

_MOST_WORDS = 20  # named; a text in another language has no end of them


class Unseen:
  """Says on stderr, once each, which words are unknown and images too many."""

  def __init__(
    self,
    tokenizer: transformers.PreTrainedTokenizerFast,
    max_images: int,
  ):
    """Looks at texts of this tokenizer, and images beyond so many."""
    self._tokenizer = tokenizer
    self._max_images = max_images
    self._words: dict[str, None] = {}

  def note(
    self, turns: Sequence[tuple[str, str | None]], num_images: int
  ) -> None:
    """Says what is new in a conversation about so many images."""
    if num_images > self._max_images:
      _say(
        f"{num_images} images, but the model was trained with at most "
        f"{self._max_images} (config.data.max_images)"
      )
      self._max_images = num_images  # more of them are no news
    named = len(self._words)
    for turn in turns:
      for text in filter(None, turn):
        self._words |= dict.fromkeys(self._unknown(text))
    new = list(self._words)[named:_MOST_WORDS]
    if new:
      words = ", ".join(map(repr, new))
      more = ", and more" if len(self._words) > _MOST_WORDS else ""
      _say(
        f"words that the model has never seen, all read as "
        f"{self._tokenizer.unk_token}: {words}{more}"
      )

  def _unknown(self, text: str) -> list[str]:
    unknown = self._tokenizer.unk_token_id
    if unknown is None:
      return []
    backend = self._tokenizer.backend_tokenizer
    backend.encode_special_tokens = True  # as data/prompt.py reads texts
    read = backend.encode(text, add_special_tokens=False)
    return [
      text[start:end]
      for token, (start, end) in zip(read.ids, read.offsets, strict=True)
      if token == unknown
    ]


def _say(words: str) -> None:
  tqdm.tqdm.write(words, file=sys.stderr)  # above a progress bar, if any
