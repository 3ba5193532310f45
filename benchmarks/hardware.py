"""What a benchmark runs on. Read next: `train_step.py`."""

import argparse
import os

import jax

PLATFORMS = ("cpu", "gpu")


def add_flag(parser: argparse.ArgumentParser) -> None:
  """`--platform`, for the benchmarks that have sizes for both."""
  parser.add_argument("--platform", choices=PLATFORMS, default="cpu")


def use(platform: str = "cpu") -> None:
  """Two CPU cores, or the GPU. To be called before anything else of JAX.

  JAX and PyTorch may share the GPU: neither takes all of its memory at once.
  """
  if platform == "gpu":
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    jax.config.update("jax_platforms", "cuda")
    return
  # JAX starts a thread for every core that it may use.
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
  jax.config.update("jax_platforms", "cpu")
