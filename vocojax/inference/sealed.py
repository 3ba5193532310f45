"""Named arrays with a header and a checksum, as bytes. Read next: cache.py.

A safetensors file, which other tools can read. The same content always has the
same bytes, and no flipped bit goes unnoticed, in the arrays or before them.
"""

import hashlib
import json
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

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


def loads(data: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """What was given to `dumps`; the arrays cannot be written to.

  Raises:
    ValueError: the bytes are not as `dumps` made them.
  """
  try:
    tensors = safetensors.deserialize(data)
    size = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + size])["__metadata__"]
    header = json.loads(metadata[_HEADER])
    digest = header.pop("sha256")
    arrays = {name: _array(tensor) for name, tensor in tensors}
  # What is foreign or damaged lacks keys, or has values of any kind.
  except (
    *(safetensors.SafetensorError, AttributeError, LookupError),
    *(TypeError, ValueError),
  ) as e:
    raise ValueError(one_line(e)) from e
  if _digest(header, arrays) != digest:
    raise ValueError("its checksum differs")
  return header, arrays


def one_line(e: Exception) -> str:
  """An error in at most 200 characters."""
  text = " ".join(str(e).split())
  return (text if type(e) is ValueError else f"{type(e).__name__}: {text}")[
    :200
  ]


def _array(tensor: dict[str, Any]) -> np.ndarray:
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
