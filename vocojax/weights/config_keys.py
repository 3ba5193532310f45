"""Keys of a published config.json: used, without effect, or refused.

A key that is not known here may change what the model computes, and so may a
value that we cannot represent: both are refused by name. The lists are those of
transformers' config classes from 4.28 to 5, of what `save_pretrained` adds, and
of what LLaVA's programs write. Read next: `hf_config.py`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vocojax.core import files
from vocojax.errors import WeightsError, shorten


@dataclasses.dataclass(frozen=True)
class Number:
  """The values that a number may have; None is null, for the default."""

  kind: type
  least: int | float
  most: int | float
  optional: bool = False

  def check(self, value: Any, where: str) -> None:
    """Raises a WeightsError for any other value."""
    kinds = (self.kind, type(None)) if self.optional else (self.kind,)
    files.check_kind(value, where, kinds, WeightsError)
    if value is not None and not self.least <= value <= self.most:
      raise WeightsError(
        where,
        shorten(value),
        f"{self.least:,} to {self.most:,}",
        "correct it, or download the file again",
      )


@dataclasses.dataclass(frozen=True)
class Keys:
  """What an object may hold.

  Attributes:
    numbers: their ranges.
    used: others that are read, and checked where they are.
    only: of influence; each with the values with which the model is ours.
    harmless: of no influence on what is computed here.
  """

  numbers: Mapping[str, Number]
  used: str
  only: Mapping[str, tuple[Any, ...]]
  harmless: str

  def check(self, values: Mapping[str, Any], where: str) -> None:
    """Refuses unknown keys, and values that we cannot represent.

    Raises:
      WeightsError: the first of them, by its name.
    """
    accepted = {*self.used.split(), *self.harmless.split()}
    for key, value in values.items():
      if key in self.numbers:
        self.numbers[key].check(value, f"{where}: {key}")
      elif key in self.only:
        if not any(value == x for x in self.only[key]):
          raise unsupported(where, key, value, self.only[key])
      elif key not in accepted:
        raise WeightsError(
          f"{where}: {key[:200]}",
          shorten(value),
          "no such key, since its effect is not known here",
          "remove the key if the model is the same without it",
        )


def unsupported(
  where: str, key: str, value: Any, expected: tuple[Any, ...]
) -> WeightsError:
  """What to raise for a value that we cannot represent."""
  return WeightsError(
    f"{where}: {key}",
    shorten(value),
    " or ".join(map(repr, expected)),
    "use a model that has this value; others are not supported",
  )


_SIZE = Number(int, 1, 2**24)
_LAYERS = Number(int, 1, 2**10)
_EPSILON = Number(float, 1e-30, 1)
_DEVIATION = Number(float, 1e-30, 1e3)

# Of every config class: names, formats of output, generation.
_COMMON = """
  _attn_implementation _attn_implementation_autoset
  _attn_implementation_internal _commit_hash _flash_attn_2_enabled
  _model_name_or_path _name_or_path architectures attn_implementation auto_map
  bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
  decoder_start_token_id diversity_penalty do_sample dtype early_stopping
  encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty
  finetuning_task forced_bos_token_id forced_eos_token_id
  gradient_checkpointing id2label is_decoder label2id length_penalty max_length
  min_length model_type no_repeat_ngram_size num_beam_groups num_beams
  num_labels num_return_sequences output_attentions output_hidden_states
  output_scores pad_token_id prefix problem_type remove_invalid_values
  repetition_penalty return_dict return_dict_in_generate sep_token_id
  suppress_tokens task_specific_params temperature tf_legacy_loss
  tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript
  transformers.js_config transformers_version typical_p unk_token_id
  unsloth_fixed unsloth_version use_bfloat16 use_cache
"""
_COMMON_ONLY: dict[str, tuple[Any, ...]] = {
  "add_cross_attention": (False,),
  "cross_attention_hidden_size": (None,),
  "is_encoder_decoder": (False,),
  "pruned_heads": ({}, None),
  "quantization_config": (None,),
}

LLAMA = Keys(
  numbers={
    "head_dim": dataclasses.replace(_SIZE, optional=True),
    "hidden_size": _SIZE,
    "initializer_range": _DEVIATION,
    "intermediate_size": _SIZE,
    "max_position_embeddings": Number(int, 1, 2**40),
    "num_attention_heads": _SIZE,
    "num_hidden_layers": _LAYERS,
    "num_key_value_heads": dataclasses.replace(_SIZE, optional=True),
    "rms_norm_eps": _EPSILON,
    "rope_theta": Number(float, 1, 1e12, optional=True),
    "vocab_size": _SIZE,
  },
  used="rope_parameters rope_scaling tie_word_embeddings",
  only=_COMMON_ONLY
  | {
    "attention_bias": (False,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "hidden_act": ("silu", "swish"),
    "logit_scale": (1.0, None),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0, None),
    "rope_interleaved": (False,),
    "sliding_window": (None,),
    "use_sliding_window": (False,),
  },
  harmless=_COMMON
  + """
  attention_dropout is_llama_config max_sequence_length pretraining_tp
  """,
)

# What LLaVA adds to a LLaMA's.
LLAVA = Keys(
  LLAMA.numbers,
  LLAMA.used
  + """
  mm_projector_type mm_use_im_patch_token mm_vision_select_layer
  mm_vision_tower unfreeze_mm_vision_tower vision_config
  """,
  {
    **LLAMA.only,
    "image_aspect_ratio": ("pad", "square", None),
    "mm_patch_merge_type": ("flat", None),
    "mm_resampler_type": (None,),
    "mm_use_im_start_end": (False,),
    "mm_vision_select_feature": ("patch",),
    "s2": (False,),
    "sep_image_conv_front": (False,),
    "use_mm_proj": (True,),
  },
  # Only read with other values of image_aspect_ratio and s2.
  LLAMA.harmless
  + """
  image_crop_resolution image_grid_pinpoints image_split_resolution
  s2_max_split_size s2_scales s2_split_size
  freeze_mm_mlp_adapter freeze_mm_vision_resampler mm_hidden_size
  mm_projector_lr mm_vision_tower_lr pretrain_mm_mlp_adapter
  tokenizer_model_max_length tokenizer_padding_side tune_mm_mlp_adapter
  tune_mm_vision_resampler
  """,
)

# Of llava-hf, around the keys of the two parts.
_ID = Number(int, 0, 2**24, optional=True)
LLAVA_HF = Keys(
  {"image_token_id": _ID, "image_token_index": _ID},
  "text_config tie_word_embeddings vision_config vision_feature_layer",
  _COMMON_ONLY
  | {
    "multimodal_projector_bias": (True,),
    "projector_hidden_act": ("gelu",),
    "vision_feature_select_strategy": ("default",),
  },
  _COMMON + "ignore_index image_seq_length vocab_size",
)

CLIP_VISION = Keys(
  {
    "hidden_size": _SIZE,
    "image_size": _SIZE,
    "initializer_range": _DEVIATION,
    "intermediate_size": _SIZE,
    "layer_norm_eps": _EPSILON,
    "num_attention_heads": _SIZE,
    "num_hidden_layers": _LAYERS,
    "patch_size": _SIZE,
  },
  "",
  _COMMON_ONLY | {"hidden_act": ("quick_gelu", "gelu"), "num_channels": (3,)},
  _COMMON
  + """
  attention_dropout dropout initializer_factor projection_dim
  tie_word_embeddings vocab_size
  """,
)

# Of a CLIP with its text half.
CLIP = Keys(
  {},
  "vision_config vision_config_dict",
  _COMMON_ONLY,
  _COMMON
  + """
  initializer_factor logit_scale_init_value projection_dim text_config
  text_config_dict tie_word_embeddings
  """,
)
