"""What the programs share: from a config or a checkpoint to what runs.

Read next: train.py.
"""

import dataclasses
import os
import pathlib
import platform
import subprocess
import sys
from typing import cast

import jax
import transformers

from vocojax.config import CompressorName, Config
from vocojax.data import prompt
from vocojax.data.sources import Source, make_source
from vocojax.data.tokenizer import (
  VOCO_TOKEN,
  build_word_level,
  load_tokenizer,
)
from vocojax.errors import CheckpointError, ConfigError, UserError
from vocojax.evals import answers
from vocojax.models.compressors import StreamTokens
from vocojax.models.vlm import VisionLanguageModel
from vocojax.training import checkpoint, loop, sharding

# (compressor trained with, compressor used): name and title of the result.
_RESULTS = {
  ("voco", "voco"): ("voco", "VoCo"),
  ("full", "full"): ("full", "upper bound, all patches"),
  ("full", "voco"): ("lower", "lower bound, the same under the VoCo mask"),
  ("voco", "full"): ("voco_full", "VoCo weights, all patches"),
  ("avgpool", "avgpool"): ("avgpool", "mean patches"),
}


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
  voco = tokenizer.get_vocab()[VOCO_TOKEN]
  return VisionLanguageModel(config.model, StreamTokens(prefix, suffix, voco))


def evaluate(
  loaded: checkpoint.Loaded,
  workdir: pathlib.Path,
  compressor: str,
  command: str,
) -> None:
  """Scores a checkpoint, writes the result and prints it in one line.

  Args:
    loaded: the checkpoint.
    workdir: the result goes to its folder `evaluation`.
    compressor: what text sees of the image; with another one than the
      checkpoint was trained with, a bound.
    command: what was typed, for the provenance.

  Raises:
    CheckpointError: the checkpoint cannot be used with this compressor.
  """
  config = loaded.config
  trained = config.model.compressor.name
  if (trained, compressor) not in _RESULTS:
    raise CheckpointError(
      f"{loaded.path}: trained with compressor {trained!r}, which says nothing "
      f"when used as {compressor!r}; leave --compressor out"
    )
  name, title = _RESULTS[trained, compressor]
  model_config = dataclasses.replace(
    config.model,
    compressor=dataclasses.replace(
      config.model.compressor, name=cast(CompressorName, compressor)
    ),
  )
  config = dataclasses.replace(config, model=model_config)
  model = make_model(config, loaded.tokenizer)
  mesh = sharding.make_mesh(config.mesh)
  params, missing = checkpoint.load_params(
    str(loaded.path), loop.abstract_params(model, mesh), config.model
  )
  if missing:
    raise CheckpointError(
      f"{loaded.path}: lacks {missing[0]} and {len(missing) - 1} more "
      f"parameters of a {compressor!r} model; train one from it with "
      "config.init_from"
    )
  source = make_source(config.data, config.evaluation.split)
  found = answers.answer_questions(
    config, model, params, loaded.tokenizer, source, title
  )
  result = answers.write(
    workdir / "evaluation",
    name,
    title,
    found,
    config,
    loaded.path,
    provenance(command),
  )
  seen = len(model.stream.visible)
  print(
    f"{title}: {result['accuracy']:.2%} of {result['total']} answers right, "
    f"{config.model.vision.num_patches} patches as {seen} token"
    f"{'s' if seen > 1 else ''}, {result['seconds']:.1f} s"
  )


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
