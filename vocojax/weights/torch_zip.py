"""`.bin` files of torch, read without torch and without running code.

Since torch 1.6 such a file is a zip archive: `data.pkl`, a pickle that says
which tensors there are, and one uncompressed member for each storage. A pickle
is a program for a machine with a stack: it can call any function, and a few
bytes of it can make gigabytes. So nothing is unpickled here. `_Machine` knows
the opcodes and names that a dictionary of tensors needs, and what it builds is
about as large as the pickle. Read next: `files.py`.
"""

import pathlib
import pickle
import pickletools
import struct
import zipfile
import zlib
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from vocojax.errors import WeightsError, shorten
from vocojax.weights.stored import Stored, is_shape

# Room for ten thousand tensors. A byte may become a hundred in memory.
_DIRECTORY_BYTES = 2**22
_PICKLE_BYTES = 2**21

_TYPES = {
  "torch.FloatStorage": np.dtype(np.float32),
  "torch.HalfStorage": np.dtype(np.float16),
  "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
  "torch.DoubleStorage": np.dtype(np.float64),
  "torch.LongStorage": np.dtype(np.int64),
  "torch.IntStorage": np.dtype(np.int32),
  "torch.ByteStorage": np.dtype(np.uint8),
  "torch.BoolStorage": np.dtype(np.bool_),
}
# What zipfile raises for what is none.
_NO_ARCHIVE = (
  zipfile.BadZipFile,
  struct.error,
  OSError,
  OverflowError,
  RuntimeError,
  ValueError,
)
_DICTIONARY = "collections.OrderedDict"
_TENSOR = "torch._utils._rebuild_tensor_v2"

_DOWNLOAD = "download the file again"
_SAVE = (
  "load it with torch in a place that you trust and save it as safetensors"
)


class _Member(NamedTuple):
  """A member of the archive: the place of its content in the file."""

  offset: int
  size: int
  crc: int


class _Function(NamedTuple):
  name: str


class _Storage(NamedTuple):
  offset: int  # of its first byte in the file
  dtype: np.dtype
  size: int  # elements


class _Tensor(NamedTuple):
  offset: int
  dtype: np.dtype
  shape: tuple[int, ...]


class _Refused(Exception):
  """What was got and expected in an archive or its pickle."""

  def __init__(self, got: str, expected: str):
    super().__init__(got, expected)
    self.got, self.expected = got, expected


def read_zip(path: pathlib.Path, file: BinaryIO) -> dict[str, Stored]:
  """All tensors of a file written by `torch.save(state_dict)`.

  Args:
    path: of the file.
    file: the same, open.

  Raises:
    WeightsError: it is no such file, or its pickle asks for anything besides
      tensors.
  """
  where, fix = str(path), _DOWNLOAD
  try:
    members = _members(file)
    content = _content(file, members)
    where, fix = f"{path}: its pickle", _SAVE
    tensors = _Machine(members).run(content)
  except _Refused as e:
    raise WeightsError(where, e.got, e.expected, fix) from e
  except _NO_ARCHIVE as e:
    file.seek(0)
    start = file.read(2)
    if start == b"PK":
      got = "a damaged or incomplete zip archive"
    elif start[:1] == b"\x80":
      got, fix = "a plain pickle, as of torch before 1.6", _SAVE
    else:
      got = f"a file that starts with {start!r}"
    raise WeightsError(path, got, "a zip archive of torch.save", fix) from e
  return {name: Stored(path, *tensor) for name, tensor in tensors.items()}


class _Bounded:
  """A file for `zipfile`, which reads an archive's directory whole."""

  def __init__(self, file: BinaryIO):
    self.seek, self.tell, self._read = file.seek, file.tell, file.read

  def read(self, size: int = -1) -> bytes:
    if size > _DIRECTORY_BYTES:
      raise _Refused(
        f"a directory of {size:,} bytes", f"at most {_DIRECTORY_BYTES:,}"
      )
    return self._read(size)


def _members(file: BinaryIO) -> dict[str, _Member]:
  """The archive's members, without the folder that all of them are in.

  Raises:
    _Refused: two have one name or share bytes, or one is not there as it is.
    _NO_ARCHIVE: it is no archive.
  """
  bounded: Any = _Bounded(file)
  archive = zipfile.ZipFile(bounded)
  found: dict[str, _Member] = {}
  folders, end = set(), 0
  for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
    folder, _, name = info.filename.partition("/")
    what = f"the member {shorten(info.filename)}"
    folders.add(folder)
    if name in found or len(folders) > 1:
      raise _Refused(
        f"{what} besides another {shorten(name)}"
        if name in found
        else f"{what} in a folder of its own",
        "one folder with one member of each name",
      )
    if info.header_offset < end:
      raise _Refused(f"{what} inside another", "members that share no bytes")
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
      raise _Refused(f"{what}, compressed or encrypted", "plain members")
    start = _content_offset(file, info, what)
    end = start + info.file_size
    if end > archive.start_dir:
      raise _Refused(f"{what} of {info.file_size:,} bytes", "those in the file")
    found[name] = _Member(start, info.file_size, info.CRC)
  return found


def _content_offset(file: BinaryIO, info: zipfile.ZipInfo, what: str) -> int:
  """Where the content of a member is, from the header before it."""
  file.seek(info.header_offset)
  signature, name_length, extra_length = struct.unpack(
    "<4s22xHH", file.read(30)
  )
  name = file.read(name_length)
  encoding = "utf-8" if info.flag_bits & 0x800 else "cp437"
  if signature != b"PK\3\4" or name.decode(encoding) != info.orig_filename:
    raise _Refused(f"{what} under another name in its place", "one name")
  return file.tell() + extra_length


def _content(file: BinaryIO, members: dict[str, _Member]) -> bytes:
  """data.pkl, if its bytes and those of the numbers are in the right order."""
  order = _read(file, members, "byteorder", 16, default=b"little")
  if order != b"little":
    raise _Refused(f"byte order {order!r}", "little")
  return _read(file, members, "data.pkl", _PICKLE_BYTES)


def _read(file: BinaryIO, members, name: str, limit: int, default=None):
  if name not in members:
    if default is None:
      raise _Refused(f"a zip archive without {name}", "one of torch.save")
    return default
  member = members[name]
  if member.size > limit:
    raise _Refused(f"{name} of {member.size:,} bytes", f"at most {limit:,}")
  file.seek(member.offset)
  content = file.read(member.size)
  if zlib.crc32(content) != member.crc:
    raise _Refused(f"{name} with a wrong checksum", "the one in the archive")
  return content


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_CONSTANTS |= {"EMPTY_TUPLE": ()}
_ARGUMENTS = ("BINUNICODE", "SHORT_BINUNICODE", "BINFLOAT")
_ARGUMENTS += ("BININT", "BININT1", "BININT2", "LONG1")


class _Machine:
  """Runs the part of pickle's language that dictionaries of tensors need.

  On its stack are texts, numbers, tuples, lists, dictionaries with texts as
  keys, types of numbers, and the named tuples above. The time and memory of an
  opcode are bounded by its length and by what it takes from the stack. Tuples
  may share their parts, so that one of a few bytes would take for ever to be
  compared, hashed or printed: none is.
  """

  def __init__(self, members: dict[str, _Member]):
    # By the bare key: a long one is not to be copied for each look-up.
    self._storages = {
      name.removeprefix("data/"): member
      for name, member in members.items()
      if name.startswith("data/")
    }
    self._stack: list[Any] = []
    self._marks: list[int] = []
    self._memo: dict[int, Any] = {}

  def run(self, content: bytes) -> dict[str, _Tensor]:
    """The dictionary of tensors that a pickle describes.

    Raises:
      _Refused: it describes something else.
    """
    end = 0
    try:
      for opcode, argument, position in pickletools.genops(content):
        if opcode.name == "STOP":
          end = (position or 0) + 1
        else:
          self._do(opcode.name, argument)
    except (ValueError, LookupError, OverflowError) as e:
      raise _Refused(
        f"damage ({shorten(str(e))})", "a pickle of tensors"
      ) from e
    if end != len(content) or len(self._stack) != 1:
      raise _Refused("another number of values than one", "one dictionary")
    found = self._stack[0]
    if not isinstance(found, dict):
      raise _Refused(f"a {type(found).__name__}", "a dictionary of tensors")
    for name, value in found.items():
      if not isinstance(value, _Tensor):
        raise _Refused(
          f"a {type(value).__name__} named {shorten(name)}",
          "a tensor for each name",
        )
    return found

  def _do(self, name: str, argument: Any) -> None:
    stack = self._stack
    if name in _CONSTANTS:
      stack.append(_CONSTANTS[name])
    elif name in _ARGUMENTS:
      stack.append(argument)
    elif name == "EMPTY_DICT":
      stack.append({})
    elif name == "EMPTY_LIST":
      stack.append([])
    elif name == "MARK":
      self._marks.append(len(stack))
    elif name == "TUPLE":
      stack.append(tuple(self._after_mark()))
    elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
      stack.append(tuple(self._pop(int(name[-1]))))
    elif name in ("BINPUT", "LONG_BINPUT"):
      self._memo[argument] = stack[-1]
    elif name == "MEMOIZE":
      self._memo[len(self._memo)] = stack[-1]
    elif name in ("BINGET", "LONG_BINGET"):
      stack.append(self._memo[argument])
    elif name in ("APPEND", "APPENDS"):
      values = self._pop(1) if name == "APPEND" else self._after_mark()
      self._changed(list).extend(values)
    elif name in ("SETITEM", "SETITEMS"):
      values = self._pop(2) if name == "SETITEM" else self._after_mark()
      self._set_items(self._changed(dict), values)
    elif name == "GLOBAL":
      stack.append(_named(*argument.split(" ")))
    elif name == "STACK_GLOBAL":
      stack.append(_named(*self._pop(2)))
    elif name == "BINPERSID":
      stack.append(self._storage(*self._pop(1)))
    elif name == "REDUCE":
      stack.append(_call(*self._pop(2)))
    elif name == "BUILD":  # attributes, such as the versions of torch's modules
      self._pop(1)
      self._changed(dict)
    elif name == "PROTO":
      if argument > pickle.HIGHEST_PROTOCOL:
        raise ValueError(f"protocol {argument}")
    elif name == "FRAME":
      if argument > _PICKLE_BYTES:
        raise ValueError(f"a frame of {argument} bytes")
    else:
      raise _Refused(f"the opcode {name}", "those that tensors need")

  def _pop(self, count: int) -> list[Any]:
    start = len(self._stack) - count
    if start < (self._marks[-1] if self._marks else 0):
      raise IndexError("too few values")
    values = self._stack[start:]
    del self._stack[start:]
    return values

  def _after_mark(self) -> list[Any]:
    return self._pop(len(self._stack) - self._marks.pop())

  def _changed(self, kind: type) -> Any:
    """The value on top, which an opcode is going to change."""
    top = self._stack[-1]
    if type(top) is not kind:
      raise _Refused(f"a change of a {type(top).__name__}", "tensors as saved")
    return top

  def _set_items(self, target: dict, values: list[Any]) -> None:
    for key, value in zip(values[::2], values[1::2], strict=True):
      if type(key) is not str:
        raise _Refused(f"a {type(key).__name__} as a name", "texts as names")
      if key in target:
        raise _Refused(f"{shorten(key)} twice", "each name once")
      target[key] = value

  def _storage(self, reference: Any) -> _Storage:
    kinds = (str, np.dtype, str, str, int)
    kind, dtype, key, _, size = _values(reference, kinds)
    member = self._storages.get(key)
    if kind != "storage" or member is None:
      raise _Refused(
        f"a reference to {shorten(kind)} {shorten(key)}", "a storage in data/"
      )
    if member.size != size * dtype.itemsize:
      raise _Refused(
        f"data/{shorten(key)} of {member.size:,} bytes",
        f"{shorten(size)} numbers of type {dtype.name}",
      )
    return _Storage(member.offset, dtype, size)


def _named(module: Any, name: Any) -> _Function | np.dtype:
  """What a name in a pickle stands for."""
  if type(module) is not str or type(name) is not str:
    raise _Refused("a name that is no text", "names of torch")
  name = f"{module}.{name}"
  if name in _TYPES:
    return _TYPES[name]
  if name not in (_DICTIONARY, _TENSOR):
    raise _Refused(f"{shorten(name)}, which was not run", "tensors alone")
  return _Function(name)


def _values(values: Any, kinds: tuple[type, ...]) -> tuple[Any, ...]:
  """The first values of a tuple, which must be of these types."""
  if not isinstance(values, tuple) or len(values) < len(kinds):
    raise _Refused(f"arguments in a {type(values).__name__}", "those of torch")
  for value, kind in zip(values, kinds, strict=False):
    # bool is an int, and the class of a numpy type is one for each.
    if not isinstance(value, kind) or type(value) is bool:
      raise _Refused(f"a {type(value).__name__}", f"a {kind.__name__}")
  return values[: len(kinds)]


def _call(function: Any, arguments: Any) -> dict | _Tensor:
  if not isinstance(function, _Function):
    raise _Refused(f"a call of a {type(function).__name__}", "tensors alone")
  if function.name == _DICTIONARY:
    if arguments != ():
      raise _Refused("a dictionary with arguments", "an empty one")
    return {}
  kinds = (_Storage, int, tuple, tuple)
  storage, offset, shape, strides = _values(arguments, kinds)
  if not (is_shape(shape) and is_shape(strides)):
    raise _Refused("a tensor of no possible shape", "a shape of numbers")
  size = 1
  for n, stride in zip(reversed(shape), reversed(strides), strict=True):
    if n > 1 and stride != size and 0 not in shape:
      raise _Refused(
        f"a tensor of shape {shorten(shape)} and strides {shorten(strides)}",
        "a contiguous one",
      )
    size *= n
  if offset < 0 or offset + size > storage.size:
    raise _Refused("a tensor outside its storage", "one inside")
  return _Tensor(
    storage.offset + offset * storage.dtype.itemsize, storage.dtype, shape
  )
