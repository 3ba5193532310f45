"""`python -m vocojax.aot` on a tiny model, against figures by hand.

The whole 7B step is in test_7b_step.py. Read next: vocojax/aot.py.
"""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from tests import runs

from vocojax.ahead import hlo, measure, programs, search, work
from vocojax.config import load_module, phases
from vocojax.data import pipeline
from vocojax.data.sources import make_source
from vocojax.data.tokenizer import load_tokenizer

CHIPS = 4
D, M, L, V, ROWS, T = 256, 512, 2, 256, 2, 128  # rows of one chip
IMAGE, PATCH, WIDTH, MLP, TOWER = 64, 16, 128, 256, 3
PATCHES = (IMAGE // PATCH) ** 2
A = 1 + PATCHES + 2 + 1  # BOS, patches, two ids between, one VoCo token

TINY = f"""
from configs import common


def get_config():
  c = common.get_config()
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
  assert uses["batch"] == ROWS * (IMAGE * IMAGE * 3 + 4 + 4 * T * 4)
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
  # The text of the last layer needs of its image stream only keys and values.
  spared = 3 * 2 * ROWS * A * (2 * D * D + 3 * D * M)
  print(executed, products, attention, spared)
  assert products - spared <= executed <= products + attention
