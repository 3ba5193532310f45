"""Evaluation after training, by its own program, and done slowly by hand."""

import contextlib
import dataclasses
import json
import re
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import disks, runs
from tests.fields import raises
from tests.models import builders
from vocojax import assemble
from vocojax.data import pipeline
from vocojax.data.sources import make_source
from vocojax.errors import CheckpointError, UserError
from vocojax.evals import collect
from vocojax.models.vlm import VisionLanguageModel
from vocojax.training import checkpoint, checksums, loop

TAIL = """\
  c.training.update(steps=60, evaluate=True)
  c.evaluation.update(split="train[:20]", bounds=True)
"""
PHASES = """\
  c.phases = ("upper", "voco")
  c.phase.upper = {"model": {"compressor": {"name": "voco_causal"}}}
  c.phase.voco = {"seed": 1}
  return c
"""
NAMES = {  # phase, compressor
  "voco": ("voco", "voco"),
  "upper": ("upper", "voco_causal"),
  "lower": ("upper", "voco"),
}
QUESTIONS = 30  # of 20 records, every other one with two turns
THRESHOLD = 0.08  # between what some questions move by and what others do


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A finished run of two phases in `run`; its tokenizer is gone."""
  folder = tmp_path_factory.mktemp("evaluate")
  runs.write_data(folder)
  runs.write_config(folder, "two.py", TAIL + PHASES)
  process = runs.start_cached(
    folder,
    "vocojax.train",
    f"--config={folder / 'two.py'}",
    f"--workdir={folder / 'run'}",
  )
  out, err = process.communicate(timeout=280)
  assert process.returncode == 0, err
  lines = out.splitlines()
  assert [x.split(":")[0] for x in lines] == [
    "VoCo",
    "upper bound, all is seen",
    "lower bound, the same under the mask",
    "report",
  ]
  assert "of 30 answers right, 16 patches as 1 token," in lines[0]
  assert lines[-1] == f"report: {folder}/run/report.md"
  # A checkpoint has its own copy.
  shutil.rmtree(folder / "tokenizer")
  return folder


def results(workdir):
  """Every result and every answer, without what a clock or a path says."""
  found = {}
  for path in (workdir / "evaluation").glob("*.json"):
    result = json.loads(path.read_text())
    for key in ("seconds", "provenance", "checkpoint"):
      del result[key]
    answers = path.with_suffix(".predictions.jsonl").read_text()
    found[path.stem] = result, [json.loads(x) for x in answers.splitlines()]
  return found


def test_run_leaves_results(folder):
  found = results(folder / "run")
  assert set(found) == set(NAMES)
  for name, (result, answers) in found.items():
    assert result["phase"] == NAMES[name][0] and result["step"] == 60
    assert result["total"] == len(answers) == QUESTIONS
    right = sum(x["answer"] == x["prediction"] for x in answers)
    assert result["correct"] == right
    assert result["accuracy"] == right / QUESTIONS
  # It learned, or the comparisons below would be about noise.
  assert found["upper"][0]["correct"] >= 10
  answers = {x["prediction"] for x in found["voco"][1]}
  assert len(answers) >= 3 and any(" " in x for x in answers)
  report = (folder / "run" / "report.md").read_text()
  for name, (result, _) in found.items():
    assert re.search(
      rf"\| {name}: .* \| {result['accuracy']:.2%} ".replace("%", " %"), report
    )


def test_other_records_by_the_program(folder, tmp_path):
  """Another file, a slice; beside the first result, and named in tables."""
  shutil.copytree(folder / "run", tmp_path / "copy")
  entries = json.loads((folder / "data.json").read_text())
  lines = [json.dumps(entry) for entry in entries[20:]]
  (tmp_path / "other.jsonl").write_text("\n".join(lines))
  workdir, data = tmp_path / "copy", f"--data={tmp_path}/other.jsonl"
  with contextlib.closing(runs.Forks(tmp_path, "vocojax.evaluate")) as program:

    def evaluate(*flags):
      return program.run(f"--checkpoint={workdir}/voco", *flags)

    for flags, title, name, total in (
      ([data], "VoCo, other", "voco_other", 6),
      (
        [data, "--split=test[1:]", "--config.evaluation.max_records=2"],
        "VoCo, other, test[1:], first 2",
        "voco_other_test_1-_first_2",
        3,
      ),
      (["--split=train[:50%]"], "VoCo, train[:50%]", "voco_train_-50p", 18),
    ):
      status, out, err = evaluate(*flags)
      assert status == 0, err
      assert out.startswith(f"{title}: ")
      result, answers = results(workdir)[name]
      assert result["total"] == len(answers) == total
    asked = [f"r{i}" for i in range(12) for _ in range(1 + i % 2)]
    assert [x["record_id"] for x in answers] == asked
    before = results(folder / "run")
    assert results(workdir).items() >= before.items()
    names = {x.path.stem: x.data for x in collect.collect(workdir) if x.use}
    assert names == {
      "voco_other": "other.jsonl",
      "voco_other_test_1-_first_2": "other.jsonl, test[1:], first 2",
      "voco_train_-50p": "data.json, train[:50%]",
    }
    for flags, where in (
      (["--split=test"], str(folder / "data.json")),
      ([data, "--split=train"], "config.evaluation.split"),
      (["--images=x"], "config.evaluation.image_folder"),
      ([data, "--images=x"], "config.evaluation.image_folder: x"),
      (["--config.evaluation.holdout=0.1"], "--config.evaluation.holdout"),
    ):
      status, _, err = evaluate(*flags)
      assert (status, runs.printed_error(err).where) == (2, where)


@pytest.mark.parametrize("name", ["voco", "lower"])
def test_program_gives_what_training_gave(folder, tmp_path, name):
  phase, compressor = NAMES[name]
  shutil.copytree(folder / "run", tmp_path / "copy")
  expected = results(folder / "run")[name]
  for path in (tmp_path / "copy" / "evaluation").glob(f"{name}.*"):
    path.unlink()
  arguments = [] if phase == compressor else [f"--compressor={compressor}"]
  process = runs.start_cached(
    folder,
    "vocojax.evaluate",
    f"--checkpoint={tmp_path}/copy/{phase}",
    *arguments,
  )
  out, err = process.communicate(timeout=280)
  assert process.returncode == 0, err
  assert f"report: {tmp_path}/copy/report.md" in out
  found = results(tmp_path / "copy")[name]
  assert found == expected


def test_eight_bit_caches_answer_nearly_the_same(folder, tmp_path):
  shutil.copytree(folder / "run", tmp_path / "copy")
  process = runs.start_cached(
    folder,
    "vocojax.evaluate",
    f"--checkpoint={tmp_path}/copy/voco",
    "--int8",
  )
  out, err = process.communicate(timeout=280)
  assert process.returncode == 0, err
  assert "VoCo, 8-bit cache: " in out
  found = results(tmp_path / "copy")
  (_, exact), (_, rounded) = found["voco"], found["voco_int8"]
  same = [
    a["prediction"] == b["prediction"]
    for a, b in zip(exact, rounded, strict=True)
  ]
  assert len(same) == QUESTIONS and sum(same) >= 28


def test_fewer_tokens_by_its_program(folder, tmp_path):
  """Of one token, the first one is all."""
  shutil.copytree(folder / "run", tmp_path / "copy")
  process = runs.start_cached(
    folder,
    "vocojax.evaluate",
    f"--checkpoint={tmp_path}/copy/voco",
    "--num_voco_tokens=1",
    "--adaptive",
  )
  out, err = process.communicate(timeout=280)
  assert process.returncode == 0, err
  assert out.startswith(
    "VoCo, first 1 of each image, as few tokens as will do: "
  )
  assert ", 16 patches as 1.00 tokens on average, " in out
  result, answers = results(tmp_path / "copy")["voco_m1_adaptive"]
  expected, _ = results(folder / "run")["voco"]
  assert result["correct"] == expected["correct"]
  assert (result["mean_k"], result["k_histogram"]) == (1, {"1": QUESTIONS})
  assert {x["num_voco_tokens"] for x in answers} == {1}


@pytest.fixture(scope="module")
def four_tokens(folder, tmp_path_factory):
  """A model of four tokens that mean little, and its results by number."""
  loaded = checkpoint.load(str(folder / "run" / "upper"))
  config = assemble.with_compressor(loaded.config, "voco", 4)
  evaluation = dataclasses.replace(
    config.evaluation, adaptive_threshold=THRESHOLD
  )
  config = dataclasses.replace(config, evaluation=evaluation)
  loaded = dataclasses.replace(loaded, config=config)
  workdir = tmp_path_factory.mktemp("four")
  for m in (1, 2, 4):
    assemble.evaluate(loaded, workdir, "voco", {}, num_voco_tokens=m)
  assemble.evaluate(loaded, workdir, "voco", {}, adaptive=True)
  evaluation = dataclasses.replace(evaluation, adaptive_threshold=0.0)
  config = dataclasses.replace(config, evaluation=evaluation)
  strict = dataclasses.replace(loaded, config=config)
  assemble.evaluate(strict, workdir, "voco", {}, adaptive=True, changes=("0",))
  return loaded, results(workdir)


def test_fewer_tokens_in_name_and_answers(four_tokens):
  _, found = four_tokens
  adaptive = {"voco_adaptive", "voco_adaptive_0"}
  assert set(found) == {"voco_m1", "voco_m2", "voco_m4"} | adaptive
  answers = [[x["prediction"] for x in found[name][1]] for name in found]
  assert len({tuple(x) for x in answers}) > 2  # the number matters
  assert found["voco_m2"][0]["title"] == "VoCo, first 2 of each image"
  assert "mean_k" not in found["voco_m2"][0]


def test_adaptive_answers_are_those_of_their_number(four_tokens):
  _, found = four_tokens
  result, answers = found["voco_adaptive"]
  numbers = [x["num_voco_tokens"] for x in answers]
  assert set(numbers) == {2, 4}
  for i, m in enumerate(numbers):
    expected = found[f"voco_m{m}"][1][i]
    assert answers[i] == expected | {"num_voco_tokens": m}
  assert result["k_histogram"] == {
    str(m): numbers.count(m) for m in sorted(set(numbers))
  }
  assert result["mean_k"] == sum(numbers) / QUESTIONS
  assert result["adaptive_threshold"] == THRESHOLD
  # Nothing settles exactly.
  strict, answers = found["voco_adaptive_0"]
  assert (strict["mean_k"], strict["adaptive_threshold"]) == (4, 0)
  assert strict["correct"] == found["voco_m4"][0]["correct"]


def test_tokens_that_cannot_be_cut(folder, four_tokens, tmp_path):
  loaded, _ = four_tokens
  upper = checkpoint.load(str(folder / "run" / "upper"))
  for k in (0, 5):
    with raises(
      UserError, "num_voco_tokens", str(k), "1 to 4", "choose 1 to 4"
    ):
      assemble.evaluate(loaded, tmp_path, "voco", {}, num_voco_tokens=k)
  voco = checkpoint.load(str(folder / "run" / "voco"))
  with raises(UserError, "num_voco_tokens", "2", "1, as", "leave it out") as e:
    assemble.evaluate(voco, tmp_path, "voco", {}, num_voco_tokens=2)
  assert "1 to 1" not in str(e.value)
  with raises(UserError, "--adaptive", "compressor 'voco_causal'"):
    assemble.evaluate(upper, tmp_path, "voco_causal", {}, adaptive=True)
  got = "weights trained with compressor 'voco_causal', to be used as 'full'"
  with raises(CheckpointError, "60", got, "'voco_causal' or 'voco'"):
    assemble.evaluate(upper, tmp_path, "full", {})
  assert not list(tmp_path.iterdir())


def test_two_evaluations_at_once(folder, tmp_path):
  """Of one name the second is refused; of another it goes its way."""
  shutil.copytree(folder / "run", tmp_path / "copy")
  out = tmp_path / "copy" / "evaluation"
  shutil.rmtree(out)
  flags = ["vocojax.evaluate", f"--checkpoint={tmp_path}/copy/voco"]
  first = runs.start_cached(folder, *flags)
  while not (out / ".evaluation-voco.lock").exists():
    assert first.poll() is None, first.communicate()
    time.sleep(0.01)
  time.sleep(0.1)  # it has written its name
  first.send_signal(signal.SIGSTOP)
  try:
    second = runs.start_cached(folder, *flags)
    said, err = second.communicate(timeout=280)
    assert (second.returncode, said) == (2, "")
    words = f"error: {out}: got evaluation-voco by process {first.pid} on "
    assert err.startswith(words) and err.count("\n") == 1
    other = runs.start_cached(folder, *flags, "--int8")
    _, err = other.communicate(timeout=280)
    assert other.returncode == 0, err
  finally:
    first.send_signal(signal.SIGCONT)
  _, err = first.communicate(timeout=280)
  assert first.returncode == 0, err
  assert set(results(tmp_path / "copy")) == {"voco", "voco_int8"}
  expected = results(folder / "run")["voco"]
  assert results(tmp_path / "copy")["voco"] == expected
  # One that was killed blocks nobody.
  killed = runs.start_cached(folder, *flags)
  while not (out / ".evaluation-voco.lock").exists():
    assert killed.poll() is None, killed.communicate()
    time.sleep(0.01)
  killed.kill()
  killed.communicate()
  again = runs.start_cached(folder, *flags)
  _, err = again.communicate(timeout=280)
  assert again.returncode == 0 and "waiting" not in err, err


def test_full_disk(folder, tmp_path):
  with disks.mounted(tmp_path / "disk", "16M") as disk:
    shutil.copytree(folder / "run", disk / "run")
    shutil.rmtree(disk / "run" / "evaluation")
    flags = ["vocojax.evaluate", f"--checkpoint={disk}/run/voco"]

    def fails(words):
      process = runs.start_cached(folder, *flags)
      out, err = process.communicate(timeout=280)
      assert process.returncode == 2 and "Traceback" not in err, err
      assert words in err.splitlines()[-1]
      found = {x.name for x in (disk / "run" / "evaluation").glob("*")}
      assert not found - {"voco.predictions.jsonl"}, found
      return out

    for leave in (0, 8192):
      disks.fill(disk, leave)
      assert fails("No space left on device") == ""
      (disk / "fill").unlink()
    disks.remount(disk, "ro")
    assert fails("Read-only file system") == ""
    disks.remount(disk, "rw")
    process = runs.start_cached(folder, *flags)
    _, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    assert results(disk / "run")["voco"] == results(folder / "run")["voco"]


def test_bad_records_are_counted(folder, tmp_path):
  """A damaged image and questions that are too long; markers do no harm."""
  for i in range(runs.NUM_RECORDS):
    shutil.copy(folder / f"{i}.png", tmp_path)
  (tmp_path / "3.png").write_bytes(b"no image")
  entries = json.loads((folder / "data.json").read_text())
  for entry in entries:
    entry["conversations"][0]["value"] = (
      "<image>\n" + entry["conversations"][0]["value"]
    )
  entries[5]["conversations"][0]["value"] = "what color is this ? " * 30
  entries[7]["image"] = ["7.png", "8.png"]
  entries[7]["conversations"][2]["value"] = "<image>\nis it green ?"
  entries[9]["conversations"][3]["value"] += " \n"
  (tmp_path / "data.json").write_text(json.dumps(entries))
  loaded = checkpoint.load(str(folder / "run" / "voco"))

  def evaluate(rule):
    data = dataclasses.replace(
      loaded.config.data,
      path=str(tmp_path / "data.json"),
      image_folder=str(tmp_path),
      on_bad_record=rule,
      max_images=2,
    )
    config = dataclasses.replace(loaded.config, data=data)
    changed = dataclasses.replace(loaded, config=config)
    assemble.evaluate(changed, tmp_path / rule, "voco", {})
    return results(tmp_path / rule)["voco"]

  result, answers = evaluate("skip")
  expected, all_answers = results(folder / "run")["voco"]
  assert (result["bad_records"], result["total"]) == (2, 26)
  assert expected["bad_records"] == 0
  changed = ("r3", "r5", "r7")
  same, two = (
    [x for x in answers if (x["record_id"] in changed) == yes]
    for yes in (False, True)
  )
  assert same == [x for x in all_answers if x["record_id"] not in changed]
  assert [(x["record_id"], x["turn"], x["question"]) for x in two] == [
    ("r7", 1, "image 1\nwhat color is this ? number 1"),
    ("r7", 2, "image 2\nis it green ?"),
  ]
  with raises(UserError):
    evaluate("stop")
  (tmp_path / "3.png").write_bytes((folder / "3.png").read_bytes())
  with raises(UserError, got="150 tokens") as e:
    evaluate("stop")
  assert e.value.where.startswith("record r5: ")


def test_another_prompt_layout_must_be_chosen(folder, tmp_path):
  shutil.copytree(folder / "run", tmp_path / "copy")
  where = tmp_path / "copy/voco/checkpoints/60"
  layout = {"name": "qa_v1", "version": 7}
  (where / "layout" / "metadata").write_text(json.dumps(layout))
  checksums.write(where, 60)
  flags = ["vocojax.evaluate", f"--checkpoint={tmp_path}/copy/voco"]
  process = runs.start_cached(folder, *flags)
  out, err = process.communicate(timeout=280)
  assert (process.returncode, out) == (2, "")
  assert err == (
    f"error: {where}/layout: got prompt layout 'qa_v1' version 7, expected "
    "version 1 of it, which this vocojax has. Fix: use the vocojax that wrote "
    "it, or choose a layout with --layout\n"
  )
  process = runs.start_cached(folder, *flags, "--layout=qa_v1")
  out, err = process.communicate(timeout=280)
  assert process.returncode == 0, err
  assert out.startswith("VoCo, prompt layout qa_v1: ")
  result, answers = results(tmp_path / "copy")["voco_qa_v1"]
  expected, expected_answers = results(folder / "run")["voco"]
  assert answers == expected_answers
  title = "VoCo, prompt layout qa_v1"
  assert result == expected | {"name": "voco_qa_v1", "title": title}


def test_sharded_weights_answer_the_same(folder, tmp_path):
  """In this process there are eight devices, and the mesh takes all."""
  loaded = checkpoint.load(str(folder / "run" / "voco"))
  assemble.evaluate(loaded, tmp_path, "voco", {})
  assert results(tmp_path)["voco"] == results(folder / "run")["voco"]


@pytest.mark.parametrize("name", NAMES)
def test_answers_by_hand(folder, name):
  """Without a cache: the whole sequence again for each token, by the mask."""
  phase, compressor = NAMES[name]
  loaded = checkpoint.load(str(folder / "run" / phase))
  config, words = loaded.config, loaded.tokenizer
  model = joint_model(loaded, compressor)
  params, missing = checkpoint.load_params(
    str(loaded.path), loop.abstract_params(model, runs.mesh()), model.config
  )
  assert not missing
  source = make_source(config, "train[:20]")
  eos = words.eos_token_id
  records, tokens = [], []
  for i in range(20):
    (conversation,) = source[i].conversations
    before = []  # the questions and the true answers
    for question, answer in conversation:
      before += words(question)["input_ids"]
      records.append(source[i])
      tokens.append(list(before))
      before += [*words(answer)["input_ids"], eos]
  n = len(records)
  length = max(map(len, tokens)) + 4
  images = [pipeline.load_images(one, 64, config.data) for one in records]
  forward = jax.jit(model.text_logits, compiler_options=builders.QUICK_COMPILE)
  prompts = list(map(len, tokens))
  for _ in range(4):
    ids = np.zeros((n, length), np.int32)
    real = np.zeros((n, length), np.int32)
    for row, row_tokens in enumerate(tokens):
      ids[row, : len(row_tokens)] = row_tokens
      real[row, : len(row_tokens)] = 1
    logits = forward(
      params,
      {
        "images": jnp.asarray(np.stack(images)),
        "image_group_ids": jnp.ones((n, 1), jnp.int32),
        "input_ids": jnp.asarray(ids),
        "segment_ids": jnp.asarray(real),
        "text_group_ids": jnp.asarray(real),
      },
    )
    tokens = [
      row_tokens
      if eos in row_tokens[prompts[row] :]
      else [*row_tokens, int(np.argmax(logits[row, len(row_tokens) - 1]))]
      for row, row_tokens in enumerate(tokens)
    ]
  answers = [
    words.decode([t for t in row_tokens[at:] if t != eos]).strip()
    for row_tokens, at in zip(tokens, prompts, strict=True)
  ]
  _, expected = results(folder / "run")[name]
  assert answers == [x["prediction"] for x in expected]
  turns = [turn for i in range(20) for turn in ((1, 2) if i % 2 else (1,))]
  assert turns == [x["turn"] for x in expected]


def joint_model(loaded, compressor):
  """The model of a checkpoint as one joint pass under the two-stage mask."""
  model = runs.model_of(loaded)
  config = dataclasses.replace(
    model.config,
    attention="bias",
    compressor=dataclasses.replace(model.config.compressor, name=compressor),
  )
  return VisionLanguageModel(config, model.tokens)
