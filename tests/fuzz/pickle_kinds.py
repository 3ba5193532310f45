"""`.bin` files of torch: zip archives with a pickle. Next: cache_kinds.py."""

import pathlib
import pickle
import struct
import zipfile
import zlib

import numpy as np

from tests.fuzz import files
from tests.fuzz.kinds import Case, Input, Kind, Mutation, Parts, array
from tests.fuzz.weight_kinds import make_state, read_tensors

_NAME = "pytorch_model.bin"
_FILE = files.one_of(_NAME)
_DATA = np.arange(12, dtype=np.float32)


def _make(folder: pathlib.Path) -> Parts:
  import torch  # only to write the sound input

  tensors = {
    name: torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    if x.dtype.name == "bfloat16"
    else torch.from_numpy(x)
    for name, x in make_state().items()
  }
  torch.save(tensors, folder / _NAME)
  return {name: array(x) for name, x in make_state().items()}


def _plain(value) -> bytes:
  """Opcodes that leave a plain value on the stack."""
  return pickle.dumps(value, 2)[2:-1]


def _state(value: bytes) -> bytes:
  """The pickle of a dictionary with one entry."""
  return b"\x80\x02}" + _plain("w") + value + b"s."


def _tensor(
  key="0", size=12, offset=0, shape=(3, 4), strides=(4, 1), kind="storage"
) -> bytes:
  """The pickle of a state with a tensor of float32."""
  storage = b"(" + _plain(kind) + b"ctorch\nFloatStorage\n"
  storage += b"".join(map(_plain, (key, "cpu", size))) + b"tQ"
  rest = b"".join(map(_plain, (offset, shape, strides, False)))
  hooks = b"ccollections\nOrderedDict\n)R"
  call = b"ctorch._utils\n_rebuild_tensor_v2\n("
  return _state(call + storage + rest + hooks + b"tR")


_SOUND = [("x/data.pkl", _tensor()), ("x/data/0", _DATA.tobytes())]


def _writes(*members: tuple[str, bytes], method=zipfile.ZIP_STORED) -> Mutation:
  """An archive with these members; the later may have an earlier's name."""

  def mutate(given: Input) -> None:
    room = str(given.folder.parent).encode()
    with zipfile.ZipFile(given.folder / _NAME, "w", method) as archive:
      for name, content in members:
        archive.writestr(name, content.replace(b"ROOM", room))
    given.right = {"w": array(_DATA.reshape(3, 4))}

  return mutate


def _doubled(count: int) -> bytes:
  """Tuples of the same tuple twice, `count` deep: 2**count when printed."""
  index = [struct.pack("<I", i) for i in range(count)]
  return b")" + b"".join(b"r" + i + b"j" + i + b"\x86" for i in index)


_REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n("
_TOUCH = _plain("touch ROOM/ran")
_FRAME = b"\x80\x04\x95" + struct.pack("<Q", 2**40) + _tensor()[2:]
_PICKLES = {
  "doubles": _state(_doubled(60)),
  "doubles_as_name": b"\x80\x02}" + _doubled(60) + b"Ns.",
  "doubles_as_shape": _state(_REBUILD + _doubled(40) + b"tR"),
  "memo_index": _state(b"Nr\xff\xff\xff\x3f"),
  "long": _state(b"\x8b" + struct.pack("<i", 2**31 - 1)),
  "text": _state(b"\x8d" + struct.pack("<Q", 2**62)),
  "bytes": _state(b"\x8e" + struct.pack("<Q", 2**33)),
  "bytearray": _state(b"\x96" + struct.pack("<Q", 2**33)),
  "digits": _state(b"L" + b"9" * 3_000_000 + b"L\n"),
  "marks": b"\x80\x02" + b"(" * 3_000_000 + b".",
  "nested": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
  "number": b"\x80\x02K\x01.",
  "names": b"\x80\x02}K\x01" + _tensor()[10:-2] + b"s.",
  "empty": b"",
  "underflow": b"\x80\x020.",
  "extension": _state(b"\x82\x01"),
  "system": _state(b"cposix\nsystem\n(" + _TOUCH + b"tR"),
  "system_stack": _state(b"\x8c\x05posix\x8c\x06system\x93(" + _TOUCH + b"tR"),
  "system_inst": _state(b"(" + _TOUCH + b"iposix\nsystem\n"),
  "eval": _state(b"cbuiltins\neval\n(" + _plain("open('ROOM/x', 'w')") + b"tR"),
  "attribute": _state(b"\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93"),
  "reference": _state(b"X\x01\0\0\x000Q"),
  "reference_kind": _tensor(kind="module"),
  "key": _tensor(key="../0"),
  **{
    f"size_{i}": _tensor(size=size, shape=(2**62,), strides=(1,))
    for i, size in enumerate((-12, 2**62, 12.5, [12], "12", None))
  },
  **{
    f"offset_{i}": _tensor(offset=x, shape=(1, 1), strides=(1, 1))
    for i, x in enumerate((-1, 12, 0.5, "0", None))
  },
  **{
    f"shape_{i}": _tensor(shape=shape, strides=strides)
    for i, (shape, strides) in enumerate(
      (
        *(((-3, -4), (4, 1)), ((3.0, 4.0), (4, 1)), ("34", "41")),
        *((12, 1), ((2**40, 2**40), (2**40, 1)), ((2**62, 0), (0, 1))),
        *(((4, 3), (1, 4)), ((3, 4), (0, 0)), ((3, 4), (4,)), ((4, 4), (4, 1))),
      )
    )
  },
}


def _zip_bomb(given: Input) -> None:
  """A compressed member of 8 GiB of zeros; its checksum does not matter."""
  packer = zlib.compressobj(9, zlib.DEFLATED, -15)
  block = packer.compress(bytes(2**26)) + packer.flush(zlib.Z_FULL_FLUSH)
  content, name = block * 128 + packer.flush(), b"x/data.pkl"
  fixed = struct.pack("<HHHHHI", 20, 0, 8, 0, 33, 0)
  fixed += struct.pack("<IIHH", len(content), 2**32 - 2, len(name), 0)
  head = b"PK\x03\x04" + fixed + name + content
  entry = b"PK\x01\x02\x14\0" + fixed + bytes(14) + name
  end = struct.pack("<HHIIH", 1, 1, len(entry), len(head), 0)
  content = head + entry + b"PK\x05\x06\0\0\0\0" + end
  (given.folder / _NAME).write_bytes(content)


def _patches(signature: bytes, at: int, new: bytes) -> Mutation:
  """Other bytes in the last local header, or entry of the directory."""

  def patch(data: bytes, rng) -> bytes:
    place = data.rindex(signature) + at
    return data[:place] + new + data[place + len(new) :]

  def mutate(given: Input) -> None:
    _writes(*_SOUND)(given)
    files.changes(_FILE, patch)(given)

  return mutate


def _damaged(change) -> Mutation:
  """Damage of all but the numbers, which only a checksum could find."""

  def mutate(given: Input) -> None:
    path = given.folder / _NAME
    data = path.read_bytes()
    new = bytearray(change(data, given.rng))
    with zipfile.ZipFile(path) as archive:
      for member in archive.infolist():
        if "/data/" in member.filename:
          start = data.index(member.filename.encode()) + len(member.filename)
          header = data[member.header_offset + 28 :][:2]
          start += int.from_bytes(header, "little")
          stop = start + member.file_size
          new[start:stop] = data[start:stop]
    path.write_bytes(new)

  return mutate


_LOCAL, _ENTRY = b"PK\x03\x04", b"PK\x01\x02"  # those of data/0
_CASES: dict[str, Case] = {
  **files.cases(_FILE),
  **{
    f"pickle_{name}": ("refuse", _writes(("x/data.pkl", pickled), _SOUND[1]))
    for name, pickled in _PICKLES.items()
  },
  "handmade": ("read", _writes(*_SOUND)),
  "frame": ("either", _writes(("x/data.pkl", _FRAME), _SOUND[1])),
  "compressed": ("either", _writes(*_SOUND, method=zipfile.ZIP_DEFLATED)),
  "zip_bomb": ("refuse", _zip_bomb),
  "member_twice": ("refuse", _writes(*_SOUND, ("x/data/0", bytes(48)))),
  "member_elsewhere": ("refuse", _writes(*_SOUND, ("y/data/0", bytes(48)))),
  "pickle_twice": ("refuse", _writes(*_SOUND, ("y/data.pkl", _tensor()))),
  "member_missing": ("refuse", _writes(_SOUND[0])),
  "member_short": ("refuse", _writes(_SOUND[0], ("x/data/0", bytes(47)))),
  "member_up": ("either", _writes(*_SOUND, ("../../evil", b"evil"))),
  "big_endian": ("refuse", _writes(*_SOUND, ("x/byteorder", b"big"))),
  "encrypted": ("refuse", _patches(_ENTRY, 8, b"\x01")),
  "entry_size": ("refuse", _patches(_ENTRY, 24, b"\xff\xff\xff\x7f")),
  "entry_place": ("refuse", _patches(_ENTRY, 42, b"\0\0\0\0")),
  "entry_beyond": ("refuse", _patches(_ENTRY, 42, b"\xff\xff\xff\x7f")),
  "local_name": ("either", _patches(_LOCAL, 26, b"\x07")),
  "local_extra": ("either", _patches(_LOCAL, 28, b"\x04")),
  "local_signature": ("refuse", _patches(_LOCAL, 0, b"PK\x09\x09")),
  "before": ("either", files.changes(_FILE, lambda x, rng: b"junk" * 9 + x)),
  "bits": ("either", _damaged(files.flip_bits)),
  "bytes": ("either", _damaged(files.set_bytes)),
}
KINDS = {"bin": Kind(_make, read_tensors, _CASES, ("bits", "bytes", "cut"))}
