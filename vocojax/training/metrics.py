"""Metrics of a run: sums, JSON lines, TensorBoard. Read next: `loop.py`."""

import json
import math
import pathlib
import time
from typing import Any

from vocojax.core import files


class Sums:
  """Sums since the last line, and the bad records since the first step.

  Saved in checkpoints, so a resumed run logs the same numbers as one that was
  never stopped.
  """

  _KEYS = ("loss", "tokens", "correct_tokens", "answers", "correct_answers")
  _KEYS += ("text_tokens", "text_room", "images", "image_room")

  def __init__(
    self, values: dict[str, float] | None = None, distilled: bool = False
  ):
    """Begins with `values`; `distilled` runs have losses of a teacher too."""
    of_teacher = ("distill_loss", "teacher_loss") if distilled else ()
    self._per_token = ("loss", *of_teacher)
    self._keys = (*self._KEYS, *self._per_token[1:])
    self.values = dict.fromkeys(self._keys, 0.0) | {"bad_records": 0}
    self.values |= values or {}

  def reset(self) -> None:
    """Back to zero, after a line; bad records count on."""
    self.values |= dict.fromkeys(self._keys, 0.0)

  def add(self, metrics: dict[str, float]) -> None:
    """Adds the metrics of one step, and how full its batch was.

    All losses there are means over tokens.
    """
    sums = metrics | {
      k: metrics[k] * metrics["tokens"] for k in self._per_token
    }
    for key in self._keys:
      self.values[key] += sums[key]

  def means(self) -> dict[str, float]:
    """Losses per token, and shares of right tokens, right answers and fill."""
    v = self.values
    return {k: v[k] / max(v["tokens"], 1) for k in self._per_token} | {
      "token_accuracy": v["correct_tokens"] / max(v["tokens"], 1),
      "answer_accuracy": v["correct_answers"] / max(v["answers"], 1),
      "text_fill": v["text_tokens"] / max(v["text_room"], 1),
      "image_fill": v["images"] / max(v["image_room"], 1),
    }


class MetricsWriter:
  """Appends to `metrics.jsonl` and TensorBoard files in a folder.

  Every method raises a UserError if there is no room or the folder is
  read-only.
  """

  def __init__(self, folder: pathlib.Path, first_step: int):
    """Opens the files and drops lines after `first_step`.

    A run that was killed has logged steps that its checkpoint does not hold;
    they will be logged again.

    Raises:
      UserError: also for a file that this class did not write.
    """
    self._path = folder / "metrics.jsonl"
    if self._path.exists():
      files.write_atomic(self._path, _lines_until(self._path, first_step))
    # Slow where PyTorch is installed, and only training needs it.
    from tensorboardX import event_file_writer, record_writer, writer

    board = folder / "tensorboard"
    with files.storage(self._path):
      self._file = files.open_growing(self._path)
    for scheme in ("gs", "s3"):  # its own need other packages
      record_writer.register_writer_factory(scheme, _Factory)
    with files.storage(board):
      board.mkdir(exist_ok=True)
      # Not tensorboardX.SummaryWriter: that writes in a thread, which dies of a
      # full disk, and then waits for it.
      self._board = event_file_writer.EventsWriter(str(board / "events"))
      start = writer.SessionLog(status=writer.SessionLog.START)
      self._board.write_event(
        writer.Event(step=first_step + 1, session_log=start)
      )
      self._board.flush()
    self._flushed = time.monotonic()

  def write(self, step: int, metrics: dict[str, float | int]) -> None:
    """One line; it is on disk when this returns."""
    from tensorboardX import summary, writer

    finite = {k: v for k, v in metrics.items() if math.isfinite(v)}
    line = {"step": step} | dict.fromkeys(metrics) | finite
    now = time.time()
    with files.storage(self._path):
      self._file.append((json.dumps(line | {"time": now}) + "\n").encode())
      for key, value in finite.items():
        scalar = summary.scalar(key, value)
        self._board.write_event(
          writer.Event(wall_time=now, step=step, summary=scalar)
        )
    if time.monotonic() > self._flushed + _FLUSH_SECONDS:
      self.flush()

  def flush(self) -> None:
    """All lines are where they belong when this returns."""
    self._file.flush()
    with files.storage(self._path.parent / "tensorboard"):
      self._board.flush()
    self._flushed = time.monotonic()

  def close(self) -> None:
    self._file.close()
    with files.storage(self._path.parent / "tensorboard"):
      self._board.close()


class _Factory:
  """How tensorboardX opens files in buckets."""

  @staticmethod
  def open(path: str) -> Any:
    return files.open_growing(files.to_path(path))

  @staticmethod
  def directory_check(path: str) -> None:
    """There are no folders to make."""


_FLUSH_SECONDS = 20  # what TensorBoard is behind, at most


def _lines_until(path: pathlib.Path, step: int) -> str:
  """The lines of a file of metrics up to a step; not a last, unfinished one."""
  kept = []
  for i, line in enumerate(files.read_text(path).splitlines(keepends=True), 1):
    if line.endswith("\n"):
      where = f"{path} line {i}"
      of = files.get_field(files.parse_json(line, where), "step", int, where)
      if of <= step:
        kept.append(line)
  return "".join(kept)
