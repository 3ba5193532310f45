"""The study's runs: what is started, that it is valid, and a small real one."""

import ast
import functools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

from benchmarks import study
from tests import runs
from vocojax.config import load_module, phases


def study_of(*arguments, **env):
  return subprocess.run(
    [sys.executable, "-m", "benchmarks.study", *arguments],
    cwd=runs.ROOT,
    env=os.environ | {"PYTHONUNBUFFERED": "1"} | env,
    capture_output=True,
    text=True,
  )


def config_of(command):
  """The phase that a command line of vocojax.train asks for."""
  given = dict(word.removeprefix("--").split("=", 1) for word in command)
  config = load_module(given.pop("config"))
  given.pop("workdir")
  for key, text in given.items():
    *groups, name = key.split(".")[1:]
    group = functools.reduce(lambda c, k: c[k], groups, config)
    if name == "phases":
      group[name] = (text,)
    elif group.get_type(name) is str:
      group[name] = text
    else:
      group[name] = ast.literal_eval(text)
  [phase] = phases(config)
  return phase


def test_every_run_is_a_valid_config(tmp_path, monkeypatch):
  monkeypatch.chdir(runs.ROOT)
  planned = study.plan(tmp_path, [2, 3], [0, 7], ["*"])
  assert len(planned) == 2 * 2 * (1 + len(study.METHODS))
  assert len({run.folder for run in planned}) == len(planned)
  found = {}
  for run in planned:
    (command, result), *evaluations = run.commands
    config = config_of(command[2:])
    seed = run.seed if run.method else 1000 + run.seed  # no batch twice
    assert (config.data.grid_size, config.seed) == (run.grid, seed)
    if config.training.evaluate:
      assert result.parent == run.folder / "evaluation"
    else:
      assert result == run.folder / config.name / "config.json"
    for other, _ in evaluations:
      assert f"--checkpoint={run.folder / config.name}" in other
    found[run.folder.relative_to(tmp_path)] = config
  for path, config in found.items():
    start = path.parent / "start"
    if path == start:
      assert (config.init_from, config.optimizer.freeze) == ("", ())
      # Its weights are no row: they learned for fewer steps.
      assert not config.training.evaluate
      continue
    # The same start, data and steps; the tower is frozen.
    assert config.init_from == str(tmp_path / start / "start")
    voco = found[path.parent / "voco_1"]
    assert config.data == voco.data
    assert config.training.steps == voco.training.steps
    assert config.optimizer.learning_rate == voco.optimizer.learning_rate
    free = path.name.endswith("_free")
    assert config.optimizer.freeze == (() if free else ("^vision/",))


def test_only_and_errors(tmp_path):
  out = f"--out={tmp_path}"
  shown = study_of(out, "--dry_run", "--grids", "2", "--seeds", "1", "--only")
  assert shown.returncode == 2
  shown = study_of(
    out, "--dry_run", "--grids", "2", "--seeds", "1", "--only", "blind", "upper"
  )
  first, *commands = shown.stdout.splitlines()
  assert first.startswith("3 of 3 runs are to be done: about 0.")
  programs = [shlex.split(c)[2] for c in commands]
  assert programs == [*["vocojax.train"] * 3, "vocojax.evaluate"] or (
    programs
    == ["vocojax.train", "vocojax.train", "vocojax.evaluate", "vocojax.train"]
  )
  wrong = study_of(out, "--only", "vocos")
  assert wrong.returncode == 2
  assert "--only vocos: found none, expected upper, full," in wrong.stderr
  wrong = study_of(out, f"--starts={tmp_path / 'other'}")
  assert wrong.returncode == 2
  assert "/other: grid2/seed0/start is not done in it\n" in wrong.stderr
  (tmp_path / "flags.json").write_text('["--config.training.steps=2"]')
  wrong = study_of(out, "--only", "blind", "--config.training.steps=3")
  assert wrong.returncode == 2
  assert "have the flags ['--config.training.steps=2'], found" in wrong.stderr
  (tmp_path / "flags.json").write_text("[")
  wrong = study_of(out, "--only", "blind")
  assert wrong.returncode == 2
  assert "flags.json: not JSON (" in wrong.stderr.splitlines()[-1]
  wrong = study_of(out, "--seed=1")
  assert wrong.returncode == 2 and "--seed=1: unknown" in wrong.stderr


@pytest.mark.slow
def test_a_small_study(tmp_path):
  small = [
    "--config.training.steps=2",
    "--config.data.train_split=train[:64]",
    "--config.evaluation.max_records=8",
    "--config.model.llm.num_hidden_layers=1",
    "--config.model.vision.num_hidden_layers=1",
  ]
  small_study = functools.partial(study_of, **runs.cached(tmp_path))
  one = ["--grids", "2", "--seeds", "0", "--only", "blind"]
  arguments = [f"--out={tmp_path}", *one, "upper", *small]
  done = small_study(*arguments)
  assert done.returncode == 0, done.stderr
  folder = tmp_path / "grid2" / "seed0"
  for run, name in (("upper", "upper"), ("upper", "lower"), ("blind", "blind")):
    path = folder / run / "evaluation" / f"{name}.json"
    result = json.loads(path.read_text())
    assert result["total"] > 100 and result["step"] == 2
  # From the same start into another folder.
  elsewhere = tmp_path / "elsewhere"
  done = small_study(f"--out={elsewhere}", f"--starts={tmp_path}", *one, *small)
  assert done.returncode == 0, done.stderr
  [run] = (elsewhere / "grid2" / "seed0").iterdir()
  assert run.name == "blind"
  config = json.loads((run / "blind" / "config.json").read_text())
  assert config["init_from"] == str(folder / "start" / "start")
  # Nothing is done a second time. What is missing is, and a run that fails is
  # named, with its log, while the others go on.
  times = {p: p.stat().st_mtime_ns for p in folder.glob("*/evaluation/*.json")}
  (folder / "upper" / "evaluation" / "lower.json").unlink()
  (folder / "blind" / "evaluation" / "blind.json").unlink()
  shutil.rmtree(folder / "blind" / "blind" / "checkpoints" / "2" / "params")
  again = small_study(*arguments)
  assert again.returncode == 1
  assert again.stdout.startswith("2 of 3 runs are to be done")
  log = folder / "blind" / "log.txt"
  assert f"grid2/seed0/blind: exit status 2, see {log}" in again.stderr
  assert re.search("checkpoints/2/params/.*: got no such", log.read_text())
  now = {p: p.stat().st_mtime_ns for p in folder.glob("*/evaluation/*.json")}
  changed = {p.name for p in now if now[p] != times[p]}
  assert times.keys() - now.keys() == {
    folder / "blind" / "evaluation" / "blind.json"
  }
  assert changed == {"lower.json"}
  # Nothing is begun without its start.
  broken = small_study(
    f"--out={tmp_path / 'broken'}",
    *one,
    "--config.data.train_split=nothing",
  )
  assert broken.returncode == 1
  failed = sorted(broken.stderr.splitlines()[-2:])
  assert failed[0].endswith("seed0/blind: not begun, as there is no start")
  assert "seed0/start: exit status 2, see " in failed[1]


@pytest.mark.slow
def test_ctrl_c_begins_no_other_run(tmp_path):
  cores = len(os.sched_getaffinity(0))
  seeds = [str(i) for i in range(cores + 1)]
  arguments = [f"--out={tmp_path}", "--grids", "2", "--seeds", *seeds]
  with runs.interruptible():
    process = subprocess.Popen(
      [sys.executable, "-m", "benchmarks.study", *arguments],
      cwd=runs.ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      start_new_session=True,
    )
  begun = tmp_path / "grid2"
  while sum(bool(p.read_text()) for p in begun.glob("*/start/log.txt")) < cores:
    assert process.poll() is None
    time.sleep(0.2)  # until their progress bars are there
  os.killpg(process.pid, signal.SIGINT)
  _, err = process.communicate(timeout=100)
  assert process.returncode == 130
  assert err.decode().endswith(
    "\ninterrupted: the same command goes on from there\n"
  )
  assert len(list(begun.iterdir())) == cores
