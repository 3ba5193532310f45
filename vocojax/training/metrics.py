"""Metrics of a run: sums, JSON lines, TensorBoard. Read next: `loop.py`."""

import json
import os
import pathlib
import time


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
  """Appends to `metrics.jsonl` and TensorBoard files in a folder."""

  def __init__(self, folder: pathlib.Path, first_step: int):
    """Opens the files and drops lines after `first_step`.

    A run that was killed has logged steps that its checkpoint does not hold;
    they will be logged again.
    """
    path = folder / "metrics.jsonl"
    if path.exists():
      kept = [
        line
        for line in path.read_text().splitlines(keepends=True)
        if line.endswith("\n") and json.loads(line)["step"] <= first_step
      ]
      part = path.with_suffix(".part")
      part.write_text("".join(kept))
      os.replace(part, path)
    self._file = path.open("a")
    # Not above: where PyTorch is installed it imports that, for two seconds of
    # every program that reads a checkpoint.
    import tensorboardX

    self._board = tensorboardX.SummaryWriter(
      str(folder / "tensorboard"), purge_step=first_step + 1
    )

  def write(self, step: int, metrics: dict[str, float | int]) -> None:
    """One line; it is on disk when this returns."""
    line = {"step": step} | metrics | {"time": time.time()}
    self._file.write(json.dumps(line) + "\n")
    self._file.flush()
    for key, value in metrics.items():
      self._board.add_scalar(key, value, step)

  def close(self) -> None:
    self._file.close()
    self._board.close()
