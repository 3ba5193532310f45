"""`.bin` files of torch: zip archives with a pickle. Next: cache_kinds.py."""

import pathlib
import pickle
import struct
import zipfile
import zlib

import numpy as np

from tests.fuzz import files
from tests.fuzz.kinds import Case, Input, Kind, Parts, array
from tests.fuzz.weight_kinds import make_state, read_tensors

_NAME = "pytorch_model.bin"
_FILE = files.one_of(_NAME)


def _make(folder: pathlib.Path) -> Parts:
  import torch  # only to write the sound input

  state = make_state()
  tensors = {
    name: torch.from_numpy(x.view(np.int16).copy()).view(torch.bfloat16)
    if x.dtype.name == "bfloat16"
    else torch.from_numpy(x)
    for name, x in state.items()
  }
  torch.save(tensors, folder / _NAME)
  return {name: array(x) for name, x in state.items()}


def _plain(value) -> bytes:
  """Opcodes that leave a plain value on the stack."""
  return pickle.dumps(value, 2)[2:-1]


def _tensor(
  key="0", size=12, offset=0, shape=(3, 4), strides=(4, 1), kind="storage"
) -> bytes:
  """Opcodes that leave a tensor of float32 on the stack."""
  storage = (
    b"(" + _plain(kind) + b"ctorch\nFloatStorage\n" + _plain(key)
    + _plain("cpu") + _plain(size) + b"tQ"
  )  # fmt: skip
  rest = b"".join(map(_plain, (offset, shape, strides, False)))
  call = b"ctorch._utils\n_rebuild_tensor_v2\n"
  hooks = b"ccollections\nOrderedDict\n)R"
  return call + b"(" + storage + rest + hooks + b"tR"


def _state(value: bytes) -> bytes:
  """The pickle of a dictionary with one entry."""
  return b"\x80\x02}" + _plain("w") + value + b"s."


_DATA = np.arange(12, dtype=np.float32)
_SOUND = [("x/data.pkl", _state(_tensor())), ("x/data/0", _DATA.tobytes())]


def _writes(*members: tuple[str, bytes], method=zipfile.ZIP_STORED):
  """An archive with these members; the later may have an earlier's name."""

  def mutate(given: Input) -> None:
    path = given.folder / _NAME
    with zipfile.ZipFile(path, "w", method) as archive:
      for name, content in members:
        archive.writestr(name, content.replace(b"ROOM", _room(given)))
    given.right = {"w": array(_DATA.reshape(3, 4))}

  return mutate


def _room(given: Input) -> bytes:
  return str(given.folder.parent).encode()


def _with_pickle(content: bytes):
  return _writes(("x/data.pkl", content), _SOUND[1])


def _doubled(count: int) -> bytes:
  """Tuples of the same tuple twice, `count` deep: 2**count when printed."""
  return b")" + b"".join(
    b"r" + struct.pack("<I", i) + b"j" + struct.pack("<I", i) + b"\x86"
    for i in range(count)
  )


_TOUCH = _plain("touch ROOM/ran")
_PICKLES = {
  "memo_doubles": _state(_doubled(60)),
  "memo_doubles_as_name": b"\x80\x02}" + _doubled(60) + _tensor() + b"s.",
  "memo_doubles_as_shape": _state(
    b"ctorch._utils\n_rebuild_tensor_v2\n(" + _doubled(40) + b"tR"
  ),
  "memo_index_huge": _state(b"Nr\xff\xff\xff\x3f"),
  "long_huge": _state(b"\x8b" + struct.pack("<i", 2**31 - 1)),
  "text_huge": _state(b"\x8d" + struct.pack("<Q", 2**62)),
  "bytes_huge": _state(b"\x8e" + struct.pack("<Q", 2**33)),
  "bytearray_huge": _state(b"\x96" + struct.pack("<Q", 2**33)),
  "frame_huge": b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"}.",
  "number_of_many_digits": _state(b"L" + b"9" * 3_000_000 + b"L\n"),
  "marks": b"\x80\x02" + b"(" * 3_000_000 + b".",
  "nested": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
  "numbers_as_names": b"\x80\x02}K\x01" + _tensor() + b"s.",
  "no_dictionary": b"\x80\x02K\x01.",
  "empty": b"",
  "stack_empty": b"\x80\x020.",
  "protocol": b"\x80\x63}.",
  "system": _state(b"cposix\nsystem\n(" + _TOUCH + b"tR"),
  "system_by_stack": _state(
    b"\x8c\x05posix\x8c\x06system\x93(" + _TOUCH + b"tR"
  ),
  "system_by_inst": _state(b"(" + _TOUCH + b"iposix\nsystem\n"),
  "eval": _state(
    b"cbuiltins\neval\n(" + _plain("open('ROOM/ran', 'w')") + b"tR"
  ),
  "attribute": _state(b"\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93"),
  "extension": _state(b"\x82\x01"),
  "reference_text": _state(b"X\x01\0\0\x000Q"),
  "reference_kind": _state(_tensor(kind="module")),
  "reference_key": _state(_tensor(key="../0")),
  "size_negative": _state(_tensor(size=-12)),
  "size_huge": _state(_tensor(size=2**62, shape=(2**62,), strides=(1,))),
  "size_float": _state(_tensor(size=12.5)),
  "size_list": _state(_tensor(size=[12])),
  "offset_negative": _state(_tensor(offset=-1)),
  "offset_beyond": _state(_tensor(offset=1)),
  "offset_float": _state(_tensor(offset=0.5, shape=(1, 1), strides=(1, 1))),
  "shape_negative": _state(_tensor(shape=(-3, -4))),
  "shape_float": _state(_tensor(shape=(3.0, 4.0))),
  "shape_text": _state(_tensor(shape="34", strides="41")),
  "shape_number": _state(_tensor(shape=12)),
  "shape_overflows": _state(_tensor(shape=(2**40, 2**40), strides=(2**40, 1))),
  "shape_empty_and_huge": _state(
    _tensor(shape=(2**62, 0), strides=(0, 1), size=0)
  ),
  "strides_turned": _state(_tensor(shape=(4, 3), strides=(1, 4))),
  "strides_0": _state(_tensor(shape=(3, 4), strides=(0, 0))),
}


def _bomb() -> bytes:
  """A compressed member of 8 GiB of zeros; its checksum does not matter."""
  packer = zlib.compressobj(9, zlib.DEFLATED, -15)
  block = packer.compress(bytes(2**26)) + packer.flush(zlib.Z_FULL_FLUSH)
  return block * 128 + packer.flush()


def _zip_bomb(given: Input) -> None:
  content = _bomb()
  name = b"x/data.pkl"
  fixed = struct.pack("<HHHHHI", 20, 0, 8, 0, 33, 0)
  sizes = struct.pack("<IIHH", len(content), 2**32 - 2, len(name), 0)
  head = b"PK\x03\x04" + fixed + sizes + name + content
  entry = b"PK\x01\x02\x14\0" + fixed + sizes + bytes(14) + name
  entry = entry[:42] + bytes(4) + name
  end = struct.pack(
    "<4s4HIIH", b"PK\x05\x06", 0, 0, 1, 1, len(entry), len(head), 0
  )
  (given.folder / _NAME).write_bytes(head + entry + end)


def _patched(given: Input, signature: bytes, at: int, new: bytes) -> None:
  """Overwrites a part of the first local header, or entry of the directory."""
  path = given.folder / _NAME
  _writes(*_SOUND)(given)
  data = path.read_bytes()
  at += data.rindex(signature)
  path.write_bytes(data[:at] + new + data[at + len(new) :])


def _patches(signature: bytes, at: int, new: bytes) -> files.Change:
  return lambda given: _patched(given, signature, at, new)


_LOCAL, _ENTRY = b"PK\x03\x04", b"PK\x01\x02"  # those of data/0
_CASES: dict[str, Case] = {
  **files.cases(_FILE),
  **{f"pickle_{k}": ("refuse", _with_pickle(v)) for k, v in _PICKLES.items()},
  "handmade": ("read", _writes(*_SOUND)),
  "compressed_pickle": (
    "either",
    _writes(*_SOUND, method=zipfile.ZIP_DEFLATED),
  ),
  "zip_bomb": ("refuse", _zip_bomb),
  "member_twice": ("refuse", _writes(*_SOUND, ("x/data/0", bytes(48)))),
  "member_twice_elsewhere": (
    "refuse",
    _writes(*_SOUND, ("y/data/0", bytes(48))),
  ),
  "pickle_twice": ("refuse", _writes(*_SOUND, ("y/data.pkl", _SOUND[0][1]))),
  "member_missing": ("refuse", _writes(_SOUND[0])),
  "member_short": ("refuse", _writes(_SOUND[0], ("x/data/0", bytes(47)))),
  "member_up": ("either", _writes(*_SOUND, ("../../evil", b"evil"))),
  "big_endian": ("refuse", _writes(*_SOUND, ("x/byteorder", b"big"))),
  "byteorder_odd": ("refuse", _writes(*_SOUND, ("x/byteorder", b"\xff"))),
  "encrypted": ("refuse", _patches(_ENTRY, 8, b"\x01")),
  "size_of_directory": ("refuse", _patches(_ENTRY, 24, b"\xff\xff\xff\x7f")),
  "place_of_directory": ("refuse", _patches(_ENTRY, 42, b"\0\0\0\0")),
  "place_beyond": ("refuse", _patches(_ENTRY, 42, b"\xff\xff\xff\x7f")),
  "name_of_local": ("either", _patches(_LOCAL, 26, b"\x07")),
  "extra_of_local": ("either", _patches(_LOCAL, 28, b"\x04")),
  "local_signature": ("refuse", _patches(_LOCAL, 0, b"PK\x09\x09")),
  "cut": ("either", files.changes(_FILE, files.cut)),
  "before": ("either", files.changes(_FILE, lambda x, rng: b"junk" * 9 + x)),
}


def _damaged(change) -> files.Change:
  """Damage of all but the numbers, which only a checksum could find."""

  def mutate(given: Input) -> None:
    path = given.folder / _NAME
    data = path.read_bytes()
    new = bytearray(change(data, given.rng))
    with zipfile.ZipFile(path) as archive:
      for member in archive.infolist():
        if "/data/" in member.filename:
          at = data.index(member.filename.encode(), member.header_offset)
          extra = data[member.header_offset + 28 : member.header_offset + 30]
          at += len(member.filename) + int.from_bytes(extra, "little")
          end = at + member.file_size
          new[at:end] = data[at:end]
    path.write_bytes(new)

  return mutate


_CASES["bits"] = "either", _damaged(files.flip_bits)
_CASES["bytes"] = "either", _damaged(files.set_bytes)

KINDS = {"bin": Kind(_make, read_tensors, _CASES, ("bits", "bytes", "cut"))}
