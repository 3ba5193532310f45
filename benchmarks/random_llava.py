"""LLaVA-1.5 with random weights, as llava-hf publishes it. Next: convert_7b.py.

  python -m benchmarks.random_llava --out=DIR [--size=7b] [--tokenizer=DIR]

Writes what a converter of the real thing reads: sharded bfloat16 safetensors
with an index, the older names of the tensors, config.json, and a tokenizer
with `<image>` and `<pad>` after its own tokens. Without `--tokenizer`, a
folder of LLaMA's, a stand-in of as many tokens spells everything out.

Values come from one block of normal numbers, read from another place for every
tensor, so that 14 GB take as long as the disk and little memory.
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterator

import ml_dtypes
import numpy as np
import tokenizers
import tqdm
import transformers
from tokenizers import decoders, models, normalizers

INDEX = "model.safetensors.index.json"
_IMAGE_TOKENS = ("<image>", "<pad>")
_ADDED_ROWS = 64  # of the vocabulary, those of _IMAGE_TOKENS included
_STANDARD_DEVIATION = 0.02
# Odd, so that rows of any even width differ.
_BLOCK = 2**24 + 1  # values; 32 MiB


@dataclasses.dataclass(frozen=True)
class Size:
  """Shape of the model; the names are those of config.json."""

  num_text_tokens: int  # of the stand-in tokenizer
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  vision_hidden_size: int
  vision_intermediate_size: int
  vision_num_hidden_layers: int
  vision_num_attention_heads: int
  image_size: int
  patch_size: int
  max_shard_bytes: int


SIZES = {
  "7b": Size(
    num_text_tokens=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    vision_hidden_size=1024,
    vision_intermediate_size=4096,
    vision_num_hidden_layers=24,
    vision_num_attention_heads=16,
    image_size=336,
    patch_size=14,
    max_shard_bytes=5 * 10**9,
  ),
  "tiny": Size(
    num_text_tokens=400,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    vision_hidden_size=16,
    vision_intermediate_size=24,
    vision_num_hidden_layers=3,
    vision_num_attention_heads=2,
    image_size=28,
    patch_size=14,
    max_shard_bytes=50_000,
  ),
}


def write(
  folder: pathlib.Path, size: Size, tokenizer: pathlib.Path | None = None
) -> None:
  """Writes the model to `folder`, unless it is there already.

  The index comes last: with it, all is there.

  Args:
    folder: made if it is not there.
    size: shape of the model.
    tokenizer: folder of a tokenizer; None for a stand-in.
  """
  words = _load(tokenizer) if tokenizer else _stand_in(size.num_text_tokens)
  num_text_tokens = len(words)
  config = _config(size, num_text_tokens)
  if _is_whole(folder, config):
    return
  folder.mkdir(parents=True, exist_ok=True)
  (folder / INDEX).unlink(missing_ok=True)
  (folder / "config.json").write_text(json.dumps(config, indent=2))
  words.add_tokens(
    [
      transformers.AddedToken(token, special=True, normalized=False)
      for token in _IMAGE_TOKENS
    ],
    special_tokens=True,
  )
  words.pad_token = "<pad>"
  words.save_pretrained(folder)

  shapes = dict(tensor_shapes(size, num_text_tokens))
  total = sum(map(_nbytes, shapes.values()))
  shards = _split(shapes, size.max_shard_bytes)
  rng = np.random.default_rng(0)
  normal = _STANDARD_DEVIATION * rng.standard_normal(_BLOCK, np.float32)
  block = normal.astype(ml_dtypes.bfloat16).view(np.uint8).data
  weight_map = {}
  with tqdm.tqdm(total=total, unit="B", unit_scale=True, desc="writing") as bar:
    for i, shard in enumerate(shards, 1):
      name = f"model-{i:05}-of-{len(shards):05}.safetensors"
      _write_shard(folder / name, shard, block, rng, bar)
      weight_map |= dict.fromkeys(shard, name)
  index = {"metadata": {"total_size": total}, "weight_map": weight_map}
  (folder / INDEX).write_text(json.dumps(index, indent=2))


def tensor_shapes(
  size: Size, num_text_tokens: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
  """Name and shape of every tensor, in the order of the files."""
  vision = "vision_tower.vision_model."
  width, patches = size.vision_hidden_size, size.image_size // size.patch_size
  mlp = size.vision_intermediate_size

  def affine(name, *weight):
    return [(f"{name}.weight", weight), (f"{name}.bias", weight[:1])]

  yield f"{vision}embeddings.class_embedding", (width,)
  patch = (width, 3, size.patch_size, size.patch_size)
  yield f"{vision}embeddings.patch_embedding.weight", patch
  positions = (patches**2 + 1, width)
  yield f"{vision}embeddings.position_embedding.weight", positions
  yield from affine(f"{vision}pre_layrnorm", width)  # misspelt there, too
  for i in range(size.vision_num_hidden_layers):
    layer = f"{vision}encoder.layers.{i}."
    for projection in ("q", "k", "v", "out"):
      yield from affine(f"{layer}self_attn.{projection}_proj", width, width)
    yield from affine(f"{layer}layer_norm1", width)
    yield from affine(f"{layer}mlp.fc1", mlp, width)
    yield from affine(f"{layer}mlp.fc2", width, mlp)
    yield from affine(f"{layer}layer_norm2", width)
  yield from affine(f"{vision}post_layernorm", width)

  projector, (width, mlp) = width, (size.hidden_size, size.intermediate_size)
  yield from affine("multi_modal_projector.linear_1", width, projector)
  yield from affine("multi_modal_projector.linear_2", width, width)

  llm = "language_model.model."
  vocabulary = (num_text_tokens + _ADDED_ROWS, width)
  yield f"{llm}embed_tokens.weight", vocabulary
  for i in range(size.num_hidden_layers):
    layer = f"{llm}layers.{i}."
    for projection in "qkvo":
      yield f"{layer}self_attn.{projection}_proj.weight", (width, width)
    yield f"{layer}mlp.gate_proj.weight", (mlp, width)
    yield f"{layer}mlp.up_proj.weight", (mlp, width)
    yield f"{layer}mlp.down_proj.weight", (width, mlp)
    yield f"{layer}input_layernorm.weight", (width,)
    yield f"{layer}post_attention_layernorm.weight", (width,)
  yield f"{llm}norm.weight", (width,)
  yield "language_model.lm_head.weight", vocabulary


def _config(size: Size, num_text_tokens: int) -> dict:
  vocab_size = num_text_tokens + _ADDED_ROWS
  return {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "ignore_index": -100,
    "image_token_index": num_text_tokens,
    "pad_token_id": num_text_tokens + 1,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": vocab_size,
    "text_config": {
      "architectures": ["LlamaForCausalLM"],
      "model_type": "llama",
      "hidden_act": "silu",
      "hidden_size": size.hidden_size,
      "intermediate_size": size.intermediate_size,
      "max_position_embeddings": 4096,
      "num_attention_heads": size.num_attention_heads,
      "num_hidden_layers": size.num_hidden_layers,
      "num_key_value_heads": size.num_attention_heads,
      "rms_norm_eps": 1e-5,
      "rope_theta": 10000.0,
      "torch_dtype": "bfloat16",
      "vocab_size": vocab_size,
    },
    "vision_config": {
      "model_type": "clip_vision_model",
      "hidden_act": "quick_gelu",
      "hidden_size": size.vision_hidden_size,
      "image_size": size.image_size,
      "intermediate_size": size.vision_intermediate_size,
      "layer_norm_eps": 1e-5,
      "num_attention_heads": size.vision_num_attention_heads,
      "num_hidden_layers": size.vision_num_hidden_layers,
      "patch_size": size.patch_size,
      "projection_dim": 768,
    },
  }


def _is_whole(folder: pathlib.Path, config: dict) -> bool:
  if not (folder / INDEX).is_file():
    return False
  return json.loads((folder / "config.json").read_text()) == config


def _nbytes(shape: tuple[int, ...]) -> int:
  return 2 * math.prod(shape)


def _split(
  shapes: dict[str, tuple[int, ...]], max_bytes: int
) -> list[dict[str, tuple[int, ...]]]:
  """Tensors of each file."""
  shards, room = [], 0
  for name, shape in shapes.items():
    if not shards or _nbytes(shape) > room:
      shards.append({})
      room = max_bytes
    shards[-1][name] = shape
    room -= _nbytes(shape)
  return shards


def _write_shard(path, shapes, block: memoryview, rng, bar) -> None:
  """One safetensors file: length of the header, header, values."""
  header, end = {"__metadata__": {"format": "pt"}}, 0
  for name, shape in shapes.items():
    offsets = [end, end := end + _nbytes(shape)]
    header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": offsets}
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)
  with path.open("wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for shape in shapes.values():
      start, left = 2 * int(rng.integers(_BLOCK)), _nbytes(shape)
      while left:
        count = file.write(block[start : start + left])
        left -= count
        start = 0
        bar.update(count)
    file.flush()
    os.fsync(file.fileno())


def _load(folder: pathlib.Path) -> transformers.PreTrainedTokenizerFast:
  return transformers.AutoTokenizer.from_pretrained(
    str(folder), local_files_only=True
  )


def _stand_in(num_tokens: int) -> transformers.PreTrainedTokenizerFast:
  """Spells every text out in bytes, and else does what LLaMA's does."""
  vocab = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁"]
  vocab += [f"<unused{i}>" for i in range(num_tokens - len(vocab))]
  backend = tokenizers.Tokenizer(
    models.BPE(
      {token: i for i, token in enumerate(vocab)},
      merges=[],
      unk_token="<unk>",
      fuse_unk=True,
      byte_fallback=True,
    )
  )
  backend.normalizer = normalizers.Sequence(
    [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
  )
  backend.decoder = decoders.Sequence(
    [
      decoders.Replace("▁", " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(" ", 1, 0),
    ]
  )
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend,
    unk_token="<unk>",
    bos_token="<s>",
    eos_token="</s>",
    clean_up_tokenization_spaces=False,
  )


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", type=pathlib.Path, required=True)
  parser.add_argument("--size", choices=SIZES, default="7b")
  parser.add_argument("--tokenizer", type=pathlib.Path)
  args = parser.parse_args()
  write(args.out, SIZES[args.size], args.tokenizer)


if __name__ == "__main__":
  main()
