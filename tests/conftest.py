"""Devices and shared fixtures of all tests. Read next: any test_*.py.

Run with `launch/test.sh`, which passes its arguments on to pytest.
"""

import os
import pathlib

import jax
import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent

# Before the first JAX call, which fixes the devices of the process.
if os.environ.get("VOCOJAX_TEST_PLATFORM") == "gpu":
  jax.config.update("jax_platforms", "cuda")
  # Not in TensorFloat-32, which has the eleven bits of half precision.
  jax.config.update("jax_default_matmul_precision", "highest")
else:
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session")
def llama_tokenizer_folder() -> pathlib.Path:
  """Folder of LLaMA's own tokenizer, which is too big for the repository."""
  variable = "VOCOJAX_LLAMA_TOKENIZER"
  beside = REPOSITORY.parent / "shared" / "llama_tokenizer"
  folder = pathlib.Path(os.environ.get(variable, beside))
  if not (folder / "tokenizer.json").is_file():
    pytest.skip(f"no tokenizer.json in {folder}; set {variable} to its folder")
  return folder
