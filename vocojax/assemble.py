"""From a config to the things that run it; what train and evaluate share.

Read next: train.py.
"""

import os
import pathlib
import platform
import subprocess
import sys

import jax
import transformers

from vocojax.config import Config
from vocojax.data import prompt
from vocojax.data.sources import Source
from vocojax.data.tokenizer import (
  VOCO_TOKEN,
  build_word_level,
  load_tokenizer,
)
from vocojax.errors import ConfigError, UserError
from vocojax.models.compressors import StreamTokens
from vocojax.models.vlm import VisionLanguageModel


def make_workdir(path: str) -> pathlib.Path:
  """Creates the folder that a run writes to.

  Raises:
    UserError: it cannot be written to.
  """
  folder = pathlib.Path(path).expanduser().absolute()
  try:
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / ".write-test"
    probe.touch()
    probe.unlink()
  except OSError as e:
    raise UserError(
      f"--workdir={path}: cannot be written to ({e.strerror}); choose another "
      "folder"
    ) from e
  return folder


def tokenizer_for(
  config: Config, source: Source, workdir: pathlib.Path
) -> transformers.PreTrainedTokenizerFast:
  """The tokenizer of the config; easy-VQA may do without one of its own.

  Without `config.data.tokenizer`, a word-level tokenizer is made from the
  questions and answers of easy-VQA's training split and saved in the workdir.

  Raises:
    ConfigError: no tokenizer is named for another source.
    DataError: its folder cannot be used.
  """
  folder = config.data.tokenizer
  if not folder and config.data.source == "easy_vqa":
    folder = workdir / "tokenizer"
    if not folder.is_dir():
      texts = (
        text
        for i in range(len(source))
        for conversation in source[i].conversations
        for turn in conversation
        for text in turn
      )
      build_word_level(texts).save_pretrained(folder)
  if not folder:
    raise ConfigError(
      "config.data.tokenizer: not set, expected a Hugging Face tokenizer "
      "folder; the tokenizer files of lmsys/vicuna-7b-v1.5 on the Hugging Face "
      "hub are what LLaVA uses"
    )
  return load_tokenizer(folder)


def make_model(
  config: Config, tokenizer: transformers.PreTrainedTokenizerFast
) -> VisionLanguageModel:
  """The model of the config with the prompt layout's tokens.

  Raises:
    ConfigError: the vocabulary sizes differ.
  """
  vocab_size = config.model.llm.vocab_size
  if len(tokenizer) != vocab_size:
    raise ConfigError(
      f"config.model.llm.vocab_size: found {vocab_size}, the tokenizer has "
      f"{len(tokenizer)} tokens ({VOCO_TOKEN} included); set it to "
      f"{len(tokenizer)}"
    )
  prefix, suffix = prompt.stream_ids(
    prompt.LAYOUTS[config.prompt.layout], tokenizer
  )
  voco = tokenizer.convert_tokens_to_ids(VOCO_TOKEN)
  return VisionLanguageModel(config.model, StreamTokens(prefix, suffix, voco))


def provenance(command: str) -> dict:
  """Where a figure comes from: command, commit, versions, hardware."""
  commit = subprocess.run(
    ["git", "rev-parse", "HEAD"],
    cwd=pathlib.Path(__file__).parent,
    capture_output=True,
    text=True,
    check=False,
  )
  return {
    "command": command,
    "commit": commit.stdout.strip() or "not in a git checkout",
    "python": platform.python_version(),
    "jax": jax.__version__,
    "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    "machine": f"{platform.machine()}, {os.cpu_count()} cores",
  }


def command_line(module: str) -> str:
  """The command that was typed."""
  return " ".join(["python", "-m", module, *sys.argv[1:]])
