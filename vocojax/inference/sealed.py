"""Named arrays with a header and a checksum, as bytes. Read next: cache.py.

A safetensors file, which other tools can read. The same content always has the
same bytes, and no flipped bit goes unnoticed, in the arrays or before them.
"""

import hashlib
import json
from typing import Any, TypeVar

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from vocojax.core import files
from vocojax.errors import CacheError

T = TypeVar("T")

# The only key in the metadata of safetensors, which would shuffle several.
_HEADER = "vocojax"
_DTYPES = {
  "F32": np.dtype(np.float32),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F16": np.dtype(np.float16),
  "I8": np.dtype(np.int8),
}


def dumps(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> bytes:
  """Header and arrays as bytes.

  Args:
    header: what JSON can hold.
    arrays: float32, bfloat16, float16 or int8, in C order.
  """
  sealed = header | {"sha256": _digest(header, arrays)}
  return safetensors.numpy.save(arrays, {_HEADER: json.dumps(sealed)})


def loads(
  data: bytes, where: str
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """What was given to `dumps`; the arrays cannot be written to.

  Args:
    data: the bytes.
    where: names their place in the error.

  Raises:
    CacheError: the bytes are not as `dumps` made them.
  """
  try:
    tensors = safetensors.deserialize(data)
    size = int.from_bytes(data[:8], "little")
    top = files.parse_json(data[8 : 8 + size], where, dict, CacheError)
    metadata = _field(top, "__metadata__", dict, where)
    text = _field(metadata, _HEADER, str, where)
    header = files.parse_json(text, where, dict, CacheError)
    digest = _field(header, "sha256", str, where)
    del header["sha256"]
    arrays = {name: _array(tensor) for name, tensor in tensors}
    if _digest(header, arrays) != digest:
      raise ValueError("another checksum")
  # A header may be nested as deep as can just be read, but not written.
  except (safetensors.SafetensorError, ValueError, RecursionError) as e:
    raise CacheError(
      where, str(e)[:200], "what was written", "write it again"
    ) from e
  return header, arrays


def _field(values: dict, key: str, kind: type[T], where: str) -> T:
  return files.get_field(values, key, kind, where, CacheError)


def _array(tensor: dict[str, Any]) -> np.ndarray:
  if tensor["dtype"] not in _DTYPES:
    raise ValueError(f"numbers of type {tensor['dtype']}")
  dtype = _DTYPES[tensor["dtype"]]
  x = np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"])
  x.flags.writeable = False
  return x


def _digest(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> str:
  digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
  for name in sorted(arrays):
    x = arrays[name]
    digest.update(f"{name} {x.dtype} {x.shape}".encode())
    digest.update(x.view(np.uint8).data)
  return digest.hexdigest()
