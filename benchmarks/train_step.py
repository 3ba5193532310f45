"""Train-step speed: vocojax against PyTorch. Read next: `torch_voco.py`.

  python -m benchmarks.train_step [--sizes easy_vqa wide] [--repeats 5]
  python -m benchmarks.train_step --platform=gpu --torch_compile

Both train the same model from the same weights on the same batch: forward,
backward, clipping, AdamW; on two CPU cores in float32, on a GPU in bfloat16
with weights in float32. Ours is the step that the trainer runs, jitted and
donated; PyTorch is eager, with fused AdamW. They take turns in one process.
Text rows hold several conversations about one image. `--torch_compile` adds the
same PyTorch model under `torch.compile`, which needs a C++ compiler and about a
minute a size.

On CPU the vocabularies are small on purpose: LLaVA's loss puts the head on the
whole joint sequence, ours on text alone, and at these widths a vocabulary of
32,000 would make that the only thing to measure. For a GPU with a known peak
the report has the model FLOPs utilisation (MFU, arXiv 2204.02311): operations
that the two-stream step needs, over time and peak, the same ones for all sides.
"""

import argparse
import contextlib
import dataclasses
import functools
import statistics
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from benchmarks import hardware, tables, torch_voco
from configs import easyvqa_1tok
from vocojax import config as config_lib
from vocojax.models import flops
from vocojax.models.compressors import StreamTokens
from vocojax.models.vlm import VisionLanguageModel
from vocojax.training import optimizer as optimizer_lib
from vocojax.training import state, step

_WIDE = {
  "model.llm.num_hidden_layers": 4,
  "model.llm.hidden_size": 256,
  "model.llm.intermediate_size": 688,
  "model.llm.num_attention_heads": 8,
  "model.llm.num_key_value_heads": 8,
  "model.vision.hidden_size": 256,
  "model.vision.intermediate_size": 1024,
  "model.vision.num_attention_heads": 8,
}
# As in the published model: 576 patches and a frozen vision tower.
_PATCHES_576 = _WIDE | {
  "model.llm.vocab_size": 256,
  "model.vision.image_size": 336,
  "model.vision.patch_size": 14,
  "model.vision.num_hidden_layers": 4,
  "data.batch_size": 4,
  "optimizer.freeze": ("^vision/",),
}
# Changes to configs/easyvqa_1tok.py, whose own size changes with its recipe.
# Only `wide` trains the vision tower, too.
SIZES = {
  "easy_vqa": {},
  "wide": _WIDE
  | {
    "model.vision.num_hidden_layers": 3,
    "data.max_text_length": 72,
    "data.batch_size": 24,
    "optimizer.freeze": (),
  },
  "576_text_64": _PATCHES_576 | {"data.max_text_length": 64},
  "576_text_256": _PATCHES_576 | {"data.max_text_length": 256},
}
# A language model of 0.95 billion parameters after CLIP ViT-L/14-336, frozen.
# Larger batches of both sides do not fit into 80 GB.
_1B = {
  "model.dtype": "bfloat16",
  "model.scan_layers": True,
  "model.llm.vocab_size": 32000,
  "model.llm.vocab_multiple": 64,
  "model.llm.num_hidden_layers": 16,
  "model.llm.hidden_size": 2048,
  "model.llm.intermediate_size": 5632,
  "model.llm.num_attention_heads": 16,
  "model.llm.num_key_value_heads": 16,
  "model.llm.head_dim": 128,
  "model.llm.initializer_range": 0.02,
  "model.vision.image_size": 336,
  "model.vision.patch_size": 14,
  "model.vision.feature_layer": -2,
  "model.vision.num_hidden_layers": 24,
  "model.vision.hidden_size": 1024,
  "model.vision.intermediate_size": 4096,
  "model.vision.num_attention_heads": 16,
  "model.vision.initializer_range": 0.02,
  "optimizer.freeze": ("^vision/",),
  "optimizer.learning_rate": 1e-4,
  "data.conversations_per_record": 4,
  "data.batch_size": 4,
}
# The joint sequences are multiples of eight, as PyTorch's kernels like them.
GPU_SIZES = {
  "1b_text_60": _1B | {"data.max_text_length": 60},
  "1b_text_252": _1B | {"data.max_text_length": 252},
}
# Dense bfloat16 operations a second, of NVIDIA's data sheets.
_PEAKS = {"NVIDIA H100 80GB HBM3": 989.4e12, "NVIDIA H200": 989.4e12}
_ONE_PHASE = {
  "training.steps": 1000,
  "optimizer.name": "adamw",
  "optimizer.learning_rate": 1e-3,
  "optimizer.schedule": "constant",
  "optimizer.warmup_ratio": 0.0,
}
_REPETITION_SECONDS = 0.5  # at least; as many steps as that takes
TOKENS = StreamTokens(prefix_ids=(1,), suffix_ids=(4, 5), voco_token_id=3)


@dataclasses.dataclass
class Result:
  """Of one size; one number a repetition where it says so."""

  name: str
  tokens_per_image: int
  batch_size: int
  compile_seconds: float  # ours
  times: dict[str, list[float]]  # seconds of a step; ours comes first
  parts: dict[str, float]  # seconds of a step, ours
  operations: int  # that a step needs, by formula
  bytes: dict[str, int]  # of GPU memory, on a GPU


def make_config(overrides: dict) -> config_lib.Config:
  """The last phase of configs/easyvqa_1tok.py with AdamW; dotted keys.

  That phase is the file without the keys of `config.phase`, but for the steps.
  """
  c = easyvqa_1tok.get_config()
  c.phases, c.phase = (), {}
  c.update_from_flattened_dict(_ONE_PHASE | overrides)
  return config_lib.phases(c)[0]


def random_batch(config: config_lib.Config) -> dict[str, np.ndarray]:
  """One image a row and conversations of equal length; half is trained."""
  rng = np.random.default_rng(0)
  B, T = config.data.batch_size, config.data.max_text_length
  size = config.model.vision.image_size
  ids = rng.integers(0, config.model.llm.vocab_size, (B, T), np.int32)
  segments = 1 + np.arange(T) * config.data.conversations_per_record // T
  trained = rng.random((B, T)) < 0.5
  return {
    "images": rng.integers(0, 256, (B, 1, size, size, 3), np.uint8),
    "image_group_ids": np.ones((B, 1), np.int32),
    "input_ids": ids,
    "labels": np.where(trained, ids, -100).astype(np.int32),
    "segment_ids": np.tile(segments.astype(np.int32), (B, 1)),
    "text_group_ids": np.ones((B, T), np.int32),
  }


class Ours:
  """The train step of the trainer, on one device."""

  def __init__(self, config: config_lib.Config):
    self.config = config
    self.model = VisionLanguageModel(
      config.model, TOKENS, config.data.text_slots
    )
    self.params = jax.jit(self.model.init)(jax.random.key(config.seed))
    self._freeze = config.optimizer.freeze
    self._optimizer = optimizer_lib.make_optimizer(
      config.optimizer, config.training.steps
    )

  def compile(self, batch, options: dict | None = None) -> float:
    """Makes the step ready; returns the seconds that compiling took.

    `options` are those of XLA, for tests.
    """
    # The step takes its state over, and `params` are still needed.
    params = jax.tree.map(jnp.copy, self.params)
    self._state = step.init_state(params, self._optimizer, self._freeze)
    train_step = jax.jit(
      step.make_train_step(self.model, self._optimizer, self._freeze, 1),
      donate_argnums=0,
    )
    start = time.perf_counter()
    self._step = train_step.lower(self._state, batch).compile(options)
    return time.perf_counter() - start

  @property
  def bytes(self) -> int:
    """Of memory that the compiled step needs, with its state."""
    found = self._step.memory_analysis()
    return (
      found.argument_size_in_bytes
      + found.output_size_in_bytes
      - found.alias_size_in_bytes
      + found.temp_size_in_bytes
    )

  def run(self, batch, steps: int) -> list[float]:
    """Losses of so many steps; returns when all is done."""
    losses = []
    for _ in range(steps):
      self._state, metrics = self._step(self._state, batch)
      losses.append(metrics["loss"])
    jax.block_until_ready(self._state)
    return [float(x) for x in losses]

  def parts(self, batch) -> dict:
    """Jitted parts of the train step, as functions without arguments.

    Forward and backward of the vision tower and projector, the same of those
    and the image stream, and the optimiser.
    """
    trained, frozen = state.split(self.params, self._freeze)
    images = jnp.asarray(batch["images"][:, 0])

    def backward(forward):
      def total(trained, frozen, images):
        outputs = forward(state.merge(trained, frozen), images)
        return sum(jnp.vdot(x, x) for x in jax.tree.leaves(outputs))

      return functools.partial(
        jax.jit(jax.grad(total)), trained, frozen, images
      )

    @jax.jit
    def update(grads, opt_state, params):
      updates, opt_state = self._optimizer.update(grads, opt_state, params)
      return optax.apply_updates(params, updates), opt_state

    opt_state = jax.jit(self._optimizer.init)(trained)
    return {
      "vision": backward(self.model.embed_images),
      "images": backward(lambda *args: self.model.compress(*args)[0]),
      "optimizer": functools.partial(update, trained, opt_state, trained),
    }


class Torch:
  """The same model in PyTorch from the same weights."""

  def __init__(self, ours: Ours, compiled: bool):
    model = torch_voco.from_params(
      ours.config.model, ours.model.stream, ours.params
    )
    if compiled:
      model.compile()
    self._step = torch_voco.make_train_step(
      model, ours.config.optimizer, ours.config.model.dtype
    )

  def run(self, batch, steps: int) -> list[float]:
    """Losses of so many steps; returns when all is done."""
    losses = []
    device = torch.get_default_device()
    for _ in range(steps):
      tensors = {k: torch.as_tensor(v, device=device) for k, v in batch.items()}
      losses.append(self._step(tensors).detach())
    return [float(x) for x in losses]


def seconds(f, *args) -> float:
  """Of one call, until everything it returns is there."""
  start = time.perf_counter()
  jax.block_until_ready(f(*args))
  return time.perf_counter() - start


def measure(
  name: str, overrides: dict, repeats: int, torch_compile: bool
) -> Result:
  """Times one size, after checking that all train the same model.

  Raises:
    AssertionError: they do not.
  """
  config = make_config(overrides)
  batch = random_batch(config)
  ours = Ours(config)
  compile_seconds = ours.compile(batch)
  # Two steps warm up, and the second loss depends on a whole first step.
  expected = ours.run(batch, 2)
  sides: dict[str, Ours | Torch] = {"vocojax": ours}
  memory = {"vocojax": ours.bytes}
  for compiled in (False, True) if torch_compile else (False,):
    side_name = "PyTorch compiled" if compiled else "PyTorch"
    with _allocated(memory, side_name):
      side = sides[side_name] = Torch(ours, compiled)
      found = side.run(batch, 2)
    tolerance = 1e-4 if config.model.dtype == "float32" else 1e-2
    np.testing.assert_allclose(found, expected, rtol=tolerance)
  steps = max(1, round(_REPETITION_SECONDS / seconds(ours.run, batch, 1)))
  times = {name: [] for name in sides}
  for _ in range(repeats):
    for side_name, side in sides.items():
      times[side_name].append(seconds(side.run, batch, steps) / steps)
  return Result(
    name,
    ours.model.stream.length + config.data.max_text_length,
    config.data.batch_size,
    compile_seconds,
    times,
    _parts(ours, batch, repeats),
    operations(config, ours.model.stream.length),
    memory,
  )


@contextlib.contextmanager
def _allocated(into: dict[str, int], name: str) -> Iterator[None]:
  """Writes how much more GPU memory PyTorch came to need; nothing on CPU."""
  if torch.get_default_device().type != "cuda":
    yield
    return
  before = torch.cuda.memory_allocated()
  torch.cuda.reset_peak_memory_stats()
  yield
  into[name] = torch.cuda.max_memory_allocated() - before


def operations(config: config_lib.Config, stream_length: int) -> int:
  """That a train step needs: the backward pass twice the forward pass.

  A frozen vision tower has none. Every conversation reads itself and the VoCo
  token.
  """
  model, data = config.model, config.data
  n = data.conversations_per_record
  text = data.max_text_length // n
  trained = flops.causal(model.llm, stream_length)
  trained += n * flops.causal(model.llm, text, 1)
  trained += n * text * flops.head(model.llm)
  frozen = "^vision/" in config.optimizer.freeze
  vision = flops.vision(model) * (1 if frozen else 3)
  return data.batch_size * (3 * trained + vision)


def _parts(ours: Ours, batch, repeats: int) -> dict[str, float]:
  parts = ours.parts(batch)
  for f in parts.values():
    jax.block_until_ready(f())  # compiles
  parts["step"] = functools.partial(ours.run, batch, 1)
  times: dict[str, list[float]] = {k: [] for k in parts}
  for _ in range(repeats):
    for k, f in parts.items():
      times[k].append(seconds(f))
  median = {k: statistics.median(v) for k, v in times.items()}
  rest = median["step"] - median["images"] - median["optimizer"]
  return {
    "vision, projector": median["vision"],
    "image stream": median["images"] - median["vision"],
    "text stream, loss": rest,
    "optimiser": median["optimizer"],
  }


def report(results: list[Result]) -> str:
  """Two Markdown tables.

  A ratio is the median of those of the repetitions, with the least and the
  greatest of them.
  """
  sides = list(results[0].times)
  head = ["size", "tokens per image", "batch"]
  head += [f"{side} images/s" for side in sides]
  head += [f"vocojax / {side}" for side in sides[1:]]
  rows = []
  for r in results:
    row = [r.name, r.tokens_per_image, r.batch_size]
    for side in sides:
      row.append(f"{r.batch_size / statistics.median(r.times[side]):.1f}")
    for side in sides[1:]:
      pairs = zip(r.times[sides[0]], r.times[side], strict=True)
      ratios = [theirs / ours for ours, theirs in pairs]
      middle = statistics.median(ratios)
      row.append(f"{middle:.2f} ({min(ratios):.2f}-{max(ratios):.2f})")
    rows.append([*row, f"{r.compile_seconds:.0f}"])
  speed = tables.markdown([*head, "vocojax compiles, s"], rows)
  if torch.get_default_device().type == "cuda":
    speed += "\n\n" + _gpu_table(results)

  rows = []
  for r in results:
    whole = sum(r.parts.values())
    rows.append([r.name, f"{1e3 * whole:.0f}"])
    for t in r.parts.values():
      rows[-1].append(f"{1e3 * t:.0f} ({100 * t / whole:.0f} %)")
  parts = tables.markdown(["size", "step", *results[0].parts], rows)
  return (
    f"{speed}\n\nWhere a vocojax step goes, in milliseconds; the text stream "
    f"is what the others leave:\n\n{parts}"
  )


def _gpu_table(results: list[Result]) -> str:
  """Memory and, where the peak of the card is known, MFU."""
  peak = _PEAKS.get(jax.devices()[0].device_kind)
  sides = list(results[0].times)
  head = ["size", "TFLOP of a step", *(f"{side} GiB" for side in sides)]
  head += [f"{side} MFU" for side in sides if peak]
  rows = []
  for r in results:
    rows.append([r.name, f"{r.operations / 1e12:.1f}"])
    rows[-1] += [f"{r.bytes[side] / 2**30:.1f}" for side in sides]
    if peak:
      medians = [statistics.median(r.times[side]) for side in sides]
      rows[-1] += [f"{r.operations / t / peak:.1%}" for t in medians]
  return tables.markdown(head, rows)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--sizes", nargs="+", choices=[*SIZES, *GPU_SIZES])
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--torch_compile", action="store_true")
  hardware.add_flag(parser)
  args = parser.parse_args()
  hardware.use(args.platform)
  if args.platform == "gpu":
    torch.set_default_device("cuda")
  else:
    torch.set_num_threads(2)
  results = []
  for name in args.sizes or (GPU_SIZES if args.platform == "gpu" else SIZES):
    print(f"{name} ...", flush=True)
    size = (SIZES | GPU_SIZES)[name]
    results.append(measure(name, size, args.repeats, args.torch_compile))
  print("\n" + report(results) + "\n")
  tables.print_provenance("benchmarks.train_step", torch=torch.__version__)


if __name__ == "__main__":
  main()
