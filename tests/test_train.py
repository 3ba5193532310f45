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


def error(*arguments, **options):
  """Runs with a mistake; returns the error that its one line holds."""
  return runs.printed_error(f"error: {error_line(*arguments, **options)}\n")


def error_line(
  program, folder, workdir, *arguments, config="one.py", bar=False
):
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
  line = error_line(
    program, folder, name, f"--config.data.path={path}", bar=True
  )
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


@pytest.mark.parametrize(
  ("arguments", "where", "got"),
  [
    (
      ["--config.training.stepz=5"],
      "config.training.stepz",
      "an unknown key",
    ),
    (["--config.training.steps=many"], "config.training.steps", "'many'"),
    (["--config.model.dtype=float31"], "config.model.dtype", "'float31'"),
    (
      ["--config.model.llm.vocab_size=21"],
      "config.model.llm.vocab_size",
      "21",
    ),
    (
      ["--config.data.batch_size=6", "--config.training.accumulate=4"],
      "config.data.batch_size",
      "6",
    ),
    (
      ["--config.mesh.tensor=2"],
      "config.mesh",
      "1 x -1 x 2 (data x fsdp x tensor)",
    ),
    (
      ["--config.optimizer.freeze=('^vision/',)"],
      "config.init_from",
      "'', which lacks vision/embeddings/class_embedding and 22 more "
      "parameters",
    ),
    (
      ["--config.optimizer.freeze="],
      "config.optimizer.freeze",
      "an empty pattern, which matches every parameter",
    ),
    (
      ["--config.optimizer.no_decay=('norm', '')"],
      "config.optimizer.no_decay",
      "an empty pattern, which matches every parameter",
    ),
    (
      ["--config.optimizer.freeze=('^vission/',)"],
      "config.optimizer.freeze",
      "'^vission/', which matches no parameter",
    ),
    (
      ["--config.optimizer.no_decay=('norm', 'biass')"],
      "config.optimizer.no_decay",
      "'biass', which matches no parameter",
    ),
    (
      ["--config.optimizer.freeze=('^llm', '^vision', '^proj')"],
      "config.optimizer.freeze",
      "('^llm', '^vision', '^proj'), which matches every parameter",
    ),
  ],
)
def test_wrong_settings(program, folder, arguments, where, got):
  found = error(program, folder, "wrong", *arguments)
  assert (found.where, found.got) == (where, got)
  assert not checkpoints(folder / "wrong/voco")


def test_a_mistake_in_the_last_phase_is_found_before_the_first(program, folder):
  found = error(
    program,
    folder,
    "late",
    "--config.phase.voco.optimizer.freeze=('^vission/',)",
    config="two.py",
  )
  assert found.where == "config.optimizer.freeze"
  assert not list((folder / "late").iterdir())


def test_wrong_data_and_weights(program, folder):
  for number, (arguments, where, got) in enumerate(
    (
      (
        ["--config.data.train_split=train[:0]"],
        f"{folder}/data.json",
        "no records in split 'train[:0]'",
      ),
      (
        # Noticed before the training, not after it.
        ["--config.training.evaluate", "--config.evaluation.split=test"],
        f"{folder}/data.json",
        "no split 'test'",
      ),
      (
        [f"--config.init_from={folder}"],
        f"config.init_from: {folder}",
        "no folder checkpoints",
      ),
    )
  ):
    found = error(program, folder, f"data{number}", *arguments)
    assert (found.where, found.got) == (where, got)


@pytest.mark.parametrize("log_every", ["4", "100"])
def test_a_run_without_a_trained_token(program, folder, log_every):
  """A caption of one token is never foretold by text before it."""
  path = folder / "captions.json"
  entries = [runs.entry(i) for i in range(4)]
  for entry in entries:
    entry["conversations"] = entry["conversations"][:2]
    entry["conversations"][1]["value"] = "red"
  path.write_text(json.dumps(entries))
  found = error(
    program,
    folder,
    f"captions{log_every}",
    "--config.prompt.layout=plain",
    f"--config.data.path={path}",
    f"--config.training.log_every={log_every}",
    bar=True,
  )
  last = min(int(log_every), 12)
  assert found.where == f"voco: steps 1 to {last}"
  assert found.got == "no token that is trained"


def test_images_per_second_of_the_last_line(program, folder):
  """Also where the step before was logged, so that one step is measured."""
  status, _, err = run(
    program,
    folder,
    "speed",
    "--config.training.steps=21",
    "--config.training.log_every=2",
  )
  assert status == 0, err
  path = folder / "speed/voco/metrics.jsonl"
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  *rates, last = [line["images_per_second"] for line in lines[1:]]
  assert last < 5 * max(rates)


def test_unwritable_workdir(program, folder):
  """A folder below a file cannot be made, not even by root."""
  (folder / "file").touch()
  for workdir, got in (
    ("file/run", "Not a directory"),
    ("file", "File exists"),
  ):
    found = error(program, folder, workdir)
    assert found.where == f"--workdir={folder}/{workdir}"
    assert found.got == got


def test_workdir_in_which_another_run_writes(program, folder):
  workdir = folder / "held"
  workdir.mkdir()
  with lock.held(workdir, "training"):
    found = error(program, folder, "held")
    (left,) = workdir.iterdir()
  assert found.where == str(workdir)
  assert found.got.startswith(f"training by process {os.getpid()} on ")
  assert left.name == ".training.lock"


def test_workdir_of_another_model(program, folder):
  status, _, err = run(
    program, folder, "taken", "--config.training.steps=1", config="two.py"
  )
  assert status == 0, err
  found = error(
    program,
    folder,
    "taken",
    "--config.model.llm.hidden_size=32",
    config="two.py",
  )
  step = f"{folder}/taken/full/checkpoints/1"
  assert found.where == f"{step}: config.model.llm.hidden_size"
  assert found.got == "16"
  # Nothing of what was there is lost.
  assert checkpoints(folder / "taken/full") == [1]
  assert checkpoints(folder / "taken/voco") == [1]
  found = error(
    program,
    folder,
    "another",
    f"--config.init_from={folder}/taken/full",
    "--config.model.llm.hidden_size=32",
  )
  assert found.where == "config.model.llm.hidden_size"
  assert found.got == "32"
  assert f"config.init_from ({folder}/taken/full)" in found.expected


def test_7b_config_says_what_is_missing(program, folder):
  """Data, images, tokenizer and weights; each is named with its remedy."""
  config = runs.ROOT / "configs/voco_1tok.py"
  given = [
    f"--config.data.path={folder}/data.json",
    f"--config.data.image_folder={folder}",
    f"--config.data.tokenizer={folder}/tokenizer",
    "--config.model.llm.vocab_size=20",
  ]
  for n, where in (
    (0, "config.data.path"),
    (1, "config.data.image_folder"),
    (2, "config.data.tokenizer"),
    (4, "config.init_from"),
  ):
    found = error(program, folder, "paper", *given[:n], config=config)
    assert found.where == where


@pytest.mark.parametrize(
  ("factor", "step", "got"),
  [
    # Weights of 1e16 are finite, but what they give is not.
    ("1e20", 3, "a loss of nan, "),
    # Here they themselves are not, and are not saved, though the loss is fine.
    ("1e30", 2, " a norm of the parameters of inf"),
  ],
)
def test_stops_when_not_finite(program, folder, factor, step, got):
  """The learning rate of the second step is far too large."""
  workdir = folder / f"rate{factor}"
  found = error(
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
  assert found.where == f"voco: step {step}"
  assert got in found.got
  assert found.fix.endswith(f"the last good checkpoint is {good}")
  assert checkpoints(workdir / "voco") == list(range(1, step))
  loaded = checkpoint.load(str(good))
  model = runs.model_of(loaded)
  params, _ = checkpoint.load_params(
    str(good), loop.abstract_params(model, runs.mesh()), model.config
  )
  for path, x in state.flatten(params).items():
    assert np.isfinite(x).all(), path


def test_not_finite_before_the_first_checkpoint(program, folder):
  found = error(
    program, folder, "hot", "--config.optimizer.learning_rate=1e30", bar=True
  )
  assert found.where == "voco: step 1"
  assert found.fix.endswith("no checkpoint was written yet")
