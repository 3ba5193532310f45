"""A conversation on a terminal. Read next: lookup.py, engine.py.

Ctrl-C ends an answer, Ctrl-D the chat. An answer that was interrupted stays in
the conversation as far as it went.
"""

import contextlib
import dataclasses
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from vocojax.errors import UserError, shorten
from vocojax.inference.cache import VocoCache
from vocojax.inference.engine import Engine
from vocojax.inference.lookup import Found, Lookup, join
from vocojax.inference.requests import Request, Result

# Where there is one, `input` gets editing and a history from it.
with contextlib.suppress(ImportError):
  import readline  # noqa: F401

HELP = """\
/image PATH...  talk about other images; begins a new conversation
/reset          begin a new conversation about the same images
/stats          tokens, bytes and times
/help           this
/quit           end, as Ctrl-D does; Ctrl-C ends an answer, twice the chat"""


class _Interrupted(Exception):
  """Ctrl-C came during an answer."""


@dataclasses.dataclass
class _Answer:
  """An answer and its times, in seconds of one clock.

  Attributes:
    started: when it was asked for.
    text: what has come of it.
    first: when its first text came.
    ended: when it was complete or interrupted.
    compiled: whether a program was compiled for it.
    result: None if it was interrupted.
  """

  started: float
  text: str = ""
  first: float = 0.0
  ended: float = 0.0
  compiled: bool = False
  result: Result | None = None

  def take(self, text: str) -> None:
    self.first = self.first or time.perf_counter()
    self.text += text

  def __str__(self) -> str:
    if self.result is None:
      return "interrupted"
    tokens = len(self.result.token_ids)
    first = (self.first or self.ended) - self.started
    line = (
      f"{self.result.num_prompt_tokens} prompt tokens after "
      f"{self.result.num_image_tokens} of images, first text in {first:.3f} s"
    )
    if self.compiled:
      line += " with compiling"
    if tokens > 1 and self.first:
      each = (self.ended - self.first) / (tokens - 1)
      line += f", then {1000 * each:.1f} ms for each of {tokens - 1} tokens"
    return line


class Chat:
  """Images and the turns about them."""

  def __init__(
    self, engine: Engine, lookup: Lookup, make: Callable[..., Request]
  ):
    self._engine = engine
    self._lookup = lookup
    self._make = make
    self._images: list[Found] = []
    self._cache: VocoCache | None = None
    self._turns: list[tuple[str, str | None]] = []
    self._last: _Answer | None = None

  def show(self, paths: Sequence[str]) -> None:
    """Begins a conversation about these images.

    Raises:
      UserError: one of them cannot be used; everything is as before then.
    """
    if len(paths) > self._engine.max_images:
      raise UserError(
        "images",
        f"{len(paths)}",
        f"at most {self._engine.max_images} in this chat",
        "begin one with as many --image",
      )
    images = self._lookup.find(paths)
    self._cache = join(images)
    self._images = [image for image in images if isinstance(image, Found)]
    self._turns = []
    for image in images:
      print(image)

  def run(self) -> None:
    """Reads and answers until the end of input or /quit."""
    print("/help lists the commands; Ctrl-D ends.")
    while True:
      try:
        line = input("> ").strip()
        if line == "/quit":
          return
        if line.startswith("/"):
          self._command(line)
        elif line:
          self._answer(line)
      except EOFError:
        print()
        return
      except KeyboardInterrupt:  # outside an answer
        print()
      except UserError as e:
        print(f"error: {e}")

  def _command(self, line: str) -> None:
    name, _, rest = line.partition(" ")
    if name == "/image":
      paths = _split(rest)
      if not paths:
        raise UserError("/image", "no path", "at least one", "write it")
      self.show(paths)
    elif name == "/reset":
      self._turns = []
      print("a new conversation")
    elif name == "/stats":
      print(self._stats())
    elif name == "/help":
      print(HELP)
    else:
      raise UserError(
        "chat", f"the command {shorten(name)}", "one of /help", "correct it"
      )

  def _answer(self, question: str) -> None:
    """Asks and prints; what was said stays in the conversation."""
    compiled = self._engine.num_compilations
    answer = _Answer(time.perf_counter())
    with _deferred_interrupt() as interrupted:

      def on_text(text: str) -> None:
        answer.take(text)
        print(text, end="", flush=True)
        if interrupted():
          raise _Interrupted

      turns = [*self._turns, (question, None)]
      request = self._make(turns, self._cache, on_text=on_text)
      try:
        [answer.result] = self._engine.run([request])
      except _Interrupted:
        print(" [interrupted]", end="")
    print()
    answer.ended = time.perf_counter()
    answer.compiled = self._engine.num_compilations > compiled
    if answer.result and answer.result.finish_reason == "length":
      print(f"[cut after {len(answer.result.token_ids)} tokens]")
    self._last = answer
    self._turns.append((question, answer.text.strip()))

  def _stats(self) -> str:
    """Tokens, bytes and times so far, as lines."""
    lines = [str(image) for image in self._images] or ["no image"]
    counts, seconds = self._lookup.counts, self._lookup.seconds
    lines += [
      f"compressed {counts['model']} in {seconds:.3f} s, found "
      f"{counts['store']} in the store",
      f"turns: {len(self._turns)}",
    ]
    if self._last:
      lines.append(f"last answer: {self._last}")
    lines.append(f"programs compiled: {self._engine.num_compilations}")
    return "\n".join(lines)


def _split(text: str) -> list[str]:
  try:
    return shlex.split(text)
  except ValueError as e:
    raise UserError(
      "/image", f"{e}", "paths as a shell reads them", "close the quotes"
    ) from e


@contextlib.contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
  """Ctrl-C sets what is yielded to true; a second one ends the program.

  An exception amid a step of the engine could leave it without its cache.
  """
  came = []

  def handle(number, frame):
    if came:
      sys.exit(130)
    came.append(number)

  before = signal.signal(signal.SIGINT, handle)
  try:
    yield lambda: bool(came)
  finally:
    signal.signal(signal.SIGINT, before)
