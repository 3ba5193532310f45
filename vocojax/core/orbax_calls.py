"""Calls of Orbax that end as a whole. Read next: `training/checkpoint.py`.

Orbax reads and writes arrays side by side in an event loop, which it closes as
soon as one of them fails or Ctrl-C comes. The others then find no loop to
report to: each prints a stack trace, and an interrupted reader says that the
checkpoint is damaged.
"""

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def orbax_call() -> Iterator[None]:
  """Around a call of Orbax: nothing of it is left running at its end.

  Ctrl-C waits for the end; a second one ends the process at once.

  Raises:
    KeyboardInterrupt: Ctrl-C came; also where the block fails after it.
  """
  before = asyncio.get_event_loop_policy()
  asyncio.set_event_loop_policy(_Policy())
  try:
    with _interrupts_later():
      yield
  finally:
    asyncio.set_event_loop_policy(before)


class _Loop(asyncio.SelectorEventLoop):
  """Before it closes, it waits for what is still going on in it."""

  def close(self) -> None:
    if not self.is_closed() and (tasks := asyncio.all_tasks(self)):
      self.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
    super().close()


class _Policy(asyncio.DefaultEventLoopPolicy):
  _loop_factory = _Loop


@contextlib.contextmanager
def _interrupts_later() -> Iterator[None]:
  before = signal.getsignal(signal.SIGINT)
  main = threading.current_thread() is threading.main_thread()
  if before is not signal.default_int_handler or not main:
    yield
    return
  caught = []

  def note(number, frame):
    del frame
    if caught:
      signal.signal(number, signal.SIG_DFL)
      os.kill(os.getpid(), number)
    caught.append(number)

  signal.signal(signal.SIGINT, note)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, before)
    if caught:
      raise KeyboardInterrupt
