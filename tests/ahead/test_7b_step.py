"""The real 7B training step, compiled for 16 TPU v5e chips that are not there.

579 image-stream tokens and one VoCo token, 448 tokens of text; AdamW in
float32, full rematerialisation, FSDP over all chips. Read next: test_aot.py.
"""

import dataclasses
import functools

import pytest

from tests import runs
from vocojax.ahead import measure, programs, topology
from vocojax.config import load_module, phases
from vocojax.training import sharding

TEXT = 448
GIB = 2**30

pytestmark = pytest.mark.slow


@functools.cache
def measured(samples_per_chip: int) -> measure.Measurement:
  """The step of configs/voco_1tok.py, compiled once for each batch."""
  [config] = phases(load_module(str(runs.ROOT / "configs/voco_1tok.py")))
  _, devices = topology.describe("v5e:4x4")
  data = dataclasses.replace(
    config.data,
    batch_size=samples_per_chip * len(devices),
    max_text_length=TEXT,
    conversations_per_record=1,
  )
  config = dataclasses.replace(config, data=data)
  mesh = sharding.make_mesh(config.mesh, devices)
  [program] = programs.train(config, mesh)
  return measure.compile_program(program)


def gathered(m: measure.Measurement, in_loops: bool) -> dict[str, int]:
  """Bytes of whole arrays that are gathered, by dtype."""
  found: dict[str, int] = {}
  for kind, dtype, inside, _, nbytes in measure.table(m.work):
    if kind == "all-gather" and inside == in_loops:
      found[dtype] = found.get(dtype, 0) + nbytes
  return found


def test_memory_and_work():
  m = measured(12)
  uses = m.program.argument_bytes
  # 6.76e9 trained parameters in float32 over 16 chips, two moments of each.
  assert 1.57 < uses["trained parameters"] / GIB < 1.58
  assert uses["optimiser state"] == 2 * uses["trained parameters"] + 12
  assert m.argument_bytes == pytest.approx(sum(uses.values()), rel=0.01)
  # 13.32 GiB and 1.24 are what MaxText's LLaMA2-7B takes for as many tokens.
  assert m.peak_bytes / GIB <= 12.3
  assert not m.work.unknown_loops
  ideal = 6 * 6.75e9 * 12 * (580 + TEXT)
  assert m.program.ideal_flops == pytest.approx(ideal, rel=0.01)
  assert 1 < m.work.flops / m.program.ideal_flops <= 1.24


def test_memory_of_a_small_batch():
  """8.32 GiB is what MaxText's step takes for as many tokens."""
  assert measured(2).peak_bytes / GIB <= 8.0


def test_flash_attention_and_no_square_of_scores():
  m = measured(12)
  layers, tower = 31, 23
  kernels = {k: n for k, n in m.work.kernels.items() if "splash" in k}
  forward = sum(n for k, n in kernels.items() if "fwd" in k)
  # In a layer both streams, twice with recomputation; the last layer's text.
  assert forward == tower + 2 * 2 * layers + 1
  for gradient in ("dq", "dkv"):
    found = sum(n for k, n in kernels.items() if gradient in k)
    assert found == 2 * layers + 1
  # Real lengths, and as the kernel pads them.
  for length in (580, 640, 577):
    assert not m.module.shapes_with(length, length)
  assert not m.module.shapes_with(TEXT, TEXT)
  assert not m.module.shapes_with(TEXT, TEXT + 1)


def test_weights_are_gathered_within_the_scan_in_bfloat16():
  m = measured(12)
  inside = gathered(m, in_loops=True)
  assert set(inside) == {"bf16"}
  # Nothing as large as a layer stack; the head is 0.25 GiB.
  assert sum(gathered(m, in_loops=False).values()) < 0.5 * GIB
