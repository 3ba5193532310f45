"""Tokens to text as they come, up to a stop string. Next: engine.py."""

from collections.abc import Callable, Sequence

import transformers

_BROKEN = "\ufffd"  # what an unfinished character decodes to


class AnswerText:
  """The text of one answer.

  White space at both ends is left out. What is passed to `on_text` is never
  taken back: characters whose bytes are not complete, white space that may be
  the last, and what may be the beginning of a stop string wait.
  """

  def __init__(
    self,
    tokenizer: transformers.PreTrainedTokenizerFast,
    stop: Sequence[str] = (),
    on_text: Callable[[str], None] | None = None,
  ):
    self._tokenizer = tokenizer
    self._stop = tuple(stop)
    self._on_text = on_text
    self._ids: list[int] = []
    # ids[:read] are in the text; ids[window:read] are what it ends with, kept
    # because a token's text depends on the one before.
    self._window = self._read = 0
    self._text = ""
    self._passed_on = 0

  def push(self, token: int) -> bool:
    """Takes one more token; True if the text has now reached a stop string."""
    self._ids.append(token)
    if not self._stop and self._on_text is None:
      return False  # decoded at once in `finish`
    old_length = len(self._text)
    self._decode(last=False)
    if self._cut(old_length):
      return True
    self._pass_on(self._text[: len(self._text) - self._held()].strip())
    return False

  def finish(self) -> str:
    """The text; what has waited is passed on."""
    old_length = len(self._text)
    self._decode(last=True)
    self._cut(old_length)
    text = self._text.strip()
    self._pass_on(text)
    return text

  def _decode(self, last: bool) -> None:
    known = self._tokens(self._window, self._read)
    text = self._tokens(self._window, len(self._ids))
    if len(text) > len(known) and (last or not text.endswith(_BROKEN)):
      self._text += text[len(known) :]
      self._window, self._read = self._read, len(self._ids)

  def _tokens(self, first: int, end: int) -> str:
    ids = self._ids[first:end]
    text = self._tokenizer.decode(ids, skip_special_tokens=True)
    assert isinstance(text, str)
    return text

  def _cut(self, old_length: int) -> bool:
    """Ends the text before the first stop string in it, if there is one."""
    found = []
    for stop in self._stop:
      index = self._text.find(stop, max(0, old_length - len(stop) + 1))
      if index >= 0:
        found.append(index)
    if found:
      self._text = self._text[: min(found)]
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
