"""Formulas of operations against PyTorch's own counter on the HF models."""

import dataclasses

import numpy as np
import pytest
import torch
import transformers
from torch.utils import flop_counter

from configs import voco_1tok
from tests.models import builders
from vocojax import config as config_lib
from vocojax.models import flops

T = 11


def counted(module, *args, **kwargs) -> int:
  with flop_counter.FlopCounterMode(display=False) as counter, torch.no_grad():
    module(*args, **kwargs)
  return counter.get_total_flops()


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_language_model(kv_heads):
  config = builders.model_config({"llm.num_key_value_heads": kv_heads}).llm
  model = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      vocab_size=config.vocab_size,
      hidden_size=config.hidden_size,
      intermediate_size=config.intermediate_size,
      num_hidden_layers=config.num_hidden_layers,
      num_attention_heads=config.num_attention_heads,
      num_key_value_heads=kv_heads,
      head_dim=config.head_dim,
      attn_implementation="eager",
    )
  )
  want = counted(model, torch.zeros((1, T), dtype=torch.long))
  # Eager attention computes the whole square of the causal mask.
  masked_pairs = T * T - T * (T + 1) // 2
  got = flops.causal(config, T) + T * flops.head(config)
  assert got + masked_pairs * flops.per_pair(config) == want


def test_cached_tokens_split_a_pass():
  config = builders.model_config().llm
  whole = flops.causal(config, 9)
  assert flops.causal(config, 4) + flops.causal(config, 5, 4) == whole


@pytest.mark.parametrize("projector", ["linear", "mlp2x_gelu"])
def test_vision(projector):
  config = builders.model_config({"vision.num_hidden_layers": 3})
  config = dataclasses.replace(config, projector=projector)
  c = config.vision
  assert c.num_feature_layers == 2  # the last is not run
  tower = transformers.CLIPVisionModel(
    transformers.CLIPVisionConfig(
      image_size=c.image_size,
      patch_size=c.patch_size,
      hidden_size=c.hidden_size,
      intermediate_size=c.intermediate_size,
      num_hidden_layers=c.num_feature_layers,
      num_attention_heads=c.num_attention_heads,
      attn_implementation="eager",
    )
  )
  want = counted(tower, torch.zeros((1, 3, c.image_size, c.image_size)))
  D = config.llm.hidden_size
  linears = [torch.nn.Linear(c.hidden_size, D)]
  if projector == "mlp2x_gelu":
    linears.append(torch.nn.Linear(D, D))
  features = torch.zeros((c.num_patches, c.hidden_size))
  want += counted(torch.nn.Sequential(*linears), features)
  assert flops.vision(config) == want


def test_7b_is_known():
  """6,476 million weights in the layers of LLaMA-7B, two operations each."""
  config = config_lib.phases(voco_1tok.get_config())[0].model.llm
  np.testing.assert_allclose(flops.per_token(config), 2 * 6.476e9, rtol=1e-3)
