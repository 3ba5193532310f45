"""The files of a published model besides its weights. Next: `hf_config.py`."""

import json
import pathlib
import tempfile
from typing import Any

import transformers
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from vocojax.data.prompt import LAYOUTS
from vocojax.data.tokenizer import VOCO_TOKEN
from vocojax.weights import hf_config, vocabulary
from vocojax.weights.out_of import Plan

_MAX_POSITIONS = 4096  # that of LLaMA 2, where the source is not known


def write(plan: Plan, folder: pathlib.Path) -> None:
  """config.json, tokenizer, generation and image settings, README.md."""
  tokenizer = _write_tokenizer(plan, folder)
  _json(folder, "config", _config(plan, tokenizer))
  ids = {
    "bos_token_id": tokenizer.bos_token_id,
    "eos_token_id": tokenizer.eos_token_id,
    "pad_token_id": tokenizer.pad_token_id,
  }
  _json(folder, "generation_config", ids | {"do_sample": False})
  if plan.layout == "llava_hf":
    _write_processor(plan, folder)
  (folder / "README.md").write_text(_readme(plan))


def _json(folder: pathlib.Path, name: str, values: dict[str, Any]) -> None:
  text = json.dumps(values, indent=2, sort_keys=True) + "\n"
  (folder / f"{name}.json").write_text(text)


def _write_tokenizer(plan: Plan, folder: pathlib.Path) -> Any:
  """Writes and returns the tokenizer with the layout's own special tokens."""
  ours = plan.loaded.tokenizer
  rows, voco = plan.rows, ours.get_vocab()[VOCO_TOKEN]
  if rows.voco_id == voco and plan.layout == "original":
    ours.save_pretrained(folder)
    return ours
  drop = {VOCO_TOKEN} if voco == rows.num_text else set()
  with tempfile.TemporaryDirectory() as temporary:
    vocabulary.strip_files(ours, drop, pathlib.Path(temporary))
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(temporary)
  if plan.layout == "llava_hf":
    names = [vocabulary.IMAGE_TOKEN, vocabulary.PAD_TOKEN]
    if drop and rows.voco_id is not None:
      names.append(VOCO_TOKEN)
    tokenizer.add_tokens(
      [
        transformers.AddedToken(name, special=True, normalized=False)
        for name in names
      ],
      special_tokens=True,
    )
    tokenizer.pad_token = vocabulary.PAD_TOKEN
  tokenizer.save_pretrained(folder)
  return tokenizer


def _config(plan: Plan, tokenizer) -> dict[str, Any]:
  model, rows = plan.model, plan.rows
  positions = plan.origin.get("max_position_embeddings") or _MAX_POSITIONS
  text = hf_config.published_llama(model.llm, len(rows.source), positions)
  text |= {
    "bos_token_id": tokenizer.bos_token_id,
    "eos_token_id": tokenizer.eos_token_id,
    "pad_token_id": tokenizer.pad_token_id,
  }
  vision = hf_config.published_vision(model.vision)
  dtype = next(t.dtype.name for t in plan.tensors)
  common = {"dtype": dtype, "torch_dtype": dtype}
  if plan.layout == "llava_hf":
    return common | {
      "architectures": ["LlavaForConditionalGeneration"],
      "model_type": "llava",
      "text_config": text | common,
      "vision_config": vision,
      "image_token_index": rows.image_token_id,
      "image_seq_length": model.vision.num_patches,
      "pad_token_id": tokenizer.pad_token_id,
      "projector_hidden_act": "gelu",
      "multimodal_projector_bias": True,
      "vision_feature_layer": model.vision.feature_layer,
      "vision_feature_select_strategy": "default",
      "tie_word_embeddings": model.llm.tie_word_embeddings,
    }
  tower = plan.origin.get("vision_tower") or hf_config.tower_name(model)
  return (
    text
    | common
    | {
      "architectures": ["LlavaLlamaForCausalLM"],
      "model_type": "llava_llama",
      "mm_hidden_size": model.vision.hidden_size,
      "mm_projector_type": model.projector,
      "mm_vision_tower": tower or "vision_tower",
      "mm_vision_select_layer": model.vision.feature_layer,
      "mm_vision_select_feature": "patch",
      "mm_use_im_start_end": False,
      "mm_use_im_patch_token": False,
      "image_aspect_ratio": (
        "pad" if plan.loaded.config.data.pad_to_square else "square"
      ),
      # Makes LLaVA use the tower that is in the weights.
      "unfreeze_mm_vision_tower": True,
      "use_mm_proj": True,
      # LLaVA leaves it alone; it lets the shape be read back.
      "vision_config": vision,
    }
  )


def _write_processor(plan: Plan, folder: pathlib.Path) -> None:
  vision = plan.model.vision
  size = vision.image_size
  _json(
    folder,
    "preprocessor_config",
    {
      "image_processor_type": "CLIPImageProcessor",
      "processor_class": "LlavaProcessor",
      "do_convert_rgb": True,
      "do_resize": True,
      "size": {"shortest_edge": size},
      "resample": 3,  # bicubic
      "do_center_crop": True,
      "crop_size": {"height": size, "width": size},
      "do_rescale": True,
      "rescale_factor": 1 / 255,
      "do_normalize": True,
      "image_mean": OPENAI_CLIP_MEAN,
      "image_std": OPENAI_CLIP_STD,
    },
  )
  _json(
    folder,
    "processor_config",
    {
      "processor_class": "LlavaProcessor",
      "patch_size": vision.patch_size,
      "vision_feature_select_strategy": "default",
      "num_additional_image_tokens": 1,  # the class token, which is dropped
      "image_token": vocabulary.IMAGE_TOKEN,
    },
  )


def _readme(plan: Plan) -> str:
  model, layout = plan.model, plan.loaded.config.prompt.layout
  lines = [
    "# A vision-language model, written by vocojax",
    "",
    f"Compressor `{model.compressor.name}`, prompt layout `{layout}` version "
    f"{LAYOUTS[layout].version}.",
    "",
  ]
  if plan.rows.voco_id is None:
    lines.append(
      "Text sees every patch of the image: plain causal attention, as in "
      "LLaVA. There is no `<voco>` token."
    )
  elif model.compressor.name == "voco_causal":
    k = model.compressor.num_voco_tokens
    lines.append(
      "After the patches and the separator of the prompt layout come "
      f"{k} x `<voco>` (id {plan.rows.voco_id}), then text, which sees all "
      "before it: plain causal attention."
    )
  else:
    k = model.compressor.num_voco_tokens
    lines += [
      f"An image is read through {k} token{'s' if k > 1 else ''} `<voco>` (id "
      f"{plan.rows.voco_id}). The program that runs these weights has to apply "
      "the VoCo mask; under plain causal attention they are not the model that "
      "was trained:",
      "",
      "- sequence: `<s>`, the patches, the separator of the prompt layout, "
      f"{k} x `<voco>`, then text;",
      "- tokens up to the last `<voco>` attend causally, to all before them;",
      "- tokens after it attend to the `<voco>` tokens and, causally, to the "
      "text after them, and to nothing else"
      + (
        " but `<s>`." if model.compressor.text_sees_bos else ", not even `<s>`."
      ),
      "",
      "In transformers: give the model a 4-D `attention_mask` of 0 where that "
      "holds and the dtype's minimum elsewhere, with attention `sdpa` or "
      "`eager`, in every forward pass, generation included.",
    ]
  if plan.layout == "original":
    lines += [
      "",
      "LLaVA's program asks for the slow tokenizer: copy `tokenizer.model` of "
      "the language model into this folder. It builds the vision tower from "
      "`mm_vision_tower` and takes its weights from here.",
    ]
  return "\n".join(lines) + "\n"
