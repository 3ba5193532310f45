"""Converted models against the torch ones they were converted from.

Logits of the text after an image, float32, through the whole model: vision
tower, projector, language model, prompt tokens and mask. Read next:
`published.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests import runs
from tests.weights import published
from vocojax import assemble
from vocojax.training import checkpoint, loop, state
from vocojax.weights import into, stream
from vocojax.weights.source import Request

TOLERANCE = 1e-4  # of the largest logit, float32
TEXT_LENGTH = 7


def convert(out, **request):
  """Converts and loads: model and parameters."""
  plan = into.make_plan(Request(**request))
  stream.write_checkpoint(plan, out)
  loaded = checkpoint.load(str(out))
  model = assemble.make_model(loaded.config, loaded.tokenizer)
  abstract = loop.abstract_params(model, runs.mesh())
  params, missing = checkpoint.load_params(
    str(out), abstract, loaded.config.model
  )
  assert not missing
  return model, params


def inputs():
  """Two images and two texts."""
  rng = np.random.default_rng(0)
  size = published.IMAGE_SIZE
  images = rng.integers(0, 256, (2, size, size, 3), np.uint8)
  ids = rng.integers(0, published.NUM_TEXT_TOKENS, (2, TEXT_LENGTH), np.int32)
  return images, ids


def our_logits(model, params, images, ids):
  """Of the text tokens that both vocabularies have."""
  batch = {
    "images": images[:, None],
    "image_group_ids": np.ones((2, 1), np.int32),
    "input_ids": ids,
    "segment_ids": np.ones_like(ids),
    "text_group_ids": np.ones_like(ids),
  }
  with runs.quick_compile():
    logits = jax.jit(model.text_logits)(
      params, jax.tree.map(jnp.asarray, batch)
    )
  return np.asarray(logits[..., : published.NUM_TEXT_TOKENS])


def original_logits(model, images, ids, k, visible=None):
  """The original's sequence and mask, given to HF's LLaMA."""
  embed = model.model.embed_tokens
  voco = torch.full((2, k), published.NUM_TEXT_TOKENS)
  with torch.no_grad():
    features = model.image_features(images)
    x = torch.cat(
      [
        embed(torch.ones(2, 1, dtype=torch.long)),
        features,
        embed(voco),
        embed(torch.tensor(ids).long()),
      ],
      1,
    )
    length, last = x.shape[1], published.NUM_PATCHES + k
    first = last - (visible or k) + 1
    i, j = np.indices((length, length))
    mask = np.where(i <= last, j <= i, (first <= j) & (j <= i))
    bias = np.where(mask, np.float32(0), np.finfo(np.float32).min)
    bias = torch.tensor(bias)[None, None].repeat(2, 1, 1, 1)
    logits = model(inputs_embeds=x, attention_mask=bias).logits
  return logits[:, last + 1 :, : published.NUM_TEXT_TOKENS].numpy()


def hf_logits(model, tokens, images, ids):
  """What is before the image, the image, the text, plain causal attention."""
  patches = [published.IMAGE_ID] * published.NUM_PATCHES
  prefix = [*tokens.prefix_ids, *patches]
  row = np.concatenate([np.tile(prefix, (2, 1)), ids], 1)
  with torch.no_grad():
    logits = model(
      input_ids=torch.tensor(row).long(), pixel_values=published.pixels(images)
    ).logits
  return logits[:, len(prefix) :, : published.NUM_TEXT_TOKENS].numpy()


def error(found, expected):
  assert found.shape == expected.shape
  return float(np.abs(found - expected).max() / np.abs(expected).max())


# Each layout gets grouped and single heads, tied and untied embeddings.
@pytest.mark.parametrize(
  "kind", ["multi-head", "grouped, tied, llama3 rope, wide heads"]
)
def test_llava_hf_with_all_patches(tmp_path, kind):
  names = "new" if "grouped" in kind else "old"
  theirs = published.llava_hf(tmp_path / "hf", kind, names)
  model, params = convert(tmp_path / "out", source=str(tmp_path / "hf"))
  assert model.config.compressor.name == "full"
  images, ids = inputs()
  expected = hf_logits(theirs, model.tokens, images, ids)
  found = error(our_logits(model, params, images, ids), expected)
  other = error(our_logits(model, params, images[::-1], ids), expected)
  print(f"\n{kind}: {found:.1e}, images exchanged {other:.1e}")
  assert found <= TOLERANCE and other > 100 * TOLERANCE


@pytest.mark.parametrize("kind", ["grouped", "tied"])
def test_original_under_the_voco_mask(tmp_path, kind):
  theirs = published.original(tmp_path / "original", kind)
  k = 2 if "grouped" in kind else 1
  model, params = convert(
    tmp_path / "out", source=str(tmp_path / "original"), num_voco_tokens=k
  )
  assert model.config.compressor.name == "voco"
  assert model.tokens.voco_token_id == published.NUM_TEXT_TOKENS
  images, ids = inputs()
  ours = our_logits(model, params, images, ids)
  found = error(ours, original_logits(theirs, images, ids, k))
  # One more visible token is no longer the model.
  other = error(ours, original_logits(theirs, images, ids, k, visible=k + 1))
  print(f"\n{kind}, k={k}: {found:.1e}, other mask {other:.1e}")
  assert found <= TOLERANCE and other > 100 * TOLERANCE


def test_three_parts(tmp_path):
  parts = published.parts(tmp_path)
  model, params = convert(
    tmp_path / "out",
    llm=str(parts.llm),
    vision=str(parts.vision),
    projector=str(parts.projector),
  )
  # torch gets the new row of <voco>, which only we have.
  n = published.NUM_TEXT_TOKENS
  row = np.array(params["llm"]["embed_tokens"]["embedding"][n])
  assert 0.005 < row.std() < 0.05
  parts.model.resize_token_embeddings(n + 1, mean_resizing=False)
  with torch.no_grad():
    parts.model.model.embed_tokens.weight[n] = torch.tensor(row)
  images, ids = inputs()
  found = error(
    our_logits(model, params, images, ids),
    original_logits(parts.model, images, ids, 1),
  )
  print(f"\nparts: {found:.1e}")
  assert found <= TOLERANCE


def test_straight_to_a_mesh(tmp_path):
  """Every device reads its shards; the values are those of the checkpoint."""
  published.original(tmp_path / "original")
  plan = into.make_plan(Request(source=str(tmp_path / "original")))
  stream.write_checkpoint(plan, tmp_path / "out")
  loaded = checkpoint.load(str(tmp_path / "out"))
  model = assemble.make_model(loaded.config, loaded.tokenizer)
  abstract = loop.abstract_params(model, runs.mesh(1, 2, 2))
  straight, missing = stream.load(plan, abstract)
  assert not missing
  stored, _ = checkpoint.load_params(
    str(tmp_path / "out"), abstract, plan.config.model
  )
  flat = state.flatten(stored)
  for path, x in state.flatten(straight).items():
    assert x.sharding == flat[path].sharding, path
    assert x.dtype == flat[path].dtype, path
    np.testing.assert_array_equal(np.asarray(x), np.asarray(flat[path]), path)
  kernel = straight["llm"]["layers"]["mlp"]["up_proj"]["kernel"]
  assert kernel.addressable_shards[0].data.shape == (2, 8, 12)
