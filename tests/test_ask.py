"""Questions to a small checkpoint: one, from a file, in a chat on a terminal.

Real processes; what they answer is compared with the engine in this one.
"""

import contextlib
import fcntl
import itertools
import json
import os
import pty
import random
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

import vocojax
from tests import disks, runs
from vocojax import ask
from vocojax.config import load_module, phases
from vocojax.errors import UserError
from vocojax.inference import jobs
from vocojax.inference.batch import Batch
from vocojax.inference.lookup import Lookup
from vocojax.inference.requests import Request
from vocojax.inference.sampling import Sampling
from vocojax.training import checkpoint, checksums, loop

TAIL = """\
  c.model.compressor.num_voco_tokens = 2
  c.training.steps = 40
"""
QUESTIONS = (
  "what color is this ?",
  "is it green ?",
  "what color is this ? number 0",
  "is this number 1 ?",
)
SIZE = "16 patches -> 2 tokens, 512 bytes"  # 2 x 2 layers x 2 x 16 x 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A checkpoint in `voco` that tells colours apart, and images."""
  folder = tmp_path_factory.mktemp("ask")
  runs.write_data(folder)
  path = runs.write_config(folder, "one.py", TAIL + runs.ONE_PHASE)
  (config,) = phases(load_module(str(path)))
  with runs.quick_compile():
    loop.run(runs.phase(config, folder / "voco"))
  (folder / "broken.png").write_bytes(b"not an image")
  shutil.copy(folder / "1.png", folder / "with,comma.png")
  return folder


@pytest.fixture(scope="module")
def engine(folder):
  with runs.quick_compile():
    yield vocojax.load(str(folder / "voco"), max_images=2)


@pytest.fixture(scope="module")
def program(folder):
  forks = runs.Forks(folder, "vocojax.ask", arguments=True)
  yield lambda *arguments: forks.run(f"--checkpoint={folder}/voco", *arguments)
  forks.close()


def command(folder, phase, *arguments):
  checkpoint = f"--checkpoint={folder}/{phase}"
  return [sys.executable, "-m", "vocojax.ask", checkpoint, *arguments]


def images(folder, *numbers):
  return [str(folder / f"{i}.png") for i in numbers]


def expected(folder, engine, question, *numbers, **fields):
  return engine.ask(question, images(folder, *numbers), **fields)


def test_it_learned(folder, engine):
  """Or the comparisons below would be about one and the same answer."""
  answers = {
    (i, q): expected(folder, engine, q, i) for q in QUESTIONS for i in range(4)
  }
  assert len(set(answers.values())) >= 4, answers
  by_image = [len({answers[i, q] for i in range(4)}) for q in QUESTIONS]
  assert max(by_image) >= 3, answers


def test_question(folder, engine, program):
  path = folder / "3.png"
  status, out, err = program(f"--image={path}", QUESTIONS[0])
  assert (status, err) == (0, f"{path}: {SIZE}\n")
  assert out == expected(folder, engine, QUESTIONS[0], 3) + "\n"


def test_several_images(folder, engine, program):
  """In their order; a comma separates them, or is part of a name."""
  a, b = images(folder, 0, 1)
  comma = f"{folder}/with,comma.png"
  answers = set()
  for arguments, numbers in (
    ([f"--image={a},{b}"], (0, 1)),
    ([f"--image={comma}", f"--image={a}"], (1, 0)),
    ([f"--image={comma}"], (1,)),
  ):
    status, out, err = program(*arguments, *QUESTIONS[0].split())
    assert status == 0, err
    assert err.count(SIZE) == len(numbers)
    assert out == expected(folder, engine, QUESTIONS[0], *numbers) + "\n"
    answers.add(out)
  assert len(answers) > 1


def test_flags(folder, engine, program):
  path, question = folder / "1.png", QUESTIONS[2]
  plain = expected(folder, engine, question, 1)
  words = plain.split()
  assert len(words) > 2
  sampled = {"sampling": Sampling(3.0, 9, 0.9, seed=7), "max_new_tokens": 7}
  stopped = {"stop": (words[1],)}
  token = {"stop_token_ids": (engine.tokenizer.get_vocab()[words[2]],)}
  for arguments, fields in (
    (
      "--temperature=3 --top_k=9 --top_p=0.9 --seed=7 --max_new_tokens=7",
      sampled,
    ),
    (f"--stop=unheard --stop={words[1]}", stopped),
    (f"--stop_token=</s> --stop_token={words[2]}", token),
    ("--max_new_tokens=2", {"max_new_tokens": 2}),
  ):
    status, out, err = program(f"--image={path}", *arguments.split(), question)
    assert status == 0, err
    answer = expected(folder, engine, question, 1, **fields)
    assert out == answer + "\n" and answer != plain
  assert err.endswith(
    "cut after 2 tokens; --max_new_tokens and --max_text_length allow more\n"
  )


def test_fewer_tokens_and_store(folder, engine, program, tmp_path):
  """Two tokens are put into the store; one of them is cut from those."""
  with runs.quick_compile():
    shorter = vocojax.load(str(folder / "voco"), num_voco_tokens=1)
  questions = (*QUESTIONS, "it", "number")
  for i, question in itertools.product(range(8), questions):
    path = folder / f"{i}.png"
    one, two = (x.ask(question, str(path)) + "\n" for x in (shorter, engine))
    if one != two:
      break
  assert one != two
  store, arguments = f"--store={tmp_path}/store", [f"--image={path}", question]
  (tmp_path / "store").mkdir()
  assert program(store, *arguments) == (0, two, f"{path}: {SIZE}\n")
  again = program(store, *arguments)
  assert again == (0, two, f"{path}: {SIZE}, from the store\n")
  cut = program(store, "--num_voco_tokens=1", *arguments)
  small = "16 patches -> 1 token, 256 bytes, from the store"
  assert cut == (0, one, f"{path}: {small}\n")


def test_question_from_stdin(folder, engine):
  question = QUESTIONS[0]
  for given, status, words in (
    (question + "\n", 0, ""),
    ("\n", 2, "error: question: got none, and nothing on stdin, expected a "),
  ):
    process = subprocess.run(
      command(folder, "voco", f"--image={folder}/3.png"),
      input=given,
      cwd=runs.ROOT,
      env=os.environ | runs.cached(folder) | {"JAX_PLATFORMS": "cpu"},
      capture_output=True,
      text=True,
      timeout=250,
    )
    assert process.returncode == status, process.stderr
    assert words in process.stderr
    if not status:
      assert process.stdout == expected(folder, engine, question, 3) + "\n"


VALUES = {"max_new_tokens": 64, "temperature": 0.0, "top_k": 0, "top_p": 1.0}
VALUES |= {"seed": 0, "stop": [], "stop_token": []}
LINES = [
  {"id": f"{i}/{q}", "image": f"{i}.png", "question": QUESTIONS[q]}
  for i in range(6)
  for q in range(4)
] + [
  {"id": "text", "question": QUESTIONS[0]},
  {"id": "two", "image": ["1.png", "0.png"], "question": QUESTIONS[0]},
  {
    "id": "turns",
    "image": "with,comma.png",
    "turns": [[QUESTIONS[1], "yes it is"], [QUESTIONS[0], None]],
  },
  {
    "id": "sampled",
    "image": "0.png",
    "question": QUESTIONS[0],
    "temperature": 4,
    "top_k": 12,
    "seed": 5,
    "max_new_tokens": 3,
  },
  {"id": "stop", "image": "1.png", "question": QUESTIONS[0], "stop": "green"},
]


@pytest.fixture(scope="module")
def answers(folder, engine):
  """By id what the lines should give, asked one by one."""
  found = {
    line["id"]: engine.ask(line["question"], str(folder / line["image"]))
    for line in LINES[:24]
  }
  found["text"] = engine.ask(QUESTIONS[0])
  found["two"] = expected(folder, engine, QUESTIONS[0], 1, 0)
  turns = [(QUESTIONS[1], "yes it is"), (QUESTIONS[0], None)]
  request = Request(turns, images(folder, 1))
  found["turns"] = engine.run([request])[0].text
  sampling = Sampling(temperature=4.0, top_k=12, seed=5)
  fields = {"sampling": sampling, "max_new_tokens": 3}
  found["sampled"] = expected(folder, engine, QUESTIONS[0], 0, **fields)
  found["stop"] = expected(folder, engine, QUESTIONS[0], 1, stop=("green",))
  assert found["turns"] != found["1/0"] != found["stop"]
  assert found["sampled"] != found["0/0"]
  return found


def write_lines(path, lines):
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return f"--jsonl={path}"


def read_lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_file(folder, answers, program, tmp_path):
  """In any order, with any number of slots, and compressing each image once."""
  shuffled = random.Random(0).sample(LINES, len(LINES))
  for number, lines, slots in ((0, LINES, 8), (1, shuffled, 3)):
    arguments = write_lines(folder / f"in{number}.jsonl", lines)
    out = tmp_path / f"out{number}.jsonl"
    status, stdout, err = program(arguments, f"--out={out}", f"--slots={slots}")
    assert (status, stdout) == (0, "")
    # with,comma.png is the same image as 1.png.
    summary = "29 answers, 0 errors; 6 images compressed, 0 from the store: "
    assert err.splitlines()[-1] == f"{summary}{SIZE} each"
    found = read_lines(out)
    assert {x["id"]: x["answer"] for x in found} == answers
    assert len(found) == len(LINES)
    assert {x["id"]: x["finish_reason"] for x in found}["stop"] == "stop"


def test_memory_and_order(folder, engine, answers, tmp_path):
  """Questions about an image are neighbours, so that no memory is needed."""
  shuffled = random.Random(1).sample(LINES[:24], 24)
  write_lines(folder / "shuffled.jsonl", shuffled)
  todo = jobs.read(str(folder / "shuffled.jsonl"))
  lookup = Lookup(engine, memory=0)
  out = jobs.Answers(str(tmp_path / "out.jsonl"), todo, None)
  with contextlib.closing(out):
    Batch(engine, lookup, out, ask.Maker(engine, VALUES)).run(todo)
  assert lookup.counts == {"model": 6}
  found = read_lines(tmp_path / "out.jsonl")
  assert {x["id"]: x["answer"] for x in found} == {
    line["id"]: answers[line["id"]] for line in shuffled
  }


def test_lookup_keeps_what_was_used_last(folder, engine):
  lookup = Lookup(engine, memory=2 * 512)
  a, b, c = images(folder, 0, 1, 2)

  def sources(*paths):
    return [found.source for found in lookup.find(paths)]

  assert sources(a, b, a) == ["model"] * 3
  assert sources(a) == ["memory"]  # b is now the one used longest ago
  assert sources(c) == ["model"]
  assert sources(a, c) == ["memory"] * 2
  assert sources(b) == ["model"]
  assert lookup.counts == {"model": 4, "memory": 3}
  [found] = lookup.find([str(folder / "with,comma.png")])
  assert found.source == "memory" and found.path.endswith("with,comma.png")
  np.testing.assert_array_equal(found.cache.keys, engine.compress(b).keys)


def test_bad_images_fail_their_lines(folder, answers, program, tmp_path):
  bad = [
    {"id": "a", "image": "broken.png", "question": QUESTIONS[0]},
    {"id": "b", "image": ["0.png", "gone.png"], "question": QUESTIONS[0]},
    {"id": "c", "image": "broken.png", "question": QUESTIONS[1]},
    {"id": "d", "image": "0.png", "question": "is it green ? " * 200},
  ]
  lines = [bad[0], *LINES[:9], *bad[1:], *LINES[9:12]]
  arguments = write_lines(folder / "bad.jsonl", lines)
  out = tmp_path / "out.jsonl"
  status, _, err = program(arguments, f"--out={out}")
  assert status == 1
  assert "12 answers, 4 errors; 3 images compressed" in err
  assert err.count("broken.png: got ") == 1
  for _ in range(2):
    found = {x["id"]: x for x in read_lines(out)}
    assert len(found) == len(read_lines(out)) == len(lines)
    for line in LINES[:12]:
      assert found[line["id"]]["answer"] == answers[line["id"]]
    for name, words in (
      ("a", f"{folder}/broken.png: got "),
      ("b", f"{folder}/gone.png: got no such file, "),
      ("c", f"{folder}/broken.png: got "),
      ("d", "prompt: got 800 tokens, expected at most 512. "),
    ):
      assert found[name]["error"].startswith(words)
      assert "answer" not in found[name]
    status, _, err = program(arguments, f"--out={out}")  # tries them again
    assert status == 1
    assert f"{out}: dropped 4 lines with an error" in err
    assert "0 answers, 4 errors" in err
  shutil.copy(folder / "3.png", folder / "gone.png")
  program(arguments, f"--out={out}")
  assert "answer" in {x["id"]: x for x in read_lines(out)}["b"]


def test_lines_that_cannot_be_used(folder, answers, program, tmp_path):
  """Each has an error, at each run again, and the others are answered."""
  os.mkfifo(folder / "pipe.png")
  (folder / "zero.png").symlink_to("/dev/zero")
  Image.new("RGB", (1, 40_000), "red").save(folder / "tall.png")
  Image.new("L", (1, 70_000)).save(folder / "higher.png")
  good = [
    *LINES[:3],
    {"id": 0, "question": QUESTIONS[0]},
    {"question": QUESTIONS[0]},
    {"id": "marked", "image": "0.png", "question": "<image>\n" + QUESTIONS[0]},
    {"id": 2.5, "image": None, "question": QUESTIONS[0]},
    {"id": "tall", "image": "tall.png", "question": QUESTIONS[0]},
  ]
  ask_red = {"question": QUESTIONS[0]}
  bad = [
    ({"id": "nul", "image": "a\0.png"} | ask_red, "line: field image: got "),
    ({"id": "up", "image": "../0.png"} | ask_red, "line: field image: got "),
    ({"id": "pipe", "image": "pipe.png"} | ask_red, f"{folder}/pipe.png: got "),
    ({"id": "zero", "image": "zero.png"} | ask_red, f"{folder}/zero.png: got "),
    (
      {"id": "higher", "image": "higher.png"} | ask_red,
      f"{folder}/higher.png: got 1 x 70,000 pixels, ",
    ),
    ({"id": "half", "question": "\ud83d ?"}, "line: got half of a surrogate "),
    ({"id": "mark", "question": "<image> ?"}, "question: got 1 <image>, "),
    (
      {"id": "marks", "image": "0.png", "question": "<image><image> ?"},
      "question: got 2 <image>, ",
    ),
    ({"id": "field", "colour": 1} | ask_red, "line: got the field 'colour', "),
    ({"id": "hot", "temperature": -1} | ask_red, "temperature: got -1.0, "),
    ({"id": "huge", "seed": 10**4000} | ask_red, "seed: got 1000"),
    (
      {"id": "stop", "stop_token": "grey"} | ask_red,
      "stop_token: got 'grey', ",
    ),
  ]
  lines = [json.dumps(x).encode() for x in [*good, *(x for x, _ in bad)]]
  lines.insert(4, b'{"id": "latin", "question": "caf\xe9 ?"}')
  lines.insert(9, b'{"id": "deep", "question": ' + b"[" * 100_000)
  (folder / "edges.jsonl").write_bytes(b"\n".join(lines))
  arguments = [f"--jsonl={folder}/edges.jsonl", f"--out={tmp_path}/out.jsonl"]
  for run in range(2):
    status, out, err = program(*arguments)
    assert (status, out) == (1, ""), err
    assert "Traceback" not in err
    count = 0 if run else len(good)
    assert f"\n{count} answers, {len(bad) + 2} errors" in err
    found = {x["id"]: x for x in read_lines(tmp_path / "out.jsonl")}
    assert len(found) == len(good) + len(bad) + 2
    for line, words in bad:
      assert found[line["id"]]["error"].startswith(words)
    assert found["latin"]["error"].startswith("line: got byte 0xe9 at offset ")
    assert found[10]["error"].startswith("line: got lists or objects nested")
    for line in LINES[:3]:
      assert found[line["id"]]["answer"] == answers[line["id"]]
    for name in (0, 6, 2.5):
      assert found[name]["answer"] == answers["text"]
    assert found["marked"]["answer"] == answers["0/0"]
  assert sorted(os.listdir(tmp_path)) == ["out.jsonl"]


def test_many_errors_are_not_all_shown(folder, program, tmp_path):
  """Such as where a file of another kind is named."""
  (folder / "text.jsonl").write_text("".join(f"{i}\n" for i in range(500)))
  arguments = [f"--jsonl={folder}/text.jsonl", f"--out={tmp_path}/out.jsonl"]
  status, _, err = program(*arguments)
  assert status == 1 and "0 answers, 500 errors" in err
  assert err.count(f"{folder}/text.jsonl:") == 20
  assert len(read_lines(tmp_path / "out.jsonl")) == 500


def test_image_folder(folder, answers, program, tmp_path):
  out = tmp_path / "out.jsonl"
  arguments = [write_lines(tmp_path / "in.jsonl", LINES[:2]), f"--out={out}"]
  assert program(*arguments)[0] == 1
  assert program(*arguments, f"--image_folder={folder}")[0] == 0
  assert {x["id"]: x["answer"] for x in read_lines(out)} == {
    line["id"]: answers[line["id"]] for line in LINES[:2]
  }
  # Other images may have these names there.
  status, _, err = program(*arguments, f"--image_folder={tmp_path}")
  assert status == 2
  assert err.startswith(f"error: {out}:1: got an answer to id '0/0' of another")


@pytest.mark.slow
def test_killed_job_goes_on(folder, answers, program, tmp_path):
  lines = [
    line | {"id": f"{line['id']} {n}"} for n in range(40) for line in LINES
  ]
  arguments = write_lines(folder / "long.jsonl", lines)
  out = tmp_path / "out.jsonl"
  process = runs.start_cached(
    folder,
    "vocojax.ask",
    f"--checkpoint={folder}/voco",
    arguments,
    f"--out={out}",
  )
  while not (out.exists() and out.stat().st_size > 2000):
    assert process.poll() is None, process.communicate()
    time.sleep(0.0005)
  process.kill()
  process.communicate()
  before = out.read_bytes().rpartition(b"\n")[0] + b"\n"
  left = len(lines) - before.count(b"\n")
  assert 10 < left < len(lines) - 10
  out.write_bytes(before + b'{"id": "0/0 9')  # torn
  status, _, err = program(arguments, f"--out={out}", "--slots=2")
  assert status == 0, err
  assert f"{out}: dropped an incomplete last line\n" in err
  assert f"{left:,} answers, 0 errors" in err
  assert out.read_bytes().startswith(before)
  found = read_lines(out)
  assert len(found) == len(lines)
  assert {x["id"]: x["answer"] for x in found} == {
    line["id"]: answers[line["id"].split()[0]] for line in lines
  }
  # Nothing is left to do; and these are no answers by other flags.
  content = out.read_bytes()
  assert "\n0 answers, 0 errors\n" in program(arguments, f"--out={out}")[2]
  for flag in ("--seed=1", "--num_voco_tokens=1"):
    status, _, err = program(arguments, f"--out={out}", flag)
    assert status == 2
    assert err.startswith(f"error: {out}:1: got an answer to id ")
  assert out.read_bytes() == content


class Terminal:
  """The program as it runs in a terminal."""

  # The terminal becomes that of the process, so that it gets its Ctrl-C.
  START = (
    "import fcntl, os, signal, sys, termios\n"
    "signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
    "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
    "os.execv(sys.argv[1], sys.argv[1:])\n"
  )

  def __init__(self, folder, phase, *arguments):
    self._fd, other = pty.openpty()
    wide = struct.pack("HHHH", 50, 5000, 0, 0)  # no line is broken
    fcntl.ioctl(self._fd, termios.TIOCSWINSZ, wide)
    environment = {"JAX_PLATFORMS": "cpu", "TERM": "dumb"}
    self._process = subprocess.Popen(
      [sys.executable, "-c", self.START, *command(folder, phase, *arguments)],
      cwd=runs.ROOT,
      env=os.environ | runs.cached(folder) | environment,
      stdin=other,
      stdout=other,
      stderr=other,
      start_new_session=True,
    )
    os.close(other)
    self.seen = ""

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._process.kill()
    self._process.wait()
    os.close(self._fd)

  def read(self, until="\r\n> "):
    """What appears, up to and without `until`, by default the next prompt."""
    deadline = time.monotonic() + 200
    while until not in self.seen:
      ready, _, _ = select.select([self._fd], [], [], 1)
      assert time.monotonic() < deadline, self.seen
      try:
        self.seen += os.read(self._fd, 4096).decode() if ready else ""
      except OSError:  # the process has ended
        self._process.wait()
        raise EOFError(self.seen) from None
    text, _, self.seen = self.seen.partition(until)
    return text.replace("\r\n", "\n")

  def type(self, keys):
    os.write(self._fd, keys.encode())

  def say(self, line):
    """What comes back after a line, up to the next prompt."""
    self.type(line + "\r")
    echo, _, text = self.read().partition("\n")
    assert echo == line
    return text

  def end(self, keys):
    """Exit status after these keys."""
    self.type(keys)
    with pytest.raises(EOFError):
      self.read("never")
    return self._process.returncode


def test_chat(folder, engine):
  """Several turns are one conversation; other images begin a new one."""

  def answer(*turns, image):
    request = Request(turns, images(folder, *image))
    return engine.run([request])[0].text

  with Terminal(folder, "voco", f"--image={folder}/1.png") as terminal:
    converse(folder, engine, terminal, answer)


def converse(folder, engine, terminal, answer):
  assert terminal.read().endswith(
    f"{folder}/1.png: {SIZE}\n/help lists the commands; Ctrl-D ends."
  )
  a, b = QUESTIONS[2], QUESTIONS[1]
  first = answer((a, None), image=[1])
  second = answer((a, first), (b, None), image=[1])
  assert terminal.say(a) == first
  assert terminal.say(b) == second
  assert terminal.say("") == ""
  stats = terminal.say("/stats")
  assert f"{folder}/1.png: {SIZE}\n" in stats and "turns: 2\n" in stats
  prompt = len(engine.tokenizer(f"{a} {first} {b}")["input_ids"]) + 1  # </s>
  assert re.search(
    rf"last answer: {prompt} prompt tokens after 2 of images, first text in "
    r"\d\.\d{3} s(, then \d+\.\d ms for each of \d+ tokens)?\n",
    stats,
  )
  # Nothing changes where a command fails.
  for line, where, got in (
    (f"/image {folder}/broken.png", f"{folder}/broken.png", ""),
    ("/imagine x", "chat", "the command '/imagine'"),
    ("/image", "/image", "no path"),
    ('/image "x', "/image", "No closing quotation"),
    ("/image" + " x" * 5, "images", "5"),
    ("<image> ?" * 2, "question", "2 <image>"),
  ):
    assert terminal.say(line).startswith(f"error: {where}: got {got}")
  third = answer((a, first), (b, second), (a, None), image=[1])
  assert terminal.say(a) == third
  # A conversation that is too long says so, and is not lost.
  long = "is it green ? " * 200
  assert terminal.say(long).startswith("error: prompt: got ")
  assert "turns: 3\n" in terminal.say("/stats")
  assert terminal.say("/reset") == "a new conversation"
  assert terminal.say(b) == answer((b, None), image=[1])
  shown = terminal.say(f"/image {folder}/0.png '{folder}/with,comma.png'")
  assert shown == f"{folder}/0.png: {SIZE}\n{folder}/with,comma.png: {SIZE}"
  fourth = answer((a, None), image=[0, 1])
  more = "2 images, but the model was trained with at most 1 "
  more += "(config.data.max_images)\n"
  assert terminal.say(a) == more + fourth
  # Ctrl-C outside an answer forgets the line; Ctrl-P brings back the last.
  terminal.type("what color")
  terminal.read("what color")  # its echo; Ctrl-C drops what was not read yet
  time.sleep(1)  # CPython misses a signal between the last key and its wait
  terminal.type("\x03")
  terminal.read()
  terminal.type("\x10\r")
  fifth = answer((a, fourth), (a, None), image=[0, 1])
  assert terminal.read().endswith(f"\n{fifth}")
  assert "/image PATH" in terminal.say("/help")
  assert terminal.end("/quit\n") == 0


@pytest.fixture(scope="module")
def endless(folder):
  """A checkpoint `endless` whose answers have no end."""
  shutil.copytree(folder / "voco", folder / "endless")
  path = folder / "endless" / "checkpoints" / "40" / "params"
  loaded = checkpoint.load(str(folder / "voco"))
  abstract = loop.abstract_params(runs.model_of(loaded), runs.mesh())
  params, _ = checkpoint.load_params(
    str(loaded.path), abstract, loaded.config.model
  )
  eos = loaded.tokenizer.eos_token_id
  kernel = params["llm"]["lm_head"]["kernel"]
  params["llm"]["lm_head"]["kernel"] = kernel.at[:, eos].set(0)
  with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as saver:
    saver.save(path, args=ocp.args.StandardSave(params), force=True)
  checksums.write(path.parent, 40)
  return [
    "endless",
    f"--image={folder}/1.png",
    "--max_new_tokens=20000",
    "--max_text_length=20100",
  ]


@pytest.mark.slow
def test_interrupted_answers(folder, endless):
  """Ctrl-C ends an answer and leaves the engine as it was."""
  with Terminal(folder, *endless) as terminal:
    terminal.read()
    found = []
    for _ in range(2):
      terminal.type(QUESTIONS[0] + "\r")
      terminal.read(QUESTIONS[0] + "\r\n")
      start = terminal.read(" ") + " " + terminal.read(" ") + " "
      terminal.type("\x03")
      answer = start + terminal.read()
      assert answer.endswith(" [interrupted]")
      found.append(re.sub(r"(\^C)?( \[interrupted\])?", "", answer))
      stats = terminal.say("/stats")
      assert "turns: 1\n" in stats and "last answer: interrupted\n" in stats
      terminal.say("/reset")
    shortest = min(map(len, found))
    assert shortest > 10 and found[0][:shortest] == found[1][:shortest]
    assert terminal.end("\x04") == 0
  with Terminal(folder, *endless, QUESTIONS[0]) as terminal:
    terminal.read(f"{folder}/1.png: {SIZE}\r\n")
    terminal.read(" ")
    assert terminal.end("\x03") == 130
    assert terminal.seen.endswith("error: interrupted\r\n")


@pytest.mark.parametrize(
  ("arguments", "where", "got"),
  [
    (["--checkpoint=nowhere", "a ?"], "nowhere", ""),
    ([""], "question", "an empty text"),
    ([" ", " "], "question", "an empty text"),
    (["a \udcff ?"], "question", "half of a surrogate pair"),
    (["<image> a ?"], "question", "1 <image>"),
    (["--image=0.png", "<image> a <image> ?"], "question", "2 <image>"),
    (["--image=0.png,broken.png", "a ?"], "broken.png", ""),
    (["--image=absent.png", "a ?"], "absent.png", "no such file"),
    (["--image=folder", "a ?"], "folder", "a folder"),
    (["--image=pipe", "a ?"], "pipe", "a pipe"),
    (["--image=~nosuchuser/a.png", "a ?"], "~nosuchuser/a.png", "a user that"),
    (["--num_voco_tokens=3", "a ?"], "num_voco_tokens", ""),
    (["--temperature=-1", "a ?"], "temperature", "-1.0"),
    (["--temperature=nan", "a ?"], "temperature", "nan"),
    (["--store=what://x", "--image=0.png", "a ?"], "--store", "'what://x'"),
    (["--store=absent", "--image=0.png", "a ?"], "absent", "no such folder"),
    (["--imag=x", "a ?"], "--imag", ""),
    (["--jsonl=good"], "--out", "nothing"),
    (["--out=x", "a ?"], "--jsonl", "nothing"),
    (["--jsonl=good", "--out=x", "a ?"], "--jsonl", "the question 'a ?'"),
    (["--jsonl=good", "--out=x", "--image=0.png"], "--jsonl", "--image"),
    (["--jsonl=absent", "--out=x"], "absent", "no such file"),
    (["--jsonl=pipe", "--out=x"], "pipe", "a pipe"),
    (["--jsonl=~nosuchuser/x", "--out=x"], "~nosuchuser/x", "a user that"),
    (["--jsonl=twice", "--out=x"], "twice:2", "the id 1, as in twice:1"),
    (["--jsonl=good", "--out=no/x"], "no/x", "no such folder"),
    (["--jsonl=good", "--out=~nosuchuser/x"], "~nosuchuser/x", "a user that"),
    (["--jsonl=good", "--out=folder"], "folder", "a folder"),
    (["--jsonl=good", "--out=pipe"], "pipe", "a pipe"),
  ],
)
def test_mistake(folder, program, arguments, where, got):
  good = {"question": "a ?"}
  write_lines(folder / "good", [good])
  write_lines(folder / "twice", [good | {"id": 1}] * 2)
  (folder / "folder").mkdir(exist_ok=True)
  if not (folder / "pipe").exists():
    os.mkfifo(folder / "pipe")
  full = [
    re.sub(
      r"^(--(?:image|jsonl|out|store)=|0.png,)(?=[\w.]+[,/\w.]*$)",
      rf"\1{folder}/",
      argument,
    )
    for argument in arguments
  ]
  full = [x.replace(",", f",{folder}/") for x in full]
  status, out, err = program(*full)
  assert (status, out) == (2, ""), err
  assert err.count("\n") == 1, err
  line = err.replace(f"{folder}/", "")
  assert line.startswith(f"error: {where}: ")
  assert f": got {got}" in line or not got
  assert not list(folder.glob("*.part")) and not list(folder.glob(".*.lock"))


@pytest.mark.parametrize(
  ("values", "where", "got", "expected"),
  [
    (
      {"stop_token": ["</s>", "gren"]},
      "stop_token",
      "'gren'",
      "one of the 20 tokens of the checkpoint",
    ),
    ({"stop": ""}, "stop", "an empty text", "a text"),
    ({"top_p": 0}, "top_p", "0.0", "above 0 and at most 1"),
    ({"top_k": -1}, "top_k", "-1", "0 or more"),
    ({"seed": -1}, "seed", "-1", "0 to 2^32 - 1"),
    ({"max_new_tokens": 0}, "max_new_tokens", "0", "at least 1"),
  ],
)
def test_wrong_value(engine, values, where, got, expected):
  """For all requests, or for one of them."""
  for make in (
    lambda: ask.Maker(engine, VALUES | values),
    lambda: ask.Maker(engine, VALUES)([("a ?", None)], fields=values),
  ):
    with pytest.raises(UserError) as e:
      make()
    error = e.value
    assert (error.where, error.got, error.expected) == (where, got, expected)


def test_a_disk_that_is_full_or_read_only(folder, answers, program, tmp_path):
  """One line; what was answered stays, and the job resumes with room."""
  lines = [x | {"id": f"{x['id']} {n}"} for n in range(3) for x in LINES]
  arguments = [write_lines(folder / "disk.jsonl", lines), "--slots=1"]
  with disks.mounted(tmp_path / "disk", "64k") as disk:
    out = disk / "out.jsonl"
    arguments.append(f"--out={out}")
    disks.fill(disk, leave=2 * 4096)  # one of them for the lock
    for got, where in (
      ("No space left on device", out),
      ("Read-only file system", disk / ".out.jsonl.lock"),
    ):
      status, _, err = program(*arguments)
      assert status == 2
      last = err.splitlines()[-1]
      assert last.startswith(f"error: {where}: got {got}, "), err
      assert "Traceback" not in err
      assert sorted(os.listdir(disk)) == ["fill", "out.jsonl"]
      disks.remount(disk, "ro")
    before = out.read_bytes().rpartition(b"\n")[0] + b"\n"
    assert 10 < before.count(b"\n") < len(lines)
    disks.remount(disk, "rw")
    (disk / "fill").unlink()
    assert program(*arguments)[0] == 0
    assert out.read_bytes().startswith(before)
    assert {x["id"]: x["answer"] for x in read_lines(out)} == {
      line["id"]: answers[line["id"].split()[0]] for line in lines
    }
    assert os.listdir(disk) == ["out.jsonl"]


def test_an_interrupted_job(folder, program, tmp_path):
  """Ctrl-C: one line and status 130; what was answered stays."""
  lines = [x | {"id": f"{x['id']} {n}"} for n in range(200) for x in LINES]
  out = tmp_path / "out.jsonl"
  arguments = [write_lines(folder / "many.jsonl", lines), f"--out={out}"]
  with runs.interruptible():
    process = runs.start_cached(
      folder, "vocojax.ask", f"--checkpoint={folder}/voco", *arguments
    )
  while not (out.exists() and out.stat().st_size > 2000):
    assert process.poll() is None, process.communicate()
    time.sleep(0.001)
  process.send_signal(signal.SIGINT)
  _, err = process.communicate(timeout=100)
  assert process.returncode == 130, err
  assert err.splitlines()[-1] == "error: interrupted" and "Trace" not in err
  assert os.listdir(tmp_path) == ["out.jsonl"]
  assert 10 < len(read_lines(out)) < len(lines)


def test_two_jobs_at_once(folder, answers, program, tmp_path):
  """The second writes nothing; the first is unharmed, killed or not."""
  out = tmp_path / "out.jsonl"
  arguments = [write_lines(folder / "one.jsonl", LINES), f"--out={out}"]
  first = runs.start_cached(
    folder, "vocojax.ask", f"--checkpoint={folder}/voco", *arguments
  )
  while not (tmp_path / ".out.jsonl.lock").exists():
    assert first.poll() is None, first.communicate()
    time.sleep(0.01)
  os.kill(first.pid, signal.SIGSTOP)
  status, _, err = program(*arguments)
  assert status == 2
  assert err.startswith(f"error: {tmp_path}: got out.jsonl by process ")
  os.kill(first.pid, signal.SIGCONT)
  _, err = first.communicate(timeout=200)
  assert first.returncode == 0, err
  assert len(read_lines(out)) == len(LINES)
  assert sorted(os.listdir(tmp_path)) == ["out.jsonl"]
