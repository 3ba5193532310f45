"""The doctor on set-ups that are really broken, each in one way or in all."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import psutil
import pytest

from tests import runs
from tests.training.test_checkpoint import save
from vocojax.config import load_module, phases
from vocojax.errors import CheckpointError
from vocojax.health import checkpoints, machine
from vocojax.health.findings import size
from vocojax.training import checkpoint

VERSIONS = """
from vocojax.health import versions
print(*versions.check(), sep="\\n")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Data, a config, and a workdir with two real checkpoints."""
  folder = tmp_path_factory.mktemp("doctor")
  runs.write_data(folder)
  runs.write_config(folder, "one.py", runs.ONE_PHASE)
  save(config_of(folder), folder / "run/voco", (3, 5))
  return folder


def config_of(folder, name="one.py", **changes):
  (config,) = phases(load_module(str(folder / name)))
  return dataclasses.replace(
    config, data=dataclasses.replace(config.data, **changes)
  )


def python(*arguments, **env):
  return subprocess.run(
    [sys.executable, *arguments],
    cwd=runs.ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"} | env,
    capture_output=True,
    text=True,
  )


def lines(findings):
  return [str(f) for f in findings]


# Packages ------------------------------------------------------------------


def install(folder, name, version, *extra):
  """What pip leaves of a package for others to read."""
  info = folder / f"{name}-{version}.dist-info"
  info.mkdir(parents=True)
  head = ("Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}")
  (info / "METADATA").write_text("\n".join((*head, *extra)) + "\n")


def test_packages_as_they_are():
  """Here everything is as setup.py says, or these tests would not run."""
  found = python("-c", VERSIONS).stdout.splitlines()
  assert found[0].startswith("Python: 3.")
  assert found[0].endswith(": OK")
  (packages,) = found[1:]
  assert re.fullmatch(
    r"packages: \d+ as vocojax and jax ask for them: OK", packages
  )
  # Those of setup.py are among them.
  assert int(packages.split()[1]) > len(requirements())


def requirements():
  text = (runs.ROOT / "setup.py").read_text()
  return re.findall(r'"([\w-]+)[>=]', text.split("EXTRAS")[0])


def test_wrong_versions(tmp_path):
  install(tmp_path, "jaxlib", "0.9.1")  # does not fit jax
  install(tmp_path, "grain", "0.1.0")  # too old
  install(tmp_path, "pytest", "8.0")  # of an extra
  process = python("-c", VERSIONS, PYTHONPATH=str(tmp_path))
  found = process.stdout.splitlines()
  pip = f"{sys.executable} -m pip install"
  wrong = {s.split()[1]: s for s in found if not s.endswith(": OK")}
  assert wrong.keys() == {"grain:", "jaxlib:", "pytest:"}
  assert wrong["grain:"] == (
    "package grain: found 0.1.0, vocojax needs <0.3,>=0.2.18: error: "
    f"{pip} 'grain<0.3,>=0.2.18'"
  )
  assert re.fullmatch(
    r"package jaxlib: found 0.9.1, jax needs \S*: error: \S+ -m pip install "
    r"'jaxlib\S+'",
    wrong["jaxlib:"],
  )
  assert wrong["pytest:"] == (
    "package pytest: found 8.0, vocojax needs <10,>=9: warning: "
    f"{pip} 'pytest<10,>=9'"
  )


def test_wrong_python_and_missing_package(tmp_path):
  install(
    tmp_path,
    "vocojax",
    "0.1.0",
    "Requires-Python: >=3.99",
    "Requires-Dist: no-such-package>=2",
    'Requires-Dist: neither-this; extra == "gpu"',
    'Requires-Dist: nor-this; python_version < "3"',
    "Provides-Extra: gpu",
  )
  found = python("-c", VERSIONS, PYTHONPATH=str(tmp_path)).stdout.splitlines()
  assert found[0].endswith(
    "expected >=3.99: error: make an environment with such a Python; "
    "PYTHON=/path/to/it launch/quickstart.sh does"
  )
  assert found[1] == (
    "package no-such-package: found nothing, vocojax needs >=2: error: "
    f"{sys.executable} -m pip install 'no-such-package>=2'"
  )
  assert not re.search("neither-this|nor-this", "".join(found))


def test_not_installed():
  code = f"import sys; sys.path[:] = ['.'] + sys.path[1:]\n{VERSIONS}"
  site = [p for p in sys.path if "site-packages" in p]
  hide = f"import sys; site = {site!r}\nimport packaging.requirements\n"
  hide += "sys.path[:] = [p for p in sys.path if p not in site]\n"
  found = python("-c", hide + code).stdout.splitlines()
  assert found == [
    f"package vocojax: not installed: error: {sys.executable} -m pip install "
    "-e . in its folder, or run launch/quickstart.sh"
  ]


# Machine -------------------------------------------------------------------


def test_devices(tmp_path, monkeypatch):
  """JAX says what there is; a file of a device, that there is more."""
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  (found,) = lines(machine.devices(tmp_path))
  assert found == "devices: 1 x cpu (cpu): OK"


@pytest.mark.parametrize(
  ("file", "name", "extra", "driver"),
  [
    ("nvidia0", "an NVIDIA GPU", "gpu", " and a driver 580 or newer"),
    ("accel0", "a TPU", "tpu", ""),
    ("vfio/0", "a TPU", "tpu", ""),
  ],
)
def test_accelerator_that_jax_misses(
  tmp_path, monkeypatch, file, name, extra, driver
):
  path = tmp_path / file
  path.parent.mkdir(exist_ok=True)
  path.touch()
  monkeypatch.setenv("JAX_PLATFORMS", "")
  (found,) = lines(machine.devices(tmp_path))
  assert found == (
    f"devices: 1 x cpu (cpu), but {path} says that there is {name}: error: "
    f"{sys.executable} -m pip install -e '.[{extra}]' in the folder of vocojax "
    f"installs JAX for it; it needs a user who may open {path}{driver}"
  )


def test_accelerator_that_the_user_hides(tmp_path, monkeypatch):
  (tmp_path / "nvidia0").touch()
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  (found,) = lines(machine.devices(tmp_path))
  assert found == (
    f"devices: 1 x cpu (cpu), but {tmp_path}/nvidia0 says that there is an "
    "NVIDIA GPU: warning: unset JAX_PLATFORMS, which is 'cpu'"
  )


def test_jax_does_not_start(monkeypatch):
  monkeypatch.setenv("JAX_PLATFORMS", "no_such")
  (found,) = machine.devices()
  assert found.status == "error"
  assert found.found.startswith("JAX does not start (RuntimeError: ")
  assert found.remedy.endswith("or unset JAX_PLATFORMS, which is 'no_such'")
  (found,) = machine.devices(timeout=0.01)
  assert str(found).startswith(
    "devices: JAX did not start in 0.01 s: error: end other programs"
  )


def test_memory(folder):
  config = config_of(folder)
  assert machine.memory((config,)).status == "OK"
  free = psutil.virtual_memory().available
  # An image of 64 x 64 x 3 bytes and 24 tokens, in 4 arrays of 4 bytes each.
  row, waiting = 64 * 64 * 3 + 4 * 4 * 24, 2
  greedy = dataclasses.replace(
    config.data, batch_size=2 * free // row // waiting
  )
  found = machine.memory((config, dataclasses.replace(config, data=greedy)))
  assert found.status == "error"
  assert f"{size(2 * free)} for batches that are prepared ahead" in found.found


def test_disk(tmp_path):
  """A folder that is not there yet is measured, not made."""
  workdir = tmp_path / "not/there"
  free = shutil.disk_usage(tmp_path).free
  assert machine.disk(workdir).status == "OK"
  assert machine.disk(workdir, free // 2).status == "OK"
  found = machine.disk(workdir, 2 * free)
  assert found.status == "error"
  assert f"take up to {size(2 * free)}" in found.found
  assert list(tmp_path.iterdir()) == []
  (tmp_path / "file").touch()
  found = machine.disk(tmp_path / "file")
  assert str(found) == (
    f"disk of {tmp_path}/file: {tmp_path}/file cannot be written to: error: "
    "choose another --workdir, or make it a folder that can be written to"
  )


def test_full_disk(full_disk):
  found = machine.disk(full_disk / "run")
  assert str(found) == (
    f"disk of {full_disk}/run: 0.0 KiB free: error: free some space, choose "
    "another --workdir, or lower config.training.keep_checkpoints"
  )


@pytest.fixture
def full_disk(tmp_path):
  """A disk of 128 KiB, all of it used."""
  where = tmp_path / "full"
  where.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(where)]
  if shutil.which("mount") is None or os.geteuid():
    pytest.skip("only root can mount a small disk")
  process = subprocess.run(mount, capture_output=True, text=True)
  if process.returncode:
    pytest.skip(f"cannot mount a small disk: {process.stderr.strip()}")
  (where / "fill").write_bytes(bytes(128 * 1024))
  yield where
  subprocess.run(["umount", str(where)], check=True)


# Checkpoints ---------------------------------------------------------------


def copy(folder, tmp_path):
  shutil.copytree(folder / "run", tmp_path / "run")
  return tmp_path / "run/voco", tmp_path / "run/voco/checkpoints"


def test_checkpoints(folder):
  """What the trainer writes is whole; no item of it is forgotten here."""
  phase = folder / "run/voco"
  steps = phase / "checkpoints"
  written = {p.name for p in (steps / "5").iterdir() if p.is_dir()}
  assert written == {*checkpoints.WEIGHTS, *checkpoints.RUN}
  whole = "a run to go on with, compressor voco, 267.6 KiB, all of it read: OK"
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
    f"checkpoint {steps}/5: lacks {item}: error: move this folder away; the "
    "run then goes on from step 3"
  )
  assert found[0].endswith(": OK")
  assert sorted(steps.rglob("*")) == before


def data_state(step):
  (path,) = (p for p in (step / "data").iterdir() if "commit" not in p.name)
  return path


@pytest.mark.parametrize(
  "damage",
  [
    lambda step: (step / "params/manifest.ocdbt").unlink(),
    lambda step: (step / "optimizer/_METADATA").write_text("{"),
    lambda step: (step / "progress/metadata").write_text("{"),
    lambda step: data_state(step).write_text("{"),
    lambda step: (step / "config/metadata").write_text("{}"),
  ],
  ids=["manifest", "metadata", "progress", "data", "config"],
)
def test_damaged(folder, tmp_path, damage):
  phase, steps = copy(folder, tmp_path)
  damage(steps / "5")
  damage(steps / "3")
  found = lines(checkpoints.check(phase, thorough=True))
  assert len(found) == 2
  for number, line in zip((3, 5), found, strict=True):
    assert line.startswith(f"checkpoint {steps}/{number}: ")
    assert re.search("cannot be read|not a config", line)
    assert line.endswith(
      ": error: move this folder away; no good step is before it, so the phase "
      "starts anew"
    )


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
  with pytest.raises(CheckpointError, match="no complete checkpoint"):
    checkpoint.find(str(phase))


def test_no_such_checkpoint(tmp_path):
  assert lines(checkpoints.check(tmp_path)) == [
    f"checkpoint {tmp_path}: no folder {tmp_path}/checkpoints: error: name the "
    "phase folder of a workdir, or use --workdir for all of them"
  ]


def test_sizes(folder):
  """Against what is on disk, before compression."""
  parameters, nbytes = checkpoints.sizes(config_of(folder))
  (found,) = checkpoints.check(folder / "run/voco/checkpoints/5")
  assert f", {size(nbytes)}," in found.found
  assert 4 * parameters < nbytes < 12 * parameters + 100
  files = [p for p in (folder / "run").rglob("*") if p.is_file()]
  total = sum(p.stat().st_size for p in files)
  assert checkpoints.bytes_on_disk(folder / "run") == total


# The program ---------------------------------------------------------------


def test_nothing_wrong(folder, tmp_path):
  """With all that can be checked; it writes what it was asked for only."""
  before = sorted(folder.rglob("*"))
  process = python(
    "-m",
    "vocojax.doctor",
    f"--config={folder}/one.py",
    f"--workdir={folder}/run",
    f"--checkpoint={folder}/run/voco/checkpoints/3",
    f"--list={tmp_path}/list.txt",
    f"--plot={tmp_path}/plot.png",
  )
  found = process.stdout.splitlines()
  assert process.returncode == 0, process.stdout + process.stderr
  checked = [line.partition(":")[0] for line in found if line.endswith(": OK")]
  steps = f"checkpoint {folder}/run/voco/checkpoints"
  assert checked == [
    "Python",
    "packages",
    "devices",
    "host memory",
    "model of voco",
    f"disk of {folder}/run",
    f"{steps}/3",
    f"{steps}/3",
    f"{steps}/5",
    "data of voco, records",
    "data of voco, text",
  ]
  assert found[-1] == "0 errors, 0 warnings"
  assert "Traceback" not in process.stderr
  assert re.search(r"24/24 \[.*record/s\]", process.stderr)  # rate and time
  assert (tmp_path / "list.txt").read_text() == ""
  assert (tmp_path / "plot.png").stat().st_size > 10_000
  assert sorted(folder.rglob("*")) == before


def test_all_of_it_broken(folder, tmp_path):
  """A wrong package, no disk, a missing image, half a checkpoint."""
  install(tmp_path / "site", "grain", "0.1.0")
  _, steps = copy(folder, tmp_path)
  shutil.rmtree(steps / "5/optimizer")
  shutil.copytree(steps / "3", steps / "7.orbax-checkpoint-tmp")
  images = tmp_path / "images"
  images.mkdir()
  for i in range(1, runs.NUM_RECORDS):
    shutil.copy(folder / f"{i}.png", images)
  free = shutil.disk_usage(tmp_path).free
  process = python(
    "-m",
    "vocojax.doctor",
    f"--config={folder}/one.py",
    f"--config.data.image_folder={images}",
    # More than the disk holds, in the layers alone.
    f"--config.model.llm.intermediate_size={free // 1000}",
    f"--workdir={tmp_path}/run",
    f"--list={tmp_path}/list.txt",
    PYTHONPATH=str(tmp_path / "site"),
  )
  assert process.returncode == 1
  wrong = [
    line
    for line in process.stdout.splitlines()
    if re.search(": (error|warning): ", line)
  ]
  patterns = (
    r"package grain: found 0.1.0, vocojax needs <0.3,>=0.2.18: error: .* -m "
    r"pip install 'grain<0.3,>=0.2.18'",
    rf"disk of {tmp_path}/run: \S+ GiB free, the checkpoints of this run take "
    r"up to \S+ GiB: error: free some space, .*",
    rf"checkpoint {steps}/5: lacks optimizer: error: move this folder away; "
    "the run then goes on from step 3",
    rf"checkpoint {steps}/7.orbax-checkpoint-tmp: half-written: warning: .*",
    rf"data of voco, missing images: 1: error: record r0: {images}/0.png: no "
    r"such image file .*; check config.data.image_folder",
    "data of voco, records: 23 of 24 can be trained on .*: error: training "
    "stops at the first other one; .*",
  )
  assert len(wrong) == len(patterns), process.stdout + process.stderr
  for pattern, line in zip(patterns, wrong, strict=True):
    assert re.fullmatch(pattern, line), line
  assert process.stdout.splitlines()[-1] == "5 errors, 1 warning"
  (listed,) = (tmp_path / "list.txt").read_text().splitlines()
  assert listed.startswith(f"record r0: {images}/0.png: no such image file")


def test_jax_cannot_be_imported(folder, tmp_path):
  """What needs no JAX is checked all the same."""
  (tmp_path / "jax.py").write_text("raise AttributeError('no jaxlib')\n")
  process = python(
    "-m",
    "vocojax.doctor",
    f"--config={folder}/one.py",
    f"--workdir={folder}/run",
    PYTHONPATH=str(tmp_path),
  )
  found = process.stdout.splitlines()
  assert process.returncode == 1
  assert "Traceback" not in process.stderr
  errors = [line for line in found if ": error: " in line]
  assert errors[0].startswith(
    "devices: JAX does not start (AttributeError: no jaxlib): error: "
  )
  names = [line.partition(":")[0] for line in errors]
  assert names == ["devices", "disk", "checkpoints", "data"]
  for line in errors[1:]:
    assert re.search(
      r": error: cannot be checked, since vocojax\.\S+ cannot be imported "
      r"\(AttributeError: no jaxlib\); correct the packages named above$",
      line,
    ), line
  assert any(line.startswith("host memory: ") for line in found)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (
      ["--plot=x.png"],
      "--plot: found no --config, which names the data; add it",
    ),
    (["--config.seed=1"], "--config.seed: needs --config=FILE as well; "),
    (["--config=none.py"], "--config=none.py: no such file; "),
  ],
)
def test_wrong_usage(arguments, message):
  process = python("-m", "vocojax.doctor", *arguments)
  assert (process.returncode, process.stdout) == (2, "")
  assert process.stderr.startswith(f"error: {message}")
