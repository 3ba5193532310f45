"""`.bin` files of a few bytes that cost a trusting reader hours or gigabytes.

Each is read in a process of its own, whose memory and time are limited. Read
next: `test_files.py`.
"""

import json
import pathlib
import pickle
import resource
import struct
import subprocess
import sys
import zipfile
import zlib

import numpy as np
import pytest
import torch

from tests import runs
from vocojax.errors import WeightsError
from vocojax.weights import files

# A process that is started here does not use JAX before it is another program.
pytestmark = pytest.mark.filterwarnings(r"ignore:os\.fork:RuntimeWarning")

MAX_BYTES = 2**30  # of address space; the program itself takes 0.4 GiB
MAX_SECONDS = 20  # for a file

_READ = """
import json, pathlib, signal, sys
from vocojax.errors import UserError
from vocojax.weights import files
for path in sys.argv[2:]:
  signal.alarm(int(sys.argv[1]))
  try:
    found = files.open_file(pathlib.Path(path))
    answer = {name: x.rows().tolist() for name, x in found.items()}
  except UserError as e:
    answer = [e.where, e.got, e.expected, e.fix]
  print(json.dumps(answer), flush=True)
"""


def read_all(paths: list[pathlib.Path]) -> list:
  """What files give in a process with limits: tensors, or an error's fields.

  In place of the answer for a file that ends the process stands how.
  """
  limits = MAX_BYTES, MAX_BYTES
  answers = []
  while rest := paths[len(answers) :]:
    done = subprocess.run(
      [sys.executable, "-c", _READ, str(MAX_SECONDS), *map(str, rest)],
      cwd=runs.ROOT,
      capture_output=True,
      text=True,
      preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, limits),
    )
    answers += map(json.loads, done.stdout.splitlines())
    if done.returncode:
      answers.append((done.returncode, done.stderr[-2000:]))
  return answers


def read(path: pathlib.Path):
  return read_all([path])[0]


def plain(value) -> bytes:
  """Opcodes that leave a value on the stack."""
  return pickle.dumps(value, 2)[2:-1]


def tensor(key="0", size=12, offset=0, shape=(3, 4), strides=(4, 1)) -> bytes:
  """Opcodes that leave a tensor of float32 on the stack."""
  storage = b"(" + plain("storage") + b"ctorch\nFloatStorage\n" + plain(key)
  storage += plain("cpu") + plain(size) + b"tQ"
  rest = b"".join(map(plain, (offset, shape, strides, False)))
  call = b"ctorch._utils\n_rebuild_tensor_v2\n("
  return call + storage + rest + b"ccollections\nOrderedDict\n)RtR"


def state(value: bytes) -> bytes:
  """The pickle of a dictionary with one entry."""
  return b"\x80\x02}" + plain("w") + value + b"s."


DATA = np.arange(12, dtype=np.float32)
SOUND = {"x/data.pkl": state(tensor()), "x/data/0": DATA.tobytes()}


def write(path, members=SOUND, *more: tuple[str, bytes], **options):
  with zipfile.ZipFile(path, "w", **options) as archive:
    for name, content in (*dict(members).items(), *more):
      archive.writestr(name, content)
  return path


def doubled(count: int) -> bytes:
  """A tuple of the same tuple twice, and so on: 2**count when compared."""
  return b")" + b"".join(
    b"r" + struct.pack("<I", i) + b"j" + struct.pack("<I", i) + b"\x86"
    for i in range(count)
  )


PICKLES = {
  "memo index": (state(b"Nr\xff\xff\xff\x3f"), "a NoneType named 'w'"),
  "tuples as a name": (
    b"\x80\x02}" + doubled(64) + b"Ns.",
    "a tuple as a name",
  ),
  "tuples as arguments": (
    state(b"ctorch._utils\n_rebuild_tensor_v2\n" + doubled(64) + b"R"),
    "arguments in a tuple",
  ),
  "tuples as a value": (state(doubled(64)), "a tuple named 'w'"),
  "tuples as a reference": (state(doubled(64) + b"Q"), "arguments in a tuple"),
  "dictionary of dictionaries": (
    state(b"ccollections\nOrderedDict\n" + doubled(64) + b"R"),
    "a dictionary with arguments",
  ),
  "long number": (
    state(b"\x8b" + struct.pack("<i", 2**31 - 1)),
    "damage (",
  ),
  "digits": (state(b"L" + b"9" * 2_000_000 + b"L\n"), "damage ("),
  "text": (state(b"\x8d" + struct.pack("<Q", 2**62)), "damage ("),
  "bytearray": (state(b"\x96" + struct.pack("<Q", 2**33)), "damage ("),
  "lists in lists": (
    b"\x80\x02" + b"]" * 500_000 + b"a" * 499_999 + b".",
    "a list",
  ),
  "marks": (b"\x80\x02" + b"(" * 2_000_000 + b".", "another number of"),
  "long key": (
    b"\x80\x02" + plain("k" * 1_000_000)[:-2] + b"q\x00" + b"h\x00Q" * 9 + b".",
    "arguments in a str",
  ),
  "axes": (
    state(tensor(shape=(1,) * 99, strides=(1,) * 99)),
    "a tensor of no possible shape",
  ),
  "huge and empty": (
    state(tensor(shape=(2**62, 0), strides=(0, 1))),
    "a tensor of no possible shape",
  ),
  "overflow": (
    state(tensor(shape=(2**40, 2**40), strides=(2**40, 1))),
    "a tensor outside its storage",
  ),
  "before its storage": (
    state(tensor(offset=-1)),
    "a tensor outside its storage",
  ),
  "after its storage": (state(tensor(offset=1)), "a tensor outside its"),
  "fewer bytes": (state(tensor(size=13)), "data/'0' of 48 bytes"),
  "no storage": (state(tensor(key="1")), "a reference to 'storage' '1'"),
  "one name twice": (
    b"\x80\x02}" + (plain("w") + tensor() + b"s") * 2 + b".",
    "'w' twice",
  ),
  "frame": (b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"}.", "damage ('a f"),
  "protocol": (b"\x80\x63}.", "damage ('protocol 99"),
  "more after its end": (SOUND["x/data.pkl"] + b"N.", "another number of"),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
  """What each of PICKLES gives."""
  folder = tmp_path_factory.mktemp("pickles")
  paths = [
    write(folder / f"{i}.bin", SOUND | {"x/data.pkl": content})
    for i, (content, _) in enumerate(PICKLES.values())
  ]
  return dict(
    zip(PICKLES, zip(paths, read_all(paths), strict=True), strict=True)
  )


@pytest.mark.parametrize("name", PICKLES)
def test_pickle(answers, name):
  path, answer = answers[name]
  where, got, _, fix = answer
  assert where == f"{path}: its pickle"
  assert got.startswith(PICKLES[name][1])
  assert fix.startswith("load it with torch in a place that you trust")


def test_sound(tmp_path):
  expected = {"w": DATA.reshape(3, 4).tolist()}
  assert read(write(tmp_path / "x.bin")) == expected
  # With other bytes before the archive, too, as torch reads it.
  path = tmp_path / "y.bin"
  path.write_bytes(b"junk" * 9 + (tmp_path / "x.bin").read_bytes())
  assert read(path) == expected


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_protocols(tmp_path, protocol):
  path = tmp_path / "x.bin"
  whole = torch.arange(12.0).reshape(3, 4)
  torch.save({"w": whole, "part": whole[1]}, path, pickle_protocol=protocol)
  assert read(path) == {"w": whole.tolist(), "part": whole[1].tolist()}


def refused(path: pathlib.Path) -> str:
  with pytest.raises(WeightsError) as e:
    files.open_file(path)
  assert e.value.where == str(path)
  assert e.value.fix == "download the file again"
  return e.value.got


def test_compressed(tmp_path):
  path = write(tmp_path / "x.bin", compression=zipfile.ZIP_DEFLATED)
  assert refused(path) == "the member 'x/data.pkl', compressed or encrypted"


def test_zip_bomb(tmp_path):
  """5 GiB of zeros in 5 MB."""
  pack = zlib.compressobj(9, zlib.DEFLATED, -15)
  block = pack.compress(bytes(2**26)) + pack.flush(zlib.Z_FULL_FLUSH)
  content = block * 80 + pack.flush()
  sizes = struct.pack("<III", 0, len(content), 2**32 - 2)
  name = b"x/data.pkl"
  head = struct.pack("<4s5H", b"PK\3\4", 20, 0, 8, 0, 33) + sizes
  head += struct.pack("<HH", len(name), 0) + name + content
  entry = struct.pack("<4s6H", b"PK\1\2", 20, 20, 0, 8, 0, 33) + sizes
  entry += struct.pack("<5HII", len(name), 0, 0, 0, 0, 0, 0) + name
  end = struct.pack("<4s4HIIH", b"PK\5\6", 0, 0, 1, 1, len(entry), len(head), 0)
  path = tmp_path / "x.bin"
  path.write_bytes(head + entry + end)
  assert zipfile.ZipFile(path).infolist()[0].file_size == 2**32 - 2
  where, got, _, _ = read(path)
  assert where == str(path) and "compressed or encrypted" in got


def test_large_pickle(tmp_path):
  path = write(tmp_path / "x.bin", {"x/data.pkl": bytes(2**21 + 1)})
  assert refused(path) == "data.pkl of 2,097,153 bytes"


def test_large_directory(tmp_path):
  """Of 5,000 names of 1,000 bytes."""
  more = {f"x/{i:0999}": b"" for i in range(5000)}
  path = write(tmp_path / "x.bin", SOUND | more)
  assert refused(path).startswith("a directory of 5,")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
  "name, got",
  [
    ("x/data/0", "the member 'x/data/0' besides another 'data/0'"),
    ("y/data/0", "the member 'y/data/0' besides another 'data/0'"),
    ("y/data/1", "the member 'y/data/1' in a folder of its own"),
    ("x/data.pkl", "the member 'x/data.pkl' besides another 'data.pkl'"),
  ],
)
def test_member_that_shadows_another(tmp_path, name, got):
  path = write(tmp_path / "x.bin", SOUND, (name, bytes(48)))
  assert refused(path) == got


def patched(path: pathlib.Path, signature: bytes, at: int, new: bytes):
  """The header of data/0, or its entry in the directory, changed."""
  data = write(path).read_bytes()
  at += data.rindex(signature)
  path.write_bytes(data[:at] + new + data[at + len(new) :])
  return path


LOCAL, ENTRY = b"PK\3\4", b"PK\1\2"


@pytest.mark.parametrize(
  "signature, at, new, got",
  [
    (ENTRY, 42, b"\0\0\0\0", "the member 'x/data/0' inside another"),
    (ENTRY, 20, b"\xf0\xff\xff\x7f" * 2, "the member 'x/data/0' of 2,147,483"),
    (ENTRY, 8, b"\1", "the member 'x/data/0', compressed or encrypted"),
    (ENTRY, 42, b"\0\0\0\x70", "a damaged or incomplete zip archive"),
    (LOCAL, 30, b"x/data/1", "the member 'x/data/0' under another name in"),
    (LOCAL, 28, b"\xff\xff", "the member 'x/data/0' of 48 bytes"),
    (LOCAL, 0, b"PK\1\1", "the member 'x/data/0' under another name in"),
  ],
)
def test_places(tmp_path, signature, at, new, got):
  path = patched(tmp_path / "x.bin", signature, at, new)
  assert refused(path).startswith(got)


def test_checksum(tmp_path):
  path = write(tmp_path / "x.bin")
  path.write_bytes(path.read_bytes().replace(b"torch.", b"xorch.", 1))
  assert refused(path) == "data.pkl with a wrong checksum"


def test_other_content(tmp_path):
  path = tmp_path / "x.bin"
  for members, got in (
    ({"x/other": b""}, "a zip archive without data.pkl"),
    (SOUND | {"x/byteorder": b"big"}, "byte order b'big'"),
    (SOUND | {"x/byteorder": bytes(17)}, "byteorder of 17 bytes"),
  ):
    assert refused(write(path, members)) == got
