"""The benchmarks of data compare equals. Next: benchmarks/packing.py."""

import numpy as np
import pytest

from benchmarks import data_path, packing
from vocojax.data import rows
from vocojax.data.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  return packing.open_data(folder, 12, 3, packing.ROW)


def test_both_data_paths_give_the_same_pixels(opened):
  data, prompts, source = opened
  encoder = rows.Encoder(load_tokenizer(data.tokenizer), prompts, data, 336)
  theirs = data_path.TorchRecords(source, data.tokenizer, normalize=False)
  compared = 0
  for i, prepared in enumerate(packing.prepare(data, prompts, source)):
    ids, pixels = theirs[i]
    assert len(ids) == pytest.approx(prepared.length, rel=0.2, abs=8)
    for ours, x in zip(encoder.load(prepared), pixels, strict=True):
      np.testing.assert_array_equal(ours, x.numpy().transpose(1, 2, 0))
      compared += 1
  assert compared >= 8


def test_arrangements_hold_the_same_records(opened):
  data, prompts, source = opened
  records = packing.prepare(data, prompts, source)
  signed = np.array([x.length if x.num_images else -x.length for x in records])
  kinds = packing.arrange(records, signed, prompts, data)
  texts = []
  for batches in kinds.values():
    found = []
    for batch in batches:
      for ids, segments in zip(
        batch["input_ids"], batch["segment_ids"], strict=True
      ):
        for segment in range(1, segments.max() + 1):
          found.append(tuple(ids[segments == segment].tolist()))
    texts.append(sorted(found))
    slots = sum(np.count_nonzero(b["image_group_ids"]) for b in batches)
    assert slots == sum(x.num_images for x in records)
  assert len(texts[0]) == 12 and texts[0] == texts[1] == texts[2]
