"""Memory of a run, at the peak of a training step. Read next: machine.py.

What a step is called with is exact: the shapes that `vocojax.aot` compiles. The
rest is arithmetic, with factors fitted to what compiled steps take and to runs
on CPU; the tests hold both. A, K, F, T, D, H, P, G and M are those of vlm.py
and llama.py.
"""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vocojax.ahead import programs
from vocojax.config import Config
from vocojax.health import machine
from vocojax.health.findings import Finding, size
from vocojax.models import precision
from vocojax.training import sharding, state

COMPILER = 2**29  # bytes of a host: the compiler and its programs


def check(
  plan: Sequence[Config], devices: Sequence[machine.Device]
) -> Iterator[Finding]:
  """A line for the devices of each phase, and one for the host.

  Args:
    plan: the phases.
    devices: what they run on; as many are in this process, of any kind.

  Raises:
    ConfigError: as `estimate`.
  """
  host: dict[str, int] = {}
  for config in plan if devices else ():
    mesh, memory = sharding.make_mesh(config.mesh), devices[0].memory
    uses = estimate(config, mesh, devices[0].platform)
    data = config.data
    batches = data.batch_size * (data.prefetch_batches + 1) * _row_bytes(config)
    needed = {"batches ahead": batches, "compiler": COMPILER}
    if memory:
      name = f"memory of each device, phase {config.name}"
      yield machine.fits(name, size(memory), uses, memory)
      held = ("trained parameters", "frozen parameters", "optimiser state")
      saved = sum(uses[use] for use in held) * len(devices)
      needed["a checkpoint to be written"] = saved
    else:
      needed |= {use: n * len(devices) for use, n in uses.items()}
    host = max(host, needed, key=lambda uses: sum(uses.values()))
  yield machine.host_memory(host)


def _row_bytes(config: Config) -> int:
  data, side = config.data, config.model.vision.image_size
  return data.max_images * side * side * 3 + 4 * 4 * data.max_text_length


def estimate(config: Config, mesh: Mesh, platform: str) -> dict[str, int]:
  """Bytes of one device by use.

  Args:
    config: one phase.
    mesh: its mesh; its devices need not be those that are planned for.
    platform: of these: 'cpu', 'gpu' or 'tpu'.

  Raises:
    ConfigError: the mesh does not fit the model or the batch.
  """
  model, data = config.model, config.data
  accumulate, on_cpu = config.training.accumulate, platform == "cpu"
  sharding.check_batch(mesh, data.batch_size, accumulate)
  [program] = programs.train(config, mesh)
  fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
  trained = program.arguments["trained parameters"]
  float32 = 4 * sum(x.size for x in jax.tree.leaves(trained)) // (fsdp * tensor)
  slots = jax.eval_shape(lambda p: precision.slots(p, model.dtype), trained)
  gradients = programs.device_bytes(slots) // (fsdp * tensor)
  if on_cpu:  # it has no bfloat16, and updates beside the gradients
    gradients = 2 * float32
  gradients += float32 * ((accumulate > 1) + (config.optimizer.name == "muon"))

  llm, width = model.llm, jnp.dtype(model.dtype).itemsize
  D, M, H = llm.hidden_size, llm.intermediate_size, llm.num_attention_heads
  HP, GP = H * llm.head_dim, llm.num_key_value_heads * llm.head_dim
  F, T = data.max_images, data.max_text_length
  stream = programs.make_model(config).stream
  A, K = stream.length, len(stream.visible)
  rows = data.batch_size // (mesh.size // tensor * accumulate)
  tokens = rows * (F * A + T)
  # Of attention without a kernel that saves them: all on CPU, of text on GPU.
  scores = 0 if platform == "tpu" else T * (T // data.text_slots + F * K)
  scores = rows * H * (scores + on_cpu * F * A * A // 2) // tensor
  # The backward pass of one layer, whose weights are there as a whole.
  part = M if tensor > 1 else M // model.mlp_chunks
  layer = width * tokens * (4 * D + (4 * HP + 3 * GP + 5 * part) // tensor)
  layer += 3 * 4 * scores
  weights = width * D * (2 * HP + 2 * GP + 3 * M) // tensor
  if fsdp > 1:
    layer += 2 * weights
  copies = 0  # of the stack, as it is read
  if not on_cpu and model.scan_layers and model.dtype != model.param_dtype:
    copies = llm.num_hidden_layers * weights // fsdp
  chunk = min(model.logits_chunk, llm.padded_vocab_size)
  head = 3 * 4 * rows * T * chunk

  def kept(D: int, HP: int, GP: int, M: int) -> int:
    """Numbers of a token that a layer keeps for the backward pass."""
    if model.remat == "full":
      return D
    if model.remat == "dots":
      return 2 * D + (HP + 2 * GP + 2 * M) // tensor
    return 8 * D + (6 * HP + 4 * GP + 5 * M) // tensor

  saved = tokens * kept(D, HP, GP, M) + (model.remat == "none") * scores
  saved *= llm.num_hidden_layers - 1
  if not state.matches("vision/layers/", config.optimizer.freeze):
    D, M = model.vision.hidden_size, model.vision.intermediate_size
    patches = rows * F * (model.vision.num_patches + 1)
    saved += patches * model.vision.num_feature_layers * kept(D, D, D, M)
  return program.argument_bytes | {
    "gradients": gradients,
    "activations": width * saved,
    "temporaries": copies + max(layer, head),
  }
