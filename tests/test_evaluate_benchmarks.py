"""Benchmarks through the program, compared with the engine asked one by one.

A tiny model with random weights; the words that it says most are made 'yes' and
'no'. Files are those of benchmark_data.py.
"""

import collections
import dataclasses
import functools
import json
import re
import signal
import threading
import time

import av
import orbax.checkpoint as ocp
import pytest

from tests import benchmark_data, disks, runs
from tests.evals.benchmarks.test_video_qa import NO, YES, Stub
from tests.inference import engines
from tests.training import test_multihost
from vocojax.data.tokenizer import load_tokenizer
from vocojax.evals.benchmarks import files, registry
from vocojax.inference.engine import Engine
from vocojax.training import checkpoint, checksums

NUM_IMAGES = 6  # of GQA, with four questions each
SAME = {"yes": "2", "no": "color"}  # words that change places
MAX_FRAMES = 3
# Which frames of each video are to be taken, worked out by hand.
FRAMES = ((0,), (0, 10, 20), (0, 5, 10), (5, 20, 30))
SECRET = "a-secret-key"
SINGLE = "--config.evaluation.batch_size=1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A checkpoint in `run/voco` and the files of three benchmarks."""
  folder = tmp_path_factory.mktemp("benchmarks")
  config, _, params, _ = engines.setup(folder)
  path = folder / "tokenizer" / "tokenizer.json"
  content = json.loads(path.read_text())
  words = content["model"]["vocab"]
  for a, b in SAME.items():
    words[a], words[b] = words[b], words[a]
  path.write_text(json.dumps(content))
  data = dataclasses.replace(config.data, max_images=MAX_FRAMES)
  config = dataclasses.replace(config, data=data)
  where = folder / "run" / "voco" / checkpoint.FOLDER / "7"
  tokenizer = load_tokenizer(folder / "tokenizer")
  checkpoint.write_settings(where, config, tokenizer)
  with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as writer:
    writer.save(where / "params", args=ocp.args.StandardSave(params))
  checksums.write(where, 7)
  benchmark_data.gqa(folder, folder / "gqa", NUM_IMAGES)
  benchmark_data.mme(folder, folder / "mme")
  benchmark_data.msvd(folder / "msvd_qa")
  return folder


@pytest.fixture(scope="module")
def one_by_one(folder):
  """Returns a function name -> the answer to each question, asked alone."""
  config, model, params, _ = engines.setup(folder)
  words = load_tokenizer(folder / "tokenizer")
  with runs.quick_compile():
    engine = Engine(
      config,
      model,
      params,
      words,
      slots=1,
      max_images=MAX_FRAMES,
      max_text_length=1100,
    )

    @functools.cache
    def answers(name):
      bench = registry.open_benchmark(name, folder / name)
      found = {}
      for question in bench.questions():
        images = list(question.images) or frames(question.video)
        found[question.id] = engine.ask(
          question.prompt, images, max_new_tokens=bench.max_new_tokens
        )
      return found

    yield answers


def frames(path):
  with av.open(path) as container:
    decoded = [frame.to_image() for frame in container.decode(video=0)]
  return [decoded[i] for i in FRAMES[int(path.stem[-1])]]


@pytest.fixture(scope="module")
def program(folder):
  """Runs the program on a benchmark: name, flags -> status, stdout, stderr."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("JUDGE_API_KEY", SECRET)
    forks = runs.Forks(folder, "vocojax.evaluate")

  def run(name, *more):
    return forks.run(*arguments(folder, name), *more)

  yield run
  forks.close()


def arguments(folder, name):
  return [
    f"--checkpoint={folder}/run/voco",
    f"--benchmark={name}",
    f"--data={folder / name}",
  ]


def finish(program, *words):
  status, out, err = program(*words)
  assert status == 0, err
  return out, err


def predictions(out):
  """The answer to each question, over all files."""
  found = {}
  for path in out.glob("predictions*.jsonl"):
    for line in path.read_text().splitlines():
      entry = json.loads(line)
      assert entry["question_id"] not in found
      found[entry["question_id"]] = entry["text"]
  return found


def result(out):
  return json.loads((out / "result.json").read_text())


def test_gqa(folder, one_by_one, program, tmp_path):
  expected = one_by_one("gqa")
  assert len(set(expected.values())) > NUM_IMAGES  # they tell questions apart
  # Answers that are right, also where the rule has to clean them first.
  truths = [text.rstrip(".").lower() for text in expected.values()][:9]
  truths[4] = "something else"
  data = tmp_path / "data"
  benchmark_data.gqa(folder, data, NUM_IMAGES, truths)
  out, err = finish(program, "gqa", f"--data={data}")
  where = folder / "run" / "benchmarks" / "gqa" / "voco"
  submission = where / "testdev_balanced_predictions.json"
  assert out.splitlines() == [
    "gqa: accuracy 33.33, 24 questions, VoCo",
    f"to hand in: {submission}",
    f"result: {where / 'result.json'}",
  ]
  assert "answers of gqa, VoCo: 100%" in err and "24/24" in err
  assert predictions(where) == expected
  assert {
    entry["questionId"]: entry["prediction"]
    for entry in json.loads(submission.read_text())
  } == {id_: text.rstrip(".").lower() for id_, text in expected.items()}
  found = result(where)
  assert found["value"] == pytest.approx(100 * 8 / 24)
  assert found["num_questions"] == 24
  assert found["prompt_layout"] == "qa_v1/1"
  assert found["checkpoint"] == f"{folder}/run/voco/checkpoints/7"
  bench = registry.open_benchmark("gqa", data)
  assert found["data"]["sha256"] == files.data_hash(bench.files)
  assert found["data"]["folder"] == str(data)
  settings = found["settings"]
  assert re.fullmatch("[0-9a-f]{64}", settings.pop("model"))
  assert settings == {
    "step": 7,
    "name": "voco",
    "tokens_per_image": 3,
    "strip_newlines": "none",
    "dtype": "float32",
    "max_new_tokens": 128,
    "judge": None,
  }
  assert {"commit", "command", "jax", "devices"} <= set(found["provenance"])
  assert found["config"]["model"]["compressor"]["num_voco_tokens"] == 3


def test_mme_pairs(one_by_one, program, tmp_path):
  expected = one_by_one("mme")
  starts = {id_: text[:4].lower() for id_, text in expected.items()}
  right = collections.Counter()
  for id_, start in starts.items():
    path, _, number = id_.partition("#")
    word = "yes" if number == "1" else "no"
    said = "yes" if "yes" in start else "no" if "no" in start else "other"
    right[path] += said == word
  assert {1, 2} <= set(right.values())  # halves and pairs both occur
  points = {path: 50 * n + 100 * (n == 2) for path, n in right.items()}
  perception = sum(list(points.values())[:10])
  out, _ = finish(program, "mme", f"--out={tmp_path}/a/b")
  assert out.startswith(f"mme: perception {perception:.2f}, 28 questions, VoCo")
  assert predictions(tmp_path / "a/b") == expected
  assert result(tmp_path / "a/b")["scores"]["perception"] == perception
  (line, _) = (tmp_path / "a/b/OCR.txt").read_text().splitlines()
  cells = line.split("\t")
  assert cells[0] == "9.txt" and cells[2] == "Yes"
  assert cells[3] == expected["OCR/9.png#1"]


@pytest.fixture
def stub():
  stub = Stub({})
  yield stub
  stub.close()


def test_videos_and_judge(folder, one_by_one, program, stub, tmp_path):
  expected = one_by_one("msvd_qa")
  assert len(set(expected.values())) == 8
  out = tmp_path / "out"
  said, _ = finish(program, "msvd_qa", f"--out={out}")
  frames = f"at most {MAX_FRAMES} frames of a video\n"
  start = f"msvd_qa: match 0.00, 8 questions, VoCo, {frames}"
  assert said.startswith(start)
  assert predictions(out) == expected
  settings = result(out)["settings"]
  assert settings["judge"] is None and settings["max_frames"] == MAX_FRAMES
  lines = (out / "predictions.jsonl").read_text()

  # A server that is busy, talks, and once never gives a verdict.
  texts = list(expected.values())
  stub.script = {text: [YES] for text in texts}
  stub.script |= {texts[0]: [503, YES], texts[1]: ["Well, yes.", NO]}
  stub.script |= {texts[2]: ["I cannot say."], texts[3]: [b"<html>", NO]}
  judge = [
    f"--judge_url={stub.url}",
    "--judge_model=stub-1",
    f"--judge_cache={tmp_path}/verdicts",
  ]
  said, err = finish(program, "msvd_qa", f"--out={out}", *judge)
  start = f"msvd_qa: judge_accuracy 62.50, 8 questions, VoCo, {frames}"
  assert said.startswith(f"{start}wrong for lack of a verdict: 1\n")
  assert "answers of msvd_qa" not in err  # none was asked again
  assert (out / "predictions.jsonl").read_text() == lines
  found = result(out)
  assert found["headline"] == "judge_accuracy" and found["value"] == 62.5
  assert found["scores"]["judge_score"] == 25 / 8
  assert found["scores"]["match"] == 0
  judged = found["settings"]["judge"]
  assert judged["model"] == "stub-1" and judged["url"] == stub.url
  assert judged["without_verdict"] == 1 and judged["retries"] == 2
  assert re.fullmatch(r"\d{4}-\d\d-\d\d", judged["last_verdict"])
  assert {h["Authorization"] for h in stub.headers} == {f"Bearer {SECRET}"}
  assert len((tmp_path / "verdicts/verdicts.jsonl").read_bytes().split()) > 7
  for path in tmp_path.rglob("*.json*"):
    assert SECRET not in path.read_text()

  # Again: only the answer without a verdict is asked about.
  calls = len(stub.requests)
  stub.script[texts[2]] = [YES]
  said, _ = finish(program, "msvd_qa", f"--out={out}", *judge)
  assert said.startswith("msvd_qa: judge_accuracy 75.00,")
  assert [text for text, _ in stub.requests[calls:]] == [texts[2]]
  # And again: nobody is called; the server could be gone.
  calls = len(stub.requests)
  finish(program, "msvd_qa", f"--out={out}", *judge)
  assert len(stub.requests) == calls
  judged = result(out)["settings"]["judge"]
  assert (judged["calls"], judged["cached"]) == (0, 8)


def wait_for_lines(process, path, count):
  deadline = time.monotonic() + 200
  while not path.exists() or path.read_bytes().count(b"\n") < count:
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < deadline
    time.sleep(0.001)


def test_killed_run_goes_on(folder, one_by_one, program, tmp_path):
  out = tmp_path / "out"
  path = out / "predictions.jsonl"
  flags = [*arguments(folder, "gqa"), f"--out={out}", SINGLE]
  process = runs.start_cached(folder, "vocojax.evaluate", *flags)
  wait_for_lines(process, path, 5)
  process.kill()
  process.communicate()
  assert process.returncode == -signal.SIGKILL
  before = path.read_bytes()
  kept = before[: before.rindex(b"\n") + 1]
  assert 5 <= kept.count(b"\n") < 24
  assert not (out / "result.json").exists()
  _, err = finish(program, "gqa", f"--out={out}", SINGLE)
  left = 24 - kept.count(b"\n")
  assert f"{left}/{left}" in err
  assert path.read_bytes().startswith(kept)
  assert predictions(out) == one_by_one("gqa")
  assert result(out)["num_questions"] == 24


def test_second_run_is_refused(folder, one_by_one, program, tmp_path):
  """Its answers would be added to those of the first."""
  out = tmp_path / "out"
  flags = [*arguments(folder, "gqa"), f"--out={out}", SINGLE]
  first = runs.start_cached(folder, "vocojax.evaluate", *flags)
  wait_for_lines(first, out / "predictions.jsonl", 2)
  first.send_signal(signal.SIGSTOP)
  try:
    before = (out / "predictions.jsonl").read_bytes()
    status, said, err = program("gqa", f"--out={out}", SINGLE)
    assert (status, said) == (2, "")
    words = f"error: {out}: got evaluation by process {first.pid} on "
    assert err.startswith(words) and err.count("\n") == 1
    assert (out / "predictions.jsonl").read_bytes() == before
    # Elsewhere it may run meanwhile.
    finish(program, "gqa", f"--out={tmp_path}/other")
  finally:
    first.send_signal(signal.SIGCONT)
  _, err = first.communicate(timeout=280)
  assert first.returncode == 0, err
  assert predictions(out) == predictions(tmp_path / "other")
  assert predictions(out) == one_by_one("gqa")
  assert result(out)["num_questions"] == 24
  assert not list(out.glob(".*"))


def test_full_disk(folder, one_by_one, program, tmp_path):
  with disks.mounted(tmp_path / "disk", "256k") as disk:
    out = disk / "out"
    for leave in (0, 12_000):  # before the first answer, and among them
      fill = disks.fill(disk, leave)
      status, said, err = program("gqa", f"--out={out}")
      assert (status, said) == (2, "") and "Traceback" not in err
      assert "No space left on device" in err.splitlines()[-1]
      assert "free some space and run the same" in err.splitlines()[-1]
      names = {path.name for path in disk.rglob("*") if path.is_file()}
      assert names <= {"fill", "predictions.jsonl"}
      fill.unlink()
    kept = predictions(out)
    assert 0 < len(kept) < 24
    _, err = finish(program, "gqa", f"--out={out}")
    assert f"{24 - len(kept)}/{24 - len(kept)}" in err
    assert predictions(out) == one_by_one("gqa")
    # The answers are there, and there is no room for the result.
    (out / "result.json").unlink()
    disks.fill(disk, 4096)
    status, said, err = program("gqa", f"--out={out}")
    assert (status, said) == (2, "") and err.count("\n") == 1
    assert not list(out.glob("*.part")) + list(out.glob("result.json"))
    (disk / "fill").unlink()
    disks.remount(disk, "ro")
    status, said, err = program("gqa", f"--out={out}")
    assert (status, said) == (2, "") and err.count("\n") == 1
    assert "Read-only file system" in err


@pytest.fixture(scope="module")
def finished(folder, program):
  """Predictions of GQA, whole."""
  out = folder / "finished"
  finish(program, "gqa", f"--out={out}")
  return (out / "predictions.jsonl").read_text().splitlines(keepends=True)


def test_damaged_predictions(finished, program, one_by_one, tmp_path):
  path = tmp_path / "predictions.jsonl"
  out = f"--out={tmp_path}"

  def error():
    status, said, err = program("gqa", out)
    assert (status, said) == (2, "") and err.count("\n") == 1
    return err.removeprefix("error: ")

  # In another order, and with the last line cut off.
  path.write_text("".join(finished[:0:-1]) + finished[0][:30])
  _, err = finish(program, "gqa", out)
  assert "1/1" in err
  assert predictions(tmp_path) == one_by_one("gqa")
  # Parts of a run that had more processes.
  path.write_text("".join(finished[:3]))
  (tmp_path / "predictions-1.jsonl").write_text("".join(finished[3:8]))
  (tmp_path / "predictions-2.jsonl").write_text(finished[9] + finished[8][:30])
  _, err = finish(program, "gqa", out)
  assert "15/15" in err
  assert predictions(tmp_path) == one_by_one("gqa")
  # One question twice, in one file and in two.
  id_ = json.loads(finished[3])["question_id"]
  path.write_text("".join(finished[:4]))
  assert error() == (
    f"{tmp_path}/predictions-1.jsonl: got question '{id_}', which "
    "predictions.jsonl answers, too, expected one answer to a question. Fix: "
    "delete one of the lines\n"
  )
  path.write_text("".join(finished[:3] + finished[:1]))
  assert re.match(r".*jsonl:4: got question '\d+' a second time", error())
  for other in tmp_path.glob("predictions-*.jsonl"):
    other.unlink()
  # Of another step, and of another question.
  path.write_text(finished[0].replace("step 7", "step 8"))
  words = ".*:1: field model_id: got 'step 8, .*expected 'step 7, "
  assert re.match(words, error())
  line = json.loads(finished[0]) | {"question_id": "foreign"}
  path.write_text(json.dumps(line) + "\n")
  assert f"{tmp_path}: got answers to 'foreign', which the b" in error()


def test_other_settings_do_not_continue(finished, program, tmp_path):
  path = tmp_path / "predictions.jsonl"
  path.write_text("".join(finished))
  for flags, words in (
    (["--int8"], "name voco_int8,"),
    (["--compressor=full"], "name voco_full, tokens_per_image 17,"),
    (["--layout=voco_v1"], "layout voco_v1/1'"),
  ):
    status, out, err = program("gqa", f"--out={tmp_path}", *flags)
    assert (status, out) == (2, "")
    assert re.search(f":1: .* got '.*', expected '.*{words}", err), err
  assert path.read_text() == "".join(finished)


@pytest.mark.slow
def test_two_processes_answer_as_one(folder, one_by_one, stub, tmp_path):
  """The second one does not wait for the judge; then one goes on alone."""
  expected = one_by_one("msvd_qa")
  out = tmp_path / "out"
  stub.script = {text: [YES] for text in expected.values()}
  judging, reply = threading.Event(), stub.reply
  stub.reply = lambda *request: judging.wait(50) and reply(*request)
  flags = [
    *arguments(folder, "msvd_qa"),
    f"--out={out}",
    f"--judge_url={stub.url}",
    "--judge_model=stub-1",
    f"--judge_cache={tmp_path}",
  ]
  first, second = test_multihost.start(folder, "vocojax.evaluate", *flags)
  (said,) = test_multihost.finish([second])
  assert said[0] == "" and first.poll() is None  # still judging
  judging.set()
  ((said, err),) = test_multihost.finish([first])
  assert said.startswith("msvd_qa: judge_accuracy 100.00, 8 questions, VoCo,")
  assert "4/4" in err
  assert predictions(out) == expected
  parts = [out / f"predictions{end}.jsonl" for end in ("", "-1")]
  assert [len(p.read_text().splitlines()) for p in parts] == [4, 4]
  text = parts[1].read_text()
  parts[1].write_text(text[: text.rindex("{") + 9])  # as a crash leaves it
  alone = runs.start_cached(folder, "vocojax.evaluate", *flags[:-3])
  ((said, err),) = test_multihost.finish([alone])
  assert "1/1" in err and predictions(out) == expected


def test_bad_input(folder, program, tmp_path):
  data = tmp_path / "data"
  benchmark_data.gqa(folder, data, 2)
  (data / "data/images/n1.png").write_bytes(b"not an image")
  (tmp_path / "no_image").mkdir()
  benchmark_data.gqa(folder, tmp_path / "no_image", 2)
  (tmp_path / "no_image/data/images/n1.png").unlink()
  out = f"--out={tmp_path / 'out'}"
  for name, flags, words in (
    ("gpa", [], "--benchmark: got 'gpa', expected one of .* write gqa"),
    ("gqa", ["--data="], "--data: got nothing, .* of gqa. .* README.md"),
    ("gqa", ["--data=nowhere"], "--data: got no folder nowhere, expected"),
    ("gqa", ["--data=~nosuchuser/x"], "~nosuchuser/x: got a user that does"),
    ("gqa", ["--out=~nosuchuser/x"], "~nosuchuser/x: got a user that does"),
    ("gqa", ["--out=/dev/null/x"], "/dev/null/x: got Not a directory,"),
    ("gqa", [f"--data={folder / 'mme'}"], r".*gqa.*jsonl: got no such .*eval"),
    (
      "gqa",
      [f"--data={tmp_path / 'no_image'}"],
      r"\S*n1.png: got no such image, .* it is in the download of https",
    ),
    (
      "gqa",
      [f"--data={data}", out],
      r"question [13]: \S*n1.png: got a file that begins with b'not an i'",
    ),
    (
      "gqa",
      ["--judge_url=http://x", "--judge_model=m"],
      "--benchmark=gqa: got a judge, expected none",
    ),
    ("msvd_qa", ["--judge_url=http://x"], "--judge_model: got nothing, expect"),
    ("msvd_qa", ["--judge_cache=x"], "--judge_url: got nothing, expected"),
    (
      "msvd_qa",
      [f"--judge_url=http://{SECRET}@x/v1", "--judge_model=m"],
      "--judge_url: got a URL with a user, ",
    ),
    (
      "gqa",
      [f"{SINGLE[:-1]}0"],
      "config.evaluation.batch_size: got 0, expected",
    ),
    ("gqa", [f"{SINGLE[:-1]}x"], "--config.evaluation.batch_size: got 'x', "),
    ("gqa", ["--split=train"], "--split: got --benchmark, expected a flag"),
  ):
    status, said, err = program(name, *flags)
    assert (status, said) == (2, ""), (name, flags)
    last = err.splitlines()[-1]
    assert re.match(f"error: {words}", last), last
    assert "Traceback" not in err and SECRET not in err


@pytest.mark.parametrize(
  ("flag", "other"),
  [
    ("--out=x", "--benchmark"),
    ("--config.evaluation.adaptive_threshold=0.2", "--adaptive"),
  ],
)
def test_flags_that_need_another(folder, flag, other):
  flags = [f"--checkpoint={folder}/run/voco", flag]
  process = runs.start_cached(folder, "vocojax.evaluate", *flags)
  out, err = process.communicate(timeout=200)
  assert (process.returncode, out) == (2, "")
  assert err == (
    f"error: {flag.partition('=')[0]}: got no {other}, expected a flag that it "
    "works with. Fix: give both or none\n"
  )


def test_judge_that_refuses(folder, one_by_one, program, stub, tmp_path):
  """What was answered stays, and the error says what to do."""
  body = f"no such key: {SECRET}".encode()
  texts = one_by_one("msvd_qa").values()
  stub.script = {text: [(401, body)] for text in texts}
  judge = [f"--judge_url={stub.url}", "--judge_model=m"]
  status, out, err = program("msvd_qa", f"--out={tmp_path}", *judge)
  assert (status, out) == (2, "")
  words = r"error: judge m at \S*: got HTTP 401 Unauthorized no such key: "
  words += r"\*\*\*, .* verdicts so far are in "
  assert re.match(
    f"{words}{folder}/run/benchmarks/verdicts", err.splitlines()[-1]
  )
  assert SECRET not in err
  assert len(predictions(tmp_path)) == 8
  assert not (tmp_path / "result.json").exists()
