"""Random small models, written to disk as their publishers do.

The tensors, files and configs come from transformers' and torch's own saving;
what LLaVA adds to a LLaMA is `OriginalLlava`. Read next: `test_parity.py`.
"""

import dataclasses
import json
import pathlib

import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import models, pre_tokenizers
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

NUM_TEXT_TOKENS = 29
NUM_PATCHES = 4
IMAGE_SIZE = 8
IMAGE_ID = NUM_TEXT_TOKENS  # in the layout of llava-hf
HF_ROWS = 64  # of its embedding

_LLAMA3 = {
  "rope_type": "llama3",
  "rope_theta": 10000.0,
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  # Of the four wavelengths one is kept, one blended, two stretched.
  "original_max_position_embeddings": 128,
}
LLAMAS = {
  "multi-head": {"num_key_value_heads": 4},
  "grouped": {"num_key_value_heads": 2},
  "tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
  "grouped, tied, llama3 rope, wide heads": {
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
    "head_dim": 8,
    "rope_parameters": _LLAMA3,
    "rms_norm_eps": 1e-5,
  },
}


def llama_config(vocab_size: int, kind: str = "grouped"):
  """Settings of a LLaMA with 2 layers of width 16."""
  return transformers.LlamaConfig(
    **{
      "vocab_size": vocab_size,
      "hidden_size": 16,
      "intermediate_size": 24,
      "num_hidden_layers": 2,
      "num_attention_heads": 4,
      "max_position_embeddings": 256,
      "attn_implementation": "eager",
    }
    | LLAMAS[kind]
  )


def clip_config(**overrides):
  """Settings of a vision tower with 3 layers of width 8."""
  return transformers.CLIPVisionConfig(
    **{
      "image_size": IMAGE_SIZE,
      "patch_size": 4,
      "hidden_size": 8,
      "intermediate_size": 12,
      "num_hidden_layers": 3,
      "num_attention_heads": 2,
    }
    | overrides
  )


WORDS = tuple(f"w{i}" for i in range(NUM_TEXT_TOKENS - 3))


def tokenizer(
  *added: str, words: tuple[str, ...] = WORDS
) -> transformers.PreTrainedTokenizerFast:
  """Three tokens and some words, then special tokens."""
  words = ("<unk>", "<s>", "</s>", *words)
  backend = tokenizers.Tokenizer(
    models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")
  )
  backend.pre_tokenizer = pre_tokenizers.Whitespace()
  result = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend,
    unk_token="<unk>",
    bos_token="<s>",
    eos_token="</s>",
  )
  result.add_tokens(
    [transformers.AddedToken(a, special=True, normalized=False) for a in added],
    special_tokens=True,
  )
  if "<pad>" in added:
    result.pad_token = "<pad>"
  return result


class OriginalLlava(transformers.LlamaForCausalLM):
  """What LLaVA's own code adds to a LLaMA, under its names."""

  def __init__(self, config, vision_config=None):
    super().__init__(config)
    vision = vision_config or clip_config()
    width = config.hidden_size
    self.model.mm_projector = torch.nn.Sequential(
      torch.nn.Linear(vision.hidden_size, width),
      torch.nn.GELU(),
      torch.nn.Linear(width, width),
    )
    self.model.vision_tower = torch.nn.Module()
    self.model.vision_tower.vision_tower = transformers.CLIPVisionModel(vision)
    self.post_init()

  def image_features(self, images: np.ndarray) -> torch.Tensor:
    tower = self.model.vision_tower.vision_tower
    states = tower(pixels(images), output_hidden_states=True).hidden_states
    return self.model.mm_projector(states[-2][:, 1:])


def pixels(images: np.ndarray) -> torch.Tensor:
  """uint8 [N, S, S, 3] as CLIP gets them."""
  x = (images / 255 - OPENAI_CLIP_MEAN) / OPENAI_CLIP_STD
  return torch.tensor(x.transpose(0, 3, 1, 2)).float()


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
  """Weights so large that a wrong mask, order or position shows."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, x in model.named_parameters():
      noise = torch.randn(x.shape, generator=generator)
      norm = "norm" in name and name.endswith("weight")
      x.copy_(1 + 0.2 * noise if norm else 0.3 * noise)
  return model.eval()


def llava_hf(
  folder: pathlib.Path,
  kind: str = "grouped",
  names: str = "old",
  voco: bool = False,
  dtype: torch.dtype = torch.float32,
  rows: int = HF_ROWS,
):
  """llava-hf's layout; `names` are those of before or after transformers 5."""
  text = llama_config(rows, kind)
  model = transformers.LlavaForConditionalGeneration(
    transformers.LlavaConfig(
      text_config=text,
      vision_config=clip_config(),
      image_token_index=IMAGE_ID,
      image_seq_length=NUM_PATCHES,
      tie_word_embeddings=text.tie_word_embeddings,
      attn_implementation="eager",
    )
  )
  randomize(model).to(dtype)
  model.save_pretrained(folder)
  state = model.state_dict()
  if text.tie_word_embeddings:
    del state["lm_head.weight"]
  save_safetensors(
    {older(k) if names == "old" else k: v for k, v in state.items()},
    folder / "model.safetensors",
  )
  added = ["<image>", "<pad>"] + ["<voco>"] * voco
  tokenizer(*added).save_pretrained(folder)
  return model


def older(name: str) -> str:
  """llava-hf's names before transformers 5, from the newer ones."""
  name = name.replace("model.language_model.", "language_model.model.")
  name = name.replace("model.vision_tower.", "vision_tower.vision_model.")
  name = name.replace("model.multi_modal", "multi_modal")
  return f"language_model.{name}" if name.startswith("lm_head") else name


def original(
  folder: pathlib.Path,
  kind: str = "grouped",
  voco: bool = True,
  dtype: torch.dtype = torch.float32,
  tower: str = "inside",
  projector: str = "inside",
  max_shard_size: int = 20_000,
  words: tuple[str, ...] = WORDS,
) -> OriginalLlava:
  """The layout of LLaVA and VoCo-LLaMA.

  Args:
    folder: to write to.
    kind: of LLAMAS.
    voco: whether the vocabulary ends in `<voco>`.
    dtype: of the weights.
    tower: "inside" the weights, or "apart" in a folder that the config names.
    projector: "inside" the weights, or "beside" in mm_projector.bin.
    max_shard_size: bytes.
    words: of the tokenizer.
  """
  folder.mkdir(parents=True, exist_ok=True)
  config = llama_config(3 + len(words) + voco, kind)
  model = randomize(OriginalLlava(config)).to(dtype)
  state = {_published(k): v for k, v in model.state_dict().items()}
  if config.tie_word_embeddings:
    del state["lm_head.weight"]
  vision = {k: v for k, v in state.items() if ".vision_tower." in k}
  if tower == "apart":
    model.model.vision_tower.vision_tower.save_pretrained(folder / "tower")
    state = {k: v for k, v in state.items() if k not in vision}
  else:
    clip_config().save_pretrained(folder / "tower")
  if projector == "beside":
    beside = {k: v for k, v in state.items() if ".mm_projector." in k}
    torch.save(beside, folder / "mm_projector.bin")
    state = {k: v for k, v in state.items() if k not in beside}
  save_shards(state, folder, max_shard_size)
  values = config.to_dict() | {
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava_llama",
    "mm_hidden_size": 8,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_tower": "tower",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "image_aspect_ratio": "pad",
  }
  (folder / "config.json").write_text(json.dumps(values))
  tokenizer(*["<voco>"] * voco, words=words).save_pretrained(folder)
  return model


def _published(name: str) -> str:
  """transformers 5 leaves out a part of CLIP's names, the files have it."""
  inner = "vision_tower.vision_tower."
  if inner in name and f"{inner}vision_model" not in name:
    name = name.replace(inner, f"{inner}vision_model.")
  return name


def save_safetensors(state, path: pathlib.Path) -> None:
  from safetensors import torch as safetensors_torch

  safetensors_torch.save_file(
    {k: v.contiguous() for k, v in state.items()}, path, {"format": "pt"}
  )


def save_shards(state, folder: pathlib.Path, max_shard_size: int) -> None:
  """Safetensors with an index, as `save_pretrained` cuts them."""
  import huggingface_hub

  huggingface_hub.save_torch_state_dict(
    {k: v.contiguous() for k, v in state.items()},
    folder,
    max_shard_size=max_shard_size,
  )


def save_bins(state, folder: pathlib.Path, num_shards: int) -> None:
  """`.bin` files with an index, as before safetensors."""
  names = list(state)
  weight_map = {}
  for i in range(num_shards):
    file = f"pytorch_model-{i + 1:05}-of-{num_shards:05}.bin"
    part = names[i::num_shards]
    torch.save({name: state[name] for name in part}, folder / file)
    weight_map |= dict.fromkeys(part, file)
  index = {"metadata": {}, "weight_map": weight_map}
  (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@dataclasses.dataclass(frozen=True)
class Parts:
  """Folders and a file of a model that is in parts."""

  llm: pathlib.Path
  vision: pathlib.Path
  projector: pathlib.Path
  model: OriginalLlava


def parts(folder: pathlib.Path, kind: str = "grouped") -> Parts:
  """A LLaMA, a whole CLIP with its text half, and a projector."""
  model = randomize(OriginalLlava(llama_config(NUM_TEXT_TOKENS, kind)))
  llm = transformers.LlamaForCausalLM(model.config)
  llm.load_state_dict(model.state_dict(), strict=False)
  llm.save_pretrained(folder / "llm")
  tokenizer().save_pretrained(folder / "llm")
  text = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 20,
    "bos_token_id": 0,
    "eos_token_id": 1,
  }
  clip = transformers.CLIPModel(
    transformers.CLIPConfig(
      text_config=text, vision_config=clip_config().to_dict()
    )
  )
  tower = model.model.vision_tower.vision_tower.state_dict()
  clip.vision_model.load_state_dict(tower)
  clip.save_pretrained(folder / "clip")
  projector = {
    f"model.mm_projector.{k}": v
    for k, v in model.model.mm_projector.state_dict().items()
  }
  torch.save(projector, folder / "mm_projector.bin")
  return Parts(
    folder / "llm", folder / "clip", folder / "mm_projector.bin", model
  )
