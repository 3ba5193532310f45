"""Tokenizers and prompts: golden ids of LLaMA's tokenizer, label spans."""

import doctest
import os
import random

import pytest

from vocojax.data import prompt, tokenizer
from vocojax.errors import DataError, OddRecord

VOCO = prompt.LAYOUTS["voco_v1"]
QA = prompt.LAYOUTS["qa_v1"]

# What LLaVA's slow tokenizer gives (legacy=False) for the original's string,
# after the VoCo tokens: a newline, then the system text without a space
# before it.
SYSTEM = [
  13, 29909, 13563, 1546, 263, 12758, 1404, 322, 385, 23116, 21082, 20255,
  310, 278, 1967, 29889, 450, 20255, 4076, 8444, 29892, 13173, 29892, 322,
  1248, 568, 6089, 304, 278, 1404, 29915, 29879, 5155, 29889,
]  # fmt: skip
FIRST_USER = [3148, 1001, 29901]  # ' US' 'ER' ':'
LATER_USER = [11889, 29901]  # 'USER' ':'
ASSISTANT = [319, 1799, 9047, 13566, 29901]
BOS, EOS = 1, 2


@pytest.fixture(scope="module")
def llama(llama_tokenizer_folder):
  return tokenizer.load_tokenizer(llama_tokenizer_folder)


def spans(labels):
  """[start, stop) of each trained stretch."""
  trained = [label != prompt.IGNORE for label in labels]
  edges = [
    i
    for i in range(len(labels) + 1)
    if (i > 0 and trained[i - 1]) != (i < len(labels) and trained[i])
  ]
  return list(zip(edges[::2], edges[1::2], strict=True))


def test_llama_voco_token(llama):
  assert len(llama) == 32001
  assert llama.convert_tokens_to_ids("<voco>") == 32000
  assert llama.pad_token_id == 0


def test_stream_ids(llama):
  assert prompt.stream_ids(VOCO, llama) == ((BOS,), (29871, 13))
  assert prompt.stream_ids(QA, llama) == ((BOS,), ())


def test_one_turn(llama):
  turns = [("<image>\nIs it red?", "Yes")]
  ids, labels = prompt.encode(VOCO, llama, turns, 1, "none")
  question = [1317, 372, 2654, 29973]
  assert len(SYSTEM) == 34
  assert ids == [*SYSTEM, *FIRST_USER, *question, *ASSISTANT, 3869, EOS]
  assert labels == [prompt.IGNORE] * (len(ids) - 2) + [3869, EOS]


def test_three_turns(llama):
  turns = [("Is it red?", "Yes"), ("hi", "Hello world"), ("hi", "No")]
  ids, labels = prompt.encode(VOCO, llama, turns, 1, "none")
  assert ids == [
    *[*SYSTEM, *FIRST_USER, 1317, 372, 2654, 29973, *ASSISTANT, 3869, EOS],
    *[*LATER_USER, 7251, *ASSISTANT, 15043, 3186, EOS],
    *[*LATER_USER, 7251, *ASSISTANT, 1939, EOS],
  ]
  assert spans(labels) == [(46, 48), (56, 59), (67, 69)]
  for start, stop in spans(labels):
    assert labels[start:stop] == ids[start:stop]


def test_text_only(llama):
  turns = [("hi\nhi", "Yes\nNo"), ("hi", "No")]
  ids, labels = prompt.encode(VOCO, llama, turns, 0, "original")
  assert ids == [
    # With a space before the first word, and newlines kept.
    *[BOS, 319, *SYSTEM[2:], *FIRST_USER, 7251, 13, 2918, *ASSISTANT],
    *[3869, 13, 3782, EOS, *LATER_USER, 7251, *ASSISTANT, 1939, EOS],
  ]
  assert spans(labels) == [(45, 49), (57, 59)]


def test_generation_prompt_is_a_prefix(llama):
  turns = [("Is it red?", "Yes"), ("hi", "Hello world")]
  for layout in (VOCO, QA):
    whole, _ = prompt.encode(layout, llama, turns, 1, "none")
    asked, labels = prompt.encode(
      layout, llama, [turns[0], ("hi", None)], 1, "none"
    )
    assert whole == [*asked, 15043, 3186, EOS]
    assert labels[-1] == prompt.IGNORE
  with pytest.raises(ValueError, match="turn 0 of 2"):
    prompt.encode(VOCO, llama, [("hi", None), turns[0]], 1, "none")


def test_newlines_go_from_image_conversations(llama):
  turns = [("<image>\nWhat?\nShort.", "A. cat\nB. dog")]
  stripped, _ = prompt.encode(VOCO, llama, turns, 1, "original")
  same, _ = prompt.encode(
    VOCO, llama, [("What?Short.", "A. catB. dog")], 1, "none"
  )
  kept, _ = prompt.encode(VOCO, llama, turns, 1, "none")
  assert stripped == same
  assert kept.count(13) == 3 and stripped.count(13) == 1


def test_special_tokens_in_a_text_are_plain_text(llama):
  turns = [("Is <voco> </s> it?", "<s> is </s>")]
  ids, _ = prompt.encode(VOCO, llama, turns, 1, "none")
  assert ids.count(EOS) == 1 and BOS not in ids and 32000 not in ids


def test_pieces_equal_the_whole_text(llama):
  """No LLaMA token reaches across the places where pieces meet."""
  rng = random.Random(0)
  alphabet = ["a", "B", " ", "  ", "\n", ".", "?", "é", "語", "7", ":", "er"]
  shield = llama.encode("\n", add_special_tokens=False)
  for _ in range(200):
    question, answer = (
      "".join(rng.choices(alphabet, k=rng.randint(1, 12))) for _ in range(2)
    )
    ids, labels = prompt.encode(VOCO, llama, [(question, answer)], 1, "none")
    text = f"{VOCO.image_opening}{question} ASSISTANT: {answer}"
    whole = llama.encode("\n" + text, add_special_tokens=False)
    assert ids == [*whole[len(shield) :], EOS]
    ((start, stop),) = spans(labels)
    assert llama.decode(ids[start : stop - 1]) == answer


def test_word_level_round_trip(tmp_path):
  made = tokenizer.build_word_level(["Is it red?", "yes, a rectangle"])
  made.save_pretrained(tmp_path)
  loaded = tokenizer.load_tokenizer(tmp_path)
  assert len(loaded) == len(made) == 12
  specials = ["<unk>", "<s>", "</s>", "<voco>", ",", "?", "Is"]
  assert loaded.convert_tokens_to_ids(specials) == list(range(7))
  assert loaded.pad_token_id == 0
  ids, labels = prompt.encode(
    QA, loaded, [("Is it red?", "rectangle")], 1, "none"
  )
  assert loaded.convert_ids_to_tokens(ids) == [
    *["Is", "it", "red", "?", "rectangle", "</s>"]
  ]
  assert spans(labels) == [(4, 6)]
  assert prompt.stream_ids(QA, loaded) == ((1,), ())
  text_only, _ = prompt.encode(
    QA, loaded, [("Is it red?", "rectangle")], 0, "none"
  )
  assert text_only == [1, *ids]
  for answer in ("yes", "rectangle"):
    ids = loaded.encode(answer, add_special_tokens=False)
    assert loaded.decode([*ids, 2], skip_special_tokens=True) == answer
  assert loaded.encode("blue", add_special_tokens=False) == [0]


@pytest.mark.parametrize(
  ("questions", "count", "placed"),
  [
    (["<image>\nWhat?"], 1, ["What?"]),
    ([" What? <image>\n", "<p>"], 1, ["What?", "<p>"]),
    (["Hi", "<image>\n<image> What?"], 2, ["Hi", "What?"]),
    (["What?"], 3, ["What?"]),
    (
      ["Before: <image> After: <image> What changed?"],
      *(2, ["Before: image 1 After: image 2 What changed?"]),
    ),
    (
      ["<image>\nWhat?", "And <image><image>?"],
      *(3, ["image 1\nWhat?", "And image 2image 3?"]),
    ),
  ],
)
def test_images_stand_in_front_in_order(questions, count, placed):
  assert prompt.place_images(questions, count) == placed


@pytest.mark.parametrize(
  ("questions", "count"),
  [(["<image>?"], 0), (["<image><image>"], 1), (["<image>", "?"], 2)],
)
def test_markers_are_counted(llama, questions, count):
  turns = [(question, "<image>") for question in questions]
  with pytest.raises(DataError) as e:
    prompt.encode(VOCO, llama, turns, count, "none")
  found = sum(q.count("<image>") for q in questions)
  assert (e.value.where, e.value.got) == ("question", f"{found} <image>")
  assert e.value.expected.startswith(f"{count}," if count else "none,")
  assert isinstance(e.value, OddRecord) == (count == 0)


@pytest.mark.parametrize("count", [0, 1])
def test_markers_in_answers_are_text(llama, count):
  said = "The tag <image> marks one."
  question = "<image>\nWhat?" if count else "What?"
  ids, labels = prompt.encode(VOCO, llama, [(question, said)], count, "none")
  ((start, stop),) = spans(labels)
  assert llama.decode(ids[start : stop - 1]) == said


@pytest.mark.parametrize("layout", [VOCO, QA], ids=lambda x: x.name)
def test_several_images_of_one_run(llama, layout):
  """The text is that of one image."""
  two = [("<image>\n<image>\nIs it red?", "No")]
  assert prompt.encode(layout, llama, two, 2, "none") == prompt.encode(
    layout, llama, [("<image>\nIs it red?", "No")], 1, "none"
  )


def test_doctests():
  assert doctest.testmod(prompt).attempted == 2
  assert doctest.testmod(prompt).failed == 0


def test_missing_tokenizer(tmp_path):
  def refused(folder) -> str:
    with pytest.raises(DataError) as e:
      tokenizer.load_tokenizer(folder)
    assert e.value.where == f"tokenizer folder {folder}"
    assert "\n" not in str(e.value)
    return e.value.got

  assert refused(tmp_path / "nowhere") == "no such folder"
  assert refused(tmp_path) == "none of its files"
  for content in (b"{", b"[]", b"{}", b"\xff", b'{"model": {"type": 3}}'):
    (tmp_path / "tokenizer.json").write_bytes(content)
    assert refused(tmp_path).startswith("what transformers cannot read (")


def test_tokenizer_files_that_are_none(tmp_path):
  """Neither a pipe nor a device is waited for."""
  tokenizer.build_word_level(["a"]).save_pretrained(tmp_path)
  os.mkfifo(tmp_path / "added_tokens.json")
  with pytest.raises(DataError) as e:
    tokenizer.load_tokenizer(tmp_path)
  assert e.value.where == f"{tmp_path}/added_tokens.json"
  assert e.value.got == "a pipe"
