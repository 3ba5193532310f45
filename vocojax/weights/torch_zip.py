"""`.bin` files of torch, read without torch and without running code.

Since torch 1.6 such a file is a zip archive: `data.pkl`, a pickle that says
which tensors there are, and one uncompressed member for each storage. A pickle
can name any function for the reader to call. Here it may name three things,
listed in `_Unpickler.find_class`; anything else is refused before it is even
imported. Read next: `files.py`.
"""

import collections
import io
import pathlib
import pickle
import struct
import zipfile
from typing import NamedTuple

import ml_dtypes
import numpy as np

from vocojax.errors import WeightsError
from vocojax.weights.stored import Stored

_STORAGES = {
  "FloatStorage": np.dtype(np.float32),
  "HalfStorage": np.dtype(np.float16),
  "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
  "DoubleStorage": np.dtype(np.float64),
  "LongStorage": np.dtype(np.int64),
  "IntStorage": np.dtype(np.int32),
  "ByteStorage": np.dtype(np.uint8),
  "BoolStorage": np.dtype(np.bool_),
}
_REMEDY = (
  "load it with torch in a place that you trust and save it as safetensors"
)


# Named tuples, since a pickle can change the attributes of other objects.
class _Storage(NamedTuple):
  offset: int  # of its first byte in the file
  dtype: np.dtype
  size: int  # elements


class _Tensor(NamedTuple):
  offset: int
  dtype: np.dtype
  shape: tuple[int, ...]


def open_zip(path: pathlib.Path) -> dict[str, Stored]:
  """All tensors of a file written by `torch.save(state_dict)`.

  Raises:
    WeightsError: it is no such file, or its pickle asks for anything besides
      tensors.
  """
  if not zipfile.is_zipfile(path):
    raise WeightsError(
      f"{path}: not a zip archive, so damaged or written by torch before 1.6 "
      f"(a plain pickle, which we do not read); {_REMEDY}"
    )
  try:
    with zipfile.ZipFile(path) as archive:
      members = {m.filename.split("/", 1)[-1]: m for m in archive.infolist()}
      if "data.pkl" not in members:
        raise WeightsError(
          f"{path}: a zip archive without data.pkl, expected what torch.save "
          f"writes; {_REMEDY}"
        )
      if "byteorder" in members:
        order = archive.read(members["byteorder"])
        if order != b"little":
          raise WeightsError(
            f"{path}: byte order {order!r}, expected little; {_REMEDY}"
          )
      content = archive.read(members["data.pkl"])
    with open(path, "rb") as f:
      found = _Unpickler(path, f, members, content).load()
  except (
    zipfile.BadZipFile,
    pickle.UnpicklingError,
    struct.error,
    ArithmeticError,
    AttributeError,
    LookupError,
    EOFError,
    TypeError,
    ValueError,
  ) as e:
    reason = " ".join(str(e).split())[:120]
    raise WeightsError(
      f"{path}: cannot be read ({type(e).__name__}: {reason}); {_REMEDY}"
    ) from e
  if not isinstance(found, dict):
    raise WeightsError(
      f"{path}: holds a {type(found).__name__}, expected a dictionary of "
      f"tensors; {_REMEDY}"
    )
  for name, value in dict.items(found):
    if not (isinstance(name, str) and isinstance(value, _Tensor)):
      raise WeightsError(
        f"{path}: {name!r} is a {type(value).__name__}, expected tensors by "
        f"name; {_REMEDY}"
      )
  return {name: Stored(path, *value) for name, value in dict.items(found)}


class _Unpickler(pickle.Unpickler):
  """Knows tensors, their storages and ordered dictionaries."""

  def __init__(self, path, file, members, content):
    super().__init__(io.BytesIO(content))
    self._path, self._file, self._members = path, file, members

  def find_class(self, module: str, name: str):
    if (module, name) == ("collections", "OrderedDict"):
      return collections.OrderedDict
    if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
      return self._rebuild_tensor
    if module == "torch" and name in _STORAGES:
      return _STORAGES[name]
    raise WeightsError(
      f"{self._path}: its pickle asks for {module}.{name}, which is no part of "
      f"a tensor and was not run; {_REMEDY}"
    )

  def persistent_load(self, pid) -> _Storage:
    kind, dtype, key, _, size = pid
    if kind != "storage" or not isinstance(dtype, np.dtype):
      raise pickle.UnpicklingError(f"unknown reference {pid!r}")
    member = self._members[f"data/{key}"]
    if member.compress_type != zipfile.ZIP_STORED:
      raise pickle.UnpicklingError(f"{member.filename} is compressed")
    if member.file_size < size * dtype.itemsize:
      raise pickle.UnpicklingError(f"{member.filename} is cut off")
    # The member's data follows its local header, whose two last lengths differ
    # from those of the archive's directory.
    self._file.seek(member.header_offset + 26)
    name_length, extra_length = struct.unpack("<HH", self._file.read(4))
    start = member.header_offset + 30 + name_length + extra_length
    return _Storage(start, dtype, size)

  def _rebuild_tensor(
    self, storage, offset, shape, strides, requires_grad, hooks, metadata=None
  ) -> _Tensor:
    del requires_grad, hooks, metadata
    if not isinstance(storage, _Storage):
      raise pickle.UnpicklingError("a tensor without storage")
    size = 1
    for n, stride in zip(reversed(shape), reversed(strides), strict=True):
      if n != 1 and stride != size:
        raise pickle.UnpicklingError(
          f"a tensor of shape {tuple(shape)} has strides {tuple(strides)}, "
          "expected a contiguous one"
        )
      size *= n
    if offset < 0 or offset + size > storage.size:
      raise pickle.UnpicklingError("a tensor outside its storage")
    start = storage.offset + offset * storage.dtype.itemsize
    return _Tensor(start, storage.dtype, tuple(shape))
