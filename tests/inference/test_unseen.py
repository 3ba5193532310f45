"""Words and numbers of images that training had not are named once."""

import numpy as np
import pytest

from tests.inference import engines
from vocojax.data.tokenizer import build_word_level, load_tokenizer
from vocojax.inference.unseen import Unseen


@pytest.fixture
def said(capfd):
  return lambda: capfd.readouterr().err.splitlines()


def test_an_engine_says_so_once(tmp_path, said):
  engine = engines.engine(tmp_path)
  images = engines.pictures(np.random.default_rng(0), 2)
  said()

  def ask(question, count):
    engine.ask(question, images[:count] or None, max_new_tokens=1)
    return said()

  assert ask("what color is it ?", 1) == []
  words = "words that the model has never seen, all read as <unk>: "
  assert ask("what colr is it , pls ?", 1) == [words + "'colr', ',', 'pls'"]
  assert ask("what colr is this ?", 0) == []
  images_line = (
    "2 images, but the model was trained with at most 1 "
    "(config.data.max_images)"
  )
  assert ask("colr of Red ?", 2) == [images_line, words + "'of', 'Red'"]
  assert ask("what color is it ?", 2) == []


def test_not_without_end(said):
  unseen = Unseen(build_word_level(["what is"]), 1)
  turns = [(f"what is w{i}", f"a{i}") for i in range(5)]
  unseen.note([*turns, ("is", None)], 1)
  (line,) = said()
  assert line.endswith(
    "'w0', 'a0', 'w1', 'a1', 'w2', 'a2', 'w3', 'a3', 'w4', 'a4'"
  )
  unseen.note([(" ".join(f"x{i}" for i in range(30)), None)], 1)
  (line,) = said()
  assert line.endswith(
    ": " + ", ".join(f"'x{i}'" for i in range(10)) + ", and more"
  )
  unseen.note([("others", None)], 1)
  assert said() == []


def test_bytes_are_known(llama_tokenizer_folder, said):
  unseen = Unseen(load_tokenizer(llama_tokenizer_folder), 1)
  unseen.note([("\N{SNOWMAN} \N{PARROT} <unk> </s> <image>", None)], 0)
  assert said() == []
