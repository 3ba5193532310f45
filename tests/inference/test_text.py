"""Streamed text: whole characters, spaces where they belong, stop strings."""

import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers

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


@pytest.fixture(scope="module", params=["llama", "byte level", "word level"])
def words(request):
  if request.param == "llama":
    folder = request.getfixturevalue("llama_tokenizer_folder")
    return tokenizer.load_tokenizer(folder)
  if request.param == "byte level":
    return byte_level()
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
