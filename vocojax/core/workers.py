"""Processes that prepare data for another one. Read next: data/pipeline.py.

They live as long as the process that started them, and leave Ctrl-C and SIGTERM
to it: a terminal and most schedulers send them to all processes of a program.
"""

import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing import resource_tracker, util

import grain


def begin(*_) -> None:
  """Ends this worker as soon as its parent is gone.

  What Grain calls first in a worker (`worker_init_fn`). Shared memory that was
  in use then is removed by the resource tracker of `multiprocessing`.
  """
  threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
  parent = multiprocessing.parent_process()
  assert parent is not None
  parent.join()
  os._exit(1)


def start(iterator: grain.DatasetIterator) -> None:
  """Starts what an iterator runs in the background, if it does not run yet.

  Its first stage must be a thread, as of `ThreadPrefetchIterDataset`. That one
  and the processes that it starts get neither Ctrl-C nor SIGTERM.
  """
  # First, since it unblocks signals where it starts. That it has to remove what
  # a killed run left is no news.
  sys.warnoptions.append("ignore:resource_tracker")
  try:
    resource_tracker.ensure_running()
  finally:
    sys.warnoptions.pop()
  signals = (signal.SIGINT, signal.SIGTERM)
  before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
  try:
    iterator.start_prefetch()
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_workers() -> None:
  """What `multiprocessing` does at exit, with a signal that they do get."""
  for process in multiprocessing.active_children():
    if process.daemon:
      process.kill()


# After Grain has closed its iterators, which ends their workers.
util.Finalize(None, _end_workers, exitpriority=0)
