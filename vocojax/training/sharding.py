"""The mesh, and where every parameter lives on it. Read next: `loop.py`.

Axes: `data` (replicas), `fsdp` (shards of weights and optimiser state, and of
the batch), `tensor` (shards within a layer).
"""

import collections
import math
import re
from collections.abc import Mapping, Sequence, Set

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vocojax.config import MeshConfig
from vocojax.errors import ConfigError
from vocojax.models.layers import BATCH_AXES
from vocojax.training import state

AXES = ("data", "fsdp", "tensor")

# (path, axes of its dimensions, why). Each parameter matches exactly one.
# Stacked layers have the layer dimension first; it is never split, since the
# scan takes one slice of it at a time.
RULES = (
  # A layer's first product splits its outputs over `tensor`, the second its
  # inputs, so that between them nothing travels.
  (
    r"^(llm|vision)/layers/.*(q_proj|k_proj|v_proj|gate_proj|up_proj|fc1)/kernel",
    (None, "fsdp", "tensor"),
  ),
  (
    r"^(llm|vision)/layers/.*(o_proj|out_proj|down_proj|fc2)/kernel",
    (None, "tensor", "fsdp"),
  ),
  (r"^vision/layers/(q_proj|k_proj|v_proj|fc1)/bias", (None, "tensor")),
  # Small vectors: cheaper to keep everywhere than to gather.
  (r"^vision/layers/(out_proj|fc2)/bias", (None, None)),
  (r"^(llm|vision)/layers/.*norm\d?/(scale|bias)", (None, None)),
  (r"^llm/norm/scale", (None,)),
  (r"^vision/(pre|post)_layernorm/(scale|bias)", (None,)),
  (r"^vision/embeddings/class_embedding", (None,)),
  # The vocabulary is padded, so it divides by `tensor`.
  (r"^llm/embed_tokens/embedding", ("tensor", "fsdp")),
  (r"^llm/lm_head/kernel", ("fsdp", "tensor")),
  # 588 x 1024 and 577 x 1024: only the width divides.
  (r"^vision/embeddings/(patch_embedding/kernel|position)", (None, "fsdp")),
  (r"^projector/linear_1/kernel", ("fsdp", "tensor")),
  (r"^projector/linear_1/bias", ("tensor",)),
  (r"^projector/linear_2/kernel", ("tensor", "fsdp")),
  (r"^projector/linear_2/bias", (None,)),
  (r"^compressor/(pooled_)?linear/kernel", ("fsdp", "tensor")),
  (r"^compressor/(pooled_)?linear/bias", ("tensor",)),
  (r"^compressor/queries", (None, "fsdp")),
  (
    r"^compressor/block_.*(q_proj|k_proj|v_proj|fc1)/kernel",
    ("fsdp", "tensor"),
  ),
  (r"^compressor/block_.*(q_proj|k_proj|v_proj|fc1)/bias", ("tensor",)),
  (r"^compressor/block_.*(out_proj|fc2)/kernel", ("tensor", "fsdp")),
  (r"^compressor/block_.*(out_proj|fc2)/bias", (None,)),
  (r"^compressor/.*norm/(scale|bias)", (None,)),
)


def make_mesh(
  config: MeshConfig, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """A mesh over all devices, or over those given.

  Of several TPU slices, joined by the slow network of the data center, only the
  axis `data` goes from one to the next; the others stay inside a slice.

  Raises:
    ConfigError: the sizes do not multiply to the number of devices, or `data`
      to that of the slices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = [getattr(config, axis) for axis in AXES]
  count = len(devices)
  known = math.prod(s for s in sizes if s != -1)
  if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
    raise ConfigError(
      "config.mesh",
      f"{' x '.join(map(str, sizes))} ({' x '.join(AXES)})",
      "positive sizes and at most one -1",
      "correct it",
    )
  if -1 in sizes and known <= count:
    sizes[sizes.index(-1)] = count // known
  if math.prod(sizes) != count:
    raise ConfigError(
      "config.mesh",
      f"{' x '.join(map(str, sizes))} ({' x '.join(AXES)})",
      f"a product of {count}, the number of devices",
      "set one axis to -1",
    )
  return Mesh(arrange(sizes, devices), AXES, (AxisType.Auto,) * len(AXES))


def local_mesh(config: MeshConfig) -> Mesh:
  """A mesh over the devices of this process only, as like `config` as can be.

  An axis has at most as many shards as `config` asks for, so that weights which
  could be split there can be split here.
  """
  devices = jax.local_devices()
  tensor = math.gcd(max(config.tensor, 1), len(devices))
  rest = len(devices) // tensor
  fsdp = rest if config.fsdp == -1 else math.gcd(config.fsdp, rest)
  return make_mesh(MeshConfig(-1, fsdp, tensor), devices)


def arrange(sizes: Sequence[int], devices: Sequence) -> np.ndarray:
  """The devices as an array of these sizes, neighbours close to each other."""
  slices = len({getattr(d, "slice_index", 0) for d in devices})
  # What XLA calls a slice of GPUs is a host; between those, the order will do.
  if slices == 1 or devices[0].platform != "tpu":
    return mesh_utils.create_device_mesh(
      sizes, devices, allow_split_physical_axes=True
    )
  data, *inside = sizes
  if data % slices:
    raise ConfigError(
      "config.mesh.data",
      str(data),
      f"a multiple of {slices}, the number of slices, since fsdp and tensor "
      "stay inside a slice",
      f"set it to {slices} and config.mesh.fsdp to -1",
    )
  return mesh_utils.create_hybrid_device_mesh(
    [data // slices, *inside],
    [slices, 1, 1],
    devices,
    allow_split_physical_axes=True,
  )


def spec(path: str) -> PartitionSpec:
  """The axes of one parameter.

  Raises:
    LookupError: no rule, or more than one, matches the path.
  """
  found = [axes for pattern, axes in RULES if re.search(pattern, path)]
  if len(found) != 1:
    raise LookupError(f"{path}: {len(found)} sharding rules match, expected 1")
  return PartitionSpec(*found[0])


def param_shardings(params: state.Params, mesh: Mesh) -> state.Params:
  """A tree of shardings like `params` (arrays or shapes).

  Raises:
    ConfigError: a dimension does not divide by its mesh axis.
  """
  shardings = {}
  for path, x in state.flatten(params).items():
    axes = spec(path)
    for size, axis in zip(x.shape, axes, strict=True):
      if axis is not None and size % mesh.shape[axis]:
        raise ConfigError(
          f"config.mesh.{axis}",
          str(mesh.shape[axis]),
          f"a divisor of {size}, a dimension of {path} {tuple(x.shape)}",
          "choose a divisor",
        )
    shardings[path] = NamedSharding(mesh, axes)
  return state.unflatten(shardings)


def opt_state_shardings(opt_state, params: state.Params, mesh: Mesh):
  """Shardings for optimiser state: moments lie as their parameters do."""
  flat = state.flatten(params)

  def one(key_path, x):
    path = "/".join(str(k.key) for k in key_path if hasattr(k, "key"))
    for name, param in flat.items():
      if path.endswith(name) and x.shape == param.shape:
        return NamedSharding(mesh, spec(name))
    return replicated(mesh)

  return jax.tree_util.tree_map_with_path(one, opt_state)


def replicated(mesh: Mesh) -> NamedSharding:
  """Everything everywhere."""
  return NamedSharding(mesh, PartitionSpec())


def rows(mesh: Mesh) -> NamedSharding:
  """Axis 0 split over `data` and `fsdp`."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def check_batch(mesh: Mesh, batch_size: int, accumulate: int) -> None:
  """Whether a batch can be split.

  Raises:
    ConfigError: it cannot.
  """
  shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
  if batch_size % (shards * accumulate):
    raise ConfigError(
      "config.data.batch_size",
      str(batch_size),
      f"a multiple of {shards * accumulate} ({shards} shards of the mesh axes "
      f"data x fsdp, times config.training.accumulate {accumulate})",
      "choose a multiple, or fewer shards or micro-batches",
    )


def data_share(mesh: Mesh, batch_size: int) -> tuple[int, int]:
  """Which share of each batch this process loads, and of how many.

  Raises:
    ConfigError: the rows of two processes overlap in part.
  """
  rows_of = collections.defaultdict(set)
  where = rows(mesh).devices_indices_map((batch_size,))
  for device, (index,) in where.items():
    rows_of[device.process_index].add(index.indices(batch_size)[:2])
  return share_of(jax.process_index(), rows_of)


def share_of(
  process: int, rows_of: Mapping[int, Set[tuple[int, int]]]
) -> tuple[int, int]:
  """`data_share`, from the ranges of rows that each process holds.

  Processes that hold the same rows load the same share, as those do that the
  axis `tensor` spans.
  """
  shares = sorted({tuple(sorted(ranges)) for ranges in rows_of.values()})
  ranges = [one for share in shares for one in share]
  if len(ranges) != len(set(ranges)) or len({len(s) for s in shares}) > 1:
    raise ConfigError(
      "config.mesh",
      "rows of a batch that two processes hold in part",
      f"whole shares of the batch for {len(rows_of)} processes",
      "choose data x fsdp as a multiple or a divisor of that number",
    )
  return shares.index(tuple(sorted(rows_of[process]))), len(shares)
