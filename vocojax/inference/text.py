"""Tokens to text as they come, up to a stop string. Next: engine.py."""

import functools
from collections.abc import Callable, Sequence

import transformers

_BROKEN = "\ufffd"  # what an unfinished character decodes to


class AnswerText:
  """The text of an answer: its tokens decoded, without white space at its ends.

  It is the same to the bit whether it is streamed or not. What is passed to
  `on_text` is never taken back: tokens whose text depends on the next one,
  white space that may be the last, and what may be the beginning of a stop
  string wait.
  """

  def __init__(
    self,
    tokenizer: transformers.PreTrainedTokenizerFast,
    stop: Sequence[str] = (),
    on_text: Callable[[str], None] | None = None,
  ):
    self._tokenizer = tokenizer
    self._special, self._bytes = _kinds(tokenizer)
    self._stop = tuple(stop)
    self._on_text = on_text
    self._ids: list[int] = []  # without special tokens
    # ids[:read] are in the text; ids[window:read] are what it ends with, kept
    # because a token's text depends on the one before.
    self._window = self._read = 0
    self._text = ""
    self._open = ""  # of ids[read:], which the next token may change
    self._passed_on = 0

  def push(self, token: int) -> bool:
    """Takes one more token; True if the text has now reached a stop string."""
    if token in self._special:
      return False
    self._ids.append(token)
    if not self._stop and self._on_text is None:
      return False  # decoded at once in `finish`
    old_length = len(self._text)
    self._decode()
    if self._cut(old_length):
      return True
    self._pass_on(self._text[: len(self._text) - self._held()].strip())
    return False

  def finish(self) -> str:
    """The text; what has waited is passed on."""
    self._decode()
    text = (self._text + self._open).strip()
    self._pass_on(text)
    return text

  def _decode(self) -> None:
    known = self._tokens(self._window, self._read)
    text = self._tokens(self._window, len(self._ids))[len(known) :]
    # Bytes in a row are one text: a byte that does not fit breaks all of them.
    if not text or text.endswith(_BROKEN) or self._ids[-1] in self._bytes:
      self._open = text
      return
    self._text, self._open = self._text + text, ""
    self._window, self._read = self._read, len(self._ids)

  def _tokens(self, first: int, end: int) -> str:
    ids = self._ids[first:end]
    text = self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text

  def _cut(self, old_length: int) -> bool:
    """Ends the text before the first stop string in it, if there is one."""
    found = []
    text = self._text + self._open
    for stop in self._stop:
      index = text.find(stop, max(0, old_length - len(stop) + 1))
      if index >= 0:
        found.append(index)
    if found:
      self._text, self._open = text[: min(found)], ""
      self._window = self._read = len(self._ids)
    return bool(found)

  def _held(self) -> int:
    """How many characters at the end may be the beginning of a stop string."""
    longest = max(map(len, self._stop), default=1) - 1
    for size in range(min(longest, len(self._text)), 0, -1):
      end = self._text[-size:]
      if any(len(s) > size and s.startswith(end) for s in self._stop):
        return size
    return 0

  def _pass_on(self, text: str) -> None:
    if self._on_text is not None and len(text) > self._passed_on:
      self._on_text(text[self._passed_on :])
      self._passed_on = len(text)


@functools.lru_cache(maxsize=4)
def _kinds(
  tokenizer: transformers.PreTrainedTokenizerFast,
) -> tuple[frozenset[int], frozenset[int]]:
  """Ids of special tokens, which have no text, and of LLaMA's single bytes."""
  added = tokenizer.added_tokens_decoder.items()
  names = [f"<0x{byte:02X}>" for byte in range(256)]
  found = map(tokenizer.backend_tokenizer.token_to_id, names)
  return (
    frozenset(i for i, token in added if token.special),
    frozenset(i for i in found if i is not None),
  )
