"""The memory that the doctor foretells, against what is taken."""

import dataclasses
import os
import subprocess
import sys

import jax
import pytest

from tests import runs
from tests.health.setups import changed, config_of
from vocojax.ahead import programs, topology
from vocojax.config import load_module, phases
from vocojax.health import machine, training_memory
from vocojax.training import sharding

GIB = 2**30
CPU = machine.Device("cpu", "cpu", 0)


def seven_b(samples, **changes):
  [config] = phases(load_module(str(runs.ROOT / "configs/voco_1tok.py")))
  changes = {
    "data__max_text_length": 448,
    "data__conversations_per_record": 1,
    "data__batch_size": samples,
  } | changes
  return changed(config, **changes)


@pytest.mark.parametrize(
  ("samples", "chips", "peak", "changes"),
  [
    (2, "v5e:4x4", 7.65, {}),
    (2, "v5e:4x4", 7.59, {"model__mlp_chunks": 1}),
    (12, "v5e:4x4", 12.02, {}),
    (12, "v5e:4x4", 12.65, {"model__mlp_chunks": 1}),
    (22, "v5e:4x4", 15.03, {}),
    (2, "v5e:4x4", 11.94, {"model__mlp_chunks": 1, "model__remat": "dots"}),
    (2, "v5p:2x2x4", 22.15, {"model__mlp_chunks": 1, "model__remat": "none"}),
    (
      2,
      "v5e:4x4",
      11.75,
      {"data__max_images": 7, "data__max_text_length": 2048},
    ),
    (3, "v5e:4x4", 10.56, {"mesh__tensor": 4}),
    (12, "v5e:16x16", 5.12, {}),
  ],
)
def test_compiled_peaks_at_7b(samples, chips, peak, changes):
  """GiB of a chip as `vocojax.aot` found them; RESULTS.md has its command."""
  _, devices = topology.describe(chips)
  config = seven_b(samples * len(devices), **changes)
  mesh = sharding.make_mesh(config.mesh, devices)
  found = training_memory.estimate(config, mesh, "tpu")
  assert sum(found.values()) / GIB == pytest.approx(peak, rel=0.1)


MIDDLE = """
  c.model.llm.update(hidden_size=1024, intermediate_size=4096, head_dim=64)
  c.model.llm.update(num_attention_heads=16, num_key_value_heads=16)
  c.model.llm.update(num_hidden_layers=6, initializer_range=0.02)
  c.training.update(steps=3, log_every=1)
  return c
"""


@pytest.fixture
def middle(tmp_path):
  """100 million parameters, which take nearly all of the memory."""
  runs.write_data(tmp_path)
  runs.write_config(tmp_path, "one.py", MIDDLE)
  return tmp_path


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"model__remat": "full", "model__dtype": "bfloat16"},
    {"training__accumulate": 2},
  ],
)
def test_compiled_peak_on_cpu(middle, changes):
  small = {"num_hidden_layers": 3, "hidden_size": 256, "num_attention_heads": 4}
  config = changed(config_of(middle), **changes)
  llm = dataclasses.replace(config.model.llm, **small, num_key_value_heads=4)
  config = changed(config, model__llm=llm)
  mesh = runs.mesh()
  [program] = programs.train(config, mesh)
  with jax.set_mesh(mesh):
    taken = program.lower().compile().memory_analysis()
  found = training_memory.estimate(config, mesh, "cpu")
  assert sum(found.values()) == pytest.approx(
    taken.argument_size_in_bytes + taken.temp_size_in_bytes, rel=0.15
  )


# A process counts what its parent held when it began; this parent is small.
_PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=sys.stderr)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def peak_of(*arguments: str) -> int:
  """Bytes that a Python process held at most."""
  process = subprocess.run(
    [sys.executable, "-c", _PEAK, sys.executable, *arguments],
    cwd=runs.ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    check=True,
    stdout=subprocess.PIPE,
  )
  return int(process.stdout) * 1024


@pytest.mark.slow
def test_peak_of_a_real_run_on_cpu(middle):
  imports = "import vocojax.train, transformers; transformers.AutoTokenizer"
  without = peak_of("-c", imports)
  peak = peak_of(
    *("-m", "vocojax.train", f"--config={middle}/one.py"),
    f"--workdir={middle}/run",
  )
  found = training_memory.estimate(config_of(middle), runs.mesh(), "cpu")
  estimated = sum(found.values()) + training_memory.COMPILER
  assert estimated == pytest.approx(peak - without, rel=0.15)


def test_a_run_that_does_not_fit():
  """A 7B on the CPU here; on GPUs of 80 GB it needs eight of them."""
  config = changed(seven_b(8), mesh__data=-1, mesh__fsdp=1)
  (host,) = training_memory.check((config,), [CPU] * jax.device_count())
  assert host.status == "error"
  assert "free of" in host.found and "optimiser state" in host.found
  gpus = [machine.Device("gpu", "H100", 75 * GIB)] * jax.device_count()
  alone, _ = training_memory.check((config,), gpus)
  assert alone.check == "memory of each device, phase voco"
  assert alone.status == "error"
  assert alone.remedy.endswith("config.mesh.fsdp -1")
  shared = changed(config, mesh__data=1, mesh__fsdp=-1)
  assert next(training_memory.check((shared,), gpus)).status == "OK"


def test_batches_that_wait(folder):
  """The phase that needs most counts."""
  # An image of 64 x 64 x 3 bytes and 24 tokens, in 4 arrays of 4 bytes each.
  batch = 8 * (64 * 64 * 3 + 4 * 4 * 24)
  small = config_of(folder, batch_size=8)
  greedy = config_of(folder, batch_size=8, prefetch_batches=2**40 // batch)
  devices = [CPU] * jax.device_count()
  for plan, status, ahead in (
    ((small,), "OK", "198.0 KiB"),
    ((greedy, small), "error", "1,024.0 GiB"),
  ):
    (found,) = training_memory.check(plan, devices)
    assert found.status == status
    assert f"batches ahead {ahead}" in found.found
