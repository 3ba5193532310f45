"""Packed rows: how full, and how fast to train. Read next: `llava_like.py`.

  python -m benchmarks.packing [--records 16384] [--repeats 3]

First, fill rates over an epoch of records like LLaVA's mix for several sizes of
a row, and what packing costs. Then training on such records of at most 1024
tokens with 576 patches an image, the same small model and the same records in
three ways: each in a row of fixed length, in the order and chunks of LLaVA's
`group_by_modality_length` with every chunk cut to its longest row (as PyTorch
would pad it, but in steps of 128 tokens, so that only 8 shapes are compiled),
and packed. The learning rate is 0, so that the loss summed over all records
must agree, which is checked.
"""

import argparse
import dataclasses
import pathlib
import statistics
import tempfile
import time
from collections.abc import Iterator

import jax
import numpy as np

from benchmarks import hardware, llava_like, tables, train_step
from vocojax.config import DataConfig, PromptConfig
from vocojax.data import grouping, packing, rows, sources
from vocojax.data.tokenizer import load_tokenizer
from vocojax.training import optimizer as optimizer_lib
from vocojax.training import step

ROW = (2048, 7)  # tokens and images
_SIZES = (ROW, (2048, 6), (2048, 8), (4096, 14))
_TRAINED_ROW = (1024, 4)
_LOOKAHEADS = (1, 16, 64, 1024)
_SHAPE_STEP = 128  # lengths that grouped chunks are cut to
_CHUNK = 8  # rows that LLaVA gives a device at a time
_BATCH = 128  # and all of its devices
_MODEL = {
  "model.remat": "full",
  "model.llm.num_hidden_layers": 2,
  "model.llm.hidden_size": 256,
  "model.llm.intermediate_size": 688,
  "model.llm.num_attention_heads": 4,
  "model.llm.num_key_value_heads": 4,
  "model.llm.head_dim": 64,
  "model.vision.image_size": 336,
  "model.vision.patch_size": 14,
  "model.vision.hidden_size": 64,
  "model.vision.intermediate_size": 256,
  "model.vision.num_hidden_layers": 2,
  "model.vision.num_attention_heads": 2,
  "optimizer.learning_rate": 0.0,
  "optimizer.freeze": ("^vision/",),
}


def open_data(
  folder: pathlib.Path, num_records: int, num_images: int, row: tuple[int, int]
) -> tuple[DataConfig, PromptConfig, sources.Source]:
  """Writes records and opens them for rows of this size."""
  path = llava_like.write(folder, num_records, row[0] - 60, num_images)
  data = DataConfig(
    path=str(path),
    image_folder=str(folder),
    tokenizer=str(folder / "tokenizer"),
    batching="pack",
    max_text_length=row[0],
    max_images=row[1],
  )
  return data, PromptConfig(), sources.llava_json(data.path, data.image_folder)


def prepare(
  data: DataConfig, prompts: PromptConfig, source: sources.Source
) -> list[rows.Prepared]:
  """All records, tokenised."""
  encoder = rows.Encoder(load_tokenizer(data.tokenizer), prompts, data, 336)
  rng = np.random.default_rng(0)
  return [encoder.prepare(source[i], rng) for i in range(len(source))]


def describe(records: list[rows.Prepared]) -> str:
  lengths = np.array([x.length for x in records])
  parts = np.percentile(lengths, (50, 90, 99, 100))
  without = np.mean([not x.num_images for x in records])
  return (
    f"{len(records)} records, {without:.1%} without image; tokens: mean "
    f"{lengths.mean():.0f}, median {parts[0]:.0f}, 90 % to {parts[1]:.0f}, "
    f"99 % to {parts[2]:.0f}, longest {parts[3]:.0f}"
  )


def epoch(
  records: list[rows.Prepared], data: DataConfig
) -> Iterator[list[rows.Prepared]]:
  """The records of each row of an epoch."""
  packer = packing.Packer(records, len(records), data)
  while True:
    yield packer.next_row()[0]
    if packer.done:
      return


def fill_table(records: list[rows.Prepared], data: DataConfig) -> str:
  """Fill rates over an epoch, its last rows included."""
  lines = []
  lookaheads = [(*ROW, n) for n in _LOOKAHEADS]
  for T, F, n in [(*size, data.pack_lookahead) for size in _SIZES] + lookaheads:
    sized = dataclasses.replace(
      data, max_text_length=T, max_images=F, pack_lookahead=n
    )
    fitting = [x for x in records if x.length <= T]
    start = time.perf_counter()
    count = sum(1 for _ in epoch(fitting, sized))
    seconds = time.perf_counter() - start
    text = sum(x.length for x in fitting) / count / T
    images = sum(x.num_images for x in fitting) / count / F
    line = [f"{T} x {F}", n, f"{len(fitting) / count:.2f}"]
    line += [f"{text:.2%}", f"{images:.2%}"]
    lines.append([*line, f"{1e6 * seconds / len(fitting):.0f}"])
  head = ["tokens x images of a row", "lookahead", "records a row"]
  return tables.markdown(
    [*head, "text fill", "image fill", "packing, us a record"], lines
  )


class Trainer:
  """The trainer's step at learning rate 0, for batches of any shape."""

  def __init__(self, vocab_size: int):
    config = train_step.make_config(
      _MODEL | {"model.llm.vocab_size": vocab_size}
    )
    ours = train_step.Ours(config)
    optimizer = optimizer_lib.make_optimizer(config.optimizer, 1)
    freeze = config.optimizer.freeze
    self._state = step.init_state(ours.params, optimizer, freeze)
    self._step = jax.jit(
      step.make_train_step(ours.model, optimizer, freeze, 1), donate_argnums=0
    )

  def run(self, batches: list[dict]) -> tuple[float, float]:
    """Summed loss, and seconds until all is done."""
    total, start = 0.0, time.perf_counter()
    for batch in batches:
      self._state, metrics = self._step(self._state, batch)
      total += float(metrics["loss"] * metrics["tokens"])
    return total, time.perf_counter() - start


def arrange(
  records: list[rows.Prepared],
  signed_lengths: np.ndarray,
  prompts: PromptConfig,
  data: DataConfig,
) -> dict[str, list[dict]]:
  """The same records as batches of three kinds."""
  words = load_tokenizer(data.tokenizer)
  size = _MODEL["model.vision.image_size"]

  def batch(parts, max_length, max_images):
    sized = dataclasses.replace(
      data, max_text_length=max_length, max_images=max_images
    )
    encoder = rows.Encoder(words, prompts, sized, size)
    made = [encoder.lay([(x, encoder.load(x)) for x in row]) for row in parts]
    return {key: np.stack([x[key] for x in made]) for key in made[0]}

  def chunks(order):
    for i in range(0, len(order), _CHUNK):
      yield [[records[j]] for j in order[i : i + _CHUNK]]

  order = grouping.order(
    signed_lengths, _BATCH, _BATCH // _CHUNK, np.random.default_rng(0)
  )
  grouped = []
  for chunk in chunks(order):
    longest = max(x.length for (x,) in chunk)
    length = -(-longest // _SHAPE_STEP) * _SHAPE_STEP
    # Without any image a chunk has no image stream, as in the original's best
    # case; a slot is needed here, so its time counts.
    grouped.append(batch(chunk, length, 1))
  packed = list(epoch(records, data))
  return {
    "fixed length": [
      batch(chunk, data.max_text_length, 1)
      for chunk in chunks(range(len(records)))
    ],
    "length-grouped": grouped,
    "packed": [
      batch(packed[i : i + 2], data.max_text_length, data.max_images)
      for i in range(0, len(packed), 2)
    ],
  }


def speed_table(kinds, num_records: int, vocab_size: int, repeats: int) -> str:
  """Samples per second of each kind, and how the packed ones compare."""
  trainer = Trainer(vocab_size)
  losses = {name: trainer.run(batches)[0] for name, batches in kinds.items()}
  for loss in losses.values():  # compiles, too
    np.testing.assert_allclose(loss, losses["packed"], rtol=1e-4)
  times = {name: [] for name in kinds}
  for _ in range(repeats):
    for name, batches in kinds.items():
      times[name].append(trainer.run(batches)[1])
  lines = []
  for name, batches in kinds.items():
    ratios = [t / p for t, p in zip(times[name], times["packed"], strict=True)]
    text = sum(np.count_nonzero(x["segment_ids"]) for x in batches)
    room = sum(x["segment_ids"].size for x in batches)
    speed = num_records / statistics.median(times[name])
    line = [name, len(batches), f"{text / room:.1%}", f"{speed:.2f}"]
    ratio = f"{statistics.median(ratios):.2f} "
    lines.append([*line, f"{ratio}({min(ratios):.2f}-{max(ratios):.2f})"])
  head = ["batches", "steps", "text fill", "samples/s", "packed / this"]
  return tables.markdown(head, lines)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--records", type=int, default=16384)
  parser.add_argument("--train_records", type=int, default=256)
  parser.add_argument("--repeats", type=int, default=3)
  args = parser.parse_args()
  hardware.use()
  with tempfile.TemporaryDirectory() as name:
    data, prompts, source = open_data(pathlib.Path(name), args.records, 0, ROW)
    records = prepare(data, prompts, source)
    print(describe(records) + "\n\n" + fill_table(records, data) + "\n")
  with tempfile.TemporaryDirectory() as name:
    count, folder = args.train_records, pathlib.Path(name)
    data, prompts, source = open_data(folder, count, 8, _TRAINED_ROW)
    records = prepare(data, prompts, source)
    print(describe(records) + "\n", flush=True)
    signed = grouping.signed_lengths(source)
    kinds = arrange(records, signed, prompts, data)
    words = load_tokenizer(data.tokenizer)
    print(speed_table(kinds, count, len(words), args.repeats) + "\n")
  tables.print_provenance("benchmarks.packing")


if __name__ == "__main__":
  main()
