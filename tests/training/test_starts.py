"""A phase from a model as it is published: it is that model, or is refused.

Each published model differs from the defaults in one key. Read next:
`../weights/published.py`.
"""

import dataclasses
import json

import numpy as np
import pytest
import torch
from ml_collections import ConfigDict

from tests import runs
from tests.weights import published, test_parity
from vocojax import assemble
from vocojax.config import ModelConfig, default_config, from_mapping
from vocojax.data.sources import Record
from vocojax.errors import ConfigError
from vocojax.training import loop

LLAMA3 = published.LLAMAS["grouped, tied, llama3 rope, wide heads"]
# Our key; what the published configs say of it, LLaMA's and CLIP's; and another
# value of the key that fits the same weights, where there is one.
CHANGES = {
  "llm.rope.theta": (
    {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    {},
    1e4,
  ),
  "llm.rope.scaling": (
    {"rope_parameters": LLAMA3["rope_parameters"]},
    {},
    "none",
  ),
  "llm.rms_norm_eps": ({"rms_norm_eps": 0.5}, {}, 1e-5),
  "llm.num_key_value_heads": ({"num_key_value_heads": 1}, {}, None),
  "llm.head_dim": ({"head_dim": 8}, {}, None),
  "llm.tie_word_embeddings": ({"tie_word_embeddings": True}, {}, None),
  "vision.layer_norm_eps": ({}, {"layer_norm_eps": 0.5}, 1e-5),
  "vision.hidden_act": ({}, {"hidden_act": "gelu"}, "quick_gelu"),
  "vision.num_attention_heads": ({}, {"num_attention_heads": 4}, 2),
}


def from_start(folder, **keys):
  """The phase that `vocojax.train` makes, and its parameters at step 0."""
  c = default_config()
  c.init_from = str(folder)
  c.training.steps = 1
  c.model.dtype = "float32"
  c.model.update(keys)
  (config,) = assemble.plan(c)
  start = assemble.open_start(config.init_from)
  model = assemble.make_model(config, start.tokenizer)
  with runs.quick_compile():
    params = loop.init_params(model, runs.mesh(), 0, start, ("^vision/",))
  return config, model, params


def cross_entropy(logits, ids) -> float:
  """Mean over the texts, float64; each token after the one before it."""
  x = logits[:, :-1].astype(np.float64)
  x -= x.max(-1, keepdims=True)
  log_probs = x - np.log(np.exp(x).sum(-1, keepdims=True))
  return -float(np.take_along_axis(log_probs, ids[:, 1:, None], -1).mean())


@pytest.mark.parametrize("key", CHANGES)
def test_another_model_trains_as_that_model(key, tmp_path, monkeypatch):
  llama, clip, other = CHANGES[key]
  monkeypatch.setitem(published.LLAMAS, "changed", llama)
  vision = published.clip_config
  monkeypatch.setattr(published, "clip_config", lambda: vision(**clip))
  theirs = published.original(tmp_path / "changed", "changed")
  config, model, params = from_start(tmp_path / "changed")
  assert config.model.compressor.name == "voco"
  images, ids = test_parity.inputs()
  ours = test_parity.our_logits(model, params, images, ids)
  expected = test_parity.original_logits(theirs, images, ids, 1)
  assert test_parity.error(ours, expected) <= test_parity.TOLERANCE
  loss = cross_entropy(ours, ids)
  torch_loss = torch.nn.functional.cross_entropy(
    torch.tensor(expected[:, :-1]).flatten(0, 1),
    torch.tensor(ids[:, 1:]).flatten().long(),
  )
  assert loss == pytest.approx(float(torch_loss), abs=1e-4)
  if other is None:
    return
  wrong = ConfigDict(dataclasses.asdict(config.model))
  wrong.update_from_flattened_dict({key: other})
  changed = from_mapping(ModelConfig, wrong.to_dict())
  model = dataclasses.replace(model, config=changed)
  found = test_parity.our_logits(model, params, images, ids)
  assert test_parity.error(found, expected) > 10 * test_parity.TOLERANCE


def test_another_feature_layer(tmp_path):
  """Of LLaVA's own config; the model itself is the same."""
  published.original(tmp_path / "a", "grouped")
  path = tmp_path / "a/config.json"
  values = json.loads(path.read_text())
  path.write_text(json.dumps(values | {"mm_vision_select_layer": -1}))
  config, *_ = from_start(tmp_path / "a")
  assert config.model.vision.feature_layer == -1


def test_a_permuted_tokenizer_is_refused(tmp_path):
  published.original(tmp_path / "a", "grouped")
  start = assemble.open_start(str(tmp_path / "a"))
  words = published.tokenizer("<voco>")
  runs.permuted(words).save_pretrained(tmp_path / "same")
  c = default_config()
  c.init_from, c.data.tokenizer = str(tmp_path / "a"), str(tmp_path / "same")
  c.training.steps = 1
  (config,) = assemble.plan(c)
  source = [Record("r0", (), ())]
  with pytest.raises(ConfigError) as e:
    assemble.tokenizer_for(config, source, tmp_path, start)
  assert e.value.where == "config.data.tokenizer"
  assert e.value.got == "id 12 for the token 'w8'"
  assert e.value.expected.startswith("11, as config.init_from")
  words.save_pretrained(tmp_path / "same")
  found = assemble.tokenizer_for(config, source, tmp_path, start)
  assert found is start.tokenizer
