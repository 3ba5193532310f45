"""Tensors of weight files, found by name and mapped, not loaded. Next: hf.py.

Reads safetensors and, through torch_zip.py, `.bin`; in one file, or in shards
with an index. Nothing of a tensor is read before `Stored.rows` is called.
"""

import collections
import json
import pathlib

import ml_dtypes
import numpy as np

from vocojax.errors import WeightsError
from vocojax.weights import torch_zip
from vocojax.weights.stored import Stored

# Where a model folder keeps its weights; the first that is there counts.
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLES = ("model.safetensors", "pytorch_model.bin")

# safetensors' names; the integers only occur in tensors that are ignored.
DTYPES = {
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F16": np.dtype(np.float16),
  "F32": np.dtype(np.float32),
  "F64": np.dtype(np.float64),
  "I64": np.dtype(np.int64),
  "I32": np.dtype(np.int32),
  "U8": np.dtype(np.uint8),
  "BOOL": np.dtype(np.bool_),
}
_REMEDY = "download the file again"


def open_folder(folder: pathlib.Path) -> dict[str, Stored]:
  """All tensors of a model folder, by name.

  Raises:
    WeightsError: there are none, a shard is missing, the index and the shards
      disagree, or a file cannot be read.
  """
  for name in _INDICES:
    if (folder / name).is_file():
      return _open_shards(folder / name)
  for name in _SINGLES:
    if (folder / name).is_file():
      return open_file(folder / name)
  raise WeightsError(
    f"{folder}: no weights, expected one of {', '.join(_SINGLES + _INDICES)}; "
    "name the folder of a Hugging Face model"
  )


def open_file(path: pathlib.Path) -> dict[str, Stored]:
  """All tensors of a `.safetensors` or `.bin` file, by name.

  Raises:
    WeightsError: it is missing, damaged or holds something else.
  """
  if not path.is_file():
    raise WeightsError(f"{path}: no such file; {_REMEDY}")
  if path.suffix == ".safetensors":
    return _open_safetensors(path)
  return torch_zip.open_zip(path)


def _open_shards(index: pathlib.Path) -> dict[str, Stored]:
  try:
    shard_of = json.loads(index.read_text())["weight_map"]
  except (ValueError, KeyError, UnicodeDecodeError) as e:
    raise WeightsError(
      f"{index}: not an index, expected JSON with 'weight_map'; {_REMEDY}"
    ) from e
  tensors: dict[str, Stored] = {}
  for shard in sorted(set(shard_of.values())):
    path = index.parent / shard
    if not path.is_file():
      named = collections.Counter(shard_of.values())[shard]
      raise WeightsError(
        f"{path}: missing shard, {index.name} puts {named} tensors in it; "
        "download it, too"
      )
    for name, tensor in open_file(path).items():
      if name in tensors:
        raise WeightsError(
          f"{name}: in {tensors[name].path.name} and {shard}, expected in one "
          f"of them; {_REMEDY}"
        )
      tensors[name] = tensor
  for name, shard in shard_of.items():
    if name not in tensors or tensors[name].path.name != shard:
      raise WeightsError(
        f"{name}: {index.name} puts it in {shard}, which does not hold it; "
        "download index and shards of the same version"
      )
  for name in tensors.keys() - shard_of.keys():
    raise WeightsError(
      f"{name}: in {tensors[name].path.name}, but not in {index.name}; "
      "download index and shards of the same version"
    )
  return tensors


def _open_safetensors(path: pathlib.Path) -> dict[str, Stored]:
  size = path.stat().st_size
  with open(path, "rb") as f:
    length = int.from_bytes(f.read(8), "little")
    header = f.read(length) if 8 + length <= size else b""
  try:
    entries = json.loads(header, object_pairs_hook=_unique)
    entries.pop("__metadata__", None)
    tensors = {
      name: _entry(path, 8 + length, entry) for name, entry in entries.items()
    }
  except (ValueError, KeyError, TypeError, AttributeError) as e:
    raise WeightsError(
      f"{path}: no safetensors header ({' '.join(str(e).split())[:80]}); "
      f"{_REMEDY}"
    ) from e
  end = max((t.offset + t.nbytes for t in tensors.values()), default=0)
  if end > size:
    raise WeightsError(
      f"{path}: cut off, found {size} bytes, its header promises {end}; "
      f"{_REMEDY}"
    )
  return tensors


def _entry(path: pathlib.Path, start: int, entry: dict) -> Stored:
  begin, end = entry["data_offsets"]
  if entry["dtype"] not in DTYPES:
    raise ValueError(f"dtype {entry['dtype']} is not one we read")
  tensor = Stored(
    path, start + begin, DTYPES[entry["dtype"]], tuple(entry["shape"])
  )
  if begin < 0 or tensor.nbytes != end - begin:
    raise ValueError(f"{end - begin} bytes for shape {tensor.shape}")
  return tensor


def _unique(pairs: list[tuple[str, object]]) -> dict:
  found: dict[str, object] = {}
  for name, value in pairs:
    if name in found:
      raise ValueError(f"{name} twice")
    found[name] = value
  return found
