"""Prompt layouts: golden ids, and LLaVA's own algorithm on random chats."""

import random

import jax.numpy as jnp
import numpy as np
import pytest

from tests.fidelity import llava_reference
from vocojax.config import CompressorConfig, ModelConfig
from vocojax.data import prompt, tokenizer
from vocojax.errors import DataError
from vocojax.models import compressors, masks

VOCO, VICUNA, PLAIN = (
  prompt.LAYOUTS[name] for name in ("voco_v1", "vicuna_v1", "plain")
)
BOS, EOS, IMAGE, VOCO_ID = 1, 2, -200, 32000
SYSTEM = [
  319, 13563, 1546, 263, 12758, 1404, 322, 385, 23116, 21082, 20255, 29889,
  450, 20255, 4076, 8444, 29892, 13173, 29892, 322, 1248, 568, 6089, 304, 278,
  1404, 29915, 29879, 5155, 29889,
]  # fmt: skip
FIRST_USER, LATER_USER = [3148, 1001, 29901], [11889, 29901]
ASSISTANT = [319, 1799, 9047, 13566, 29901]
IS_IT_RED = [3624, 372, 2654, 29973]  # 'Is' without a space before it
YES, NO = [3869], [1939]


@pytest.fixture(scope="module")
def llama(llama_tokenizer_folder):
  return tokenizer.load_tokenizer(llama_tokenizer_folder)


@pytest.fixture(scope="module")
def slow(llama_tokenizer_folder):
  return llava_reference.SlowTokenizer(llama_tokenizer_folder)


def joint(layout, llama, turns, k=0, strip="none"):
  """Ids and labels of one sequence, as the original has it."""
  num_images = sum(q.count("<image>") for q, _ in turns)
  ids, labels = prompt.encode(layout, llama, turns, num_images, strip)
  if not num_images:
    return ids, labels
  prefix, suffix = prompt.stream_ids(layout, llama)
  stream = [*prefix, IMAGE, *suffix, *[VOCO_ID] * k]
  return stream + ids, [prompt.IGNORE] * len(stream) + labels


def test_vicuna_golden(llama):
  """LLaVA-1.5's 'USER: <image>\\nq ASSISTANT: a</s>' in its two streams."""
  prefix, suffix = prompt.stream_ids(VICUNA, llama)
  assert list(prefix) == [BOS, *SYSTEM, *FIRST_USER, 29871]
  assert suffix == ()
  turns = [("<image>\nIs it red?", "Yes"), ("hi", "Yes"), ("hi", "No")]
  ids, labels = prompt.encode(VICUNA, llama, turns, 1, "none")
  asked = [
    [29871, 13, *IS_IT_RED, *ASSISTANT],
    [*LATER_USER, 7251, *ASSISTANT],
    [*LATER_USER, 7251, *ASSISTANT],
  ]
  answers = [[*YES, EOS], [*YES, EOS], [*NO, EOS]]
  assert ids == [
    x for pair in zip(asked, answers, strict=True) for y in pair for x in y
  ]
  assert labels == [
    x
    for question, answer in zip(asked, answers, strict=True)
    for x in [prompt.IGNORE] * len(question) + answer
  ]
  # The marker may stand anywhere, and what is asked is a prefix of it all.
  for text in ("Is it red?\n<image>", " Is it <image>red? ", "Is it red?"):
    turns = [(text, None)]
    assert prompt.encode(VICUNA, llama, turns, 1, "none")[0] == asked[0]


def test_vicuna_text_only_golden(llama):
  turns = [("hi", "Yes"), ("hi", None)]
  ids, labels = prompt.encode(VICUNA, llama, turns, 0, "none")
  first = [BOS, *SYSTEM, *FIRST_USER, 7251, *ASSISTANT]
  later = [*LATER_USER, 7251, *ASSISTANT]
  assert ids == [*first, *YES, EOS, *later]
  ignored = [prompt.IGNORE]
  assert labels == ignored * len(first) + [*YES, EOS] + ignored * len(later)


def test_plain_golden(llama):
  turns = [("<image>\nDescribe it.", "a red\ncat")]
  assert prompt.stream_ids(PLAIN, llama) == ((BOS,), ())
  ids, labels = prompt.encode(PLAIN, llama, turns, 1, "none")
  assert ids == labels == [263, 2654, 13, 4117, 13]
  turns = [("Describe it.", "a red\ncat")]
  text_only, labels = prompt.encode(PLAIN, llama, turns, 0, "none")
  assert text_only == [BOS, *ids] and labels == [prompt.IGNORE, *ids]
  with pytest.raises(DataError) as e:
    prompt.encode(PLAIN, llama, [("hi", None)], 1, "none")
  assert e.value.where == "prompt layout 'plain'"


@pytest.mark.parametrize("k", [1, 2, 8])
def test_voco_golden(llama, k):
  """The whole of the original's sequence, token by token."""
  turns = [("<image>\nIs it\nred?", "Yes"), ("hi", "No")]
  ids, labels = joint(VOCO, llama, turns, k, "original")
  system = [29909, *SYSTEM[1:11], 310, 278, 1967, *SYSTEM[11:]]
  asked = [BOS, IMAGE, 29871, 13, *[VOCO_ID] * k, 13, *system]
  # Without the newline: 'Is it' and 'red?' meet.
  asked += [*FIRST_USER, 1317, 372, 1127, 29973, *ASSISTANT]
  later = [*LATER_USER, 7251, *ASSISTANT]
  assert ids == [*asked, *YES, EOS, *later, *NO, EOS]
  ignored = [prompt.IGNORE]
  assert labels == [
    *ignored * len(asked),
    *[*YES, EOS],
    *ignored * len(later),
    *[*NO, EOS],
  ]


def test_positions_are_those_of_one_sequence(llama):
  """BOS, system and 'USER: ', 576 patches, then text, with no gap."""
  turns = [("<image>\nIs it red?", None)]
  ids, _ = joint(VICUNA, llama, turns)
  at = ids.index(IMAGE)
  prefix, suffix = prompt.stream_ids(VICUNA, llama)
  stream = compressors.image_stream(
    ModelConfig(compressor=CompressorConfig(name="full")),
    compressors.StreamTokens(prefix, suffix, VOCO_ID),
  )
  assert stream.visible == tuple(range(at + 576))
  row = jnp.ones((1, len(ids) - at - 1), jnp.int32)
  found = masks.text_positions(
    jnp.ones((1, 1), jnp.int32),
    row,
    row,
    stream.start,
    jnp.array([[stream.stride]]),
  )
  # One placeholder in `ids` for 576 patches.
  expected = np.arange(at + 1, len(ids)) + 575
  np.testing.assert_array_equal(found[0], expected)


WORDS = [
  *["What", "colour", "is", "the", "cat", "A.", "B.", "3.14", "12", "it's"],
  *[
    "élan",
    "語",
    "🙂",
    "USER",
    "user:",
    "assistant:",
    "x=1;",
    "(a)",
    "http://a",
  ],
  *["\n", "\n\n", "  ", "\t", ".", "?", ":", "-", "<", ">", "Yes", "no", "I"],
]


def chatter(rng):
  text = rng.choice(WORDS)
  for _ in range(rng.randint(0, 12)):
    text += rng.choice([" ", " ", " ", ""]) + rng.choice(WORDS)
  # LLaVA leaves out the newline after an image that nothing is asked about.
  return text if text.strip() else chatter(rng)


def random_turns(rng, num_turns, image):
  turns = [(chatter(rng), chatter(rng)) for _ in range(num_turns)]
  if image:
    question, answer = turns[0]
    at = rng.choice([0, len(question), rng.randint(0, len(question))])
    question = question[:at] + rng.choice(["<image>", "<image>\n", "\n<image>"])
    turns[0] = (question + turns[0][0][at:], answer)
  return turns


def test_equal_llavas_own_algorithm(llama, slow):
  """400 random conversations: every id and every label."""
  rng = random.Random(0)
  trained = 0
  for i in range(400):
    image = i % 4 > 0
    turns = random_turns(rng, rng.randint(1, 4), image)
    k = rng.choice([1, 2, 8])
    pairs = [
      (
        joint(VICUNA, llama, turns),
        llava_reference.vicuna_v1(turns, slow),
      ),
      (
        joint(VOCO, llama, turns, k, "original"),
        llava_reference.voco_v1(turns, k, slow),
      ),
    ]
    if image:
      pairs.append(
        (
          joint(PLAIN, llama, turns[:1]),
          llava_reference.preprocess_plain(turns[:1], slow),
        )
      )
    for ours, theirs in pairs:
      assert ours == theirs, turns
      trained += sum(label != prompt.IGNORE for label in ours[1])
  assert trained > 10_000


def test_what_is_asked_equals_llavas_string(llama, slow):
  """Generation: the string ends in 'ASSISTANT:'."""
  rng = random.Random(1)
  for i in range(100):
    *turns, (question, _) = random_turns(rng, rng.randint(1, 3), i % 2)
    turns.append((question, None))
    front = llava_reference.image_to_front
    text = llava_reference.conversation_text(
      llava_reference.VICUNA, [(front(q), a) for q, a in turns]
    )
    theirs = llava_reference.tokenizer_image_token(text, slow)
    assert joint(VICUNA, llama, turns)[0] == theirs
