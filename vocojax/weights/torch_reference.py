"""Logits of published weights by transformers and torch; a program of its own.

  python -m vocojax.weights.torch_reference FOLDER

`check.py` starts it with FOLDER/recipe.json and FOLDER/inputs.npz and reads
FOLDER/logits.npy. vocojax does not depend on torch and never loads it into its
own process: only this file names it, through importlib, so that it can be
checked, packed and installed where there is none. It shares no code with the
converter but for the prefixes of the names.
"""

import importlib
import json
import pathlib
import sys
from typing import Any

import numpy as np

torch: Any = importlib.import_module("torch")
transformers: Any = importlib.import_module("transformers")


def main(folder: pathlib.Path) -> None:
  transformers.logging.set_verbosity_error()
  recipe = json.loads((folder / "recipe.json").read_text())
  inputs = np.load(folder / "inputs.npz")
  state = {}
  for path in recipe["files"]:
    state |= _read(path)
  with torch.no_grad():
    logits = _logits(recipe, inputs, state)
  np.save(folder / "logits.npy", logits.numpy())


def _read(path: str) -> dict[str, Any]:
  if path.endswith(".bin"):
    state = torch.load(path, map_location="cpu", weights_only=True)
  else:
    state = importlib.import_module("safetensors.torch").load_file(path)
  return {name: x.float() for name, x in state.items()}


def _part(state, prefix: str) -> dict[str, Any]:
  return {
    name.removeprefix(prefix): x
    for name, x in state.items()
    if name.startswith(prefix)
  }


def _llama(recipe, state):
  config = transformers.LlamaConfig.from_dict(
    recipe["llm_config"] | {"model_type": "llama"}
  )
  config.tie_word_embeddings = recipe["tied"]
  weights = {
    f"model.{name}": x
    for name, x in _part(state, recipe["prefixes"]["llm"]).items()
    if name.startswith(("embed_tokens.", "layers.", "norm."))
    and "rotary" not in name
  }
  head = "model.embed_tokens.weight"
  weights["lm_head.weight"] = (
    weights[head]
    if recipe["tied"]
    else state[recipe["prefixes"]["head"] + "lm_head.weight"]
  )
  config.vocab_size = len(weights[head])
  return _load(
    transformers.AutoModelForCausalLM.from_config(
      config, attn_implementation="eager"
    ),
    weights,
  )


def _clip(recipe, state):
  config = transformers.CLIPVisionConfig.from_dict(recipe["vision_config"])
  names = ("embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm.")
  weights = {
    name: x
    for name, x in _part(state, recipe["prefixes"]["vision"]).items()
    if name.startswith(names) and "position_ids" not in name
  }
  model = transformers.CLIPVisionModel(config)
  if next(iter(model.state_dict())).startswith("vision_model."):
    weights = {f"vision_model.{name}": x for name, x in weights.items()}
  return _load(model, weights)


def _load(model, weights):
  keys = model.load_state_dict(weights, strict=False)
  missing = [k for k in keys.missing_keys if "position_ids" not in k]
  if missing or keys.unexpected_keys:
    raise SystemExit(f"missing {missing}, unexpected {keys.unexpected_keys}")
  return model.float().eval()


def _logits(recipe, inputs, state):
  """Of the text after the image stream, under the mask of two streams."""
  llama = _llama(recipe, state)
  pixels = torch.tensor(inputs["pixels"])[None]
  features = _clip(recipe, state)(pixels, output_hidden_states=True)
  x = features.hidden_states[recipe["feature_layer"]][:, 1:]
  for i, (weight, bias) in enumerate(recipe["projector"]):
    if i:
      x = torch.nn.functional.gelu(x)
    x = torch.nn.functional.linear(x, state[weight], state[bias])

  def embed(ids):
    return llama.model.embed_tokens(torch.tensor(ids, dtype=torch.long))[None]

  voco = torch.tensor(inputs["voco_row"])
  if recipe["voco_row"] is not None:
    voco = llama.model.embed_tokens.weight[recipe["voco_row"]]
  voco = voco.expand(1, recipe["num_voco"], -1)
  stream = [embed(recipe["before"]), x, embed(recipe["between"]), voco]
  A = sum(part.shape[1] for part in stream)
  x = torch.cat([*stream, embed(recipe["text"])], 1)
  i, j = np.indices((x.shape[1],) * 2)
  seen = np.isin(j, recipe["visible"]) | (j >= A)
  mask = (j <= i) & ((i < A) | seen)
  bias = np.where(mask, np.float32(0), np.finfo(np.float32).min)
  logits = llama(
    inputs_embeds=x, attention_mask=torch.tensor(bias)[None, None]
  ).logits
  return logits[0, A:]


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))
