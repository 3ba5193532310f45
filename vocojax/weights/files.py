"""Tensors of weight files, found by name and mapped, not loaded. Next: hf.py.

Reads safetensors and, through torch_zip.py, `.bin`; in one file, or in shards
with an index. Nothing of a tensor is read before `Stored.rows` is called.
"""

import collections
import math
import os
import pathlib
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from vocojax.core import files
from vocojax.errors import WeightsError, shorten
from vocojax.weights import torch_zip
from vocojax.weights.stored import Stored, is_shape

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
_DOWNLOAD = "download the file again"
_SAME_VERSION = "download index and shards of the same version"
# Of JSON that describes tensors: room for a hundred thousand of them.
_JSON_BYTES = 2**24
# What git has in place of a file that git-lfs has not fetched.
_POINTER = b"version https://git-lfs"
# Files of models in other formats, and what helps.
_OTHERS = {
  "adapter_config.json": (
    "a LoRA adapter",
    "merge it into its base model (merge_and_unload of peft), and name that",
  ),
  "mm_projector.bin": (
    "a projector alone",
    "name it with --projector, and with --llm the model it belongs to",
  ),
  "*.gguf": ("GGUF files", "use the model that they were made from"),
  "consolidated*.pth": (
    "weights as Meta has them",
    "convert them to the Hugging Face format with transformers",
  ),
}


def open_folder(folder: pathlib.Path) -> dict[str, Stored]:
  """All tensors of a model folder, by name.

  Raises:
    WeightsError: there are none, a shard is missing, the index and the shards
      disagree, or a file cannot be read.
  """
  for name in _INDICES:
    if (folder / name).exists():
      return _open_shards(folder / name)
  for name in _SINGLES:
    if (folder / name).exists():
      return open_file(folder / name)
  got, fix = other_format(folder) or (
    "no weights",
    "name the folder of a Hugging Face model",
  )
  raise WeightsError(folder, got, " or ".join(_SINGLES + _INDICES), fix)


def other_format(folder: pathlib.Path) -> tuple[str, str] | None:
  """What a folder holds that is no whole model, and the remedy."""
  found = (v for pattern, v in _OTHERS.items() if any(folder.glob(pattern)))
  return next(found, None)


def open_file(path: pathlib.Path) -> dict[str, Stored]:
  """All tensors of a `.safetensors` or `.bin` file, by name.

  Raises:
    WeightsError: it is missing, damaged or holds something else.
  """
  with files.open_regular(path, WeightsError) as file:
    if file.read(len(_POINTER)) == _POINTER:
      raise WeightsError(
        path, "a pointer of git-lfs", "the file itself", "run `git lfs pull`"
      )
    file.seek(0)
    if path.suffix == ".safetensors":
      return _read_safetensors(path, file)
    return torch_zip.read_zip(path, file)


def _open_shards(index: pathlib.Path) -> dict[str, Stored]:
  values = files.read_json(index, dict, WeightsError, _JSON_BYTES)
  shard_of = files.get_field(values, "weight_map", dict, index, WeightsError)
  for name, shard in shard_of.items():
    where = _at(index, name)
    files.check_kind(shard, where, str, WeightsError)
    files.file_name(shard, where, WeightsError)
  tensors: dict[str, Stored] = {}
  for shard, count in sorted(collections.Counter(shard_of.values()).items()):
    path = index.parent / shard
    if not path.exists():
      raise WeightsError(
        path,
        "no such file",
        f"a shard with {count} tensors, as {index.name} says",
        "download it, too",
      )
    for name, tensor in open_file(path).items():
      if name in tensors:
        raise WeightsError(
          _at(path, name),
          f"a tensor that {tensors[name].path.name} has, too",
          "each tensor in one shard",
          _SAME_VERSION,
        )
      tensors[name] = tensor
  for name, shard in shard_of.items():
    if name not in tensors or tensors[name].path.name != shard:
      raise WeightsError(
        _at(index, name),
        f"{shard}, which has no such tensor",
        "the shard that has it",
        _SAME_VERSION,
      )
  for name in tensors.keys() - shard_of.keys():
    raise WeightsError(
      _at(tensors[name].path, name),
      f"a tensor that {index.name} does not list",
      "one that it lists",
      _SAME_VERSION,
    )
  return tensors


def _at(path: pathlib.Path, name: str) -> str:
  """Where a tensor is; damaged files have names of megabytes."""
  return f"{path}: {name[:200]}"


def _read_safetensors(path: pathlib.Path, file: BinaryIO) -> dict[str, Stored]:
  """The tensors that the header lists, which lie side by side to the end."""
  size = os.fstat(file.fileno()).st_size
  length = int.from_bytes(file.read(8), "little")
  most = min(size - 8, _JSON_BYTES)
  if length > most:
    raise WeightsError(
      path,
      f"a header of {length:,} bytes" if size > 8 else f"{size} bytes",
      f"a safetensors header of at most {max(most, 0):,}",
      _DOWNLOAD,
    )
  where = f"{path}: header"
  entries = files.parse_json(file.read(length), where, dict, WeightsError)
  entries.pop("__metadata__", None)
  tensors = {
    name: _read_entry(path, 8 + length, name, entry)
    for name, entry in entries.items()
  }
  start = end = 8 + length
  # Empty tensors come first of those at one place.
  for name, tensor in sorted(
    tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)
  ):
    if tensor.offset != end:
      raise WeightsError(
        _at(path, name),
        f"data_offsets from {tensor.offset - start:,} on",
        f"from {end - start:,} on, where the tensor before it ends",
        _DOWNLOAD,
      )
    end += tensor.nbytes
  if end != size:
    raise WeightsError(
      path, f"{size:,} bytes", f"{end:,}, as its header says", _DOWNLOAD
    )
  return tensors


def _read_entry(
  path: pathlib.Path, start: int, name: str, entry: Any
) -> Stored:
  where = _at(path, name)
  files.check_kind(entry, where, dict, WeightsError)
  spelled = files.get_field(entry, "dtype", str, where, WeightsError)
  shape: list[Any]
  offsets: list[Any]
  shape, offsets = (
    files.get_field(entry, key, list, where, WeightsError)
    for key in ("shape", "data_offsets")
  )
  if spelled not in DTYPES:
    raise WeightsError(
      where,
      f"numbers of type {shorten(spelled)}",
      "BF16, F16 or F32",
      "use the model before it was quantised",
    )
  if not is_shape(shape) or len(offsets) != 2 or not is_shape(offsets):
    raise WeightsError(
      where,
      f"shape {shorten(shape)} and data_offsets {shorten(offsets)}",
      "sizes and two places",
      _DOWNLOAD,
    )
  begin, end = offsets
  dtype = DTYPES[spelled]
  nbytes = math.prod(shape) * dtype.itemsize
  if end - begin != nbytes:
    raise WeightsError(
      where,
      f"{end - begin:,} bytes",
      f"{nbytes:,} for shape {shorten(shape)} and type {spelled}",
      _DOWNLOAD,
    )
  if begin % dtype.itemsize:
    raise WeightsError(
      where,
      f"offset {begin:,}",
      f"a multiple of {dtype.itemsize}, the size of a number",
      "save the file again with safetensors",
    )
  return Stored(path, start + begin, dtype, tuple(shape))
