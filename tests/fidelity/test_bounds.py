"""The bounds of the paper (arXiv 2406.12275, section 4.2).

The upper bound is trained with the VoCo tokens in the sequence, under the
ordinary causal mask. The lower bound is the same weights under the VoCo mask.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import easyvqa_1tok
from tests.models import builders
from vocojax import config as config_lib
from vocojax.models import masks
from vocojax.models.vlm import VisionLanguageModel

T = 7
TOLERANCE = 1e-5  # of the largest logit
NAMES = ("voco", "voco_causal")


def _vlm(compressor, k=2, **overrides):
  return builders.model(
    {"compressor.name": compressor, "compressor.num_voco_tokens": k} | overrides
  )


def _jit(f):
  return jax.jit(f, compiler_options=builders.QUICK_COMPILE)


def _batch(vlm, rows=(((1,), [(1, T)]), ((1,), [(1, T - 2)]))):
  """Rows of text that holds no `<voco>`."""
  batch = builders.batch(np.random.default_rng(3), vlm, list(rows), T)
  voco = vlm.tokens.voco_token_id
  ids = np.where(batch["input_ids"] == voco, voco + 1, batch["input_ids"])
  labels = np.where(batch["labels"] == voco, voco + 1, batch["labels"])
  return jax.tree.map(jnp.asarray, batch | {"input_ids": ids, "labels": labels})


def _literal(vlm, params, batch, mask):
  """Text logits of one sequence [BOS, patches, suffix, VoCo, text].

  Positions count from 0. Of the model only the layers are used.
  """

  def logits(params, batch):
    images = vlm.embed_images(params, batch["images"][:, 0])
    text = vlm.llm.embed(params["llm"], batch["input_ids"])
    x = jnp.concatenate([images, text], axis=1)
    B, S, _ = x.shape
    positions = jnp.broadcast_to(jnp.arange(S), (B, S))
    x, _ = vlm.llm.run(
      params["llm"], x, positions, jnp.broadcast_to(mask, (B, S, S))
    )
    return vlm.llm.logits(params["llm"], x[:, -T:])

  return _jit(logits)(params, batch)


def _check(vlm, params, batch, expected):
  vocab = vlm.config.llm.vocab_size
  real = np.asarray(batch["segment_ids"] > 0)
  expected = np.asarray(expected)[real][:, :vocab]
  for attention in ("two_stream", "bias"):
    config = dataclasses.replace(vlm.config, attention=attention)
    found = _jit(VisionLanguageModel(config, vlm.tokens).text_logits)(
      params, batch
    )
    error = np.abs(np.asarray(found)[real][:, :vocab] - expected).max()
    assert error <= TOLERANCE * np.abs(expected).max(), attention


@pytest.mark.parametrize("k", [1, 2])
def test_the_upper_bound_is_a_literal_causal_mask(k):
  vlm = _vlm("voco_causal", k)
  params, batch = builders.init(vlm), _batch(vlm)
  S = 1 + 4 + 2 + k + T
  causal = np.arange(S)[:, None] >= np.arange(S)[None, :]
  _check(vlm, params, batch, _literal(vlm, params, batch, causal))


@pytest.mark.parametrize("k", [1, 2])
def test_the_lower_bound_is_the_same_weights_under_the_literal_mask(k):
  vlm = _vlm("voco", k)
  params, batch = builders.init(_vlm("voco_causal", k)), _batch(vlm)
  first = 1 + 4 + 2
  S = first + k + T
  row, column = np.arange(S)[:, None], np.arange(S)[None, :]
  mask = (row >= column) & ((row < first + k) | (column >= first))
  _check(vlm, params, batch, _literal(vlm, params, batch, mask))


def _voco_row_gradient(compressor):
  vlm = _vlm(compressor)
  batch = _batch(vlm)

  def loss(params):
    return builders.loss_of(vlm.text_logits(params, batch), batch)[0]

  params = builders.init(vlm)
  table = _jit(jax.grad(loss))(params)["llm"]["embed_tokens"]["embedding"]
  return np.abs(np.asarray(table)[vlm.tokens.voco_token_id]).max()


def test_the_upper_bound_trains_the_voco_row():
  assert _voco_row_gradient("voco_causal") > 1e-3
  assert _voco_row_gradient("voco") > 1e-3
  # What was the upper bound before, whose lower bound read a random row.
  assert _voco_row_gradient("full") == 0


@pytest.mark.parametrize("num_slots", [1, 2, 3])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_text_and_voco_tokens_are_where_voco_has_them(k, num_slots):
  rng = np.random.default_rng(k)
  found = {}
  rows = builders.random_rows(rng, 6, num_slots, T)
  for name in NAMES:
    vlm = _vlm(name, k)
    batch = builders.batch(np.random.default_rng(0), vlm, rows, T)
    groups = jnp.asarray(batch["image_group_ids"])
    strides = jnp.full_like(groups, vlm.stream.stride)
    voco, text = vlm.stream.positions(num_slots)
    voco = voco.reshape(num_slots, -1)[:, -k:]
    found[name] = (
      *(voco, text, vlm.stream.length, vlm.stream.after),
      masks.text_positions(
        groups,
        jnp.asarray(batch["segment_ids"]),
        jnp.asarray(batch["text_group_ids"]),
        vlm.stream.start,
        strides,
      ),
      masks.image_offsets(groups, strides),
    )
  jax.tree.map(np.testing.assert_array_equal, *found.values())


def test_the_parameters_are_those_of_voco():
  voco, causal = (
    jax.eval_shape(_vlm(name).init, jax.random.key(0)) for name in NAMES
  )
  assert voco == causal


def test_the_quick_start_trains_the_upper_bound_first():
  *_, upper, voco = config_lib.phases(easyvqa_1tok.get_config())
  names = [x.model.compressor.name for x in (upper, voco)]
  assert names == ["voco_causal", "voco"]
  assert voco.evaluation.bounds
