"""A plan's parameters to a checkpoint or to devices, piece by piece.

A checkpoint is Orbax's: arrays in zarr format, plus metadata. Orbax is given
the shapes and writes the metadata; the chunks are written here, each as soon as
it is read, so that memory holds a few of them and never a whole array. They are
not compressed, since weights hardly shrink. Read next: `into.py`.
"""

import collections
import concurrent.futures
import errno
import functools
import itertools
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
import tqdm

from vocojax.core.orbax_calls import orbax_call
from vocojax.training import checkpoint, checksums, state
from vocojax.weights.incomplete import complete, require_empty
from vocojax.weights.into import Plan
from vocojax.weights.leaves import Box, Leaf

ORIGIN = "origin"  # item with what the way back must know
_CHUNK_BYTES = 2**26
_WORKERS = min(4, os.cpu_count() or 1)


def write_checkpoint(plan: Plan, out: pathlib.Path) -> None:
  """Writes OUT/checkpoints/0, complete or not at all.

  Raises:
    WeightsError: there is a checkpoint already, or it cannot be written.
    KeyboardInterrupt: Ctrl-C; nothing is left.
  """
  folder = out / checkpoint.FOLDER
  require_empty(folder)
  with complete(folder / "0", beside=out) as temporary:
    _write_metadata(plan, temporary)
    jobs = (
      functools.partial(_write_chunk, temporary / "params", leaf, key, box)
      for leaf in plan.leaves
      for key, box in _chunks(leaf)
    )
    run_jobs(jobs, plan.nbytes, f"writing {out}")
    checksums.write(temporary, 0)


def load(plan: Plan, abstract: state.Params) -> tuple[state.Params, list[str]]:
  """The plan's parameters on devices, each device reading what it holds.

  Args:
    plan: where they come from.
    abstract: shapes, dtypes and shardings, as `loop.abstract_params` gives.

  Returns:
    Those of `abstract` that the plan has, and the paths of the others.
  """
  targets = state.flatten(abstract)
  loaded = {}
  for leaf in plan.leaves:
    if leaf.path not in targets:
      continue
    to = targets[leaf.path]

    def read(index, leaf=leaf, to=to):
      return leaf.read(_box(index, leaf.shape)).astype(to.dtype)

    loaded[leaf.path] = jax.make_array_from_callback(
      leaf.shape, to.sharding, read
    )
  return state.unflatten(loaded), missing(plan, abstract)


def missing(plan: Plan, abstract: state.Params) -> list[str]:
  """Paths of `abstract` that a plan has no parameter for."""
  return sorted(
    state.flatten(abstract).keys() - {leaf.path for leaf in plan.leaves}
  )


def _box(index, shape: tuple[int, ...]) -> Box:
  return tuple(
    slice(*i.indices(n)[:2]) for i, n in zip(index, shape, strict=True)
  )


def run_jobs(
  jobs: Iterable[Callable[[], int]], nbytes: int, title: str
) -> None:
  """Runs jobs in threads, a few ahead, and shows the bytes they return."""
  bar = tqdm.tqdm(
    desc=title, total=nbytes, unit="B", unit_scale=True, disable=None
  )
  pool = concurrent.futures.ThreadPoolExecutor(_WORKERS)
  waiting: collections.deque[concurrent.futures.Future[int]]
  waiting = collections.deque()
  jobs = iter(jobs)
  try:
    with bar:
      while True:
        for job in itertools.islice(jobs, 2 * _WORKERS - len(waiting)):
          waiting.append(pool.submit(job))
        if not waiting:
          break
        bar.update(waiting.popleft().result())
  finally:
    pool.shutdown(cancel_futures=True)


class _ShapesOnly(ocp.type_handlers.NumpyHandler):
  """Creates arrays without content; the rest of a checkpoint is Orbax's."""

  async def serialize(self, values, infos, args=None):
    del args
    for leaf, info in zip(values, infos, strict=True):
      await ts.open(
        {
          "driver": "zarr",
          "kvstore": {"driver": "file", "path": f"{info.path}/"},
          "metadata": {
            "shape": leaf.shape,
            "chunks": _chunk_shape(leaf),
            "dtype": leaf.dtype.name
            if leaf.dtype.name == "bfloat16"
            else leaf.dtype.str,
            "order": "C",
            "compressor": None,
          },
        },
        create=True,
      )
    return []


def _write_metadata(plan: Plan, folder: pathlib.Path) -> None:
  """Everything but the chunks."""
  registry = ocp.type_handlers.create_type_handler_registry(
    (Leaf, _ShapesOnly())
  )
  handler = ocp.PyTreeCheckpointHandler(
    use_ocdbt=False, type_handler_registry=registry
  )
  tree = state.unflatten({leaf.path: leaf for leaf in plan.leaves})
  try:
    with orbax_call():
      with ocp.Checkpointer(handler) as writer:
        writer.save(folder / "params", args=ocp.args.PyTreeSave(tree))
      checkpoint.write_settings(folder, plan.config, plan.tokenizer)
      checkpoint.write_json(folder, ORIGIN, plan.origin)
  except ValueError as e:  # what TensorStore makes of an OSError
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    code = next((c for c in codes if os.strerror(c) in str(e)), 0)
    raise OSError(code, " ".join(str(e).split())[:200]) from e


def _chunk_shape(leaf: Leaf) -> tuple[int, ...]:
  """Some whole layers, or a part of the rows of one, within _CHUNK_BYTES."""
  shape = list(leaf.shape)
  if leaf.stacked:
    layer = leaf.nbytes // shape[0]
    shape[0] = min(shape[0], max(1, _CHUNK_BYTES // max(1, layer)))
  nbytes = math.prod(shape) * leaf.dtype.itemsize
  parts = -(-nbytes // _CHUNK_BYTES)
  shape[leaf.row_axis] = -(-shape[leaf.row_axis] // parts)
  return tuple(shape)


def _chunks(leaf: Leaf) -> Iterator[tuple[str, Box]]:
  """Name and place of every chunk of an array."""
  chunk = _chunk_shape(leaf)
  counts = [-(-n // c) for n, c in zip(leaf.shape, chunk, strict=True)]
  for index in itertools.product(*map(range, counts)):
    box = tuple(
      slice(i * c, min(n, (i + 1) * c))
      for i, c, n in zip(index, chunk, leaf.shape, strict=True)
    )
    yield ".".join(map(str, index)), box


def _write_chunk(params: pathlib.Path, leaf: Leaf, key: str, box: Box) -> int:
  """Writes one chunk and returns how many bytes of the array it holds."""
  x = leaf.read(box)
  full = _chunk_shape(leaf)
  nbytes = x.nbytes
  if x.shape != full:  # at the end of an axis; zarr's chunks are all alike
    pad = [(0, n - m) for n, m in zip(full, x.shape, strict=True)]
    x = np.pad(x, pad)
  path = params / leaf.path.replace("/", ".") / key
  path.touch()
  write_at(path, 0, x)
  return nbytes


def write_at(path: pathlib.Path, offset: int, x: np.ndarray) -> None:
  """Writes a contiguous array to its place in a file that exists."""
  view: Any = x.reshape(-1).view(np.uint8).data
  with open(path, "r+b", buffering=0) as f:
    f.seek(offset)
    while view:
      view = view[f.write(view) :]
