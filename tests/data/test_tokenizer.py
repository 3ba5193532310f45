"""Tokenizer folders as published: sentencepiece alone, and llava-hf's."""

import json
import pathlib
import random

import pytest
import sentencepiece
import transformers

import vocojax
from vocojax.data import prompt, tokenizer
from vocojax.errors import DataError

LAYOUTS = [prompt.LAYOUTS[name] for name in ("voco_v1", "vicuna_v1", "plain")]
TURNS = [("<image>\nIs it <pad> or </s>?", "A\nB  c"), ("1 é 語", " yes")]
# As lmsys/vicuna-7b-v1.5 has it.
VICUNA = {
  "tokenizer_class": "LlamaTokenizer",
  "bos_token": "<s>",
  "eos_token": "</s>",
  "unk_token": "<unk>",
  "pad_token": "<unk>",
  "add_bos_token": True,
  "add_eos_token": False,
  "model_max_length": 4096,
  "clean_up_tokenization_spaces": False,
}


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
  """A tokenizer.model made as LLaMA's was, from this project's own text."""
  folder = tmp_path_factory.mktemp("sentencepiece")
  package = pathlib.Path(vocojax.__file__).parent
  lines = [
    line
    for path in sorted(package.glob("data/*.py"))
    for line in path.read_text().splitlines()
    if line.strip()
  ]
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines),
    model_prefix=str(folder / "tokenizer"),
    vocab_size=600,
    model_type="bpe",
    byte_fallback=True,
    split_digits=True,
    remove_extra_whitespaces=False,
    normalization_rule_name="identity",
    allow_whitespace_only_pieces=True,
    pad_id=-1,
    minloglevel=2,
  )
  return folder / "tokenizer.model"


def published(folder, model_file, config):
  folder.mkdir()
  (folder / "tokenizer.model").write_bytes(model_file.read_bytes())
  if config is not None:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
  return folder


@pytest.mark.parametrize("legacy", [None, False, True])
def test_sentencepiece_alone(model_file, tmp_path, legacy):
  config = VICUNA if legacy is None else VICUNA | {"legacy": legacy}
  folder = published(tmp_path / "vicuna", model_file, config)
  loaded = tokenizer.load_tokenizer(folder)
  assert (len(loaded), loaded.pad_token_id) == (601, 0)
  assert loaded.convert_tokens_to_ids("<voco>") == 600
  own = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
  bos, newline = own.bos_id(), own.encode("\n")[1:]
  ids, _ = prompt.encode(LAYOUTS[2], loaded, [("", " Raises\n a é")], 0, "none")
  assert ids == [bos, *own.encode(" Raises\n a é\n")]
  # As a continuation, and after </s>: without a space in front.
  text = "\n" + LAYOUTS[0].image_opening.removeprefix("\n") + "hi ASSISTANT:"
  ids, _ = prompt.encode(LAYOUTS[0], loaded, [("hi", None)], 1, "none")
  assert ids == own.encode(text)[1:] and ids[: len(newline)] == newline
  # A checkpoint keeps only the JSON files.
  loaded.save_pretrained(tmp_path / "saved")
  (tmp_path / "saved" / "tokenizer.model").unlink(missing_ok=True)
  again = tokenizer.load_tokenizer(tmp_path / "saved")
  assert again.get_vocab() == loaded.get_vocab()
  for layout in LAYOUTS:
    assert prompt.stream_ids(layout, again) == prompt.stream_ids(layout, loaded)
    assert prompt.encode(layout, again, TURNS, 1, "none") == prompt.encode(
      layout, loaded, TURNS, 1, "none"
    )


@pytest.mark.parametrize("config", [None, {"bos_token": "<s>"}])
def test_sentencepiece_that_is_misread(model_file, tmp_path, config):
  """Without a class, transformers would forget the space in front."""
  folder = published(tmp_path / "bare", model_file, config)
  with pytest.raises(DataError) as e:
    tokenizer.load_tokenizer(folder)
  assert e.value.where == f"tokenizer folder {folder}: tokenizer.model"
  assert e.value.got.endswith("as transformers reads it")


def test_llava_hf(llama_tokenizer_folder, tmp_path):
  """<image> and <pad> at 32000 and 32001: <voco> moves, no text id does."""
  plain = tokenizer.load_tokenizer(llama_tokenizer_folder)
  hf = transformers.AutoTokenizer.from_pretrained(llama_tokenizer_folder)
  for content in ("<image>", "<pad>"):
    token = transformers.AddedToken(content, special=True, normalized=False)
    hf.add_tokens([token], special_tokens=True)
  hf.pad_token = "<pad>"
  hf.save_pretrained(tmp_path)
  loaded = tokenizer.load_tokenizer(tmp_path)
  assert len(loaded) == 32003 and loaded.pad_token_id == 32001
  assert loaded.convert_tokens_to_ids(["<image>", "<voco>"]) == [32000, 32002]
  rng = random.Random(0)
  words = ["<pad>", "<image>", "</s>", "<voco>", "red", "\n", " a", "語", "?"]
  for layout in LAYOUTS:
    assert prompt.stream_ids(layout, loaded) == prompt.stream_ids(layout, plain)
    for _ in range(50):
      turns = [
        tuple("".join(rng.choices(words, k=6)) for _ in "qa") for _ in range(2)
      ]
      count = max(1, sum(question.count("<image>") for question, _ in turns))
      found = prompt.encode(layout, loaded, turns, count, "none")
      assert found == prompt.encode(layout, plain, turns, count, "none")
      assert max(found[0]) < 32000
