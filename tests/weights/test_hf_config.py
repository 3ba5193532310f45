"""config.json of published models against the shapes of configs/common.py.

The published values are those of LLaVA-1.5-7B, Vicuna-7B-v1.5 and Llama 3.2.
Read next: `test_refusals.py`.
"""

import dataclasses
import pathlib

import pytest
import transformers

from configs import common
from vocojax.config import LlamaConfig, VisionConfig, from_mapping
from vocojax.weights import hf_config

NOWHERE = pathlib.Path("nowhere")


def ours(group: str, cls: type):
  return from_mapping(cls, common.get_config().model[group].to_dict())


# What llava-hf writes relies on transformers' defaults for the rest.
SPARSE = {
  "_name_or_path": "lmsys/vicuna-7b-v1.5",
  "architectures": ["LlamaForCausalLM"],
  "max_position_embeddings": 4096,
  "model_type": "llama",
  "rms_norm_eps": 1e-05,
  "torch_dtype": "float16",
  "vocab_size": 32064,
}
# And LLaVA's own.
LLAVA = SPARSE | {
  "hidden_act": "silu",
  "hidden_size": 4096,
  "intermediate_size": 11008,
  "num_attention_heads": 32,
  "num_key_value_heads": 32,
  "num_hidden_layers": 32,
  "mm_hidden_size": 1024,
  "mm_projector_type": "mlp2x_gelu",
  "mm_vision_tower": "openai/clip-vit-large-patch14-336",
  "model_type": "llava",
  "pretraining_tp": 1,
  "rope_scaling": None,
  "vocab_size": 32000,
}


@pytest.mark.parametrize("values", [SPARSE, LLAVA])
def test_llava_7b(values):
  assert hf_config.llama(values, "x", 32001) == ours("llm", LlamaConfig)


@pytest.mark.parametrize(
  "tower",
  ["openai/clip-vit-large-patch14-336", "/data/clip-vit-large-patch14-336"],
)
def test_towers_that_are_only_named(tower):
  values = hf_config.vision_values({"mm_vision_tower": tower}, NOWHERE)
  assert hf_config.vision(values, "x", -2) == ours("vision", VisionConfig)
  unknown = {"mm_vision_tower": "google/siglip"}
  assert hf_config.vision_values(unknown, NOWHERE) is None
  small = hf_config.vision_values(
    {"mm_vision_tower": "openai/clip-vit-large-patch14"}, NOWHERE
  )
  assert small["image_size"] == 224


def test_llama_3():
  scaling = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
  }
  values = {
    "model_type": "llama",
    "hidden_size": 2048,
    "head_dim": 64,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_scaling": scaling,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
  }
  config = hf_config.llama(values, "x", 128257)
  assert config.rope.theta == 500000.0
  assert (config.rope.scaling, config.rope.factor) == ("llama3", 32.0)
  assert config.num_key_value_heads == 8 and config.tie_word_embeddings
  # Back, as transformers reads it, and there again.
  back = hf_config.published_llama(config, 128256, 131072)
  again = transformers.LlamaConfig.from_dict(back)
  assert again.rope_parameters == scaling | {"rope_theta": 500000.0}
  assert hf_config.llama(again.to_dict(), "x", 128257) == config


@pytest.mark.parametrize("field", ["rms_norm_eps", "num_hidden_layers"])
def test_nothing_is_lost_on_the_way_back(field):
  config = ours("llm", LlamaConfig)
  config = dataclasses.replace(config, **{field: getattr(config, field) * 2})
  back = hf_config.published_llama(config, 32001, 4096)
  assert hf_config.llama(back, "x", 32001) == config
