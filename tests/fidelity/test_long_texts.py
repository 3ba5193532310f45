"""Where long conversations are cut: ids and labels of the original's own code.

The original cuts a sequence after 2,048 positions, 576 of which are the patches
of its image; the reference here does that literally.
"""

import dataclasses
import random

import numpy as np
import pytest

from configs import voco_1tok
from tests.fidelity import llava_reference
from tests.fidelity.test_layouts import random_turns
from vocojax import config as config_lib
from vocojax.data import pipeline, prompt, tokenizer
from vocojax.data.sources import Record
from vocojax.errors import OddRecord
from vocojax.models import compressors

POSITIONS, PATCHES = 2048, 576


@pytest.fixture(scope="module")
def llama(llama_tokenizer_folder):
  return tokenizer.load_tokenizer(llama_tokenizer_folder)


@pytest.fixture(scope="module")
def slow(llama_tokenizer_folder):
  return llava_reference.SlowTokenizer(llama_tokenizer_folder)


def encoder_of(llama, k):
  """As training makes it, from the paper's config."""
  c = voco_1tok.get_config()
  c.model.compressor.num_voco_tokens = k
  [phase] = config_lib.phases(c)
  prefix, suffix = prompt.stream_ids(prompt.LAYOUTS["voco_v1"], llama)
  stream = compressors.image_stream(
    phase.model, compressors.StreamTokens(prefix, suffix, 32000)
  )
  data = dataclasses.replace(phase.data, max_images=1)
  positions = (stream.start, stream.stride)
  return pipeline.Encoder(llama, phase.prompt, data, 336, (), positions)


def original(turns, k, slow):
  """Ids and labels of its text, after the sequence with patches was cut."""
  ids, labels = llava_reference.voco_v1(turns, k, slow)
  if llava_reference.IMAGE not in ids:
    return ids[:POSITIONS], labels[:POSITIONS]
  at = ids.index(llava_reference.IMAGE)
  for values in (ids, labels):
    values[at : at + 1] = [prompt.IGNORE] * PATCHES
  text = at + PATCHES + 2 + k  # after the separators and the VoCo tokens
  return ids[text:POSITIONS], labels[text:POSITIONS]


def grown(turns, length, k, slow):
  """The turns with an answer so long that the whole has `length` positions."""
  question, _ = turns[-1]
  head = turns[:-1]
  ids, _ = llava_reference.voco_v1([*head, (question, "cat")], k, slow)
  have = len(ids) + (PATCHES - 1) * (llava_reference.IMAGE in ids)
  return [*head, (question, "cat" + " cat" * (length - have))]


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("image", [False, True])
def test_cut_as_the_original(llama, slow, k, image):
  encoder = encoder_of(llama, k)
  rng = np.random.default_rng(0)
  most = POSITIONS if not image else 1469 - k
  images = (b"",) if image else ()
  assert encoder.longest(Record("x", images, ())) == most
  chat = random.Random(0)
  lengths = set()
  for length in (*range(POSITIONS - 4, POSITIONS + 5), 2300, 4000):
    turns = random_turns(chat, chat.randint(1, 30), image)
    turns = grown(turns, length, k, slow)
    record = Record("x", images, (tuple(turns),))
    ((ids, labels),) = encoder.prepare(record, rng).conversations
    assert (ids, labels) == original(turns, k, slow)
    lengths.add(len(ids))
  assert lengths == set(range(most - 4, most + 1))


@pytest.mark.parametrize("image", [False, True])
def test_no_answer_is_left(llama, slow, image):
  """The original trains on such a row without a label; it is left out here."""
  encoder = encoder_of(llama, 1)
  question = "<image>\n" * image + "What " * 2100
  turns = ((question, "Yes"),)
  record = Record("x", (b"",) if image else (), (turns,))
  with pytest.raises(OddRecord) as e:
    encoder.prepare(record, np.random.default_rng(0))
  assert e.value.kind == "cut"
  _, labels = original(turns, 1, slow)
  assert set(labels) == {prompt.IGNORE}
