"""Mistakes in a run: one line on stderr, status 2, what and where to mend it.

Read next: `tests/runs.py`, which starts the programs.
"""

import json
import os
import pathlib

import numpy as np
import pytest

from tests import runs
from vocojax.core import lock
from vocojax.training import checkpoint, loop, state


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("train")
  runs.write_data(folder)
  runs.write_config(folder, "one.py", runs.ONE_PHASE)
  runs.write_config(folder, "two.py", runs.TWO_PHASES)
  return folder


@pytest.fixture(scope="module")
def program(folder):
  program = runs.Forks(folder, "vocojax.train")
  yield program
  program.close()


def run(program, folder, workdir, *arguments, config="one.py"):
  return program.run(
    f"--config={folder / config}", f"--workdir={folder / workdir}", *arguments
  )


def error(program, folder, workdir, *arguments, config="one.py", bar=False):
  """Runs with a mistake; returns the line, which is all of stderr.

  Once a run has begun (`bar`), its progress bar stands above the line.
  """
  status, out, err = run(program, folder, workdir, *arguments, config=config)
  assert (status, out) == (2, ""), err
  assert "Traceback" not in err and err.endswith("\n")
  *above, line = err.removesuffix("\n").split("\n")
  assert line.startswith("error: ") and bool(above) == bar, err
  assert all(x.startswith("\rvoco: ") for x in above), err
  return line.removeprefix("error: ")


def write_records(folder, name, *entries):
  """A JSON file of so few records that the first batch has them all."""
  path = folder / name
  path.write_text(json.dumps([*entries, *(runs.entry(i) for i in (0, 1, 2))]))
  return path


def without_value(entry):
  del entry["conversations"][0]["value"]
  return entry


def long_answer(entry):
  entry["conversations"][1]["value"] = "red " * 40
  return entry


SKIP = "or leave such records out with config.data.on_bad_record=skip"
BAD_RECORDS = {
  "truncated": (
    runs.entry(4) | {"image": "truncated.png"},
    "record r4: FOLDER/truncated.png: got image file is truncated",
    f"Fix: replace the file, {SKIP}",
  ),
  "missing_file": (
    runs.entry(5) | {"image": "nowhere.png"},
    "record r5: FOLDER/nowhere.png: got no such file, ",
    SKIP,
  ),
  "missing_field": (
    without_value(runs.entry(6)),
    "FOLDER/missing_field.json record 0 (id 'r6'): field "
    "conversations[0]: field value: got nothing, expected text. Fix: add it, ",
    SKIP,
  ),
  "long_answer": (
    long_answer(runs.entry(7)),
    "record r7: got a conversation of ",
    SKIP,
  ),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_bad_record_stops_the_run(program, folder, name):
  entry, begins, ends = BAD_RECORDS[name]
  whole = (folder / "0.png").read_bytes()
  (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
  path = write_records(folder, f"{name}.json", entry)
  line = error(program, folder, name, f"--config.data.path={path}", bar=True)
  assert line.startswith(begins.replace("FOLDER", str(folder)))
  assert line.endswith(ends)
  assert not checkpoints(folder / name / "voco")


def checkpoints(phase: pathlib.Path) -> list[int]:
  return sorted(int(p.name) for p in phase.glob("checkpoints/*"))


def test_bad_records_are_skipped_counted_and_named(program, folder):
  whole = (folder / "0.png").read_bytes()
  (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
  entries = [entry for entry, *_ in BAD_RECORDS.values()]
  path = write_records(folder, "skipped.json", *entries)
  status, _, err = run(
    program,
    folder,
    "skipped",
    f"--config.data.path={path}",
    "--config.data.on_bad_record=skip",
    "--config.training.steps=6",
    "--config.training.log_every=1",
  )
  assert status == 0, err
  warnings = [x for x in err.splitlines() if "skipped a bad record: " in x]
  for name in (
    "truncated.png",
    "nowhere.png",
    "skipped.json record 2 (id 'r6')",
    "record r7",
  ):
    assert sum(name in x for x in warnings) >= 2, (name, err)
  counts = [x["bad_records"] for x in runs.metrics(folder / "skipped/voco")]
  # 24 rows of 3 good records are 8 epochs, of 4 bad ones each, within a few
  # that come before the first or after the last row.
  assert counts == sorted(counts) and len(counts) == 6
  assert counts[-1] == len(warnings)
  assert 28 <= counts[-1] <= 32


def test_wrong_settings(program, folder):
  for number, (arguments, message) in enumerate(
    (
      (
        ["--config.training.stepz=5"],
        "config.training.stepz: unknown key; the nearest key is "
        "'config.training.steps'; configs/common.py lists all keys",
      ),
      (
        ["--config.training.steps=many"],
        "config.training.steps: found 'many', expected int, such as 12",
      ),
      (
        ["--config.model.dtype=float31"],
        "config.model.dtype: found 'float31', expected one of float32, "
        "bfloat16; the nearest key is 'float32'",
      ),
      (
        ["--config.data.train_split=train[:0]"],
        f"{folder}/data.json: got no records in split 'train[:0]', expected at "
        "least one. Fix: choose another config.data.train_split or "
        "config.evaluation.split",
      ),
      (
        # Noticed before the training, not after it.
        ["--config.training.evaluate", "--config.evaluation.split=test"],
        f"{folder}/data.json: got no split 'test', expected 'train' or a slice "
        "of it, such as 'train[:1000]' or 'train[90%:]'. Fix: correct "
        "config.data.train_split or config.evaluation.split",
      ),
      (
        ["--config.model.llm.vocab_size=21"],
        "config.model.llm.vocab_size: got 21, expected 20, the tokens of the "
        "tokenizer, <voco> included. Fix: set it to 20, or choose another "
        "tokenizer",
      ),
      (
        ["--config.data.batch_size=6", "--config.training.accumulate=4"],
        "config.data.batch_size: 6 is not a multiple of 4 (1 shards of the "
        "mesh axes data x fsdp, times config.training.accumulate 4)",
      ),
      (
        ["--config.mesh.tensor=2"],
        "config.mesh: 1 x -1 x 2 is not the number of devices, 1; set one axis "
        "to -1",
      ),
      (
        [f"--config.init_from={folder}"],
        f"{folder}: got no folder checkpoints, expected the folder of one "
        "phase. Fix: name a phase of a workdir",
      ),
      (
        ["--config.optimizer.freeze=('^vision/',)"],
        "config.init_from: found '', which lacks "
        "vision/embeddings/class_embedding and 22 more parameters that "
        "config.optimizer.freeze keeps from learning; name a checkpoint that "
        "has them, or freeze less",
      ),
    )
  ):
    line = error(program, folder, f"wrong{number}", *arguments)
    assert line == message


def test_unwritable_workdir(program, folder):
  """A folder below a file cannot be made, not even by root."""
  (folder / "file").touch()
  assert error(program, folder, "file/run").startswith(
    f"--workdir={folder}/file/run: got Not a directory, expected "
  )
  assert error(program, folder, "file").startswith(
    f"--workdir={folder}/file: got File exists, expected "
  )


def test_workdir_in_which_another_run_writes(program, folder):
  workdir = folder / "held"
  workdir.mkdir()
  with lock.held(workdir, "training"):
    line = error(program, folder, "held")
    (left,) = workdir.iterdir()
  assert line.startswith(
    f"{workdir}: got training by process {os.getpid()} on "
  )
  assert left.name == ".training.lock"


def test_workdir_of_another_model(program, folder):
  status, _, err = run(
    program, folder, "taken", "--config.training.steps=1", config="two.py"
  )
  assert status == 0, err
  line = error(
    program,
    folder,
    "taken",
    "--config.model.llm.hidden_size=32",
    config="two.py",
  )
  assert line == (
    f"{folder}/taken/full/checkpoints/1: config.model.llm.hidden_size: got 16, "
    "expected 32, which this run has. Fix: set it back, or use another "
    "--workdir, and config.init_from to start from its weights"
  )
  # Nothing of what was there is lost.
  assert checkpoints(folder / "taken/full") == [1]
  assert checkpoints(folder / "taken/voco") == [1]
  line = error(
    program,
    folder,
    "another",
    f"--config.init_from={folder}/taken/full",
    "--config.model.llm.hidden_size=32",
  )
  assert line.startswith(f"{folder}/taken/full/checkpoints/1/params: ")
  assert ": got shape (" in line and line.endswith(
    "use a checkpoint of the same shape, or change config.model"
  )


def test_7b_config_says_what_is_missing(program, folder):
  """Data, images, tokenizer and weights; each is named with its remedy."""
  config = runs.ROOT / "configs/voco_1tok.py"
  given = [
    f"--config.data.path={folder}/data.json",
    f"--config.data.image_folder={folder}",
    f"--config.data.tokenizer={folder}/tokenizer",
    "--config.model.llm.vocab_size=20",
  ]
  found = [
    error(program, folder, "paper", *given[:n], config=config)
    for n in (0, 1, 2, 4)
  ]
  hub = "on the Hugging Face hub"
  assert found[0] == (
    "config.data.path: got nothing, expected a path. Fix: set it; "
    "llava_v1_5_mix665k.json is in the data set "
    f"liuhaotian/LLaVA-Instruct-150K {hub}"
  )
  assert found[1].startswith(
    "config.data.image_folder: got nothing, expected a path. Fix: set it to "
    "the folder that the image paths in data.json start from"
  )
  assert found[2] == (
    "config.data.tokenizer: got '', expected a Hugging Face tokenizer folder. "
    "Fix: set it; LLaVA uses the tokenizer files of lmsys/vicuna-7b-v1.5 "
    f"{hub}"
  )
  assert found[3].startswith(
    "config.init_from: found '', which lacks vision/embeddings/class_embedding "
    "and 22 more parameters that config.optimizer.freeze keeps from learning; "
    "name a checkpoint"
  )


@pytest.mark.parametrize(
  ("factor", "step", "words"),
  [
    # Weights of 1e16 are finite, but what they give is not.
    ("1e20", 3, "at step 3 the loss is nan, the gradient norm "),
    # Here they themselves are not, and are not saved, though the loss is fine.
    ("1e30", 2, "and the norm of the parameters inf; "),
  ],
)
def test_stops_when_not_finite(program, folder, factor, step, words):
  """The learning rate of the second step is far too large."""
  workdir = folder / f"rate{factor}"
  line = error(
    program,
    folder,
    workdir.name,
    "--config.optimizer.warmup_ratio=0",
    "--config.optimizer.schedule=linear",
    f"--config.optimizer.end_learning_rate={factor}",
    "--config.training.checkpoint_every=1",
    bar=True,
  )
  good = workdir / "voco/checkpoints" / str(step - 1)
  assert line.startswith(f"voco: at step {step} the loss is ")
  assert words in line
  assert line.endswith(
    f"; the last good checkpoint is {good}; try a lower "
    "config.optimizer.learning_rate"
  )
  assert checkpoints(workdir / "voco") == list(range(1, step))
  loaded = checkpoint.load(str(good))
  model = runs.model_of(loaded)
  params, _ = checkpoint.load_params(
    str(good), loop.abstract_params(model, runs.mesh()), model.config
  )
  for path, x in state.flatten(params).items():
    assert np.isfinite(x).all(), path


def test_not_finite_before_the_first_checkpoint(program, folder):
  line = error(
    program, folder, "hot", "--config.optimizer.learning_rate=1e30", bar=True
  )
  assert line.startswith("voco: at step 1 the loss is ")
  assert "; no checkpoint was written yet; try a lower" in line
