"""`python -m vocojax.aot` on a tiny model, against figures by hand.

The whole 7B step is in test_7b_step.py. Read next: vocojax/aot.py.
"""

import importlib.metadata
import json
import sys

import numpy as np
import PIL.Image
import pytest

from tests import runs
from vocojax.ahead import hlo, measure, programs, search, topology, work
from vocojax.config import load_module, phases
from vocojax.data import prompt
from vocojax.data.sources import make_source
from vocojax.data.tokenizer import load_tokenizer
from vocojax.errors import UserError
from vocojax.training import sharding

CHIPS = 4
D, M, L, V, ROWS, T = 256, 512, 2, 256, 2, 128  # rows of one chip
IMAGE, PATCH, WIDTH, MLP, TOWER = 64, 16, 128, 256, 3
PATCHES = (IMAGE // PATCH) ** 2
A = 1 + PATCHES + 2 + 1  # BOS, patches, two ids between, one VoCo token

TINY = f"""
from vocojax.config import default_config


def get_config():
  c = default_config()
  c.model.remat = "none"
  c.model.llm.update(
    vocab_size={V - 6}, hidden_size={D}, intermediate_size={M},
    num_hidden_layers={L}, num_attention_heads=2, num_key_value_heads=2
  )
  c.model.vision.update(
    image_size={IMAGE}, patch_size={PATCH}, hidden_size={WIDTH},
    intermediate_size={MLP}, num_hidden_layers={TOWER}, num_attention_heads=2
  )
  c.data.update(batch_size={ROWS * CHIPS}, max_text_length={T})
  c.data.conversations_per_record = 1
  c.evaluation.batch_size = 4
  c.training.steps = 10
  return c
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("aot")
  (folder / "tiny.py").write_text(TINY)
  return folder


@pytest.fixture(scope="module")
def aot(folder):
  """Runs the program with the tiny config; (status, stdout, stderr)."""
  forks = runs.Forks(folder, "vocojax.aot")
  yield lambda *arguments: forks.run(
    f"--config={folder / 'tiny.py'}", *arguments
  )
  forks.close()


@pytest.fixture(scope="module")
def trained(aot, folder):
  """Output and figures of the training step."""
  status, out, err = aot(
    "--topology=v5e:2x2",
    f"--json={folder / 'train.json'}",
    f"--plot={folder / 'train.png'}",
  )
  assert status == 0, err
  report = json.loads((folder / "train.json").read_text())
  [program] = report["programs"]
  return out, program


def test_arguments_to_the_byte(trained):
  _, program = trained
  layer_matrices = 4 * D * D + 3 * D * M
  matrices = 2 * V * D + L * layer_matrices + WIDTH * D + D * D  # + projector
  everywhere = (2 * L + 1) * D + 2 * D  # norms; biases of the projector
  trained_bytes = 4 * (matrices // CHIPS + everywhere)
  tower_matrices = 3 * PATCH * PATCH * WIDTH + (PATCHES + 1) * WIDTH
  tower_matrices += TOWER * (4 * WIDTH * WIDTH + 2 * WIDTH * MLP)
  # Class token, two norms outside; biases and two norms in each layer.
  tower_vectors = WIDTH + 4 * WIDTH + TOWER * (5 * WIDTH + MLP + 4 * WIDTH)
  uses = program["bytes_by_use"]
  assert uses["trained parameters"] == trained_bytes
  assert uses["frozen parameters"] == 4 * (
    tower_matrices // CHIPS + tower_vectors
  )
  # Two moments; the step and the counters of Adam and of the learning rate.
  assert uses["optimiser state"] == 2 * trained_bytes + 3 * 4
  assert uses["batch"] == ROWS * (IMAGE * IMAGE * 3 + 2 * 4 + 4 * T * 4)
  # The chip keeps these, in tiles of 8 x 128, and little more.
  exact = sum(uses[use] for use in list(uses)[:4])
  assert exact <= program["argument_bytes"] <= 1.05 * exact
  assert sum(uses.values()) == program["peak_bytes"]


def test_operations_by_hand(trained):
  _, program = trained
  tokens = ROWS * (A + T)
  assert program["tokens"] == CHIPS * tokens
  layers = L * (4 * D * D + 3 * D * M)
  embeddings = 2 * V * D
  norms = (2 * L + 1) * D
  ideal = 6 * (layers + embeddings + norms) * tokens
  assert program["ideal_flops"] == ideal
  # Forward, and both gradients; of the projector's input there is none.
  tower = (
    2
    * ROWS
    * (PATCHES + 1)
    * (TOWER - 1)
    * (4 * WIDTH * WIDTH + 2 * WIDTH * MLP)
    + 2 * ROWS * PATCHES * 3 * PATCH**2 * WIDTH
  )
  projector = 2 * ROWS * PATCHES * (2 * WIDTH * D + 3 * D * D)
  head = 3 * 2 * ROWS * T * D * V
  products = 3 * 2 * tokens * layers + tower + projector + head
  # Attention: two products forward and four back, within kernels or not.
  squares = A * A + T * (1 + T)
  attention = 6 * 2 * ROWS * squares * D * L
  attention += 2 * 2 * ROWS * (PATCHES + 1) ** 2 * WIDTH * (TOWER - 1)
  executed = program["executed_flops"]
  # The last layer makes of an image only the keys and values of its VoCo token.
  spared = 3 * 2 * ROWS * (A * (4 * D * D + 3 * D * M) - 2 * D * D)
  assert products - spared <= executed <= products + attention


def test_printed(trained):
  out, program = trained
  lines = out.splitlines()
  assert lines[0] == (
    "voco on v5e:2x2: 4 chips as data 1 x fsdp 4 x tensor 1, 2 samples a chip"
  )
  assert lines[1].startswith("train step, compiled in ")
  peak = program["peak_bytes"] / 2**30
  assert lines[2].startswith(f"  memory: peak {peak:.2f} GiB of 15.75 a chip ")
  ratio = program["executed_flops"] / program["ideal_flops"]
  assert f"matrix products, {ratio:.2f} x the ideal" in out
  assert "x all-gather bf16 in loops" in out
  bound = max(program["seconds"].values())
  assert f"time: at least {1000 * bound:.1f} ms" in out


def test_picture(trained, folder):
  picture = PIL.Image.open(folder / "train.png")
  assert picture.format == "PNG"
  assert len(picture.convert("RGB").getcolors(1 << 24)) > 5


def test_programs_of_the_engine(aot, folder):
  path = folder / "serve.json"
  status, out, err = aot("--topology=v5e:2x2", "--what=serve", f"--json={path}")
  assert status == 0, err
  compress, prefill, decode = json.loads(path.read_text())["programs"]
  assert compress["program"] == "compress"
  assert prefill["program"] == "prefill"
  assert decode["program"] == "decode"
  for program in (compress, prefill, decode):
    assert f"{program['program']}, compiled in " in out
  slots, room = 4, 1 + T + 16  # a VoCo token, text, 16 new tokens
  # Keys and values of one of the four slots, in bfloat16.
  assert decode["bytes_by_use"]["cache"] == 2 * L * room * D * 2
  assert decode["tokens"] == slots
  assert prefill["tokens"] == T + 16  # one prompt
  assert compress["tokens"] == slots * A


@pytest.mark.parametrize(
  ("name", "found"),
  [
    ("v9:2x2", "v4:2x2x1, v5e:4x4, v5p:2x2x1, v6e:4x4"),
    ("v5e", "v4:2x2x1, v5e:4x4, v5p:2x2x1, v6e:4x4"),
    ("v5p:4x4", "v4:2x2x1, v5e:4x4, v5p:2x2x1, v6e:4x4"),
    ("v5e:3x3", "is not divisible"),
  ],
)
def test_unknown_topology(aot, name, found):
  status, out, err = aot(f"--topology={name}")
  assert (status, out) == (2, "")
  assert err.startswith(f"error: --topology: got '{name}'")
  assert found in err
  assert err.count("\n") == 1, err


def test_batch_that_the_mesh_does_not_divide(aot):
  status, _, err = aot("--topology=v5e:4x4")
  assert status == 2
  assert "config.data.batch_size: got 8, expected a multiple of 16" in err


def test_too_big_a_model_says_what_to_change(aot):
  status, _, err = aot(
    "--topology=v5e:2x2",
    "--config.model.llm.vocab_size=4000000",
    "--config.model.llm.hidden_size=4096",
  )
  assert status == 1
  [line] = err.splitlines()
  assert line.startswith("error: train step: got ")
  assert ": does not fit, expected at most " in line
  assert "a topology with more chips" in line
  assert "config.optimizer.first_moment_dtype=bfloat16" in line


def test_too_big_a_batch_says_what_to_change(aot):
  status, _, err = aot(
    "--topology=v5e:2x2",
    "--samples_per_chip=40000",
    "--config.model.remat=dots",
  )
  assert status == 1
  [line] = err.splitlines()
  assert "lower --samples_per_chip" in line
  assert "config.model.remat=full (now dots)" in line


def test_without_the_compiler(monkeypatch):
  monkeypatch.setitem(sys.modules, "libtpu", None)
  [needed] = [
    requirement.partition(";")[0]
    for requirement in importlib.metadata.requires("jax")
    if requirement.startswith("libtpu")
  ]
  with pytest.raises(UserError) as e:
    topology.describe("v5e:2x2")
  assert (e.value.where, e.value.got) == ("--topology", "no TPU compiler")
  assert e.value.fix == f'run pip install "{needed}"'


def measurement(peak: int) -> measure.Measurement:
  program = programs.Program("step", {}, L, 1, 1.0, runs.mesh(), lambda: None)
  module = hlo.Module({}, "")
  return measure.Measurement(
    program, peak, 0, 0, 0, {}, work.Work(), module, 0.0
  )


@pytest.mark.parametrize(
  ("start", "bend", "limit"),
  [
    *((start, 0.0, 17) for start in (1, 2, 17, 18, 40)),
    *((start, -0.05, 17) for start in (1, 2, 17, 18, 40)),
    (19, 0.3, 18),  # the first guess is one too low
  ],
)
def test_search_ends_at_the_limit_with_few_compilations(start, bend, limit):
  """Memory as of a 7B: 8 GiB and half of one a sample, almost linear."""
  tried = []
  capacity = (8 + 0.45 * (limit + 0.2) + bend) * 2**30

  def peak(samples):
    return int((8 + 0.45 * samples + bend * (samples > 9)) * 2**30)

  def compile_with(samples):
    tried.append(samples)
    if peak(samples) > capacity:
      raise measure.DoesNotFitError("Used 17G of 15.75G hbm")
    return measurement(peak(samples))

  first = measurement(peak(start)) if peak(start) <= capacity else None
  lines = []
  best, found = search.largest(
    compile_with, first, start, capacity, lines.append
  )
  assert best == limit
  assert found.peak_bytes == peak(limit)
  assert len(lines) == len(tried) == len(set(tried)) <= 6


def test_search_finds_that_nothing_fits():
  def compile_with(samples):
    raise measure.DoesNotFitError("Used 17G of 15.75G hbm")

  found = search.largest(compile_with, None, 1, 2.0**30, lambda line: None)
  assert found is None


@pytest.mark.parametrize("number", ["fixed", "elastic"])
def test_batch_is_that_of_the_pipeline(tmp_path, number):
  runs.write_data(tmp_path)
  key = "  c.model.compressor.train_num_voco_tokens"
  tail = f"{key} = {number!r}\n{runs.ONE_PHASE}"
  path = runs.write_config(tmp_path, "one.py", tail)
  (config,) = phases(load_module(str(path)))
  encoder = runs.phase(config, tmp_path / "run").encoder
  source = make_source(config, config.data.train_split)
  row = encoder(source[0], np.random.default_rng(0))
  batch = programs.abstract_batch(config, runs.mesh())
  assert {k: (x.shape, x.dtype) for k, x in batch.items()} == {
    k: ((config.data.batch_size, *x.shape), x.dtype) for k, x in row.items()
  }


def test_stream_lengths_are_those_of_llamas_tokenizer(llama_tokenizer_folder):
  words = load_tokenizer(str(llama_tokenizer_folder))
  for name, lengths in programs.STREAM_LENGTHS.items():
    before, after = prompt.stream_ids(prompt.LAYOUTS[name], words)
    assert (len(before), len(after)) == lengths, name
  assert programs.STREAM_LENGTHS.keys() == prompt.LAYOUTS.keys()


def test_tensor_parallelism_splits_the_work(folder):
  """Also with an MLP in parts, which are not cut out of a split width."""
  flops = {}
  for chunks in (1, 4):
    config = load_module(str(folder / "tiny.py"))
    config.mesh.tensor = 2
    config.model.mlp_chunks = chunks
    [phase] = phases(config)
    _, devices = topology.describe("v5e:2x2")
    mesh = sharding.make_mesh(phase.mesh, devices)
    [program] = programs.train(phase, mesh)
    flops[chunks] = measure.compile_program(program).work.flops
  assert flops[4] == flops[1]
  # On one axis of four chips each has a quarter of the rows and all the width,
  # on two half of the rows and half the width: as much work.
  config.mesh.tensor, config.model.mlp_chunks = 1, 1
  [phase] = phases(config)
  mesh = sharding.make_mesh(phase.mesh, devices)
  [program] = programs.train(phase, mesh)
  alone = measure.compile_program(program).work.flops
  assert flops[1] == pytest.approx(alone, rel=0.1)
