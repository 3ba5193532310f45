"""A model's fingerprint: what changes it, what does not, wherever it lies."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from tests.models import builders
from vocojax.config import MeshConfig
from vocojax.inference import fingerprint
from vocojax.inference.fingerprint import model_fingerprint
from vocojax.models.vlm import VisionLanguageModel
from vocojax.training import sharding

UNSIGNED = {2: np.uint16, 4: np.uint32}


def _flat(params):
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return {jax.tree_util.keystr(path): x for path, x in leaves}


def _with(params, changes):
  """The tree with other arrays at some paths."""

  def one(path, x):
    return changes.get(jax.tree_util.keystr(path), x)

  return jax.tree_util.tree_map_with_path(one, params)


def _params(vlm, dtype="float32"):
  params = builders.init(vlm)
  return jax.tree.map(lambda x: np.asarray(x.astype(dtype)), params)


def _flip(x, index, bit):
  x = x.copy()
  bits = x.reshape(-1).view(UNSIGNED[x.dtype.itemsize])
  bits[index] ^= 1 << bit
  return x


def _swap(x, i, j):
  x = x.copy()
  x.reshape(-1)[[i, j]] = x.reshape(-1)[[j, i]]
  return x


def _reference_sums(x):
  """One number at a time, in Python's integers."""

  def mix(b):
    b ^= b >> 16
    b = b * 0x7FEB352D % 2**32
    b ^= b >> 15
    b = b * 0x846CA68B % 2**32
    return b ^ b >> 16

  x = np.ascontiguousarray(x.reshape(x.shape[0] if x.ndim else 1, -1))
  rows = x.view(UNSIGNED[x.dtype.itemsize])
  return [
    [
      sum(mix(int(b) ^ i * factor % 2**32) for i, b in enumerate(row)) % 2**32
      for row in rows
    ]
    for factor in (0x9E3779B1, 0x85EBCA77)
  ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sums_of_rows(dtype):
  rng = np.random.default_rng(0)
  for shape in [(), (5,), (3, 4), (2, 3, 5), (2, 2, 3, 2), (1, 1)]:
    x = np.asarray(rng.normal(0, 1, shape)).astype(dtype)
    found = fingerprint._all_sums([x])[0]
    np.testing.assert_array_equal(found, _reference_sums(x))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_bit_and_place_counts(dtype):
  vlm = builders.model()
  params = _params(vlm, dtype)
  rng = np.random.default_rng(0)
  seen = {model_fingerprint(vlm, params, True)}
  count = 1

  def note(changes):
    nonlocal count
    seen.add(model_fingerprint(vlm, _with(params, changes), True))
    count += 1

  flat = _flat(params)
  for name, x in flat.items():
    for bit in (0, 8 * x.dtype.itemsize - 1, int(rng.integers(1, 14))):
      note({name: _flip(x, rng.integers(x.size), bit)})
    # Two numbers of a row, and the first two of two rows.
    row = x[0].size
    pairs = [(0, row - 1)] if row > 1 else []
    pairs += [(0, row)] if len(x) > 1 else []
    for i, j in pairs:
      swapped = _swap(x, i, j)
      assert (swapped != x).any(), name
      note({name: swapped})
  for a, b in itertools.combinations(flat, 2):
    if flat[a].shape == flat[b].shape:
      note({a: flat[b], b: flat[a]})
  assert count > 100
  assert len(seen) == count


def test_bits_and_swaps_within_one_tensor():
  """All of them: 32 bits of 12 numbers, and every pair of numbers."""
  x = np.random.default_rng(0).normal(0, 1, (2, 6)).astype(np.float32)
  changed = [_flip(x, i, bit) for i in range(12) for bit in range(32)]
  changed += [_swap(x, i, j) for i, j in itertools.combinations(range(12), 2)]
  sums = jax.jit(jax.vmap(fingerprint._row_sums))(np.stack([x, *changed]))
  assert len({s.tobytes() for s in np.asarray(sums)}) == 1 + 12 * 32 + 66


def test_settings():
  vlm = builders.model()
  params = _params(vlm)
  base = model_fingerprint(vlm, params, True)
  assert len(base) == 64 and set(base) <= set("0123456789abcdef")
  same = [
    {"compressor.num_voco_tokens": 16},
    {"attention": "bias"},
    {"remat": "full"},
    {"scan_layers": False},
  ]
  for overrides in same:
    other = builders.model(overrides)
    assert model_fingerprint(other, params, True) == base, overrides
  different = [
    {"llm.rope.theta": 5e5},
    {"llm.rms_norm_eps": 1e-6},
    {"llm.num_attention_heads": 8},
    {"llm.vocab_size": 28},
    {"vision.feature_layer": -1},
    {"vision.hidden_act": "gelu"},
    {"dtype": "bfloat16"},
    {"compressor.text_sees_bos": True},
    {"compressor.name": "full"},
    {"compressor.name": "voco_causal", "compressor.num_voco_tokens": 1},
    {"compressor.name": "voco_causal", "compressor.num_voco_tokens": 4},
    {"compressor.name": "avgpool", "compressor.num_voco_tokens": 1},
    {"compressor.name": "avgpool", "compressor.num_voco_tokens": 4},
  ]
  found = {base, model_fingerprint(vlm, params, False)}
  found |= {
    model_fingerprint(builders.model(overrides), params, True)
    for overrides in different
  }
  for change in (
    {"prefix_ids": (2,)},
    {"suffix_ids": (5, 4)},
    {"suffix_ids": ()},
    {"voco_token_id": 4},
  ):
    tokens = dataclasses.replace(vlm.tokens, **change)
    other = VisionLanguageModel(vlm.config, tokens)
    found.add(model_fingerprint(other, params, True))
  assert len(found) == 2 + len(different) + 4
  half = jax.tree.map(lambda x: x.astype("bfloat16"), params)
  assert model_fingerprint(vlm, half, True) != base


def test_a_tensor_of_another_shape_or_name():
  vlm = builders.model()
  params = _params(vlm)
  name = next(n for n, x in _flat(params).items() if x.ndim == 2)
  x = _flat(params)[name]
  other = _with(params, {name: x.reshape(x.shape[0], 2, -1)})
  base = model_fingerprint(vlm, params, True)
  assert model_fingerprint(vlm, other, True) != base
  renamed = params | {"projectors": params["projector"]}
  del renamed["projector"]  # in the same place among the others
  assert model_fingerprint(vlm, renamed, True) != base


@pytest.mark.parametrize("mesh", [(1, 8, 1), (2, 2, 2)])
def test_the_same_on_any_mesh(mesh):
  # Multiples of every axis of the mesh.
  vlm = builders.model({"llm.intermediate_size": 32, "llm.vocab_multiple": 16})
  params = _params(vlm)
  alone = model_fingerprint(vlm, params, True)
  assert model_fingerprint(vlm, jax.device_put(params), True) == alone
  mesh = sharding.make_mesh(MeshConfig(*mesh))
  spread = jax.device_put(params, sharding.param_shardings(params, mesh))
  assert any(not x.is_fully_replicated for x in jax.tree.leaves(spread))
  assert model_fingerprint(vlm, spread, True) == alone
  # What travels between devices are sums, not weights.
  compiled = fingerprint._all_sums.lower(jax.tree.leaves(spread)).compile()
  assert "all-gather" in compiled.as_text()
  for line in compiled.as_text().splitlines():
    assert not (" all-gather(" in line and " = f32" in line), line
