"""What the programs share: from a config or a checkpoint to what runs.

Read next: train.py.
"""

import dataclasses
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import cast

import jax
import ml_collections
import transformers

from vocojax import config as config_lib
from vocojax.config import CompressorName, Config
from vocojax.core.files import in_bucket, storage, to_path, write_atomic
from vocojax.data import prompt
from vocojax.data.sources import Source, make_source, record_border
from vocojax.data.tokenizer import (
  VOCO_TOKEN,
  build_word_level,
  check_same,
  load_tokenizer,
)
from vocojax.errors import CheckpointError, ConfigError, DataError, UserError
from vocojax.evals import answers, matches
from vocojax.inference.engine import Engine
from vocojax.models.compressors import StreamTokens
from vocojax.models.vlm import VisionLanguageModel
from vocojax.training import checkpoint, distributed, loop, sharding, starts
from vocojax.training.starts import Start

_WORDS = "words"  # a tokenizer that is made from the data
# (compressor trained with, compressor used): name and title of the result.
_RESULTS = {
  ("voco", "voco"): ("voco", "VoCo"),
  ("voco_causal", "voco_causal"): ("upper", "upper bound, all is seen"),
  ("voco_causal", "voco"): ("lower", "lower bound, the same under the mask"),
  ("full", "full"): ("full", "LLaVA, all patches without VoCo tokens"),
  ("full", "voco"): ("full_voco", "LLaVA's weights under the VoCo mask"),
  ("voco", "full"): ("voco_full", "VoCo weights, all patches"),
  ("avgpool", "avgpool"): ("avgpool", "mean patches"),
  ("qformer", "qformer"): ("qformer", "Q-Former"),
  ("blind", "blind"): ("blind", "blind, the question alone"),
}


def make_workdir(path: str) -> pathlib.Path:
  """Creates the folder that a run writes to.

  Raises:
    UserError: it cannot be written to.
  """
  folder = to_path(path)
  with storage(f"--workdir={path}"):
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / ".write-test"
    probe.touch()
    probe.unlink(missing_ok=True)  # another host may have been faster
  return folder


def plan(
  config: ml_collections.ConfigDict, workdir: str | None = None
) -> tuple[Config, ...]:
  """The phases of a config, with what their starts and tokenizers say.

  Args:
    config: as the command line gives it.
    workdir: where a tokenizer goes that is made from data.

  Raises:
    ConfigError: as `config.phases`.
    UserError: a start, the data or a tokenizer cannot be read.
  """

  def vocab_size(phase: Config) -> int:
    nowhere = phase.data.source == "llava_json" and not phase.data.path
    if workdir is None or nowhere:
      return phase.model.llm.vocab_size
    source = make_source(phase, phase.data.train_split)
    return len(tokenizer_for(phase, source, make_workdir(workdir)))

  def start_config(path: str, layout: str) -> Config:
    try:
      return open_start(path, layout).config
    except UserError as e:
      raise e.within("config.init_from") from e

  return config_lib.phases(config, start_config, vocab_size)


def make_phases(
  plan: Iterable[Config], workdir: pathlib.Path
) -> Iterator[loop.Phase]:
  """What training runs, one phase after the other, checked beforehand.

  Each starts from its `config.init_from`, or else the one before.

  Args:
    plan: the phases.
    workdir: of the run; a tokenizer that is made from data goes there.

  Raises:
    UserError: see `loop.check`; data or tokenizer cannot be read.
  """
  made: list[loop.Phase] = []
  for config in plan:
    source = make_source(config, config.data.train_split)
    if config.init_from or not made:
      start = None
      if config.init_from:
        start = open_start(config.init_from, config.prompt.layout)
      tokenizer = tokenizer_for(config, source, workdir, start)
    else:
      tokenizer, before = made[-1].tokenizer, str(made[-1].folder)
      config = dataclasses.replace(config, init_from=before)
    phase = loop.Phase(
      config,
      workdir / config.name,
      make_model(config, tokenizer),
      tokenizer,
      source,
      sharding.make_mesh(config.mesh),
      open_start,
    )
    loop.check(phase, made)
    made.append(phase)
    yield phase


def open_start(path: str, layout: str = "") -> Start:
  """A checkpoint, or a model in a folder as it is published, to start from.

  Args:
    path: of either.
    layout: prompt layout to use it in; '' is its own.

  Raises:
    UserError: there is none, or it cannot be read.
  """
  folder = to_path(path, CheckpointError)
  published = not in_bucket(path) and (folder / "config.json").is_file()
  if not published or (folder / checkpoint.FOLDER).is_dir():
    return starts.from_checkpoint(path, layout)
  from vocojax.weights import into, source, stream  # slow to import

  found = into.make_plan(source.Request(source=path, layout=layout))
  return Start(
    path,
    found.config,
    found.tokenizer,
    lambda abstract, _: stream.missing(found, abstract),
    lambda abstract, _: stream.load(found, abstract),
  )


def tokenizer_for(
  config: Config,
  source: Source,
  workdir: pathlib.Path,
  start: Start | None = None,
) -> transformers.PreTrainedTokenizerFast:
  """The tokenizer of the config; small data sets may do without one.

  It is that of the `start`, if there is one; `config.data.tokenizer` must then
  be the same. Where it is 'words', or nothing for a data set of vocojax, a
  word-level tokenizer is made from the training split (of GridVQA, from all its
  words) and saved in the workdir; of several hosts, the first one does so.

  Raises:
    ConfigError: no tokenizer is named for another source, or 'words' beside a
      start.
    DataError: its folder cannot be used.
  """
  folder = config.data.tokenizer
  if start:
    if folder == _WORDS:
      raise ConfigError(
        "config.data.tokenizer",
        f"{folder!r} with config.init_from",
        "the tokenizer of what it starts from",
        "leave the key out",
      )
    if folder:
      name = f"config.init_from ({start.path})"
      check_same(_load_tokenizer(folder), start.tokenizer, name)
    return start.tokenizer
  if folder == _WORDS or (not folder and config.data.source != "llava_json"):
    folder = workdir / "tokenizer"
    # Its last file in a bucket.
    if jax.process_index() == 0 and not (folder / "tokenizer.json").exists():
      _save_whole(build_word_level(_texts(config, source)), folder)
    distributed.gather(None)  # wait for it
  if not folder:
    raise ConfigError(
      "config.data.tokenizer",
      "''",
      "a Hugging Face tokenizer folder",
      "set it; LLaVA uses the tokenizer files of lmsys/vicuna-7b-v1.5 on the "
      f"Hugging Face hub; {_WORDS!r} makes a small one from the data",
    )
  return _load_tokenizer(folder)


def _load_tokenizer(
  folder: str | pathlib.Path,
) -> transformers.PreTrainedTokenizerFast:
  try:
    return load_tokenizer(folder)
  except DataError as e:
    raise e.within("config.data.tokenizer") from e


def _save_whole(
  tokenizer: transformers.PreTrainedTokenizerFast, folder: pathlib.Path
) -> None:
  part = folder.with_name(f"{folder.name}.part")
  with storage(folder):
    if in_bucket(folder):
      for name, content in reversed(
        checkpoint.tokenizer_files(tokenizer).items()
      ):
        write_atomic(folder / name, json.dumps(content))
      return
    try:
      tokenizer.save_pretrained(part)
      part.rename(folder)
    finally:
      shutil.rmtree(part, ignore_errors=True)


def _texts(config: Config, source: Source) -> Iterator[str]:
  """Texts with every word of a small data set, and of the prompt's layout."""
  if config.data.source == "grid_vqa":
    from vocojax.data.tfds import grid_vqa  # slow to import

    yield from grid_vqa.words()
    return
  layout = prompt.LAYOUTS[config.prompt.layout]
  yield f"{layout.stream_prefix} {layout.text_opening} {layout.question_end}"
  for i in range(len(source)):
    try:
      with record_border(f"record {i}"):
        record = source[i]
        yield record.system
        for turns in record.conversations:
          questions, answers = zip(*turns, strict=True)
          yield from prompt.place_images(questions, len(record.images))
          yield from answers
    except DataError:  # comes again when the record's turn comes
      continue


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
      "config.model.llm.vocab_size",
      str(vocab_size),
      f"{len(tokenizer)}, the tokens of the tokenizer, {VOCO_TOKEN} included",
      f"set it to {len(tokenizer)}, or choose another tokenizer",
    )
  prefix, suffix = prompt.stream_ids(
    prompt.LAYOUTS[config.prompt.layout], tokenizer
  )
  voco = tokenizer.get_vocab()[VOCO_TOKEN]
  tokens = StreamTokens(prefix, suffix, voco)
  return VisionLanguageModel(config.model, tokens, config.data.text_slots)


def evaluate(
  loaded: checkpoint.Loaded,
  workdir: pathlib.Path,
  compressor: str,
  made_by: dict,
  int8: bool = False,
  num_voco_tokens: int | None = None,
  adaptive: bool = False,
  changes: tuple[str, ...] = (),
) -> None:
  """Scores a checkpoint, writes the result and prints it in one line.

  Of several hosts each answers a part of the questions, on its own devices and
  with all weights, and the first one writes.

  Args:
    loaded: the checkpoint.
    workdir: the result goes to its folder `evaluation`.
    compressor: what text sees of the image; with another one than the
      checkpoint was trained with, a bound.
    made_by: the `provenance` of the program when it began.
    int8: answer from caches of 8-bit numbers.
    num_voco_tokens: answer from the first so many tokens of each image.
    adaptive: answer each question from as few of them as will do.
    changes: what is not as the checkpoint's own config has it, in words; title
      and name of the result end in them.

  Raises:
    CheckpointError: the checkpoint cannot be used with this compressor.
    UserError: its tokens cannot be cut so.
  """
  name, title = result_name(loaded, compressor, int8, num_voco_tokens)
  if adaptive:
    if compressor != "voco":
      raise UserError(
        "--adaptive",
        f"compressor {compressor!r}, whose tokens cannot be cut",
        "'voco'",
        "leave the flag out",
      )
    name, title = f"{name}_adaptive", f"{title}, as few tokens as will do"
  config = with_compressor(loaded.config, compressor, num_voco_tokens)
  title = ", ".join((title, *changes))
  words = "_".join((name, *changes)).replace(":", "-").replace("%", "p")
  name = re.sub(r"(?:[^\w.-]|_)+", "_", words).strip("_")
  folder = workdir / "evaluation"
  with storage(folder):
    folder.mkdir(parents=True, exist_ok=True)
  with distributed.held(folder, f"evaluation-{name}"):
    model, params = load_model(loaded, config)
    source = make_source(config, config.evaluation.split)
    found = answers.answer_questions(
      config, model, params, loaded.tokenizer, source, title, int8, adaptive
    )
    if jax.process_index():
      return
    result = answers.write(
      folder, name, title, found, config, loaded.path, made_by
    )
  normalized = ""
  if result["normalized_correct"] != result["correct"]:
    normalized = f" ({result['normalized_accuracy']:.2%} normalised)"
  seen = len(model.stream.visible)
  tokens = f"{seen} token{'s' if seen > 1 else ''}"
  if adaptive:
    tokens = f"{result['mean_k']:.2f} tokens on average"
  print(
    f"{title}: {result['accuracy']:.2%} of {result['total']} answers right"
    f"{normalized}, {config.model.vision.num_patches} patches as {tokens}, "
    f"{result['seconds']:.1f} s"
  )
  if note := matches.note_on_length(result["median_answer_words"]):
    print(note)
  if found.bad_records:
    print(f"bad records, left out: {found.bad_records:,}")


def result_name(
  loaded: checkpoint.Loaded,
  compressor: str,
  int8: bool,
  num_voco_tokens: int | None = None,
) -> tuple[str, str]:
  """Name and title of what a checkpoint answers when used so.

  Raises:
    CheckpointError: it cannot be used with this compressor.
    UserError: its tokens cannot be cut to so many.
  """
  _check_compressor(loaded, compressor)
  name, title = _RESULTS[loaded.config.model.compressor.name, compressor]
  if layout := loaded.chosen_layout:
    name, title = f"{name}_{layout}", f"{title}, prompt layout {layout}"
  if loaded.config.model.dtype == "float16":
    title = f"{title}, in float16"  # as all results of a table may be
  if int8:
    name, title = f"{name}_int8", f"{title}, 8-bit cache"
  _check_num_voco_tokens(loaded, compressor, num_voco_tokens)
  if num_voco_tokens is not None:
    name = f"{name}_m{num_voco_tokens}"
    title = f"{title}, first {num_voco_tokens} of each image"
  return name, title


def with_compressor(
  config: Config, name: str, num_voco_tokens: int | None
) -> Config:
  """The config with another compressor, or another number of VoCo tokens."""
  changes: dict = {"name": cast(CompressorName, name)}
  if num_voco_tokens is not None:
    changes["num_voco_tokens"] = num_voco_tokens
  compressor = dataclasses.replace(config.model.compressor, **changes)
  model = dataclasses.replace(config.model, compressor=compressor)
  return dataclasses.replace(config, model=model)


def load_model(loaded: checkpoint.Loaded, config: Config):
  """The model and the checkpoint's parameters, on this host's devices.

  Raises:
    CheckpointError: it lacks some.
  """
  model = make_model(config, loaded.tokenizer).exact
  mesh = sharding.local_mesh(config.mesh)
  params, missing = checkpoint.load_params(
    str(loaded.path), loop.abstract_params(model, mesh), config.model
  )
  if missing:
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    raise CheckpointError(
      loaded.path,
      f"no parameter {missing[0]}{more}",
      f"those of a {config.model.compressor.name!r} model",
      "train one from it with config.init_from",
    )
  return model, params


def load(
  checkpoint_path: str | os.PathLike,
  *,
  compressor: str | None = None,
  num_voco_tokens: int | None = None,
  layout: str = "",
  **sizes: int,
) -> Engine:
  """An engine with the weights of a checkpoint; also `vocojax.load`.

  Args:
    checkpoint_path: a phase folder of a workdir, or one step of it.
    compressor: what text sees of an image, by default what the checkpoint was
      trained with; 'voco_causal' may be used as 'voco' (the lower bound), and
      'full' and 'voco' for each other.
    num_voco_tokens: at most as many as the checkpoint was trained with.
    layout: prompt layout, by default the checkpoint's own.
    **sizes: `slots`, `max_images`, `max_text_length`, `compress_batch` and
      `prefill_rows` of `Engine`.

  Raises:
    CheckpointError: there is no such checkpoint, or it cannot be used so.
    UserError: a size is too small, or `num_voco_tokens` not one it can have.
  """
  loaded = checkpoint.load(str(checkpoint_path), layout)
  name = compressor or loaded.config.model.compressor.name
  return make_engine(loaded, name, num_voco_tokens, **sizes)


def make_engine(
  loaded: checkpoint.Loaded,
  compressor: str,
  num_voco_tokens: int | None = None,
  **sizes: int,
) -> Engine:
  """An engine with the weights of a checkpoint that was found before.

  Raises:
    CheckpointError: it cannot be used with this compressor.
    UserError: as for `load`.
  """
  _check_compressor(loaded, compressor)
  _check_num_voco_tokens(loaded, compressor, num_voco_tokens)
  config = with_compressor(loaded.config, compressor, num_voco_tokens)
  model, params = load_model(loaded, config)
  return Engine(config, model, params, loaded.tokenizer, **sizes)


def _check_compressor(loaded: checkpoint.Loaded, name: str) -> None:
  trained = loaded.config.model.compressor.name
  if (trained, name) not in _RESULTS:
    usable = [repr(used) for of, used in _RESULTS if of == trained]
    raise CheckpointError(
      loaded.path,
      f"weights trained with compressor {trained!r}, to be used as {name!r}",
      f"use as {' or '.join(usable)}",
      "leave the compressor out, or name another phase",
    )


def _check_num_voco_tokens(loaded, name: str, k: int | None) -> None:
  trained = loaded.config.model.compressor.num_voco_tokens
  if k is None or k == trained:
    return
  if name != "voco":
    raise UserError(
      "num_voco_tokens",
      f"{k} with compressor {name!r}, whose tokens cannot be cut",
      "the number that it was trained with",
      "leave it out",
    )
  if not 1 <= k <= trained:
    raise UserError(
      "num_voco_tokens",
      str(k),
      f"1 to {trained}, as {loaded.path} was trained"
      if trained > 1
      else f"1, as {loaded.path} was trained",
      "leave it out" if trained == 1 else f"choose 1 to {trained}",
    )


def provenance(command: str) -> dict:
  """Where a figure comes from: command, commit, versions, hardware.

  Of a program that runs for long it is taken when it begins. A commit with
  changes on top of it ends in '-dirty'.
  """
  try:
    commit = subprocess.run(
      "git describe --always --dirty --abbrev=40 --exclude=*".split(),
      cwd=pathlib.Path(__file__).parent,
      capture_output=True,
      text=True,
      check=False,
    ).stdout.strip()
  except OSError:  # there is no git
    commit = ""
  return {
    "command": command,
    "commit": commit or "not in a git checkout",
    "python": platform.python_version(),
    "jax": jax.__version__,
    "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    "machine": f"{platform.machine()}, {os.cpu_count()} cores",
  }


def command_line(module: str) -> str:
  """The command that was typed."""
  return " ".join(["python", "-m", module, *sys.argv[1:]])
