"""Long conversations, cut as the original cuts them at 2,048 positions.

It puts 576 patches in the place of `<image>` and keeps the first 2,048 tokens.
"""

import pathlib
import random

import jax.numpy as jnp
import numpy as np
import pytest

from configs import voco_1tok
from tests.fidelity import llava_reference
from tests.fidelity.test_layouts import IMAGE, random_turns
from vocojax import config as config_lib
from vocojax.data import prompt, tokenizer
from vocojax.data.rows import Encoder
from vocojax.data.sources import OddRecord, Record
from vocojax.models import compressors, masks

LONGEST, PATCHES, VOCO_ID = 2048, 576, 32000


def original(turns, k, slow):
  """Ids and labels after the cut, and the place of the first of the text."""
  ids, labels = llava_reference.voco_v1(turns, k, slow)
  if IMAGE not in ids:
    return ids[:LONGEST], labels[:LONGEST], 0
  at = ids.index(IMAGE)
  ids[at : at + 1] = [IMAGE] * PATCHES
  labels[at : at + 1] = [prompt.IGNORE] * PATCHES
  text = len(ids) - ids[::-1].index(VOCO_ID)
  return ids[text:LONGEST], labels[text:LONGEST], text


def stream_of(phase, llama):
  layout = prompt.LAYOUTS[phase.prompt.layout]
  tokens = compressors.StreamTokens(*prompt.stream_ids(layout, llama), VOCO_ID)
  return compressors.image_stream(phase.model, tokens)


def encoder_of(k, llama):
  """As the recipe makes it, with k tokens; and the image stream."""
  c = voco_1tok.get_config()
  c.model.compressor.num_voco_tokens = k
  [phase] = config_lib.phases(c)
  stream = stream_of(phase, llama)
  encoder = Encoder(
    llama,
    phase.prompt,
    phase.data,
    phase.model.vision.image_size,
    image_positions=(stream.start, stream.stride),
  )
  return encoder, stream


@pytest.fixture(scope="module")
def llama(llama_tokenizer_folder):
  return tokenizer.load_tokenizer(llama_tokenizer_folder)


@pytest.fixture(scope="module")
def slow(llama_tokenizer_folder):
  return llava_reference.SlowTokenizer(llama_tokenizer_folder)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("image", [False, True])
def test_ids_labels_and_positions(llama, slow, k, image):
  """Of conversations that fit, and of those that do not by little or much."""
  encoder, stream = encoder_of(k, llama)
  images = (pathlib.Path("0.png"),) if image else ()
  cut = 0
  for seed, num_turns in enumerate((3, 60, 70, 80, 90, 140)):
    turns = random_turns(random.Random(seed), num_turns, image)
    record = Record("r", images, (tuple(turns),))
    prepared = encoder.prepare(record, np.random.default_rng(0))
    [(ids, labels)] = prepared.conversations
    expected, expected_labels, first = original(turns, k, slow)
    assert ids == expected and labels == expected_labels
    most = LONGEST - (579 + k if image else 0)
    assert len(ids) <= most
    cut += len(ids) == most
    row = jnp.ones((1, len(ids)), jnp.int32)
    groups = jnp.full((1, 1), int(image), jnp.int32)
    positions = masks.text_positions(
      groups, row, row * int(image), stream.start, groups * stream.stride
    )
    np.testing.assert_array_equal(positions[0], first + np.arange(len(ids)))
  assert cut >= 3


def test_a_record_whose_answers_are_cut_away_is_named(llama):
  encoder, _ = encoder_of(1, llama)
  turns = (("<image>\n" + "what " * 2000, "Yes"),)
  record = Record("r", (pathlib.Path("0.png"),), (turns,))
  with pytest.raises(OddRecord) as e:
    encoder.prepare(record, np.random.default_rng(0))
  assert (e.value.where, e.value.kind) == ("record r", "cut")
