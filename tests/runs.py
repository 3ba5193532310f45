"""A tiny data set and config, and the programs run on them as a user would.

Read next: `training/test_resume.py`, `test_train.py`.
"""

import contextlib
import copy
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import tokenizers
import transformers
from jax.sharding import AxisType
from PIL import Image

from vocojax import assemble
from vocojax.config import Config
from vocojax.data import tokenizer
from vocojax.data.sources import make_source
from vocojax.errors import UserError
from vocojax.models.vlm import VisionLanguageModel
from vocojax.training import checkpoint, loop, sharding

ROOT = pathlib.Path(__file__).resolve().parent.parent
COLOURS = {
  "red": (220, 30, 30),
  "green": (30, 180, 40),
  "blue": (30, 60, 220),
  "yellow": (230, 220, 40),
}
NUM_RECORDS = 24

CONFIG = """
from vocojax.config import default_config


def get_config():
  c = default_config()
  c.model.dtype, c.model.remat = "float32", "none"
  c.model.llm.update(
    vocab_size=20, vocab_multiple=8, hidden_size=16, intermediate_size=24
  )
  c.model.llm.update(
    num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2
  )
  c.model.llm.update(head_dim=8, initializer_range=0.2)
  c.model.vision.update(
    image_size=64, patch_size=16, hidden_size=16, intermediate_size=32
  )
  c.model.vision.update(
    num_hidden_layers=2, num_attention_heads=2, initializer_range=0.2
  )
  c.prompt.layout = "qa_v1"
  c.data.update(
    path="FOLDER/data.json", image_folder="FOLDER", tokenizer="FOLDER/tokenizer"
  )
  c.data.update(max_text_length=24, batch_size=4, prefetch_batches=1)
  c.optimizer.update(learning_rate=0.01, b2=0.99, freeze=())
  c.training.update(steps=12, log_every=4, checkpoint_every=100)
  c.evaluation.update(split="train[:10]", batch_size=4, max_new_tokens=4)
"""
ONE_PHASE = "  return c\n"
TWO_PHASES = """\
  c.phases = ("full", "voco")
  c.phase.full = {"model": {"compressor": {"name": "full"}}}
  c.phase.voco = {"seed": 1}
  return c
"""


def entry(i: int) -> dict:
  """A record of the JSON file, with answers of different lengths."""
  name = list(COLOURS)[i % 4]
  turns = [f"what color is this ? number {i % 3}"]
  turns.append(name if i % 3 else f"it is {name}")
  if i % 2:
    turns += ["is it green ?", "yes it is" if name == "green" else "no"]
  roles = ("human", "gpt") * 2
  return {
    "id": f"r{i}",
    "image": f"{i}.png",
    "conversations": [
      {"from": role, "value": text}
      for role, text in zip(roles, turns, strict=False)
    ],
  }


def write_data(folder: pathlib.Path) -> None:
  """Images, data.json and a tokenizer of 20 tokens."""
  rng = np.random.default_rng(0)
  for i in range(NUM_RECORDS):
    pixels = np.full((20, 20, 3), list(COLOURS.values())[i % 4], np.uint8)
    pixels[rng.integers(0, 20, 40), rng.integers(0, 20, 40)] = 0
    Image.fromarray(pixels).save(folder / f"{i}.png")
  entries = [entry(i) for i in range(NUM_RECORDS)]
  (folder / "data.json").write_text(json.dumps(entries))
  texts = (t["value"] for e in entries for t in e["conversations"])
  words = tokenizer.build_word_level(texts)
  assert len(words) == 20, len(words)
  words.save_pretrained(folder / "tokenizer")


def write_config(folder: pathlib.Path, name: str, tail: str) -> pathlib.Path:
  path = folder / name
  path.write_text(CONFIG.replace("FOLDER", str(folder)) + tail)
  return path


@contextlib.contextmanager
def interruptible():
  """Processes that begin in here heed Ctrl-C.

  Tests that run in a shell's background inherit an ignored SIGINT, and would
  hand it on.
  """
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, before)


def start(module: str, *arguments: str, **env: str) -> subprocess.Popen:
  """Starts `python -m module` on one CPU device."""
  return subprocess.Popen(
    [sys.executable, "-m", module, *arguments],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"} | env,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def start_cached(folder: pathlib.Path, *arguments: str) -> subprocess.Popen:
  """`start`, compiling quickly, and once for all starts with this folder."""
  return start(*arguments, **cached(folder))


def cached(folder: pathlib.Path) -> dict[str, str]:
  return {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }


def printed_error(text: str) -> UserError:
  """The error of a program's last words, which are one line."""
  found = re.fullmatch(
    r"error: (.*?): got (.*?), expected (.*)\. Fix: (.*)\n", text
  )
  assert found, text
  return UserError(*found.groups())


def children(pid: int) -> set[int]:
  """Processes that a process and its children have started and that live."""
  parents = {}
  for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
    with contextlib.suppress(OSError):  # it has ended meanwhile
      state, parent = stat.read_text().rpartition(")")[2].split()[:2]
      if state != "Z":
        parents[int(stat.parent.name)] = int(parent)
  found, size = {pid}, 0
  while len(found) > size:
    size = len(found)
    found |= {child for child, parent in parents.items() if parent in found}
  return found - {pid}


def wait_until(condition, seconds: float) -> None:
  """Until something is so; an error if it takes longer than that."""
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.01)


def running(pids: set[int]) -> set[int]:
  """Those of some processes that still live."""
  return pids & children(0)


def permuted(
  words: transformers.PreTrainedTokenizerFast,
) -> transformers.PreTrainedTokenizerFast:
  """A tokenizer in which two tokens have each other's ids."""
  values = json.loads(words.backend_tokenizer.to_str())
  vocabulary = values["model"]["vocab"]
  one, two = sorted(vocabulary)[-2:]
  vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
  changed = copy.deepcopy(words)
  backend = tokenizers.Tokenizer.from_str(json.dumps(values))
  changed.backend_tokenizer.model = backend.model
  return changed


def shared_memory() -> set[str]:
  """Names of what processes share; other programs have theirs there, too."""
  return set(os.listdir("/dev/shm"))


def unused_memory() -> set[str]:
  """What no process has open: it was left behind, or is on its way to one.

  Other tests that run meanwhile have theirs on its way for minutes.
  """
  left = shared_memory()
  for maps in pathlib.Path("/proc").glob("[0-9]*/maps"):
    with contextlib.suppress(OSError):  # it has ended meanwhile
      left -= set(re.findall(r"/dev/shm/(\S+)", maps.read_text()))
  return left


# Imports the program once and forks for each command line that it reads.
_FORKS = """
import importlib, json, os, sys, traceback
import transformers

from vocojax import cli

transformers.AutoTokenizer  # slow to import, which it is when first used
program = importlib.import_module(sys.argv[1])
options = json.loads(sys.argv[2])
for line in sys.stdin:
  arguments, out, err = json.loads(line)
  if child := os.fork():
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    continue
  for file, path in ((1, out), (2, err)):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), file)
  sys.argv[1:] = arguments
  try:
    cli.run(program.main, program.__doc__, **options)
  except SystemExit as e:
    status = e.code or 0
  except BaseException:
    traceback.print_exc()
    status = 1
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)
"""


class Forks:
  """Runs a program many times, importing it once."""

  def __init__(self, folder: pathlib.Path, module: str, **options):
    """Imports it; `options` are those of `cli.run`."""
    self._folder = folder
    arguments = [module, json.dumps(options)]
    self._process = subprocess.Popen(
      [sys.executable, "-W", "ignore", "-c", _FORKS, *arguments],
      cwd=ROOT,
      env=os.environ | {"JAX_PLATFORMS": "cpu"} | cached(folder),
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )

  def run(self, *arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of one command line."""
    out, err = self._folder / "stdout", self._folder / "stderr"
    for path in (out, err):
      path.unlink(missing_ok=True)
    line = json.dumps([arguments, str(out), str(err)])
    print(line, file=self._process.stdin, flush=True)
    status = int(self._process.stdout.readline())
    # As bytes: a progress bar's carriage return is not an end of line.
    return status, out.read_bytes().decode(), err.read_bytes().decode()

  def close(self) -> None:
    self._process.communicate()
    assert self._process.returncode == 0


def metrics(phase: pathlib.Path) -> list[dict]:
  """Lines of metrics.jsonl, without what a clock says."""
  lines = map(json.loads, (phase / "metrics.jsonl").read_text().splitlines())
  clock = ("time", "images_per_second")
  return [{k: v for k, v in x.items() if k not in clock} for x in lines]


def mesh(*sizes: int) -> jax.sharding.Mesh:
  """A mesh data x fsdp x tensor over the first devices; one by default."""
  sizes = sizes or (1, 1, 1)
  return jax.make_mesh(
    sizes,
    sharding.AXES,
    axis_types=(AxisType.Auto,) * 3,
    devices=jax.devices()[: int(np.prod(sizes))],
  )


def model_of(loaded: checkpoint.Loaded) -> VisionLanguageModel:
  return assemble.make_model(loaded.config, loaded.tokenizer)


def phase(
  config: Config, folder: pathlib.Path, sizes: tuple[int, ...] = ()
) -> loop.Phase:
  """What `vocojax.train` makes of a config, on a mesh of these sizes."""
  source = make_source(config, config.data.train_split)
  words = tokenizer.load_tokenizer(config.data.tokenizer)
  model = assemble.make_model(config, words)
  folder.mkdir(parents=True)
  return loop.Phase(config, folder, model, words, source, mesh(*sizes))


@contextlib.contextmanager
def quick_compile():
  """Compiling takes far longer than the steps of a tiny model."""
  jax.config.update("jax_disable_most_optimizations", True)
  try:
    yield
  finally:
    jax.config.update("jax_disable_most_optimizations", False)
