"""Streamed text: whole characters, spaces where they belong, stop strings."""

import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

from vocojax.data import tokenizer
from vocojax.inference.text import AnswerText

TEXTS = (
  "The cat sat on the mat, didn't it?\n\n - yes\n - no",
  "日本語のテキスト, Ünïcödé and 👩‍👩‍👧 emoji 🦜.",
  "  two  spaces   inside\tand a tab",
  "price: 3.50 €; 1 , 2 .",
)


def byte_level() -> transformers.PreTrainedTokenizerFast:
  """One token for each byte, as GPT-2's tokenizer falls back to."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  words = ["<unk>", "<s>", "</s>", "<voco>", *alphabet]
  vocabulary = {word: i for i, word in enumerate(words)}
  backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
  )


def byte_pairs() -> transformers.PreTrainedTokenizerFast:
  """Tokens of one or several bytes, which need not be whole characters."""
  backend = tokenizers.Tokenizer(models.BPE())
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  backend.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=300,
    special_tokens=["<s>", "</s>", "<voco>"],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  backend.train_from_iterator(TEXTS, trainer)
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
  )


KINDS = ["llama", "byte level", "byte pairs", "word level"]


@pytest.fixture(scope="module", params=KINDS)
def words(request):
  if request.param == "llama":
    folder = request.getfixturevalue("llama_tokenizer_folder")
    return tokenizer.load_tokenizer(folder)
  if request.param == "byte level":
    return byte_level()
  if request.param == "byte pairs":
    return byte_pairs()
  return tokenizer.build_word_level(TEXTS)


def ids_of(words, text: str) -> list[int]:
  return words.encode(text, add_special_tokens=False)


def stream(words, ids, stop=()):
  """Text, its pieces, how many tokens were taken, and whether it stopped."""
  pieces: list[str] = []
  text = AnswerText(words, stop, pieces.append)
  for count, token in enumerate(ids, 1):
    if text.push(token):
      return text.finish(), pieces, count, True
  return text.finish(), pieces, len(ids), False


def test_streamed_text_is_the_decoded_text(words):
  for source in TEXTS:
    ids = ids_of(words, source)
    expected = words.decode(ids, skip_special_tokens=True).strip()
    text, pieces, _, stopped = stream(words, ids)
    assert (text, stopped) == (expected, False)
    assert "".join(pieces) == text
    assert len(pieces) > 5 and all(pieces)
    assert not any("\ufffd" in piece for piece in pieces)
    silent = AnswerText(words)
    assert not any(silent.push(token) for token in ids)
    assert silent.finish() == expected


def random_ids(words, rng) -> list[int]:
  """Ids of any text and none, half of them of bytes where there are such."""
  n = int(rng.integers(1, 40))
  ids = rng.integers(0, len(words), n)
  if len(words) > 30_000:  # LLaMA's bytes are tokens 3 to 258
    ids = np.where(rng.random(n) < rng.choice([0.2, 0.9]), ids % 256 + 3, ids)
  source = TEXTS[int(rng.integers(len(TEXTS)))]
  for i, token in enumerate(ids_of(words, source)[:n]):
    ids[i] = token if rng.random() < 0.5 else ids[i]
  return ids.tolist()


def test_any_tokens_give_the_same_text_streamed_or_not(words):
  """Bytes that are no characters, special tokens in between, any order."""
  rng = np.random.default_rng(0)
  broken = 0
  for _ in range(400):
    ids = random_ids(words, rng)
    expected = words.decode(ids, skip_special_tokens=True).strip()
    broken += "\ufffd" in expected
    text, pieces, *_ = stream(words, ids)
    silent = AnswerText(words)
    assert not any(silent.push(token) for token in ids)
    assert silent.finish() == text == "".join(pieces) == expected
  assert broken > 50 or "<0x41>" not in words.get_vocab()


def test_any_tokens_stop_alike_streamed_or_not(words):
  rng = np.random.default_rng(1)
  stops = 0
  for _ in range(300):
    ids = random_ids(words, rng)
    whole = words.decode(ids, skip_special_tokens=True)
    first = int(rng.integers(0, len(whole) + 1))
    stop = whole[first : first + int(rng.integers(1, 4))]
    if not stop or "\ufffd" in stop:
      continue
    text, pieces, count, stopped = stream(words, ids, (stop,))
    silent = AnswerText(words, (stop,))
    taken = [silent.push(token) for token in ids[:count]]
    assert silent.finish() == text == "".join(pieces)
    assert taken == [False] * (count - 1) + [stopped]
    until = words.decode(ids[:count], skip_special_tokens=True)
    assert stopped == (stop in until)
    if stopped:
      assert text == until[: until.index(stop)].strip()
      stops += 1
  assert stops > 80


def test_text_comes_as_early_as_it_can(words):
  """What is complete is not held back for the next token."""
  pieces: list[str] = []
  ids = ids_of(words, TEXTS[0])
  text = AnswerText(words, (), pieces.append)
  for count, token in enumerate(ids, 1):
    text.push(token)
    decoded = words.decode(ids[:count], skip_special_tokens=True).strip()
    assert "".join(pieces) == decoded


def test_stop_strings_anywhere(words):
  rng = np.random.default_rng(0)
  for source in TEXTS[:2]:
    ids = ids_of(words, source)
    whole = words.decode(ids, skip_special_tokens=True)
    for _ in range(60):
      first = int(rng.integers(0, len(whole) - 1))
      size = int(rng.integers(1, 8))
      stop = (whole[first : first + size], "never there")
      if "\ufffd" in stop[0]:
        continue
      text, pieces, count, stopped = stream(words, ids, stop)
      assert stopped
      assert text == whole[: whole.index(stop[0])].strip()
      assert "".join(pieces) == text
      # Not a token later than the string was complete.
      before = words.decode(ids[: count - 1], skip_special_tokens=True)
      assert stop[0] not in before
      silent = AnswerText(words, stop)
      assert [silent.push(t) for t in ids[:count]] == [False] * (count - 1) + [
        True
      ]
      assert silent.finish() == text


def test_what_only_begins_like_a_stop_string_comes_later():
  words = byte_level()
  pieces: list[str] = []
  text = AnswerText(words, ("STOP!", "TOPIC"), pieces.append)
  seen = []
  for token in ids_of(words, "a STOPPED STO"):
    assert not text.push(token)
    seen.append("".join(pieces))
  assert seen == [
    "a",
    *["a"] * 5,  # " STOP" might go on with "!"
    "a STOPP",
    "a STOPPE",
    "a STOPPED",
    *["a STOPPED"] * 4,
  ]
  assert text.finish() == "a STOPPED STO"
  assert "".join(pieces) == "a STOPPED STO"


def test_the_earliest_of_several_stop_strings_counts():
  words = byte_level()
  ids = ids_of(words, "one two three")
  assert stream(words, ids, ("three", "wo", "two th"))[0] == "one t"
  assert stream(words, ids, ("e", "one"))[0] == ""
  assert stream(words, ids, ("o",))[:2] == ("", [])


def test_an_unfinished_character_at_the_end():
  words = byte_level()
  ids = ids_of(words, "ab🦜")[:-1]
  text, pieces, *_ = stream(words, ids)
  assert text == "ab\ufffd" == "".join(pieces)
  assert text == words.decode(ids)
