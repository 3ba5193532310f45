"""Damage to a checkpoint is found, whichever bit of whichever file it is."""

import contextlib
import json
import os
import random
import shutil
import zlib

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests import runs
from tests.training import test_checkpoint as cases
from vocojax.errors import CheckpointError
from vocojax.training import checkpoint, checksums, loop

STEPS = (5, 10)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A phase with two checkpoints, and what each of them holds."""
  folder = tmp_path_factory.mktemp("checksums")
  runs.write_data(folder)
  runs.write_config(folder, "one.py", runs.ONE_PHASE)
  phase = cases.save(cases.config_of(folder), folder / "run", STEPS)
  with opened(phase, phase.folder) as checkpoints:
    held = {step: everything(checkpoints, phase, step) for step in STEPS}
  return phase, held


@contextlib.contextmanager
def opened(phase, folder):
  checkpoints = checkpoint.Checkpointer(folder, phase.config, phase.tokenizer)
  with contextlib.closing(checkpoints):
    yield checkpoints


def everything(checkpoints, phase, step):
  """All that readers of a step get: text, and arrays in their order."""
  path = str(checkpoints.path(step))
  train_state, shares, progress = checkpoints.restore(
    step, cases.abstract(phase), 1
  )
  wanted = loop.abstract_params(phase.model, runs.mesh())
  params, missing = checkpoint.load_params(path, wanted, phase.config.model)
  loaded = checkpoint.load(path)
  text = [loaded.config, loaded.step, missing, shares, progress]
  text.append(loaded.tokenizer.backend_tokenizer.to_str())
  return text, [np.asarray(x) for x in jax.tree.leaves((params, train_state))]


def assert_same(found, expected):
  assert found[0] == expected[0]
  for x, y in zip(found[1], expected[1], strict=True):
    np.testing.assert_array_equal(x, y)


def copy(phase, tmp_path):
  shutil.copytree(phase.folder, tmp_path / "run")
  return tmp_path / "run/checkpoints/10"


def test_single_bits_of_every_file(saved, tmp_path):
  """It is refused, or what is read is right: never another value."""
  phase, held = saved
  where = copy(phase, tmp_path)
  rng = random.Random(0)
  paths = sorted(p for p in where.rglob("*") if p.is_file())
  assert len(paths) > 30
  refused, read = 0, set()
  with opened(phase, tmp_path / "run") as checkpoints:
    for path in paths * 3:
      content = path.read_bytes()
      flipped = bytearray(content)
      flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
      path.write_bytes(flipped)
      try:
        found = everything(checkpoints, phase, 10)
      except CheckpointError as e:
        refused += 1
        assert e.where.startswith(str(where)) and e.fix
      else:
        assert_same(found, held[10])
        read.add(path.name)
      path.write_bytes(content)
    assert_same(everything(checkpoints, phase, 10), held[10])
  # What Orbax keeps beside the items, which nobody reads, and a name in the
  # checksums, without which one sound file is not compared.
  beside = {"_CHECKPOINT_METADATA", "commit_success.txt", checksums.FILE}
  assert read <= beside
  assert refused >= 3 * (len(paths) - len(beside))


@pytest.mark.parametrize("item", ["params", "optimizer"])
def test_item_of_another_step(saved, tmp_path, item):
  phase, _ = saved
  where = copy(phase, tmp_path)
  shutil.rmtree(where / item)
  shutil.copytree(where.parent / "5" / item, where / item)
  with opened(phase, tmp_path / "run") as checkpoints:
    with pytest.raises(CheckpointError) as e:
      checkpoints.restore(10, cases.abstract(phase), 1)
  assert e.value.where.startswith(f"{where}/{item}/")
  # Without checksums, the number of the step in the optimizer's state says it.
  if item == "optimizer":
    (where / checksums.FILE).unlink()
    with opened(phase, tmp_path / "run") as checkpoints:
      with pytest.raises(CheckpointError) as e:
        checkpoints.restore(10, cases.abstract(phase), 1)
    assert (e.value.where, e.value.got) == (f"{where}/optimizer", "step 5")


def test_folder_of_another_step(saved, tmp_path):
  """All items together, with their checksums, under another number."""
  phase, _ = saved
  where = copy(phase, tmp_path)
  where.rename(where.with_name("12"))
  with pytest.raises(CheckpointError) as e:
    checkpoint.load(str(tmp_path / "run"))
  assert e.value.where == str(where.with_name("12"))
  assert e.value.got == "items of step 10"


@pytest.mark.parametrize(
  "damage",
  [
    lambda x: x | {"format": "vocojax-checksums/2"},
    lambda x: x | {"step": "10"},
    lambda x: x | {"files": []},
    lambda x: x | {"files": x["files"] | {"config/metadata": []}},
    lambda x: x | {"files": x["files"] | {"config/metadata": [10**30]}},
    lambda x: x | {"files": x["files"] | {"config/../../x": [0]}},
    lambda x: x | {"files": {"params/x": [0]}},
    lambda x: [x],
  ],
)
def test_wrong_checksums(saved, tmp_path, damage):
  phase, _ = saved
  where = copy(phase, tmp_path)
  path = where / checksums.FILE
  path.write_text(json.dumps(damage(json.loads(path.read_text()))))
  with pytest.raises(CheckpointError) as e:
    checkpoint.load(str(where))
  assert e.value.where.startswith(str(where)) and e.value.expected


def test_only_what_is_read_is_compared(saved, tmp_path):
  """Whoever wants weights does not read the optimizer's state."""
  phase, held = saved
  where = copy(phase, tmp_path)
  (where / "optimizer/manifest.ocdbt").unlink()
  (where / "progress/metadata").write_text("{")
  assert checkpoint.load(str(where)).config == held[10][0][0]
  wanted = loop.abstract_params(phase.model, runs.mesh())
  found, _ = checkpoint.load_params(str(where), wanted, phase.config.model)
  leaves = jax.tree.leaves(found)
  for x, y in zip(leaves, held[10][1][: len(leaves)], strict=True):
    np.testing.assert_array_equal(x, y)


def test_checkpoint_of_before_checksums(saved, tmp_path, capfd):
  """It opens, with one line."""
  phase, held = saved
  where = copy(phase, tmp_path)
  (where / checksums.FILE).unlink()
  with opened(phase, tmp_path / "run") as checkpoints:
    assert_same(everything(checkpoints, phase, 10), held[10])
  assert capfd.readouterr().err == (
    f"{where}: has no checksums.json, so damage to it goes unnoticed; "
    "checkpoints that this version writes have one\n"
  )


def test_orbax_alone_can_read_it(saved):
  """As before there were checksums."""
  phase, held = saved
  with ocp.CheckpointManager(phase.folder / "checkpoints") as manager:
    found = manager.restore(10)
  assert found["data"] == {"shares": cases.SHARES}
  leaves = jax.tree.leaves(found["params"])
  for x, y in zip(leaves, held[10][1][: len(leaves)], strict=True):
    np.testing.assert_array_equal(x, y)


BLOCK, PIECE = 2**26, 2**18


def digests(content: bytes) -> list[int]:
  """By the words of the docstring."""
  result = []
  for block in range(0, len(content), BLOCK):
    crc = 0
    for at in range(block, min(len(content), block + BLOCK), PIECE):
      words = content[at : at + PIECE].ljust(PIECE, b"\0")
      table = [
        [
          int.from_bytes(words[i : i + 8], "little")
          for i in range(j, j + 4096, 8)
        ]
        for j in range(0, PIECE, 4096)
      ]
      columns = [sum(column) for column in zip(*table, strict=True)]
      for sums in (columns, [sum(row) for row in table]):
        crc = zlib.crc32(
          b"".join((x % 2**64).to_bytes(8, "little") for x in sums), crc
        )
    result.append(crc)
  return result


def test_digests(tmp_path):
  content = random.Random(0).randbytes(PIECE + 5)
  (tmp_path / "item").mkdir()
  (tmp_path / "item/file").write_bytes(content)
  (tmp_path / "item/empty").touch()
  checksums.write(tmp_path, 3)
  assert json.loads((tmp_path / checksums.FILE).read_text()) == {
    "format": "vocojax-checksums/1",
    "step": 3,
    "files": {
      "item/file": [len(content), *digests(content)],
      "item/empty": [0],
    },
  }


def test_damage_of_many_kinds(tmp_path):
  """In a file of several blocks, also where one read ends."""
  (tmp_path / "item").mkdir()
  path = tmp_path / "item/file"
  size = BLOCK + PIECE + 3
  content = random.Random(0).randbytes(PIECE) * (size // PIECE + 1)
  content = content[:size]
  path.write_bytes(content)
  checksums.write(tmp_path, 0)

  def compare():
    with checksums.checked(tmp_path, 0, ["item"]) as there:
      assert there

  def swap(a, b, n):
    x = bytearray(content)
    x[a : a + n], x[b : b + n] = x[b : b + n], x[a : a + n]
    return x

  def flip(*bits):
    x = bytearray(content)
    for at, mask in bits:
      x[at] ^= mask
    return x

  compare()
  same = next(  # column, and the other value in this bit
    4096 * i + 3 for i in range(64) if (content[4096 * i + 3] ^ content[3]) & 16
  )
  for damaged in (
    *(
      flip((at, 1)) for at in (0, PIECE - 1, PIECE, BLOCK - 1, BLOCK, size - 1)
    ),
    flip((3, 16), (same, 16)),  # the sum of their column is as before
    swap(0, 4096, 4096),  # so is that of all columns
    swap(8, 16, 8),  # and here that of the row
    bytes(4096) + content[4096:],
    content[4096:] + content[:4096],
  ):
    assert len(damaged) == size and damaged != content
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError) as e:
      compare()
    assert (e.value.where, e.value.got) == (str(path), "damaged content")
  os.truncate(path, size - 1)
  with pytest.raises(CheckpointError) as e:
    compare()
  assert e.value.got == f"{size - 1:,} bytes"


def test_what_the_block_raises(tmp_path):
  """Damage explains any other error; a mistake of the user comes first."""
  (tmp_path / "item").mkdir()
  path = tmp_path / "item/file"
  content = random.Random(0).randbytes(2**22 + 1)
  path.write_bytes(content)
  checksums.write(tmp_path, 0)
  for damaged, raised, expected in (
    (False, KeyError("x"), KeyError),
    (True, KeyError("x"), CheckpointError),
    (True, CheckpointError("mine", "a", "b", "c"), "mine"),
  ):
    path.write_bytes(b"x" + content[1:] if damaged else content)
    kind = CheckpointError if expected == "mine" else expected
    with pytest.raises(kind) as e:
      with checksums.checked(tmp_path, 0, ["item"]):
        raise raised
    if expected is CheckpointError:
      assert e.value.where == str(path)
    else:
      assert e.value is raised
