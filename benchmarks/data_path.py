"""Data path: Grain against PyTorch's DataLoader. Read next: `llava_like.py`.

  python -m benchmarks.data_path [--records 1024] [--repeats 3]

Records like LLaVA's mix with JPEGs of about 640x480, on two CPU cores with two
worker processes on either side, read from the page cache. Ours decodes, scales,
tokenises and packs rows of 2048 tokens and 7 images, or gives every record a
row. Theirs does what LLaVA's data set does: opens an image with Pillow, pads it
to a square, lets Hugging Face's CLIPImageProcessor scale, crop and normalise
it, and tokenises the conversation with the same tokenizer (once; LLaVA does it
again for every turn to find the labels, which is left out). A second row has
its processor without what ours leaves to the device, the normalisation.

After the speeds, where the time of one process goes. That is time of the CPU,
which counts the same on a machine that is not idle.
"""

import argparse
import dataclasses
import functools
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from transformers.models.clip import image_processing_pil_clip

from benchmarks import hardware, tables
from benchmarks import packing as packing_benchmark
from vocojax.config import DataConfig, PromptConfig
from vocojax.data import images, packing, pipeline, prompt, rows, sources
from vocojax.data.tokenizer import load_tokenizer

_SIZE = 336
_WORKERS = 2
_PACKED_BATCH = 4  # rows of packed records
_BATCH = 32  # records, where each has a row
_STAGED = 256  # records whose parts are timed


class TorchRecords(torch.utils.data.Dataset):
  """What LLaVA's LazySupervisedDataset does, on our records."""

  def __init__(self, source: sources.Source, folder: str, normalize: bool):
    self._source = source
    self._tokenizer = load_tokenizer(folder)
    self._processor = image_processing_pil_clip.CLIPImageProcessorPil(
      size={"shortest_edge": _SIZE},
      crop_size={"height": _SIZE, "width": _SIZE},
      do_rescale=normalize,
      do_normalize=normalize,
    )

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    record = self._source[index]
    layout = prompt.LAYOUTS["voco_v1"]
    text = layout.image_opening if record.images else layout.text_opening
    (turns,) = record.conversations
    for question, answer in turns:
      text += f"{question}{layout.question_end} {answer}</s>USER: "
    ids = self._tokenizer(text, return_tensors="pt").input_ids[0]
    return ids, [self._pixels(path) for path in record.images]

  def _pixels(self, path: pathlib.Path) -> torch.Tensor:
    with Image.open(path) as file:
      image = file.convert("RGB")
    side = max(image.size)
    if image.width != image.height:
      square = Image.new("RGB", (side, side), (122, 116, 104))
      left, top = (side - n for n in image.size)
      square.paste(image, (left // 2, top // 2))
      image = square
    return self._processor(image, return_tensors="pt")["pixel_values"][0]


def collate(batch) -> dict[str, torch.Tensor]:
  """Pads texts to the longest and stacks what images there are."""
  texts, pixels = zip(*batch, strict=True)
  return {
    "input_ids": torch.nn.utils.rnn.pad_sequence(texts, batch_first=True),
    "images": torch.stack([x for part in pixels for x in part]),
  }


def run_torch(source, folder: str, normalize: bool) -> tuple[int, float]:
  """Images of an epoch but for the first batch, and its seconds."""
  loader = torch.utils.data.DataLoader(
    TorchRecords(source, folder, normalize),
    _BATCH,
    shuffle=True,
    num_workers=_WORKERS,
    collate_fn=collate,
    drop_last=True,
  )
  iterator = iter(loader)
  next(iterator)  # workers start
  count, start = 0, time.perf_counter()
  for batch in iterator:
    count += len(batch["images"])
  return count, time.perf_counter() - start


def run_ours(
  source, data: DataConfig, prompts: PromptConfig
) -> tuple[int, float]:
  """The same of ours."""
  words = load_tokenizer(data.tokenizer)
  encoder = rows.Encoder(words, prompts, data, _SIZE)
  dataset = pipeline.train_dataset(
    source, encoder, data, 0, 0, 1, data.batch_size
  )
  iterator = iter(dataset)
  next(iterator)
  count = 0
  # As many records as theirs, to the batch; what is ready then was not paid.
  ready = data.prefetch_batches
  for _ in range(ready):
    next(iterator)
  start = time.perf_counter()
  while count < len(source):
    batch = next(iterator)
    count += batch.fill["images"]
  seconds = time.perf_counter() - start
  iterator.close()
  return count, seconds


def measure(sides: dict[str, Callable], repeats: int) -> str:
  """Images per second of every side; the first is compared with the rest."""
  speeds = {name: [] for name in sides}
  for _ in range(repeats):
    for name, run in sides.items():
      count, seconds = run()
      speeds[name].append(count / seconds)
  lines = []
  base = next(iter(sides))
  for name, found in speeds.items():
    ratios = [a / b for a, b in zip(speeds[base], found, strict=True)]
    lines.append(
      [
        name,
        f"{statistics.median(found):.0f}",
        f"{statistics.median(ratios):.2f} "
        f"({min(ratios):.2f}-{max(ratios):.2f})",
      ]
    )
  return tables.markdown(["data path", "images/s", f"{base} / this"], lines)


def torch_milliseconds(source, folder: str, normalize: bool) -> str:
  """The same of PyTorch's side, in one number."""
  records = TorchRecords(source, folder, normalize)
  records[0]
  count, start = 0, time.process_time()
  for i in range(0, _STAGED, _BATCH):
    batch = collate([records[k] for k in range(i, i + _BATCH)])
    count += len(batch["images"])
  return f"{1e3 * (time.process_time() - start) / count:.2f}"


def stages(source, data: DataConfig, prompts: PromptConfig) -> str:
  """Milliseconds of CPU that one image costs in each part, in one process."""
  words = load_tokenizer(data.tokenizer)
  encoder = rows.Encoder(words, prompts, data, _SIZE)
  spent: dict[str, float] = {}

  def timed(name: str, f: Callable, *args):
    start = time.process_time()
    result = f(*args)
    spent[name] = spent.get(name, 0.0) + time.process_time() - start
    return result

  rng = np.random.default_rng(0)
  records = [timed("read JSON", source.__getitem__, i) for i in range(_STAGED)]
  prepared = [timed("tokenise", encoder.prepare, x, rng) for x in records]
  packer = packing.Packer(prepared, len(prepared), data)
  processor = images.ImageProcessor(_SIZE, pad_to_square=True)
  count = 0
  while not count or not packer.done:
    parts, _ = timed("choose rows", packer.next_row)
    loaded = []
    for x in parts:
      pixels = np.zeros((x.num_images, _SIZE, _SIZE, 3), np.uint8)
      for i, path in enumerate(x.record.images):
        image = timed("decode JPEG", images.decode_image, path)
        pixels[i] = timed("pad, resize", processor.scale, image)
        count += 1
      loaded.append((x, pixels))
    row = timed("lay out row", encoder.lay, loaded)
    timed("stack", np.stack, [row["images"]])
  whole = sum(spent.values())
  lines = [
    [name, f"{1e3 * t / count:.2f}", f"{t / whole:.0%}"]
    for name, t in spent.items()
  ]
  lines.append(["all", f"{1e3 * whole / count:.2f}", "100%"])
  for name, normalize in (("DataLoader", True), ("not normalised", False)):
    theirs = torch_milliseconds(source, data.tokenizer, normalize)
    lines.append([name, theirs, ""])
  return tables.markdown(["part", "ms an image", "share"], lines)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--records", type=int, default=1024)
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--tokenizer", default="", help="folder of another one")
  args = parser.parse_args()
  hardware.use()
  torch.set_num_threads(1)  # in a worker it would be so anyway
  with tempfile.TemporaryDirectory() as name:
    data, prompts, source = packing_benchmark.open_data(
      pathlib.Path(name), args.records, 256, packing_benchmark.ROW
    )
    folder = args.tokenizer or data.tokenizer
    data = dataclasses.replace(
      data,
      tokenizer=folder,
      num_workers=_WORKERS,
      batch_size=_PACKED_BATCH,
      on_bad_record="skip",
    )
    single = dataclasses.replace(
      data, batching="shuffle", max_images=1, batch_size=_BATCH
    )
    ours = functools.partial(run_ours, source)
    theirs = functools.partial(run_torch, source, folder)
    sides = {
      "vocojax, packed": lambda: ours(data, prompts),
      "vocojax, a row each": lambda: ours(single, prompts),
      "DataLoader, CLIPImageProcessor": lambda: theirs(True),
      "the same, not normalised": lambda: theirs(False),
    }
    print(measure(sides, args.repeats) + "\n", flush=True)
    print(stages(source, data, prompts) + "\n")
  tables.print_provenance("benchmarks.data_path", torch=torch.__version__)


if __name__ == "__main__":
  main()
