"""Our LLaMA and CLIP against Hugging Face's in torch, layer by layer.

Random weights go from our parameters to torch by name, and `load_state_dict`
is strict, so that none is left over on either side.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from tests.models import builders
from vocojax.models.clip import ClipVision
from vocojax.models.llama import Llama
from vocojax.models.projector import Projector
from vocojax.models.vlm import VisionLanguageModel
from vocojax.training import state

TOLERANCE = 1e-4  # of the largest output, float32

LLAMAS = {
  "multi-head": {"llm.num_key_value_heads": 4},
  "grouped": {"llm.num_key_value_heads": 2},
  "one key head, tied": {
    "llm.num_key_value_heads": 1,
    "llm.tie_word_embeddings": True,
  },
  "llama3 scaling, wide heads": {
    "llm.head_dim": 8,
    "llm.rope.scaling": "llama3",
    # Of the four wavelengths (6 to 6283) one is kept, one blended, two
    # stretched.
    "llm.rope.original_max_position_embeddings": 128,
    "llm.rope.theta": 10000.0,
  },
}


def _config(overrides):
  return builders.model_config(
    {"llm.num_hidden_layers": 3, "llm.rope.theta": 50.0} | overrides
  )


def _torch_llama(model, params):
  """HF's model with our weights; ours are [in, out] and stacked."""
  c = model.llm
  rope = {"rope_type": "default", "rope_theta": c.rope.theta}
  if c.rope.scaling == "llama3":
    rope = dataclasses.asdict(c.rope)
    rope |= {"rope_type": rope.pop("scaling"), "rope_theta": rope.pop("theta")}
  hf = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      vocab_size=c.vocab_size,
      hidden_size=c.hidden_size,
      intermediate_size=c.intermediate_size,
      num_hidden_layers=c.num_hidden_layers,
      num_attention_heads=c.num_attention_heads,
      num_key_value_heads=c.num_key_value_heads,
      head_dim=c.head_dim,
      rms_norm_eps=c.rms_norm_eps,
      rope_parameters=rope,
      tie_word_embeddings=c.tie_word_embeddings,
      max_position_embeddings=512,
      attn_implementation="eager",
    )
  )
  weights = {}
  for path, x in state.flatten(params).items():
    name = path.replace("/", ".").replace("kernel", "weight")
    name = name.replace("embedding", "weight").replace("scale", "weight")
    if path.startswith("layers/"):
      for i, y in enumerate(x):
        layer = name.replace("layers.", f"model.layers.{i}.", 1)
        weights[layer] = y.T
    elif path == "lm_head/kernel":
      weights[name] = x[:, : c.vocab_size].T
    else:
      weights[f"model.{name}"] = x[: c.vocab_size] if x.ndim == 2 else x
  if c.tie_word_embeddings:
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
  return _load(hf, weights)


def _torch_clip(model, params):
  """HF's vision tower with our weights."""
  c = model.vision
  hf = transformers.CLIPVisionModel(
    transformers.CLIPVisionConfig(
      image_size=c.image_size,
      patch_size=c.patch_size,
      hidden_size=c.hidden_size,
      intermediate_size=c.intermediate_size,
      num_hidden_layers=c.num_hidden_layers,
      num_attention_heads=c.num_attention_heads,
      layer_norm_eps=c.layer_norm_eps,
      hidden_act=c.hidden_act,
    )
  )
  p = c.patch_size
  weights = {}
  for path, x in state.flatten(params).items():
    name = path.replace("/", ".").replace("kernel", "weight")
    name = name.replace("scale", "weight").replace("pre_layern", "pre_layrn")
    name = name.replace("position_embedding", "position_embedding.weight")
    if path.startswith("layers/"):
      for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
        name = name.replace(part, f"self_attn.{part}")
      name = name.replace("fc", "mlp.fc")
      for i, y in enumerate(x):
        weights[name.replace("layers.", f"encoder.layers.{i}.", 1)] = y.T
    elif "patch_embedding" in path:  # rows, columns, channels of a patch
      weights[name] = x.reshape(p, p, 3, -1).transpose(3, 2, 0, 1)
    else:
      weights[name] = x
  if next(iter(hf.state_dict())).startswith("vision_model."):
    weights = {f"vision_model.{name}": x for name, x in weights.items()}
  return _load(hf, weights)


def _load(hf, weights):
  tensors = {k: torch.tensor(np.array(x)) for k, x in weights.items()}
  keys = hf.load_state_dict(tensors, strict=False)
  assert not keys.unexpected_keys
  assert all("position_ids" in key for key in keys.missing_keys)
  return hf.eval()


def _outputs_of(layers, run):
  """What each torch layer returns during `run()`, and what run returns."""
  outputs = []

  def hook(module, inputs, output):
    del module, inputs
    x = output[0] if isinstance(output, tuple) else output
    outputs.append(x.numpy())

  handles = [layer.register_forward_hook(hook) for layer in layers]
  with torch.no_grad():
    result = run()
  for handle in handles:
    handle.remove()
  return outputs, result


def _error(found, expected):
  found, expected = np.asarray(found), np.asarray(expected)
  assert found.shape == expected.shape
  return float(np.abs(found - expected).max() / np.abs(expected).max())


def _llama_errors(ours, model, params):
  """Errors of `ours`, a ModelConfig, against torch configured as `model`."""
  hf = _torch_llama(model, params)
  B, S = 2, 40
  ids = np.random.default_rng(0).integers(0, model.llm.vocab_size, (B, S))
  layers, result = _outputs_of(
    hf.model.layers, lambda: hf(input_ids=torch.tensor(ids))
  )
  llama = Llama(ours)

  @jax.jit
  def forward(params, ids):
    x = llama.embed(params, ids)
    positions = jnp.broadcast_to(jnp.arange(S), (B, S))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((S, S), bool)), (B, S, S))
    last, every = llama.run(params, x, positions, mask)
    return every, llama.logits(params, last)

  every, logits = forward(params, jnp.asarray(ids))
  errors = {
    f"layer {i}": _error(*pair)
    for i, pair in enumerate(zip(every, layers, strict=True))
  }
  vocab = model.llm.vocab_size
  errors["logits"] = _error(logits[..., :vocab], result.logits)
  return errors


def _report(name, errors):
  print(f"\n{name}:", ", ".join(f"{k} {e:.1e}" for k, e in errors.items()))


@pytest.mark.parametrize("name", LLAMAS)
def test_llama(name):
  model = _config(LLAMAS[name])
  params = builders.init(VisionLanguageModel(model, builders.TOKENS))
  errors = _llama_errors(model, model, params["llm"])
  _report(name, errors)
  assert max(errors.values()) <= TOLERANCE


@pytest.mark.parametrize(
  "key, value",
  [
    ("llm.rope.theta", 55.0),
    ("llm.rope.factor", 7.0),
    ("llm.rope.high_freq_factor", 3.5),
    ("llm.rms_norm_eps", 1e-3),
  ],
)
def test_a_wrong_llama_is_noticed(key, value):
  settings = LLAMAS["llama3 scaling, wide heads"]
  right, wrong = _config(settings), _config(settings | {key: value})
  params = builders.init(VisionLanguageModel(right, builders.TOKENS))
  errors = _llama_errors(wrong, right, params["llm"])
  _report(f"{key}={value}", errors)
  assert min(errors.values()) > TOLERANCE
  assert max(errors.values()) > 10 * TOLERANCE


CLIP = {"vision.num_hidden_layers": 3, "vision.image_size": 12}


def _clip_errors(ours, model, params):
  hf = _torch_clip(model, params)
  size = model.vision.image_size
  images = np.random.default_rng(0).integers(0, 256, (2, size, size, 3))
  pixels = (images / 255 - OPENAI_CLIP_MEAN) / OPENAI_CLIP_STD
  channels_first = torch.tensor(pixels.transpose(0, 3, 1, 2)).float()
  layers, result = _outputs_of(
    [
      m
      for name, m in hf.named_modules()
      if name.split(".")[-2:-1] == ["layers"]
    ],
    lambda: hf(pixel_values=channels_first, output_hidden_states=True),
  )
  clip = ClipVision(ours)
  last, every = jax.jit(clip.hidden_states, static_argnums=2)(
    params, jnp.asarray(pixels, jnp.float32), model.vision.num_hidden_layers
  )
  features = jax.jit(clip.features)(params, jnp.asarray(images, jnp.uint8))
  errors = {
    f"layer {i}": _error(*pair)
    for i, pair in enumerate(zip(every, layers, strict=True))
  }
  return errors | {
    "last": _error(last, result.last_hidden_state),
    "features": _error(features, result.hidden_states[-2][:, 1:]),
  }


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
def test_clip(hidden_act):
  model = _config(CLIP | {"vision.hidden_act": hidden_act})
  params = builders.init(VisionLanguageModel(model, builders.TOKENS))
  errors = _clip_errors(model, model, params["vision"])
  _report(hidden_act, errors)
  assert max(errors.values()) <= TOLERANCE


@pytest.mark.parametrize(
  "key, value",
  [
    ("vision.hidden_act", "gelu"),
    ("vision.layer_norm_eps", 1e-2),
    ("vision.feature_layer", -3),
  ],
)
def test_a_wrong_clip_is_noticed(key, value):
  right, wrong = _config(CLIP), _config(CLIP | {key: value})
  params = builders.init(VisionLanguageModel(right, builders.TOKENS))
  errors = _clip_errors(wrong, right, params["vision"])
  _report(f"{key}={value}", errors)
  assert errors["features"] > 10 * TOLERANCE


def _original_mask(first, last, length):
  """The rule of the original, for one image with VoCo at first..last."""
  i, j = np.indices((length, length))
  return np.where(i <= last, j <= i, (first <= j) & (j <= i))


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("shift", [0, 1])
def test_two_streams_equal_torch_under_the_original_mask(k, shift):
  """HF's LLaMA on [image stream, text] with a dense 4-D mask.

  With `shift`, torch's text sees one separator too, and must not agree.
  """
  vlm = builders.model({"compressor.num_voco_tokens": k})
  params = builders.init(vlm)
  rng = np.random.default_rng(0)
  T, A = 7, vlm.stream.length
  batch = builders.batch(rng, vlm, [((1,), [(1, T)])] * 2, T)
  batch = jax.tree.map(jnp.asarray, batch)
  image_x = jax.jit(vlm.embed_images)(params, batch["images"][:, 0])
  ours = jax.jit(vlm.logits_from_embeddings)(params["llm"], image_x, batch)

  hf = _torch_llama(vlm.config, params["llm"])
  text_x = vlm.llm.embed(params["llm"], batch["input_ids"])
  mask = _original_mask(A - k - shift, A - 1, A + T)
  lowest = np.finfo(np.float32).min
  bias = np.where(mask, np.float32(0), lowest)[None, None].repeat(2, 0)
  with torch.no_grad():
    theirs = hf(
      inputs_embeds=torch.tensor(np.array(jnp.hstack([image_x, text_x]))),
      attention_mask=torch.tensor(bias),
    ).logits[:, A:]
  error = _error(ours[..., : vlm.config.llm.vocab_size], theirs)
  print(f"\nk={k}, shift={shift}: {error:.1e}")
  assert (error <= TOLERANCE) == (shift == 0)
  assert shift == 0 or error > 100 * TOLERANCE


@pytest.mark.parametrize("shift", [0, 1])
def test_full_equals_torch_on_one_sequence(shift):
  """LLaVA: text before the image too, all of it causal, positions in a row.

  With `shift`, torch counts one position more before the text, and must not
  agree.
  """
  prefix = (1, 9, 8, 7, 6)
  tokens = dataclasses.replace(builders.TOKENS, prefix_ids=prefix)
  vlm = builders.model({"compressor.name": "full"}, tokens)
  params = builders.init(vlm)
  T, A = 7, len(prefix) + vlm.config.vision.num_patches
  rng = np.random.default_rng(0)
  batch = builders.batch(rng, vlm, [((1,), [(1, T)])] * 2, T)
  batch = jax.tree.map(jnp.asarray, batch)
  ours = jax.jit(vlm.text_logits)(params, batch)

  hf = _torch_llama(vlm.config, params["llm"])
  features = vlm.vision.features(params["vision"], batch["images"][:, 0])
  projector = Projector(vlm.config)
  patches = projector.apply({"params": params["projector"]}, features)
  embed = hf.get_input_embeddings()
  with torch.no_grad():
    joint = [
      embed(torch.tensor(prefix)).expand(2, -1, -1),
      torch.tensor(np.array(patches)),
      embed(torch.tensor(np.array(batch["input_ids"]))),
    ]
    positions = torch.arange(A + T)[None] + shift * (torch.arange(A + T) >= A)
    theirs = hf(inputs_embeds=torch.cat(joint, 1), position_ids=positions)
  vocab = vlm.config.llm.vocab_size
  error = _error(ours[..., :vocab], theirs.logits[:, A:])
  print(f"\nshift={shift}: {error:.1e}")
  assert (error <= TOLERANCE) == (shift == 0)
