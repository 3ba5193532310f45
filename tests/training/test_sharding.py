"""Any mesh trains the same; where each parameter lies; see sharding.py."""

import collections
import dataclasses
import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from configs import voco_1tok
from tests import runs
from tests.models import builders
from vocojax.config import CompressorConfig, MeshConfig, load_module, phases
from vocojax.errors import ConfigError
from vocojax.models.vlm import VisionLanguageModel
from vocojax.training import loop, sharding, state, step
from vocojax.training.optimizer import make_optimizer

# Adam divides by the gradient's size, so where the true gradient is zero (as of
# CLIP's key biases) it makes steps of rounding errors; this eps keeps them out.
TAIL = """\
  c.optimizer.update(learning_rate=0.005, eps=1e-6)
  c.training.update(steps=20, log_every=1, checkpoint_every=100)
  c.data.batch_size = 8
  c.evaluation.every = 10
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("sharding")
  runs.write_data(folder)
  runs.write_config(folder, "one.py", TAIL + runs.ONE_PHASE)
  return folder


def config_of(folder, accumulate=1):
  (config,) = phases(load_module(str(folder / "one.py")))
  training = dataclasses.replace(config.training, accumulate=accumulate)
  return dataclasses.replace(config, training=training)


def train(config, folder, sizes=()):
  """Loss of every step, and the parameters after the last."""
  phase = runs.phase(config, folder, sizes)
  with runs.quick_compile():
    params = loop.run(phase)
  lines = runs.metrics(folder)
  trained = [line["step"] for line in lines if "loss" in line]
  assert trained == list(range(1, 21))
  return lines, params


@pytest.fixture(scope="module")
def one_device(folder):
  return train(config_of(folder), folder / "one")


def assert_same_curve(lines, expected):
  want = [x["loss"] for x in expected if "loss" in x]
  assert want[-1] < 0.8 * want[0]  # it learns, so a curve it is
  close = {"loss": 1e-5, "validation_loss": 1e-5, "grad_norm": 1e-4}
  same = ("step", "answer_accuracy", "validation_answer_accuracy")
  for x, y in zip(lines, expected, strict=True):
    assert x.keys() == y.keys()
    assert [x.get(key) for key in same] == [y.get(key) for key in same]
    for key in close.keys() & x.keys():
      np.testing.assert_allclose(x[key], y[key], rtol=close[key])


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_mesh_trains_as_one_device(folder, one_device, sizes):
  lines, params = train(config_of(folder), folder / f"{sizes}", sizes)
  assert_same_curve(lines, one_device[0])
  # The mesh was used: weights are split over it.
  kernel = params["llm"]["layers"]["mlp"]["up_proj"]["kernel"]
  assert len(kernel.sharding.device_set) == 8
  assert kernel.shape == (2, 16, 24)
  _, fsdp, tensor = sizes
  shard = kernel.addressable_shards[0].data.shape
  assert shard == (2, 16 // fsdp, 24 // tensor)


def test_accumulation_changes_nothing(folder, one_device):
  lines, _ = train(config_of(folder, accumulate=4), folder / "four")
  assert_same_curve(lines, one_device[0])


# Where every parameter lies. Stacked layers have the layer dimension first.
GOLDEN = {
  # Of avgpool; that of qformer is below.
  "compressor/pooled_linear/bias": P("tensor"),
  "compressor/pooled_linear/kernel": P("fsdp", "tensor"),
  "llm/embed_tokens/embedding": P("tensor", "fsdp"),
  "llm/layers/input_layernorm/scale": P(None, None),
  "llm/layers/mlp/down_proj/kernel": P(None, "tensor", "fsdp"),
  "llm/layers/mlp/gate_proj/kernel": P(None, "fsdp", "tensor"),
  "llm/layers/mlp/up_proj/kernel": P(None, "fsdp", "tensor"),
  "llm/layers/post_attention_layernorm/scale": P(None, None),
  "llm/layers/self_attn/k_proj/kernel": P(None, "fsdp", "tensor"),
  "llm/layers/self_attn/o_proj/kernel": P(None, "tensor", "fsdp"),
  "llm/layers/self_attn/q_proj/kernel": P(None, "fsdp", "tensor"),
  "llm/layers/self_attn/v_proj/kernel": P(None, "fsdp", "tensor"),
  "llm/lm_head/kernel": P("fsdp", "tensor"),
  "llm/norm/scale": P(None),
  "projector/linear_1/bias": P("tensor"),
  "projector/linear_1/kernel": P("fsdp", "tensor"),
  "projector/linear_2/bias": P(None),
  "projector/linear_2/kernel": P("tensor", "fsdp"),
  "vision/embeddings/class_embedding": P(None),
  "vision/embeddings/patch_embedding/kernel": P(None, "fsdp"),
  "vision/embeddings/position_embedding": P(None, "fsdp"),
  "vision/layers/fc1/bias": P(None, "tensor"),
  "vision/layers/fc1/kernel": P(None, "fsdp", "tensor"),
  "vision/layers/fc2/bias": P(None, None),
  "vision/layers/fc2/kernel": P(None, "tensor", "fsdp"),
  "vision/layers/k_proj/bias": P(None, "tensor"),
  "vision/layers/k_proj/kernel": P(None, "fsdp", "tensor"),
  "vision/layers/layer_norm1/bias": P(None, None),
  "vision/layers/layer_norm1/scale": P(None, None),
  "vision/layers/layer_norm2/bias": P(None, None),
  "vision/layers/layer_norm2/scale": P(None, None),
  "vision/layers/out_proj/bias": P(None, None),
  "vision/layers/out_proj/kernel": P(None, "tensor", "fsdp"),
  "vision/layers/q_proj/bias": P(None, "tensor"),
  "vision/layers/q_proj/kernel": P(None, "fsdp", "tensor"),
  "vision/layers/v_proj/bias": P(None, "tensor"),
  "vision/layers/v_proj/kernel": P(None, "fsdp", "tensor"),
  "vision/post_layernorm/bias": P(None),
  "vision/post_layernorm/scale": P(None),
  "vision/pre_layernorm/bias": P(None),
  "vision/pre_layernorm/scale": P(None),
}
QFORMER = {
  "block/cross_attention/k_proj/bias": P("tensor"),
  "block/cross_attention/k_proj/kernel": P("fsdp", "tensor"),
  "block/cross_attention/out_proj/bias": P(None),
  "block/cross_attention/out_proj/kernel": P("tensor", "fsdp"),
  "block/cross_attention/q_proj/bias": P("tensor"),
  "block/cross_attention/q_proj/kernel": P("fsdp", "tensor"),
  "block/cross_attention/v_proj/bias": P("tensor"),
  "block/cross_attention/v_proj/kernel": P("fsdp", "tensor"),
  "block/cross_norm/bias": P(None),
  "block/cross_norm/scale": P(None),
  "block/fc1/bias": P("tensor"),
  "block/fc1/kernel": P("fsdp", "tensor"),
  "block/fc2/bias": P(None),
  "block/fc2/kernel": P("tensor", "fsdp"),
  "block/mlp_norm/bias": P(None),
  "block/mlp_norm/scale": P(None),
  "block/self_attention/k_proj/bias": P("tensor"),
  "block/self_attention/k_proj/kernel": P("fsdp", "tensor"),
  "block/self_attention/out_proj/bias": P(None),
  "block/self_attention/out_proj/kernel": P("tensor", "fsdp"),
  "block/self_attention/q_proj/bias": P("tensor"),
  "block/self_attention/q_proj/kernel": P("fsdp", "tensor"),
  "block/self_attention/v_proj/bias": P("tensor"),
  "block/self_attention/v_proj/kernel": P("fsdp", "tensor"),
  "block/self_norm/bias": P(None),
  "block/self_norm/scale": P(None),
  "linear/bias": P("tensor"),
  "linear/kernel": P("fsdp", "tensor"),
  "norm/bias": P(None),
  "norm/scale": P(None),
  "patch_norm/bias": P(None),
  "patch_norm/scale": P(None),
  "queries": P(None, "fsdp"),
}
PAPER = phases(voco_1tok.get_config())[0]


def abstract(model, *sizes):
  mesh = runs.mesh(*sizes)
  return state.flatten(loop.abstract_params(model, mesh))


def specs(params):
  return {path: x.sharding.spec for path, x in params.items()}


def golden(*absent):
  return {
    path: x
    for path, x in GOLDEN.items()
    if not any(name in path for name in absent)
  }


@pytest.mark.parametrize("sizes", [(1, 1, 1), (8, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize(
  ("overrides", "absent"),
  [
    ({"compressor.name": "avgpool"}, ()),
    ({}, ("compressor",)),
    ({"compressor.name": "full"}, ("compressor",)),
    ({"llm.tie_word_embeddings": True}, ("compressor", "lm_head")),
    ({"projector": "linear"}, ("compressor", "linear_2")),
    ({"scan_layers": False, "attention": "bias"}, ("compressor",)),
  ],
)
def test_golden_table(sizes, overrides, absent):
  found = abstract(builders.model(overrides), *sizes)
  assert specs(found) == golden(*absent)


def test_golden_table_of_qformer():
  found = specs(
    abstract(builders.model({"compressor.name": "qformer"}), 2, 2, 2)
  )
  expected = {}
  for path, x in QFORMER.items():
    for i in range(2 if path.startswith("block") else 1):
      expected["compressor/" + path.replace("block", f"block_{i}")] = x
  assert found == golden("compressor") | expected


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)])
def test_7b_shapes(sizes):
  """By shape only: the arrays would take 27 GB."""
  model = VisionLanguageModel(PAPER.model, builders.TOKENS)
  params = abstract(model, *sizes)
  assert specs(params) == golden("compressor")
  total = sum(x.size for x in params.values())
  assert 7.0e9 < total < 7.2e9
  # A device's share of a big matrix.
  _, fsdp, tensor = sizes
  up = params["llm/layers/mlp/up_proj/kernel"]
  assert up.sharding.shard_shape(up.shape) == (
    32,
    4096 // fsdp,
    11008 // tensor,
  )


def test_each_parameter_matches_one_rule_and_no_rule_is_idle():
  used = set()
  for name in ("voco", "avgpool", "qformer"):
    compressor = CompressorConfig(name, 1, text_sees_bos=False)
    config = dataclasses.replace(PAPER.model, compressor=compressor)
    for path in abstract(VisionLanguageModel(config, builders.TOKENS)):
      matching = [p for p, _ in sharding.RULES if re.search(p, path)]
      assert len(matching) == 1, (path, matching)
      used.update(matching)
  assert used == {pattern for pattern, _ in sharding.RULES}


def test_unknown_or_doubly_matched_parameter(monkeypatch):
  with pytest.raises(LookupError, match="q_norm/weight: 0 sharding rules"):
    sharding.spec("llm/layers/self_attn/q_norm/weight")
  monkeypatch.setattr(
    sharding, "RULES", (*sharding.RULES, (r"^llm/norm", (None,)))
  )
  with pytest.raises(LookupError, match="llm/norm/scale: 2 sharding rules"):
    sharding.spec("llm/norm/scale")


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimizer_state_lies_like_its_parameter(name, folder):
  config = config_of(folder).optimizer
  config = dataclasses.replace(
    config, name=name, adam_learning_rate=0.1, freeze=("^vision/",)
  )
  mesh = runs.mesh(2, 2, 2)
  params = loop.abstract_params(builders.model(), mesh)
  optimizer = make_optimizer(config, 10)
  shapes = jax.eval_shape(
    lambda p: step.init_state(p, optimizer, config.freeze), params
  ).opt_state
  found = sharding.opt_state_shardings(shapes, params, mesh)
  moments = collections.Counter()
  leaves = jax.tree_util.tree_leaves_with_path(shapes)
  for (path, x), to in zip(leaves, jax.tree.leaves(found), strict=True):
    keys = [str(k.key) for k in path if isinstance(k, jax.tree_util.DictKey)]
    while keys and keys[0] not in ("llm", "projector", "vision"):
      del keys[0]  # names of muon's parts
    if keys:
      assert to.spec == GOLDEN["/".join(keys)], path
      moments["/".join(keys)] += 1
    else:
      assert to.spec == P() and x.size < 10  # a counter or a constant
  trained = list(golden("compressor", "vision/"))
  kernel = "llm/layers/mlp/up_proj/kernel"
  assert sorted(moments) == trained
  assert moments[kernel] == (2 if name == "adamw" else 1)
  assert moments["llm/norm/scale"] == 2


def test_dimension_that_does_not_divide():
  model = builders.model({"llm.intermediate_size": 22})
  with pytest.raises(ConfigError) as e:
    abstract(model, 1, 1, 8)
  assert (e.value.where, e.value.got) == ("config.mesh.tensor", "8")
  assert e.value.expected == (
    "a divisor of 22, a dimension of llm/layers/mlp/down_proj/kernel "
    "(2, 22, 16)"
  )


def test_mesh_from_config():
  def shape(*sizes):
    return tuple(sharding.make_mesh(MeshConfig(*sizes)).shape.values())

  assert shape(1, -1, 1) == (1, 8, 1)
  assert shape(2, 2, -1) == (2, 2, 2)
  assert shape(8, 1, 1) == (8, 1, 1)
  product = "a product of 8, the number of devices"
  for sizes, got, expected in (
    ((2, 2, 1), "2 x 2 x 1", product),
    ((3, -1, 1), "3 x 2 x 1", product),
    ((16, -1, 1), "16 x -1 x 1", product),
    ((-1, -1, 1), "-1 x -1 x 1", "positive sizes and at most one -1"),
    ((0, -1, 1), "0 x -1 x 1", "positive sizes and at most one -1"),
  ):
    with pytest.raises(ConfigError) as e:
      shape(*sizes)
    assert e.value.where == "config.mesh"
    assert e.value.got == f"{got} (data x fsdp x tensor)"
    assert e.value.expected == expected


def test_batch_that_cannot_be_split():
  sharding.check_batch(runs.mesh(2, 2, 2), 16, 4)
  with pytest.raises(ConfigError) as e:
    sharding.check_batch(runs.mesh(2, 2, 2), 24, 4)
  assert (e.value.where, e.value.got) == ("config.data.batch_size", "24")
  assert e.value.expected.startswith("a multiple of 16 (4 shards ")


@pytest.mark.parametrize(
  "rows_of, expected",
  [
    # Each process its own rows, also where the mesh scatters them.
    ({0: {(0, 4)}, 1: {(4, 8)}}, [(0, 2), (1, 2)]),
    ({0: {(4, 6), (6, 8)}, 1: {(0, 2), (2, 4)}}, [(1, 2), (0, 2)]),
    ({0: {(0, 2), (4, 6)}, 1: {(2, 4), (6, 8)}}, [(0, 2), (1, 2)]),
    # An axis `tensor` over two processes, and over all.
    ({0: {(0, 4)}, 1: {(0, 4)}, 2: {(4, 8)}, 3: {(4, 8)}}, [0, 0, 1, 1]),
    ({0: {(0, 8)}, 1: {(0, 8)}}, [(0, 1), (0, 1)]),
    # 1 x 2 x 3 over three processes of two devices.
    ({0: {(0, 4)}, 1: {(0, 4), (4, 8)}, 2: {(4, 8)}}, None),
    (
      {0: {(0, 2), (2, 4)}, 1: {(2, 4), (4, 6)}, 2: {(4, 6), (0, 2)}},
      None,
    ),
  ],
)
def test_share_of_the_batch(rows_of, expected):
  if expected is None:
    with pytest.raises(ConfigError) as e:
      sharding.share_of(0, rows_of)
    assert e.value.where == "config.mesh"
    assert e.value.expected == "whole shares of the batch for 3 processes"
    return
  found = [sharding.share_of(process, rows_of) for process in rows_of]
  assert found == [x if isinstance(x, tuple) else (x, 2) for x in expected]


def test_one_process_loads_all():
  assert sharding.data_share(runs.mesh(2, 2, 2), 8) == (0, 1)


@dataclasses.dataclass(frozen=True)
class Chip:
  """What the placement reads of a TPU v4 device."""

  id: int
  slice_index: int
  coords: tuple[int, int, int]
  platform: str = "tpu"
  device_kind: str = "TPU v4"
  core_on_chip: int = 0

  @property
  def process_index(self):
    return self.id // 4


def chips(slices):
  """Slices of 2 x 4 chips, in an order that says nothing."""
  found = [
    Chip(8 * s + 2 * y + x, s, (x, y, 0))
    for x in range(2)
    for y in range(4)
    for s in range(slices)
  ]
  return found


@pytest.mark.parametrize("sizes", [(2, 8, 1), (2, 2, 4), (4, 4, 1)])
def test_only_data_goes_over_slices(sizes):
  grid = sharding.arrange(list(sizes), chips(2))
  assert grid.shape == sizes
  assert len({d.id for d in grid.flat}) == 16
  for replica in grid:
    assert len({d.slice_index for d in replica.flat}) == 1
  # Neighbours in a slice, as on one slice alone.
  alone = sharding.arrange([sizes[0] // 2, *sizes[1:]], chips(1))
  half = grid[: sizes[0] // 2]
  assert [d.coords for d in half.flat] == [d.coords for d in alone.flat]


def test_mesh_that_would_cut_slices():
  with pytest.raises(ConfigError) as e:
    sharding.arrange([1, 16, 1], chips(2))
  assert (e.value.where, e.value.got) == ("config.mesh.data", "1")
  assert e.value.fix == "set it to 2 and config.mesh.fsdp to -1"


@pytest.mark.parametrize(
  "config, expected",
  [
    ((1, -1, 1), (1, 8, 1)),
    ((-1, 1, 1), (8, 1, 1)),
    ((1, 16, 2), (1, 4, 2)),  # of 32 devices
    ((2, 4, 16), (1, 1, 8)),
    ((1, 3, 1), (8, 1, 1)),
  ],
)
def test_mesh_of_one_host(config, expected):
  """An axis is never cut finer than the config does."""
  mesh = sharding.local_mesh(MeshConfig(*config))
  assert tuple(mesh.shape.values()) == expected
