"""The doctor as a program, on set-ups that are whole, broken, or no set-up."""

import re
import shutil

import pytest

from tests import runs
from tests.health.setups import copy, install, python


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
    "start of voco",
    "data of voco, records",
    "data of voco, text",
  ]
  assert found[-1] == "0 errors, 0 warnings"
  assert "Traceback" not in process.stderr
  assert re.search(r"24/24 \[.*record/s\]", process.stderr)  # rate and time
  assert (tmp_path / "list.txt").read_text() == ""
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
    r"host memory: .* free of .*, a run takes about \S+ GiB \(.*trained "
    r"parameters \S+ GiB.*\): error: use more devices or larger .*",
    rf"disk of {tmp_path}/run: \S+ GiB free, the checkpoints of this run take "
    r"up to \S+ GiB: error: free some space, .*",
    rf"checkpoint {steps}/5: got no optimizer, expected all items: error: copy "
    "it again, or move it away; without this folder the run resumes from step "
    "3",
    rf"checkpoint {steps}/7.orbax-checkpoint-tmp: half-written: warning: .*",
    rf"data of voco, missing images: 1: error: record r0: {images}/0.png: got "
    r"no such file, .*",
    "data of voco, records: 23 of 24 can be trained on .*: error: training "
    "stops at the first other one; .*",
  )
  assert len(wrong) == len(patterns), process.stdout + process.stderr
  for pattern, line in zip(patterns, wrong, strict=True):
    assert re.fullmatch(pattern, line), line
  assert process.stdout.splitlines()[-1] == "6 errors, 1 warning"
  (listed,) = (tmp_path / "list.txt").read_text().splitlines()
  assert listed.startswith(f"record r0: {images}/0.png: got no such file")


@pytest.mark.parametrize(
  ("changes", "line"),
  [
    (
      ["init_from=FOLDER/nowhere"],
      "config: error: config.init_from: FOLDER/nowhere: got .*",
    ),
    (
      ["init_from=FOLDER/run/voco", "model.llm.hidden_size=32"],
      r"config: error: config.model.llm.hidden_size: got 32, expected 16, as "
      r"config.init_from \(FOLDER/run/voco\) has it. Fix: .*",
    ),
    (
      ["optimizer.freeze=('^vision/',)"],
      "training: error: config.init_from: got '', which lacks vision/.* and "
      r"\d+ more parameters, expected .*",
    ),
    (
      ["init_from=FOLDER/run/voco", "optimizer.freeze=('^vision/',)"],
      "start of voco: FOLDER/run/voco: OK",
    ),
    (
      ["training.distill_weight=1.0", "training.teacher=FOLDER/run/voco"],
      "training: error: config.training.teacher: got FOLDER/run/voco, trained "
      "with config.model.compressor.name 'voco', expected .* 'full'.*",
    ),
  ],
)
def test_what_a_run_starts_from(folder, changes, line):
  process = python(
    "-m",
    "vocojax.doctor",
    f"--config={folder}/one.py",
    *(f"--config.{x.replace('FOLDER', str(folder))}" for x in changes),
  )
  line = line.replace("FOLDER", re.escape(str(folder)))
  found = process.stdout.splitlines()
  assert any(re.fullmatch(line, x) for x in found), process.stdout
  assert process.returncode == ("error" in line), process.stderr


def test_broken_json(folder, tmp_path):
  """No data can be read at all; what else there is, is still checked."""
  text = (folder / "data.json").read_text()
  (tmp_path / "data.json").write_text(text[: len(text) // 2])
  process = python(
    "-m",
    "vocojax.doctor",
    f"--config={folder}/one.py",
    f"--config.data.path={tmp_path}/data.json",
    f"--workdir={tmp_path}/run",
  )
  assert process.returncode == 1
  found = process.stdout.splitlines()
  assert found[-3] == f"checkpoints: none yet in {tmp_path}/run: OK"
  assert re.match(
    rf"training: error: {tmp_path}/data.json: got .* at byte \d+, .*, expected "
    "a JSON list of records, or one record a line. Fix: ",
    found[-2],
  )
  assert found[-1] == "1 error, 0 warnings"
  assert [p.name for p in tmp_path.iterdir()] == ["data.json"]


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
  assert names == ["devices", "config", "checkpoints"]
  for line in errors[1:]:
    assert re.search(
      r": error: vocojax\.\S+: got AttributeError: no jaxlib, expected a "
      r"module that can be imported. Fix: correct the packages named above$",
      line,
    ), line
  assert any(line.startswith("host memory: ") for line in found)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (
      ["--list=x.txt"],
      "--list: got no --config, expected one, which names the data. Fix: ",
    ),
    (["--config.seed=1"], "--config: got nothing, expected --config=VALUE. "),
    (["--config=none.py"], "--config=none.py: got no such file, expected "),
  ],
)
def test_wrong_usage(arguments, message):
  process = python("-m", "vocojax.doctor", *arguments)
  assert (process.returncode, process.stdout) == (2, "")
  assert process.stderr.startswith(f"error: {message}")
