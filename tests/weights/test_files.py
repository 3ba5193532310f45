"""Weight files that are incomplete, damaged, foreign or hostile.

Every message names the file or tensor. Read next: `published.py`.
"""

import collections
import json
import os
import pathlib
import pickle
import zipfile

import pytest
import torch

from tests.weights import published
from vocojax.errors import WeightsError
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
  with pytest.raises(WeightsError, match=r"strides \(1, 3\)"):
    files.open_file(path)


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
  with pytest.raises(WeightsError, match=f"evil.bin: its pickle asks.* {name}"):
    files.open_file(path)
  assert not (tmp_path / "PROOF").exists()
  if "PROOF" in str(arguments):  # it would have run
    torch.load(path, weights_only=False)
    assert (tmp_path / "PROOF").exists()


def _write_pickle(path, content: bytes):
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("x/data.pkl", content)


def test_pickle_cannot_change_what_was_read(tmp_path):
  """The opcode that sets attributes, on a tensor."""
  tensor = torch.zeros(3)

  class Changed:
    def __reduce__(self):
      function, arguments = tensor.__reduce_ex__(2)[:2]
      return function, arguments, {"offset": 0}

  path = tmp_path / "x.bin"
  torch.save({"a": tensor, "b": Changed()}, path)
  with pytest.raises(WeightsError, match=r"x\.bin: cannot be read"):
    files.open_file(path)


@pytest.mark.parametrize(
  "value, message",
  [
    ([1, 2], "holds a list, expected a dictionary"),
    ({"a": 1}, "'a' is a int, expected tensors"),
    ({1: 1}, "1 is a int"),
    ({"a": {"b": 1}}, "'a' is a dict"),
  ],
)
def test_other_content(tmp_path, value, message):
  path = tmp_path / "x.bin"
  torch.save(value, path)
  with pytest.raises(WeightsError, match=message):
    files.open_file(path)


def test_damaged_bin(tmp_path, state):
  path = tmp_path / "x.bin"
  torch.save(state, path, _use_new_zipfile_serialization=False)
  with pytest.raises(WeightsError, match=r"x\.bin: not a zip.*before 1\.6"):
    files.open_file(path)
  torch.save(state, path)
  path.write_bytes(path.read_bytes()[:-40])
  with pytest.raises(WeightsError, match=r"x\.bin: not a zip"):
    files.open_file(path)
  _write_pickle(path, b"garbage")
  with pytest.raises(WeightsError, match=r"x\.bin: cannot be read"):
    files.open_file(path)
  _write_pickle(path, pickle.dumps({}, 2)[:-1])
  with pytest.raises(WeightsError, match=r"x\.bin: cannot be read"):
    files.open_file(path)
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("x/other", b"")
  with pytest.raises(WeightsError, match=r"without data\.pkl"):
    files.open_file(path)


def test_damaged_safetensors(tmp_path, state):
  path = tmp_path / "x.safetensors"
  published.save_safetensors(state, path)
  content = path.read_bytes()
  for damaged, message in (
    (content[:-1], "cut off"),
    (content[:20], "no safetensors header"),
    (b"", "no safetensors header"),
    (content.replace(b'"F32"', b'"F33"'), "dtype F33"),
    (content.replace(b"[5,3]", b"[5,4]"), r"60 bytes for shape \(5, 4\)"),
    (content.replace(b"b.weight", b"a.weight"), "a.weight twice"),
  ):
    assert damaged != content
    path.write_bytes(damaged)
    with pytest.raises(WeightsError, match=rf"x\.safetensors: .*{message}"):
      files.open_file(path)


def _index(folder: pathlib.Path) -> tuple[pathlib.Path, dict]:
  path = folder / "model.safetensors.index.json"
  return path, json.loads(path.read_text())


@pytest.fixture
def shards(tmp_path, state):
  published.save_shards(state, tmp_path, 100)
  assert len(list(tmp_path.glob("*.safetensors"))) >= 2
  assert_read(files.open_folder(tmp_path), state)
  return tmp_path


def test_missing_shard(shards):
  first = min(shards.glob("*.safetensors"))
  first.unlink()
  with pytest.raises(WeightsError, match=f"{first.name}: missing shard"):
    files.open_folder(shards)


def test_index_names_an_absent_tensor(shards):
  path, index = _index(shards)
  index["weight_map"]["ghost"] = index["weight_map"]["a.weight"]
  path.write_text(json.dumps(index))
  with pytest.raises(WeightsError, match=r"ghost: .*index\.json puts it in"):
    files.open_folder(shards)


def test_index_lacks_a_tensor(shards):
  path, index = _index(shards)
  names = collections.defaultdict(list)
  for name, shard in index["weight_map"].items():
    names[shard].append(name)
  name = max(names.values(), key=len)[0]
  del index["weight_map"][name]
  path.write_text(json.dumps(index))
  with pytest.raises(WeightsError, match=f"{name}: .* not in"):
    files.open_folder(shards)


def test_tensor_in_two_shards(shards, state):
  path, index = _index(shards)
  published.save_safetensors(
    {"a.weight": state["a.weight"], "e": state["b.weight"]},
    shards / "more.safetensors",
  )
  index["weight_map"]["e"] = "more.safetensors"
  path.write_text(json.dumps(index))
  with pytest.raises(WeightsError, match=r"a\.weight: in .* and "):
    files.open_folder(shards)


def test_no_index(tmp_path):
  with pytest.raises(WeightsError, match="no weights, expected one of"):
    files.open_folder(tmp_path)
  (tmp_path / "model.safetensors.index.json").write_text("{}")
  with pytest.raises(WeightsError, match="not an index"):
    files.open_folder(tmp_path)
