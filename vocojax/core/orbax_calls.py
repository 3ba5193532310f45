"""Calls of Orbax that end as a whole. Read next: `training/checkpoint.py`.

Orbax reads and writes arrays side by side in an event loop, which it closes as
soon as one of them fails or Ctrl-C comes. The others then find no loop to
report to: each prints a stack trace, and an interrupted reader says that the
checkpoint is damaged.
"""

import asyncio
import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def orbax_call() -> Iterator[None]:
  """Around a call of Orbax: nothing of it is left running at its end.

  Signals wait as in `signals_later`.
  """
  before = asyncio.get_event_loop_policy()
  asyncio.set_event_loop_policy(_Policy())
  try:
    with signals_later():
      yield
  finally:
    asyncio.set_event_loop_policy(before)


def enable_s3(kvstore: Callable[[str], dict]) -> None:
  """Lets Orbax use s3://, which TensorStore knows, exactly as gs://.

  Orbax asks these functions whether a path is in a bucket of Google, and for
  TensorStore's description of it.

  Args:
    kvstore: makes that description of a URL.
  """
  from orbax.checkpoint._src.path import gcs_utils
  from orbax.checkpoint._src.serialization import tensorstore_utils

  normalize = tensorstore_utils._normalize_path
  schemes = ("gs://", "s3://")
  for module, name, new in (
    (gcs_utils, "_GCS_PATH_PREFIX", schemes),
    (gcs_utils, "get_kvstore_for_gcs", kvstore),
    (tensorstore_utils, "_use_gcs_driver", lambda p: p.startswith(schemes)),
    (
      tensorstore_utils,
      "_normalize_path",
      lambda p: normalize(p).replace("s3:/", "s3://"),
    ),
  ):
    setattr(module, name, new)


class _Loop(asyncio.SelectorEventLoop):
  """Before it closes, it waits for what is still going on in it."""

  def close(self) -> None:
    if not self.is_closed() and (tasks := asyncio.all_tasks(self)):
      self.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
    super().close()


class _Policy(asyncio.DefaultEventLoopPolicy):
  _loop_factory = _Loop


@contextlib.contextmanager
def orbax_quiet() -> Iterator[None]:
  """Keeps Orbax from logging stack traces of errors that it also raises."""

  def is_other(record: logging.LogRecord) -> bool:
    return not (record.exc_info and "/orbax/" in record.pathname)

  logger = logging.getLogger("absl")
  logger.addFilter(is_other)
  try:
    yield
  finally:
    logger.removeFilter(is_other)


@contextlib.contextmanager
def signals_later() -> Iterator[None]:
  """Ctrl-C and SIGTERM wait for the end of a block; a second one kills."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  both = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
  # The others stay: SIG_IGN is what was asked for, and SIG_DFL may be a handler
  # that Python does not know, such as JAX's for SIGTERM.
  handlers = {n: handler for n, handler in both.items() if callable(handler)}
  caught = []

  def note(number, frame):
    del frame
    if caught:
      signal.signal(number, signal.SIG_DFL)
      signal.raise_signal(number)
    caught.append(number)

  for number in handlers:
    signal.signal(number, note)
  try:
    yield
  finally:
    for number, handler in handlers.items():
      signal.signal(number, handler)
    for number in caught:
      signal.raise_signal(number)
