"""A plan of published weights to files. Read next: `model_files.py`.

Every published tensor is read from the checkpoint's arrays in blocks of rows
and written to its place in a safetensors file, so that memory holds a few
blocks. Works for checkpoints of training as well; of those, a block takes as
much memory as the chunk that it lies in.
"""

import functools
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from jaxtyping import Shaped

from vocojax.core.files import kvstore
from vocojax.errors import CheckpointError, shorten
from vocojax.training import checkpoint
from vocojax.weights import files, hf, model_files, stream
from vocojax.weights.incomplete import complete, require_empty
from vocojax.weights.out_of import Plan, Published

_SHARD_BYTES = 5 * 10**9
_BLOCK_BYTES = 2**26
_CACHE_BYTES = 2**29


class _Arrays:
  """The arrays of a checkpoint, opened."""

  def __init__(self, params: pathlib.Path):
    self._params = params.absolute()
    self._ocdbt = ocp.type_handlers.is_ocdbt_checkpoint(
      epath.Path(self._params)
    )
    self._context = ts.Context(
      {"cache_pool": {"total_bytes_limit": _CACHE_BYTES}}
    )

  @functools.cache  # noqa: B019  (as long as the arrays are needed)
  def open(self, path: str) -> ts.TensorStore:
    name = path.replace("/", ".") + "/"
    folder = kvstore(self._params)
    if self._ocdbt:
      store = {"driver": "ocdbt", "base": folder, "path": name}
    else:
      store = folder | {"path": folder["path"] + name}
    return ts.open(
      {"driver": "zarr", "kvstore": store}, context=self._context
    ).result()


class _Reader:
  """Published tensors, in blocks of rows, from the arrays."""

  def __init__(self, plan: Plan):
    self._plan = plan
    self._arrays = _Arrays(plan.loaded.path / "params")

  def read(
    self, tensor: Published, start: int, stop: int
  ) -> Shaped[np.ndarray, "..."]:
    """Rows of a published tensor.

    Raises:
      CheckpointError: the array is damaged.
    """
    try:
      if tensor.rule.vocabulary:
        x = self._vocabulary(tensor, start, stop)
      else:
        x = self._block(tensor, start, stop)
    except ValueError as e:  # of TensorStore
      raise CheckpointError(
        f"{self._plan.loaded.path}: {tensor.path}",
        shorten(str(e), 200),
        "an array that can be read",
        "use another step, or copy this one again",
      ) from e
    return np.ascontiguousarray(x, tensor.dtype)

  def _block(self, tensor: Published, start: int, stop: int):
    """Rows as ours are numbered."""
    array = self._arrays.open(tensor.path)
    if tensor.layer is not None:
      array = array[tensor.layer]
    rule = tensor.rule
    if rule.transform == "copy":
      return np.asarray(array[start:stop].read().result())
    x = np.ascontiguousarray(array[:, start:stop].read().result())
    patch_size = self._plan.model.vision.patch_size
    return hf.to_published(x, rule.transform, patch_size)

  def _vocabulary(self, tensor: Published, start: int, stop: int):
    source = self._plan.rows.source
    blocks, i = [], start
    while i < stop:
      j = i + 1
      while j < stop and source[j] == source[j - 1] + 1 and source[i] >= 0:
        j += 1
      if source[i] < 0:
        blocks.append(self._mean(tensor)[None])
      else:
        blocks.append(self._block(tensor, source[i], source[i] + j - i))
      i = j
    return np.concatenate(blocks)

  @functools.cache  # noqa: B019
  def _mean(self, tensor: Published) -> np.ndarray:
    """For rows of tokens that we do not have: as likely as the average."""
    n = self._plan.rows.num_text
    total = np.zeros(tensor.shape[1], np.float64)
    step = max(1, _BLOCK_BYTES // (8 * tensor.shape[1]))
    for i in range(0, n, step):
      block = self._block(tensor, i, min(n, i + step))
      total += block.astype(np.float64).sum(0)
    dtype = self._arrays.open(tensor.path).dtype.numpy_dtype
    return (total / n).astype(dtype)


def write(plan: Plan, out: pathlib.Path) -> None:
  """Writes the model's folder, complete or not at all.

  Raises:
    WeightsError: OUT is not empty, or cannot be written.
    CheckpointError: the checkpoint is damaged.
    KeyboardInterrupt: Ctrl-C; nothing is left.
  """
  require_empty(out)
  reader = _Reader(plan)
  with complete(out, beside=out) as temporary:
    model_files.write(plan, temporary)
    offsets = _write_headers(plan.tensors, temporary)
    # In the order of the arrays, so that what was read serves all layers.
    tensors = sorted(plan.tensors, key=lambda t: (t.path, t.layer))
    jobs = (
      functools.partial(_write_block, reader, tensor, *offsets[tensor.name], *b)
      for tensor in tensors
      for b in _blocks(tensor)
    )
    with checkpoint.checked(plan.loaded.path, plan.loaded.step, ("params",)):
      stream.run_jobs(jobs, plan.nbytes, f"writing {out}")


def _blocks(tensor: Published) -> Iterator[tuple[int, int]]:
  rows = tensor.shape[0]
  step = max(1, _BLOCK_BYTES * rows // max(1, tensor.nbytes))
  for start in range(0, rows, step):
    yield start, min(rows, start + step)


def _write_block(reader, tensor, path, offset, start, stop) -> int:
  x = reader.read(tensor, start, stop)
  offset += start * tensor.nbytes // tensor.shape[0]
  stream.write_at(path, offset, x)
  return x.nbytes


def _write_headers(
  tensors: Sequence[Published], folder: pathlib.Path
) -> dict[str, tuple[pathlib.Path, int]]:
  """Files with room for the tensors, and where in them each one goes."""
  shards: list[list[Published]] = [[]]
  size = 0
  for tensor in tensors:
    if shards[-1] and size + tensor.nbytes > _SHARD_BYTES:
      shards.append([])
      size = 0
    shards[-1].append(tensor)
    size += tensor.nbytes
  places: dict[str, tuple[pathlib.Path, int]] = {}
  names = ["model.safetensors"]
  if len(shards) > 1:
    count = len(shards)
    names = [
      f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)
    ]
    index = {
      "metadata": {"total_size": sum(t.nbytes for t in tensors)},
      "weight_map": {
        t.name: name
        for name, shard in zip(names, shards, strict=True)
        for t in shard
      },
    }
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(index, indent=2) + "\n")
  for name, shard in zip(names, shards, strict=True):
    places |= _write_header(folder / name, shard)
  return places


def _write_header(path: pathlib.Path, tensors: Sequence[Published]):
  spelled = {dtype: name for name, dtype in files.DTYPES.items()}
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  offset = 0
  for t in tensors:
    header[t.name] = {
      "dtype": spelled[t.dtype],
      "shape": t.shape,
      "data_offsets": [offset, offset + t.nbytes],
    }
    offset += t.nbytes
  content = json.dumps(header).encode()
  content += b" " * (-len(content) % 8)
  with open(path, "wb") as f:
    f.write(len(content).to_bytes(8, "little") + content)
    start = f.tell()
    os.truncate(f.fileno(), start + offset)
  return {
    t.name: (path, start + header[t.name]["data_offsets"][0]) for t in tensors
  }
