"""What may depend on what, seen through exact zeros of gradients.

A gradient of random sums of logits is exactly zero only where no path at all
leads from the one to the other.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import builders
from vocojax.models import attention, masks
from vocojax.models.llama import Llama

F, T, K = 2, 9, 2
# Row 0: two conversations about both images, one about none. Row 1: a
# conversation for each image. Row 2: an empty slot, text first, padding.
ROWS = [
  ((1, 1), [(1, 3), (1, 3), (0, 3)]),
  ((1, 2), [(1, 4), (2, 5)]),
  ((0, 1), [(0, 3), (1, 4)]),
]
SETTINGS = {
  "compressor.num_voco_tokens": K,
  "scan_layers": False,  # layer by layer, so that each gets its own probe
}


def _vlm(mode, num_layers=3):
  return builders.model(
    SETTINGS | {"attention": mode, "llm.num_hidden_layers": num_layers}
  )


def _setup(mode, num_layers=3):
  """Model, parameters, batch, embedded image streams."""
  vlm = _vlm(mode, num_layers)
  rng = np.random.default_rng(0)
  params = builders.init(vlm)["llm"]
  batch = jax.tree.map(jnp.asarray, builders.batch(rng, vlm, ROWS, T))
  shape = (len(ROWS) * F, vlm.stream.length, vlm.config.llm.hidden_size)
  return vlm, params, batch, jnp.asarray(rng.normal(size=shape), jnp.float32)


def _grad(f, *args):
  """Gradients of a random sum of everything f returns."""

  def total(*args):
    leaves = jax.tree.leaves(f(*args))
    rng = np.random.default_rng(1)
    return sum(jnp.sum(x * rng.normal(size=x.shape)) for x in leaves)

  argnums = tuple(range(len(args)))
  grad = jax.jit(
    jax.grad(total, argnums), compiler_options=builders.QUICK_COMPILE
  )
  return jax.tree.map(np.asarray, grad(*args))


def _real(logits, batch, vlm):
  """Real rows and columns of logits; the rest are zeroed."""
  rows = batch["segment_ids"] > 0
  logits = jnp.where(rows[..., None], logits, 0.0)
  return logits[..., : vlm.config.llm.vocab_size]


def _text_logits(vlm, batch):
  return lambda params, image_x: _real(
    vlm.logits_from_embeddings(params, image_x, batch), batch, vlm
  )


def _change_what_text_reads(vlm, change, monkeypatch):
  """Passes keys and values on their way to text queries through `change`.

  `change(x, part)` gets all columns [B, S, G, P], part 0 for keys, 1 for
  values, layer by layer. What image rows read stays as it is.
  """
  if vlm.config.attention == "two_stream":
    attend = attention.attend

    def changed(query, key, value, config, mask=None, causal=False):
      if mask is not None:
        key, value = change(key, 0), change(value, 1)
      return attend(query, key, value, config, mask, causal)

    monkeypatch.setattr(attention, "attend", changed)
  else:
    attend = attention.attend_with_bias

    def changed(query, key, value, bias):
      out = attend(query, key, value, bias)
      text = attend(query, change(key, 0), change(value, 1), bias)
      return jnp.concatenate([out[:, :-T], text[:, -T:]], axis=1)

    monkeypatch.setattr(attention, "attend_with_bias", changed)


@pytest.mark.parametrize("mode", ["two_stream", "bias"])
def test_with_voco_cut_no_image_has_a_gradient(mode, monkeypatch):
  vlm, params, batch, image_x = _setup(mode)
  visible = np.tile(vlm.stream.visible_mask, F)
  if mode == "two_stream":
    visible = np.ones(F * K, bool)
  visible = np.concatenate([visible, np.zeros(T, bool)])[:, None, None]

  def cut(x, part):
    del part
    return jnp.where(visible, jax.lax.stop_gradient(x), x)

  f = _text_logits(vlm, batch)
  _, uncut = _grad(f, params, image_x)
  # Every row of every image that some text sees matters...
  seen = np.asarray(batch["image_group_ids"]).reshape(-1) > 0
  assert (np.abs(uncut[seen]).max(axis=-1) > 0).all()
  assert not uncut[~seen].any()
  _change_what_text_reads(vlm, cut, monkeypatch)
  cut_params, cut_x = _grad(f, params, image_x)
  # ... and only by way of the keys and values of VoCo tokens.
  assert not cut_x.any()
  assert all(x.any() for x in jax.tree.leaves(cut_params))


def _probe_gradients(vlm, params, batch, image_x, monkeypatch):
  """Gradient of text logits to what text rows read, [L, 2, B, S, G, P]."""
  c = vlm.config.llm
  shape = (
    c.num_hidden_layers,
    2,
    len(ROWS),
    F * vlm.stream.length + T,
    c.num_key_value_heads,
    c.head_dim,
  )

  def f(probes):
    probes = iter(probes.reshape(-1, *shape[2:]))  # keys, values, next layer
    with monkeypatch.context() as patch:
      _change_what_text_reads(vlm, lambda x, _: x + next(probes), patch)
      return _text_logits(vlm, batch)(params, image_x)

  return _grad(f, jnp.zeros(shape))[0]


def test_text_reads_the_visible_columns_of_its_own_group_only(monkeypatch):
  vlm, params, batch, image_x = _setup("bias")
  probes = _probe_gradients(vlm, params, batch, image_x, monkeypatch)
  A = vlm.stream.length
  images = probes[:, :, :, : F * A].reshape(*probes.shape[:3], F, A, -1)
  voco = vlm.stream.visible_mask
  assert not images[..., ~voco, :].any()
  seen = np.array([[True, True], [True, True], [False, True]])  # as in ROWS
  assert not images[:, :, ~seen].any()
  largest = np.abs(images[:, :, seen][..., voco, :]).max(axis=-1)
  print(f"\nsmallest gradient of a visible key or value: {largest.min():.1e}")
  assert (largest > 1e-6).all()  # of each layer, key and value, image, token


def test_one_visible_image_token_is_noticed(monkeypatch):
  vlm, params, batch, image_x = _setup("bias")
  mask = masks.two_stage_mask
  shown = F * vlm.stream.length * [False] + T * [False]
  shown[2] = True  # a patch of the first image

  def broken(streams, *rest):
    text = streams[:, :, None] == 0
    return mask(streams, *rest) | (text & jnp.array(shown))

  monkeypatch.setattr(masks, "two_stage_mask", broken)
  probes = _probe_gradients(vlm, params, batch, image_x, monkeypatch)
  column = np.abs(probes[:, :, 1, 2]).max(axis=(-1, -2))
  assert (column > 1e-6).all()


@pytest.mark.parametrize("mode", ["two_stream", "bias"])
def test_what_the_last_layer_makes_of_image_rows_is_lost(mode):
  """In one layer, text feels a change of VoCo rows and of nothing else."""
  vlm, params, batch, image_x = _setup(mode, num_layers=1)
  f = jax.jit(_text_logits(vlm, batch))
  voco = vlm.stream.visible_mask[:, None]
  noise = np.random.default_rng(2).normal(size=image_x.shape)
  others = f(params, image_x + jnp.float32(np.where(voco, 0, noise)))
  itself = f(params, image_x + jnp.float32(np.where(voco, noise, 0)))
  before = np.asarray(f(params, image_x))
  np.testing.assert_array_equal(before, others)
  seen = np.asarray(batch["text_group_ids"]) > 0
  assert (np.abs(before - itself).max(axis=-1)[seen] > 1e-3).all()


def _image_side(vlm, batch, monkeypatch):
  """`f(params, image_x)` -> all that image rows make, in every layer."""
  filled = jnp.repeat(batch["image_group_ids"] > 0, vlm.stream.length, axis=1)

  def joint(params, image_x):
    outputs = []
    run = Llama.run

    def recording(self, *args):
      last, every = run(self, *args)
      # Rows of an empty slot may attend to nothing, so they hold anything.
      outputs.append(jnp.where(filled[..., None], every[:, :, :-T], 0.0))
      return last, every

    with monkeypatch.context() as patch:
      patch.setattr(Llama, "run", recording)
      vlm.logits_from_embeddings(params, image_x, batch)
    return outputs

  def two_stream(params, image_x):
    read = []

    def record(x, part):
      del part
      read.append(x[:, : F * K])
      return x

    with monkeypatch.context() as patch:
      _change_what_text_reads(vlm, record, patch)
      vlm.logits_from_embeddings(params, image_x, batch)
    return read

  return {"two_stream": two_stream, "bias": joint}[vlm.config.attention]


@pytest.mark.parametrize("mode", ["two_stream", "bias"])
def test_images_do_not_depend_on_text(mode, monkeypatch):
  vlm, params, batch, image_x = _setup(mode)
  made = _image_side(vlm, batch, monkeypatch)
  gradients, image_gradient = _grad(made, params, image_x)
  # Text enters by the table of embeddings, and leaves by the head.
  assert not gradients["embed_tokens"]["embedding"].any()
  assert image_gradient.any()
  other = batch | {"input_ids": (batch["input_ids"] + 7) % 29}
  before = jax.jit(made)(params, image_x)
  after = jax.jit(_image_side(vlm, other, monkeypatch))(params, image_x)
  assert len(before) >= 1
  for x, y in zip(before, after, strict=True):
    np.testing.assert_array_equal(x, y)


def test_an_image_that_looks_at_text_is_noticed(monkeypatch):
  vlm, params, batch, image_x = _setup("bias")
  mask = masks.two_stage_mask

  def broken(*tokens):  # VoCo token 1 of image 1 sees the last text token
    return mask(*tokens).at[:, vlm.stream.visible[0], -1].set(True)

  monkeypatch.setattr(masks, "two_stage_mask", broken)
  gradients, _ = _grad(_image_side(vlm, batch, monkeypatch), params, image_x)
  assert gradients["embed_tokens"]["embedding"].any()


def test_compress_takes_no_text():
  """Of the embedding table, only the stream's own tokens enter a cache."""
  vlm = _vlm("two_stream")
  params = builders.init(vlm)
  images = jnp.asarray(
    np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3)), jnp.uint8
  )

  def f(params):
    cache, _ = vlm.compress(params, images)
    return cache

  gradients = _grad(f, params)[0]
  table = gradients["llm"]["embed_tokens"]["embedding"]
  own = [*vlm.tokens.prefix_ids, *vlm.tokens.suffix_ids]
  own.append(vlm.tokens.voco_token_id)
  assert sorted(np.flatnonzero(np.abs(table).max(axis=-1))) == sorted(own)
