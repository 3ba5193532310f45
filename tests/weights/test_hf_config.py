"""config.json of published models against the default shapes.

The published values are those of LLaVA-1.5-7B, Vicuna-7B-v1.5 and Llama 3.2.
Read next: `test_refusals.py`.
"""

import dataclasses
import json
import pathlib

import pytest
import transformers

from vocojax.config import (
  LlamaConfig,
  VisionConfig,
)
from vocojax.errors import WeightsError
from vocojax.weights import config_keys, hf_config, preprocessor

NOWHERE = pathlib.Path("nowhere")


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
# And LLaVA's own relied on those of its time.
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
  assert hf_config.llama(values, "x", 32001) == LlamaConfig()


@pytest.mark.parametrize(
  "tower",
  ["openai/clip-vit-large-patch14-336", "/data/clip-vit-large-patch14-336"],
)
def test_towers_that_are_only_named(tower):
  values, _ = hf_config.vision_values({"mm_vision_tower": tower}, NOWHERE)
  found = hf_config.vision(values, "x", -2, "y")
  assert found == VisionConfig()
  unknown = {"mm_vision_tower": "google/siglip"}
  assert hf_config.vision_values(unknown, NOWHERE)[0] is None
  small, _ = hf_config.vision_values(
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
  config = LlamaConfig()
  config = dataclasses.replace(config, **{field: getattr(config, field) * 2})
  back = hf_config.published_llama(config, 32001, 4096)
  assert hf_config.llama(back, "x", 32001) == config


# What PretrainedConfig of transformers 4 wrote in full.
COMMON_4 = {
  "_commit_hash": None,
  "_name_or_path": "",
  "add_cross_attention": False,
  "architectures": None,
  "bad_words_ids": None,
  "begin_suppress_tokens": None,
  "bos_token_id": 0,
  "chunk_size_feed_forward": 0,
  "cross_attention_hidden_size": None,
  "decoder_start_token_id": None,
  "diversity_penalty": 0.0,
  "do_sample": False,
  "early_stopping": False,
  "encoder_no_repeat_ngram_size": 0,
  "eos_token_id": 2,
  "exponential_decay_length_penalty": None,
  "finetuning_task": None,
  "forced_bos_token_id": None,
  "forced_eos_token_id": None,
  "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
  "is_decoder": False,
  "is_encoder_decoder": False,
  "label2id": {"LABEL_0": 0, "LABEL_1": 1},
  "length_penalty": 1.0,
  "max_length": 20,
  "min_length": 0,
  "no_repeat_ngram_size": 0,
  "num_beam_groups": 1,
  "num_beams": 1,
  "num_return_sequences": 1,
  "output_attentions": False,
  "output_hidden_states": False,
  "output_scores": False,
  "pad_token_id": 1,
  "prefix": None,
  "problem_type": None,
  "pruned_heads": {},
  "remove_invalid_values": False,
  "repetition_penalty": 1.0,
  "return_dict": True,
  "return_dict_in_generate": False,
  "sep_token_id": None,
  "suppress_tokens": None,
  "task_specific_params": None,
  "temperature": 1.0,
  "tf_legacy_loss": False,
  "tie_encoder_decoder": False,
  "tie_word_embeddings": True,
  "tokenizer_class": None,
  "top_k": 50,
  "top_p": 1.0,
  "torch_dtype": None,
  "torchscript": False,
  "transformers_version": "4.24.0",
  "typical_p": 1.0,
  "use_bfloat16": False,
}
LLAMA_2 = {
  "_name_or_path": "meta-llama/Llama-2-7b-hf",
  "architectures": ["LlamaForCausalLM"],
  "attention_bias": False,
  "attention_dropout": 0.0,
  "bos_token_id": 1,
  "eos_token_id": 2,
  "hidden_act": "silu",
  "hidden_size": 4096,
  "initializer_range": 0.02,
  "intermediate_size": 11008,
  "max_position_embeddings": 4096,
  "mlp_bias": False,
  "model_type": "llama",
  "num_attention_heads": 32,
  "num_hidden_layers": 32,
  "num_key_value_heads": 32,
  "pad_token_id": 0,
  "pretraining_tp": 2,
  "rms_norm_eps": 1e-05,
  "rope_scaling": None,
  "rope_theta": 10000.0,
  "tie_word_embeddings": False,
  "torch_dtype": "float16",
  "transformers_version": "4.31.0.dev0",
  "use_cache": True,
  "vocab_size": 32000,
}
LLAMA_3 = LLAMA_2 | {
  "eos_token_id": [128001, 128008, 128009],
  "head_dim": 128,
  "num_key_value_heads": 8,
  "rope_scaling": {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
  },
  "rope_theta": 500000.0,
  "vocab_size": 128256,
}
SMOLLM2 = LLAMA_2 | {
  "hidden_size": 576,
  "intermediate_size": 1536,
  "is_llama_config": True,
  "max_position_embeddings": 8192,
  "num_attention_heads": 9,
  "num_hidden_layers": 30,
  "num_key_value_heads": 3,
  "rope_interleaved": False,
  "rope_theta": 100000,
  "tie_word_embeddings": True,
  "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}},
  "vocab_size": 49152,
}
# liuhaotian/llava-v1.5-7b, and what later versions of LLaVA write besides.
LLAVA_7B = LLAMA_2 | {
  "architectures": ["LlavaLlamaForCausalLM"],
  "freeze_mm_mlp_adapter": False,
  "freeze_mm_vision_resampler": False,
  "image_aspect_ratio": "pad",
  "max_length": 4096,
  "mm_hidden_size": 1024,
  "mm_patch_merge_type": "flat",
  "mm_projector_lr": None,
  "mm_projector_type": "mlp2x_gelu",
  "mm_resampler_type": None,
  "mm_use_im_patch_token": False,
  "mm_use_im_start_end": False,
  "mm_vision_select_feature": "patch",
  "mm_vision_select_layer": -2,
  "mm_vision_tower": "openai/clip-vit-large-patch14-336",
  "mm_vision_tower_lr": 2e-06,
  "model_type": "llava",
  "tokenizer_model_max_length": 2048,
  "tokenizer_padding_side": "right",
  "tune_mm_mlp_adapter": False,
  "tune_mm_vision_resampler": False,
  "unfreeze_mm_vision_tower": False,
  "use_mm_proj": True,
}
# llava-hf/llava-1.5-7b-hf
LLAVA_HF_7B = {
  "architectures": ["LlavaForConditionalGeneration"],
  "ignore_index": -100,
  "image_seq_length": 576,
  "image_token_index": 32000,
  "model_type": "llava",
  "pad_token_id": 32001,
  "projector_hidden_act": "gelu",
  "text_config": SPARSE,
  "tie_word_embeddings": False,
  "torch_dtype": "float16",
  "transformers_version": "4.36.0.dev0",
  "vision_config": {
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "model_type": "clip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32000,
  },
  "vision_feature_layer": -2,
  "vision_feature_select_strategy": "default",
  "vocab_size": 32064,
}
# openai/clip-vit-large-patch14-336
CLIP = {
  "_name_or_path": "openai/clip-vit-large-patch14-336",
  "architectures": ["CLIPModel"],
  "initializer_factor": 1.0,
  "logit_scale_init_value": 2.6592,
  "model_type": "clip",
  "projection_dim": 768,
  "text_config": COMMON_4 | {"model_type": "clip_text_model", "vocab_size": 9},
  "text_config_dict": {"hidden_size": 768, "num_attention_heads": 12},
  "torch_dtype": "float32",
  "transformers_version": None,
  "vision_config": COMMON_4
  | {
    "attention_dropout": 0.0,
    "dropout": 0.0,
    "hidden_act": "quick_gelu",
    "hidden_size": 1024,
    "image_size": 336,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 4096,
    "layer_norm_eps": 1e-05,
    "model_type": "clip_vision_model",
    "num_attention_heads": 16,
    "num_channels": 3,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
  },
  "vision_config_dict": {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
  },
}


def as_read(config) -> dict:
  """A config of transformers as it is in a file."""
  return json.loads(json.dumps(config.to_dict()))


@pytest.mark.parametrize(
  "values, layout",
  [
    (LLAMA_2, None),
    (COMMON_4 | LLAMA_2, None),
    (LLAMA_3, None),
    (SMOLLM2, None),
    (SPARSE, None),
    (LLAVA, "original"),
    (LLAVA_7B, "original"),
    (LLAVA_7B | {"model_type": "llava_llama"}, "original"),
    (LLAVA_HF_7B, "llava_hf"),
    (as_read(transformers.LlamaConfig()), None),
    (as_read(transformers.LlavaConfig()), "llava_hf"),
  ],
)
def test_published_keys(values, layout):
  """Every key that publishers and transformers' classes write is known."""
  assert hf_config.layout_of(values, "x") == layout
  text, _ = hf_config.text_values(values, layout, "x")
  assert hf_config.llama(text, "x", 32001).hidden_size in (576, 4096)
  if layout:
    vision, where = hf_config.vision_values(values, NOWHERE)
    found = hf_config.vision(vision, where, -2, "x")
    assert found == VisionConfig()


@pytest.mark.parametrize(
  "values",
  [
    CLIP,
    CLIP["vision_config"],
    as_read(
      transformers.CLIPConfig(
        vision_config=hf_config._CLIP_LARGE | {"image_size": 336}
      )
    ),
    as_read(
      transformers.CLIPVisionConfig(**hf_config._CLIP_LARGE, image_size=336)
    ),
  ],
)
def test_published_keys_of_clip(tmp_path, values):
  (tmp_path / "config.json").write_text(json.dumps(values))
  vision, where = hf_config.clip_values(tmp_path)
  found = hf_config.vision(vision, where, -2, "x")
  assert found == VisionConfig()


@pytest.mark.parametrize(
  "values",
  [
    # openai/clip-vit-large-patch14-336
    {
      "crop_size": 336,
      "do_center_crop": True,
      "do_normalize": True,
      "do_resize": True,
      "feature_extractor_type": "CLIPFeatureExtractor",
      "image_mean": [0.48145466, 0.4578275, 0.40821073],
      "image_std": [0.26862954, 0.26130258, 0.27577711],
      "resample": 3,
      "size": 336,
    },
    as_read(
      transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 336}, crop_size=336
      )
    ),
  ],
)
def test_published_keys_of_preprocessors(tmp_path, values):
  (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
  assert not preprocessor.check(tmp_path, 336)


@pytest.mark.parametrize(
  "keys", ["LLAMA", "LLAVA", "LLAVA_HF", "CLIP", "CLIP_VISION"]
)
def test_every_key_that_matters(keys):
  """Its harmless values pass; others are refused by its name."""
  keys = getattr(config_keys, keys)
  for key, values in keys.only.items():
    for value in values:
      keys.check({key: value}, "x")
  bad = {key: "other" for key in keys.only} | {"unheard_of": None}
  bad |= {key: 2.0**70 for key in keys.numbers}
  for key, value in bad.items():
    with pytest.raises(WeightsError) as e:
      keys.check({"model_type": "y", key: value}, "x")
    assert (e.value.where, e.value.got) == (f"x: {key}", repr(value))


@pytest.mark.parametrize(
  "scaling",
  [
    {"rope_type": "default", "rope_theta": 5e5},
    LLAMA_3["rope_scaling"],
    LLAMA_3["rope_scaling"] | {"rope_theta": 5e5, "partial_rotary_factor": 1.0},
    {**LLAMA_3["rope_scaling"], "type": "llama3"},
    None,
  ],
)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_rope_as_transformers_reads_it(key, scaling):
  """In the spellings of its versions."""
  values = {k: v for k, v in LLAMA_2.items() if not k.startswith("rope")}
  values |= {key: scaling}
  if not (scaling and "rope_theta" in scaling):
    values["rope_theta"] = 5e5
  theirs = dict(transformers.LlamaConfig.from_dict(values).rope_parameters)
  ours = dataclasses.asdict(hf_config.llama(values, "x", 32001).rope)
  assert ours["theta"] == theirs["rope_theta"] == 5e5
  kind = {"none": "default"}.get(ours["scaling"], ours["scaling"])
  assert kind == theirs["rope_type"]
  if kind == "llama3":
    for name in ("factor", "low_freq_factor", "high_freq_factor"):
      assert ours[name] == theirs[name]
