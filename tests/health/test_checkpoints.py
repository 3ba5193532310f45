"""Real checkpoints, broken in every way that comes to mind."""

import json
import os
import re
import shutil

import pytest

from tests.health.setups import config_of, copy, lines, python
from vocojax.errors import CheckpointError
from vocojax.health import checkpoints
from vocojax.health.findings import size
from vocojax.training import checkpoint, checksums


def test_checkpoints(folder):
  """What the trainer writes is whole; no item of it is forgotten here."""
  phase = folder / "run/voco"
  steps = phase / "checkpoints"
  written = {p.name for p in (steps / "5").iterdir() if p.is_dir()}
  assert written == {*checkpoints.WEIGHTS, *checkpoints.RUN}
  whole = "a run to resume, compressor voco, 267.6 KiB, all of it read: OK"
  unread = whole.replace("all of it", "arrays not").replace(
    ": OK", ", --thorough does: OK"
  )
  assert lines(checkpoints.check(phase)) == [
    f"checkpoint {steps}/3: {unread}",
    f"checkpoint {steps}/5: {whole}",
  ]
  assert lines(checkpoints.check(phase, thorough=True)) == [
    f"checkpoint {steps}/3: {whole}",
    f"checkpoint {steps}/5: {whole}",
  ]
  assert lines(checkpoints.check(steps / "3")) == [
    f"checkpoint {steps}/3: {whole}"
  ]
  assert checkpoints.folders(folder / "run") == [steps]
  assert checkpoints.folders(folder / "none") == []


def test_weights_without_a_run(folder, tmp_path):
  _, steps = copy(folder, tmp_path)
  for item in checkpoints.RUN:
    shutil.rmtree(steps / "5" / item)
  checksums.write(steps / "5", 5)
  (found,) = checkpoints.check(steps / "5")
  assert found.status == "OK"
  assert "weights without a run, compressor voco, 89.2 KiB" in found.found


@pytest.mark.parametrize("item", [*checkpoints.WEIGHTS, *checkpoints.RUN])
def test_item_missing(folder, tmp_path, item):
  phase, steps = copy(folder, tmp_path)
  shutil.rmtree(steps / "5" / item)
  before = sorted(steps.rglob("*"))
  found = lines(checkpoints.check(phase))
  assert found[1] == (
    f"checkpoint {steps}/5: got no {item}, expected all items: error: copy it "
    "again, or move it away; without this folder the run resumes from step 3"
  )
  assert found[0].endswith(": OK")
  assert sorted(steps.rglob("*")) == before


def unsummed(step):
  (step / checksums.FILE).unlink()


@pytest.mark.parametrize("summed", [True, False])
@pytest.mark.parametrize(
  "name, content",
  [
    ("params/manifest.ocdbt", None),
    ("optimizer/_METADATA", b"{"),
    ("optimizer/_METADATA", b'{"tree_metadata": {"a": 1}}'),
    ("params/_METADATA", b'{"tree_metadata": [1]}'),
    ("progress/metadata", b"{"),
    ("progress/metadata", b'{"loss": "1"}'),
    ("data/metadata", b"\xff"),
    ("data/metadata", b"[" * 100_000),
    ("config/metadata", b"{}"),
    ("config/metadata", b"[]"),
    ("tokenizer/metadata", b'{"../x.json": {}}'),
    ("tokenizer/metadata", b"7"),
    ("layout/metadata", b'{"name": ["qa_v1"], "version": 1}'),
  ],
)
def test_damaged(folder, tmp_path, name, content, summed):
  """Whether or not there are checksums, which find it first."""
  phase, steps = copy(folder, tmp_path)
  for step in ("3", "5"):
    (steps / step / name).unlink()
    if content is not None:
      (steps / step / name).write_bytes(content)
    if not summed:
      unsummed(steps / step)
  found = lines(checkpoints.check(phase, thorough=True))
  assert len(found) == 2
  for number, line in zip((3, 5), found, strict=True):
    item = name.partition("/")[0]
    # TensorStore names no item.
    where = "" if content is None and not summed else f"{item}.*: "
    assert re.fullmatch(
      f"checkpoint {steps}/{number}: {where}got .*, expected .*: error: .*; "
      "without this folder the phase starts anew",
      line,
    ), line


def test_pipe(folder, tmp_path):
  """Nobody writes to it: a reader would wait for ever."""
  _, steps = copy(folder, tmp_path)
  for step, name in (("3", "config/metadata"), ("5", "params/_METADATA")):
    (steps / step / name).unlink()
    os.mkfifo(steps / step / name)
    for _ in range(2):
      (found,) = checkpoints.check(steps / step)
      assert (found.status, found.found) == (
        "error",
        f"{name}: got a pipe, expected a regular file",
      )
      (steps / step / checksums.FILE).unlink(missing_ok=True)


def test_flipped_bit(folder, tmp_path):
  """In full, also what nothing else shows."""
  _, steps = copy(folder, tmp_path)
  path = max(
    (steps / "5/optimizer").rglob("d/*"), key=lambda p: p.stat().st_size
  )
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 4
  path.write_bytes(content)
  good, bad = checkpoints.check(steps)
  assert (good.status, bad.status) == ("OK", "error")
  name = path.relative_to(steps / "5")
  assert bad.found == (
    f"{name}: got damaged content, expected what was written at step 5"
  )


def test_no_checksums(folder, tmp_path):
  _, steps = copy(folder, tmp_path)
  unsummed(steps / "5")
  (found,) = checkpoints.check(steps / "5")
  assert found.status == "OK"
  assert found.found.endswith(", all of it read, no checksums.json")


# Whether training could start from a checkpoint whose files are gone or cut,
# one at a time. In a process of its own, since Orbax leaves readers behind.
LOADS = """
import json, os, pathlib, sys
from tests import runs
from vocojax.training import checkpoint, loop

phase = pathlib.Path(sys.argv[1])
loaded = checkpoint.load(str(phase))
abstract = loop.abstract_params(runs.model_of(loaded), runs.mesh())
for name in json.loads(sys.argv[2]):
  path = phase / "checkpoints/5" / name
  content = path.read_bytes()
  for damage in (path.unlink, lambda: os.truncate(path, len(content) // 2)):
    damage()
    try:
      checkpoint.load_params(str(phase), abstract, loaded.config.model)
      print("OK")
    except Exception:  # nearly any
      print("error")
    path.write_bytes(content)
sys.stdout.flush()
os._exit(0)
"""


def test_files_of_arrays(folder, tmp_path):
  """Whichever file is gone or cut: no worse and no better than for training."""
  phase, steps = copy(folder, tmp_path)
  step = steps / "5"
  paths = sorted((step / "params").glob("**/d/*"))
  verdicts = []
  unsummed(step)  # which find all
  for path in paths:
    content = path.read_bytes()
    for cut in (False, True):
      path.write_bytes(content[: len(content) // 2]) if cut else path.unlink()
      (found,) = checkpoints.check(step)
      verdicts.append(found.status)
      path.write_bytes(content)
  names = json.dumps([str(p.relative_to(step)) for p in paths])
  process = python("-c", LOADS, str(phase), names)
  assert process.stdout.split() == verdicts, process.stderr
  assert {"OK", "error"} >= set(verdicts) > {"OK"}


def test_half_written(folder, tmp_path):
  """As Orbax leaves it when it is killed: before, and while, it renames."""
  phase, steps = copy(folder, tmp_path)
  temporary = steps / "7.orbax-checkpoint-tmp"
  shutil.copytree(steps / "5", temporary)
  shutil.rmtree(temporary / "optimizer")
  (temporary / "commit_success.txt").unlink(missing_ok=True)
  before = sorted(steps.rglob("*"))
  found = lines(checkpoints.check(phase))
  assert found[2:] == [
    f"checkpoint {temporary}: half-written: warning: nothing ever picks it up; "
    "delete it unless a run is writing it now"
  ]
  assert checkpoint.find(str(phase)) == (steps, 5)
  assert sorted(steps.rglob("*")) == before
  for number in ("3", "5"):
    shutil.rmtree(steps / number)
  found = lines(checkpoints.check(phase))
  assert found[1] == (
    f"checkpoint {steps}: no complete step: warning: the same command as "
    "before starts this phase anew"
  )
  with pytest.raises(CheckpointError) as e:
    checkpoint.find(str(phase))
  assert e.value.got == "no complete step"


def test_no_such_checkpoint(tmp_path):
  assert lines(checkpoints.check(tmp_path)) == [
    f"checkpoint {tmp_path}: no folder {tmp_path}/checkpoints: error: name the "
    "phase folder of a workdir, or use --workdir for all of them"
  ]
  (tmp_path / "checkpoints").mkdir()
  (found,) = checkpoints.check(tmp_path / "checkpoints/4")
  assert found.status == "error"
  assert found.found == f"no folder {tmp_path}/checkpoints/4"


def test_sizes(folder):
  """Against what is on disk, before compression."""
  parameters, nbytes = checkpoints.sizes(config_of(folder))
  (found,) = checkpoints.check(folder / "run/voco/checkpoints/5")
  assert f", {size(nbytes)}," in found.found
  assert 4 * parameters < nbytes < 12 * parameters + 100
  files = [p for p in (folder / "run").rglob("*") if p.is_file()]
  total = sum(p.stat().st_size for p in files)
  assert checkpoints.bytes_on_disk(folder / "run") == total
