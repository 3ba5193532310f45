"""Weight files that are incomplete, damaged, foreign or hostile.

Every message names the file or tensor. Read next: `published.py`.
"""

import collections
import json
import os
import pathlib

import numpy as np
import pytest
import torch

from tests.weights import published
from vocojax.errors import WeightsError, shorten
from vocojax.weights import files


@pytest.fixture
def state():
  generator = torch.Generator().manual_seed(0)
  return {
    name: torch.randn(shape, generator=generator).to(dtype)
    for name, shape, dtype in (
      ("a.weight", (5, 3), torch.float32),
      ("b.weight", (4,), torch.bfloat16),
      ("c.weight", (2, 3, 4), torch.float16),
      ("d.position_ids", (1, 7), torch.int64),
    )
  }


def assert_read(tensors, state):
  assert tensors.keys() == state.keys()
  for name, x in state.items():
    assert tensors[name].shape == tuple(x.shape)
    expected = x.contiguous().view(torch.uint8).numpy().tobytes()
    assert tensors[name].rows().tobytes() == expected, name
    last = len(x) - 1
    found = tensors[name].rows(last, last + 1)
    assert found.shape == (1, *x.shape[1:])
    assert found.tobytes() == expected[last * len(expected) // len(x) :], name


def refused(path: pathlib.Path) -> tuple[str, str, str]:
  """Where, got and expected of the error that a file gives."""
  with pytest.raises(WeightsError) as e:
    files.open_file(path)
  assert e.value.fix
  return e.value.where, e.value.got, e.value.expected


def test_safetensors(tmp_path, state):
  path = tmp_path / "model.safetensors"
  published.save_safetensors(state, path)
  assert_read(files.open_folder(tmp_path), state)


def test_bin(tmp_path, state):
  path = tmp_path / "pytorch_model.bin"
  # As state_dict() of a module gives it: ordered, with an attribute.
  ordered = collections.OrderedDict(state)
  ordered._metadata = collections.OrderedDict({"": {"version": 1}})
  torch.save(ordered, path)
  assert_read(files.open_folder(tmp_path), state)


def test_tensors_that_share_a_storage(tmp_path):
  whole = torch.arange(12.0).reshape(4, 3)
  path = tmp_path / "x.bin"
  torch.save({"whole": whole, "part": whole[1:3]}, path)
  assert_read(files.open_file(path), {"whole": whole, "part": whole[1:3]})
  torch.save({"turned": whole.T}, path)
  _, got, _ = refused(path)
  assert got == "a tensor of shape (3, 4) and strides (1, 3)"


def test_sharded_bin(tmp_path, state):
  published.save_bins(state, tmp_path, 2)
  assert_read(files.open_folder(tmp_path), state)


class _Code:
  """Runs a command when it is unpickled by a trusting reader."""

  def __init__(self, function, *arguments):
    self._call = function, arguments

  def __reduce__(self):
    return self._call


@pytest.mark.parametrize(
  "function, arguments, name",
  [
    (os.system, ("touch PROOF",), "posix.system"),
    (eval, ("__import__('os').mkdir('PROOF')",), "__builtin__.eval"),
    (exec, ("__import__('os').mkdir('PROOF')",), "__builtin__.exec"),
    (pathlib.Path.touch, (pathlib.Path("PROOF"),), "__builtin__.getattr"),
    (torch.nn.Linear, (2, 3), "torch.nn.modules.linear.Linear"),
    (bytearray, (10,), "__builtin__.bytearray"),
  ],
)
def test_code_in_a_pickle_is_not_run(
  tmp_path, monkeypatch, state, function, arguments, name
):
  monkeypatch.chdir(tmp_path)
  path = tmp_path / "evil.bin"
  torch.save(state | {"code": _Code(function, *arguments)}, path)
  assert refused(path) == (
    f"{path}: its pickle",
    f"'{name}', which was not run",
    "tensors alone",
  )
  assert not (tmp_path / "PROOF").exists()
  if "PROOF" in str(arguments):  # it would have run
    torch.load(path, weights_only=False)
    assert (tmp_path / "PROOF").exists()


def test_pickle_cannot_change_what_was_read(tmp_path):
  """The opcode that sets attributes, on a tensor."""
  tensor = torch.zeros(3)

  class Changed:
    def __reduce__(self):
      function, arguments = tensor.__reduce_ex__(2)[:2]
      return function, arguments, {"offset": 0}

  path = tmp_path / "x.bin"
  torch.save({"a": tensor, "b": Changed()}, path)
  assert refused(path)[:2] == (f"{path}: its pickle", "a change of a _Tensor")


@pytest.mark.parametrize(
  "value, got",
  [
    ([1, 2], "a list"),
    ({"a": 1}, "a int named 'a'"),
    ({1: 1}, "a int as a name"),
    ({"a": {"b": 1}}, "a dict named 'a'"),
  ],
)
def test_other_content(tmp_path, value, got):
  path = tmp_path / "x.bin"
  torch.save(value, path)
  assert refused(path)[:2] == (f"{path}: its pickle", got)


def test_damaged_bin(tmp_path, state):
  path = tmp_path / "x.bin"
  torch.save(state, path, _use_new_zipfile_serialization=False)
  assert refused(path)[1] == "a plain pickle, as of torch before 1.6"
  torch.save(state, path)
  path.write_bytes(path.read_bytes()[:-40])
  assert refused(path)[1] == "a damaged or incomplete zip archive"
  path.write_bytes(b"<!doctype html>")
  assert refused(path)[1] == "a file that starts with b'<!'"
  path.write_bytes(b"")
  assert refused(path)[1] == "a file that starts with b''"


@pytest.mark.parametrize("name", ["x.bin", "x.safetensors"])
def test_file_that_is_none(tmp_path, name):
  path = tmp_path / name
  assert refused(path)[1] == "no such file"
  os.mkfifo(path)
  assert refused(path)[1] == "a pipe"
  path.unlink()
  path.mkdir()
  assert refused(path)[1] == "a folder"
  path.rmdir()
  path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
  assert refused(path)[1] == "a pointer of git-lfs"


def _safetensors(header, data: bytes = b"") -> bytes:
  content = header if isinstance(header, bytes) else json.dumps(header).encode()
  return len(content).to_bytes(8, "little") + content + data


def _entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
  return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def _pair(second: dict, first: dict | None = None) -> dict:
  return {"a": first or _entry(), "b": second}


# The header, how many bytes follow, the tensor or "", and what was got.
_HEADERS = {
  "nothing": (b"", 0, "", "0 bytes"),
  "no JSON": (b"{garbage", 0, "header", "Expecting property name"),
  "a list": (b"[1, 2]", 0, "header", "[1, 2]"),
  "NaN": (b'{"a": NaN}', 0, "header", "the number 'NaN'"),
  "twice": (b'{"a": 1, "a": 2}', 0, "header", "the key 'a' twice"),
  "digits": (b'{"a": ' + b"9" * 5000 + b"}", 0, "header", "Exceeds the"),
  "no object": ({"a": 7}, 0, "a", "7"),
  "no dtype": (
    {"a": {"shape": [], "data_offsets": []}},
    0,
    "a: field",
    "nothing",
  ),
  "offsets": (
    {"a": _entry() | {"data_offsets": "0, 8"}},
    8,
    "a: field",
    "'0, 8'",
  ),
  "FP8": ({"a": _entry("F8_E4M3", (8,))}, 8, "a", "numbers of type 'F8_E4M3'"),
  "bool": ({"a": _entry(shape=(True,))}, 8, "a", "shape [True] and"),
  "negative": ({"a": _entry(shape=(-1, -2))}, 8, "a", "shape [-1, -2] and"),
  "overflow": ({"a": _entry(shape=(2**62, 4))}, 8, "a", "shape [461168601842"),
  "many axes": ({"a": _entry(shape=(1,) * 65)}, 8, "a", "shape [1, 1, 1"),
  "three offsets": ({"a": _entry(offsets=(0, 4, 8))}, 8, "a", "shape [2] and"),
  "turned": ({"a": _entry(offsets=(8, 0))}, 8, "a", "-8 bytes"),
  "shape": ({"a": _entry(shape=(3,))}, 8, "a", "8 bytes"),
  "overlap": (
    _pair(_entry(offsets=(4, 12))),
    12,
    "b",
    "data_offsets from 4 on",
  ),
  "the same": (_pair(_entry()), 8, "b", "data_offsets from 0 on"),
  "a gap": (
    _pair(_entry(offsets=(12, 20))),
    20,
    "b",
    "data_offsets from 12 on",
  ),
  "a gap before": (
    {"a": _entry(offsets=(4, 12))},
    12,
    "a",
    "data_offsets from 4 on",
  ),
  "misaligned": (
    _pair(_entry(offsets=(3, 11)), _entry("U8", (3,), (0, 3))),
    11,
    "b",
    "offset 3",
  ),
  "cut off": ({"a": _entry()}, 7, "", "SIZE bytes"),
  "more": ({"a": _entry()}, 9, "", "SIZE bytes"),
}


@pytest.mark.parametrize("name", _HEADERS)
def test_safetensors_header(tmp_path, name):
  header, size, at, got = _HEADERS[name]
  path = tmp_path / "x.safetensors"
  path.write_bytes(_safetensors(header, bytes(size)) if header else b"")
  where, found, _ = refused(path)
  assert where.startswith(f"{path}: {at}" if at else str(path))
  assert found.startswith(got.replace("SIZE", str(path.stat().st_size))), found


@pytest.mark.parametrize("length", [9, 2**24 + 1, 2**63, 2**64 - 1])
def test_safetensors_header_of_absurd_length(tmp_path, length):
  path = tmp_path / "x.safetensors"
  with open(path, "wb") as f:
    f.write(length.to_bytes(8, "little") + b"{}")
    f.truncate(2**30 if length == 2**24 + 1 else 10)  # with a hole
  assert refused(path)[1] == f"a header of {length:,} bytes"


def test_safetensors_that_are_unusual(tmp_path):
  """Empty tensors, scalars, and data that begin at an odd place."""
  path = tmp_path / "x.safetensors"
  data = np.arange(3, dtype=np.float32).tobytes()
  header = {
    "empty": _entry(shape=(0, 5), offsets=(0, 0)),
    "b": _entry(shape=(2,), offsets=(0, 8)),
    "none": _entry(shape=(4, 0), offsets=(8, 8)),
    "scalar": _entry(shape=(), offsets=(8, 12)),
  }
  content = json.dumps(header).encode()
  content += b" " * (-len(content) % 8 + 3)  # as before safetensors padded it
  path.write_bytes(_safetensors(content, data))
  found = files.open_file(path)
  assert found["b"].offset % 4 == 3
  assert found["b"].rows().tolist() == [0, 1]
  assert {name: x.shape for name, x in found.items()} == {
    name: tuple(entry["shape"]) for name, entry in header.items()
  }


def _index(folder: pathlib.Path) -> tuple[pathlib.Path, dict]:
  path = folder / "model.safetensors.index.json"
  return path, json.loads(path.read_text())


@pytest.fixture
def shards(tmp_path, state):
  published.save_shards(state, tmp_path, 100)
  assert len(list(tmp_path.glob("*.safetensors"))) >= 2
  assert_read(files.open_folder(tmp_path), state)
  return tmp_path


def refused_folder(folder: pathlib.Path) -> tuple[str, str, str]:
  with pytest.raises(WeightsError) as e:
    files.open_folder(folder)
  assert e.value.fix
  return e.value.where, e.value.got, e.value.expected


def test_missing_shard(shards):
  first = min(shards.glob("*.safetensors"))
  first.unlink()
  assert refused_folder(shards) == (
    str(first),
    "no such file",
    "a shard with 2 tensors, as model.safetensors.index.json says",
  )


def test_index_names_an_absent_tensor(shards):
  path, index = _index(shards)
  index["weight_map"]["ghost"] = index["weight_map"]["a.weight"]
  path.write_text(json.dumps(index))
  where, got, _ = refused_folder(shards)
  assert where == f"{path}: ghost"
  assert got == f"{index['weight_map']['a.weight']}, which has no such tensor"


def test_index_lacks_a_tensor(shards):
  path, index = _index(shards)
  names = collections.defaultdict(list)
  for name, shard in index["weight_map"].items():
    names[shard].append(name)
  name = max(names.values(), key=len)[0]
  shard = index["weight_map"].pop(name)
  path.write_text(json.dumps(index))
  assert refused_folder(shards)[:2] == (
    f"{shards / shard}: {name}",
    f"a tensor that {path.name} does not list",
  )


def test_tensor_in_two_shards(shards, state):
  path, index = _index(shards)
  published.save_safetensors(
    {"a.weight": state["a.weight"], "e": state["b.weight"]},
    shards / "more.safetensors",
  )
  index["weight_map"]["e"] = "more.safetensors"
  path.write_text(json.dumps(index))
  assert refused_folder(shards)[:2] == (
    f"{shards / 'more.safetensors'}: a.weight",
    f"a tensor that {index['weight_map']['a.weight']} has, too",
  )


@pytest.mark.parametrize(
  "shard",
  [
    "../out.safetensors",
    "OUT",
    "sub/x.safetensors",
    ".",
    "",
    "a\0b",
    "a" * 256,
  ],
)
def test_shard_elsewhere(shards, tmp_path_factory, shard):
  """An index is a stranger's: it names no file outside of its folder."""
  path, index = _index(shards)
  elsewhere = tmp_path_factory.mktemp("elsewhere") / "out.safetensors"
  for place in (elsewhere, shards.parent / "out.safetensors"):
    place.write_bytes((shards / index["weight_map"]["a.weight"]).read_bytes())
  shard = shard.replace("OUT", str(elsewhere))
  index["weight_map"]["a.weight"] = shard
  path.write_text(json.dumps(index))
  where, got, expected = refused_folder(shards)
  assert (where, expected) == (f"{path}: a.weight", "a plain file name")
  assert got == shorten(shard)


@pytest.mark.parametrize(
  "content, where, got",
  [
    ("{", "", "Expecting property name"),
    ("[" * 100_000, "", "lists or objects nested too deep"),
    ("[]", "", "[]"),
    ("{}", ": field weight_map", "nothing"),
    ('{"weight_map": []}', ": field weight_map", "[]"),
    ('{"weight_map": {"a": 1}}', ": a", "1"),
    ('{"weight_map": {"a": "\\ud800"}}', "", "half of a surrogate pair"),
    (b"\xff", "", "byte 0xff at offset 0"),
  ],
)
def test_damaged_index(tmp_path, content, where, got):
  path = tmp_path / "model.safetensors.index.json"
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  found = refused_folder(tmp_path)
  assert found[0] == f"{path}{where}"
  assert found[1].startswith(got)


def test_index_that_is_a_pipe(tmp_path):
  path = tmp_path / "model.safetensors.index.json"
  os.mkfifo(path)
  assert refused_folder(tmp_path)[:2] == (str(path), "a pipe")


@pytest.mark.parametrize(
  "file, got",
  [
    ("notes.txt", "no weights"),
    ("adapter_config.json", "a LoRA adapter"),
    ("mm_projector.bin", "a projector alone"),
    ("llava-7b.Q4_K_M.gguf", "GGUF files"),
    ("consolidated.00.pth", "weights as Meta has them"),
  ],
)
def test_no_weights(tmp_path, file, got):
  (tmp_path / file).touch()
  assert refused_folder(tmp_path)[:2] == (str(tmp_path), got)
