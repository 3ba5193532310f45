"""Every turn is asked with the true answers before it; random weights tell."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import runs
from tests.models import builders
from vocojax import assemble
from vocojax.config import load_module, phases
from vocojax.data import pipeline, tokenizer
from vocojax.data.sources import make_source
from vocojax.evals import answers
from vocojax.models.vlm import VisionLanguageModel

NEW_TOKENS = 3


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
  """Config, model, random parameters, tokenizer and source."""
  folder = tmp_path_factory.mktemp("answers")
  runs.write_data(folder)
  runs.write_config(folder, "one.py", runs.ONE_PHASE)
  (config,) = phases(load_module(str(folder / "one.py")))
  evaluation = dataclasses.replace(
    config.evaluation, max_new_tokens=NEW_TOKENS, max_records=8
  )
  config = dataclasses.replace(config, evaluation=evaluation)
  words = tokenizer.load_tokenizer(config.data.tokenizer)
  model = assemble.make_model(config, words)
  source = make_source(config, "train")
  params = jax.tree.map(jnp.asarray, builders.init(model))
  return config, model, params, words, source


def by_hand(setup, in_context: bool) -> list[str]:
  """The whole sequence again for each token, in one pass under the mask."""
  config, model, params, words, source = setup
  joint = dataclasses.replace(model.config, attention="bias")
  logits_of = jax.jit(
    VisionLanguageModel(joint, model.tokens).text_logits,
    compiler_options=builders.QUICK_COMPILE,
  )
  found, eos = [], words.eos_token_id
  for i in range(8):
    images = pipeline.load_images(source[i], 64, config.data)[None]
    before: list[int] = []
    for question, answer in source[i].conversations[0]:
      ids = before * in_context + words(question)["input_ids"]
      start = len(ids)
      while len(ids) < start + NEW_TOKENS and eos not in ids[start:]:
        row, real = np.zeros((2, 1, 32), np.int32)
        row[0, : len(ids)], real[0, : len(ids)] = ids, 1
        logits = logits_of(
          params,
          {
            "images": images,
            "image_group_ids": np.ones((1, 1), np.int32),
            "input_ids": row,
            "segment_ids": real,
            "text_group_ids": real,
          },
        )
        ids.append(int(np.argmax(logits[0, len(ids) - 1])))
      text = words.decode(ids[start:], skip_special_tokens=True)
      found.append(text.strip())
      before += words(question)["input_ids"]
      before += [*words(answer)["input_ids"], eos]
  return found


def test_turns_by_hand(setup):
  config, model, params, words, source = setup
  with runs.quick_compile():
    evaluation = answers.answer_questions(
      config, model, params, words, source, "random"
    )
  expected = by_hand(setup, in_context=True)
  assert [x["prediction"] for x in evaluation.predictions] == expected
  # Else the test could not tell.
  assert by_hand(setup, in_context=False)[2::3] != expected[2::3]
  turns = [(x["record_id"], x["turn"]) for x in evaluation.predictions]
  assert turns == [
    (f"r{i}", turn) for i in range(8) for turn in range(1, i % 2 + 2)
  ]
