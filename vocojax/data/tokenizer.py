"""Tokenizers, always read from a folder. Read next: prompt.py.

Any Hugging Face tokenizer with a begin-of-text and an end-of-text token will
do. `<voco>` is added to it where it lacks one. For small data sets with a
closed vocabulary, `build_word_level` makes a tokenizer from the texts.
"""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import sentencepiece
import tokenizers
import transformers
from tokenizers import models, pre_tokenizers

from vocojax.core.files import (
  expand_user,
  in_bucket,
  listing,
  open_regular,
  read_bytes,
  to_path,
)
from vocojax.errors import ConfigError, DataError, shorten

VOCO_TOKEN = "<voco>"
_SPECIAL = ("<unk>", "<s>", "</s>", VOCO_TOKEN)
_FILES = ("tokenizer.json", "tokenizer.model")
_FIX = (
  "name a folder with the files of a Hugging Face tokenizer, such as those of "
  "lmsys/vicuna-7b-v1.5"
)


def check_same(
  tokenizer: transformers.PreTrainedTokenizerFast,
  known: transformers.PreTrainedTokenizerFast,
  name: str,
) -> None:
  """Makes sure that each token has the id that some weights know.

  Args:
    tokenizer: the one to be used.
    known: what the weights were trained with.
    name: of the weights, in errors.

  Raises:
    ConfigError: a token has another id, or is missing on one side.
  """
  ours, theirs = tokenizer.get_vocab(), known.get_vocab()
  for token in sorted(theirs.keys() | ours.keys()):
    if theirs.get(token) != ours.get(token):
      raise ConfigError(
        "config.data.tokenizer",
        f"id {ours.get(token, 'none')} for the token {shorten(token)}",
        f"{theirs.get(token, 'none')}, as {name} has it",
        "leave the key out, which takes the tokenizer from there",
      )


def load_tokenizer(
  folder: str | os.PathLike,
) -> transformers.PreTrainedTokenizerFast:
  """Loads the tokenizer in `folder`; the network is never used.

  `<voco>` gets id `len(tokenizer)` where the folder does not define it: 32000
  for LLaMA. A missing padding token becomes the unknown token, as in LLaVA.

  Raises:
    DataError: the folder or a file is missing or cannot be read, there is no
      begin-of-text or end-of-text token, or transformers makes something else
      of a lone `tokenizer.model`.
  """
  if in_bucket(folder):
    with _copied(folder) as local:
      return load_tokenizer(local)
  folder = expand_user(folder)
  where = f"tokenizer folder {folder}"
  files = " or ".join(_FILES)
  if not folder.is_dir():
    raise DataError(where, "no such folder", f"a folder with {files}", _FIX)
  if not any((folder / name).exists() for name in _FILES):
    raise DataError(where, "none of its files", files, _FIX)
  # transformers would wait for a pipe.
  for path in sorted({*folder.glob("*token*"), *folder.glob("*.json")}):
    open_regular(path).close()
  try:
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
      str(folder), local_files_only=True, trust_remote_code=False
    )
    tokenizer("a")  # which a setting of a wrong type does not survive
  except Exception as e:  # the Rust parser raises bare Exception
    raise DataError(
      where,
      f"what transformers cannot read ({shorten(str(e), 200)})",
      "a Hugging Face tokenizer",
      _FIX,
    ) from e
  if not isinstance(tokenizer, transformers.PreTrainedTokenizerFast):
    raise DataError(
      where,
      f"a {type(tokenizer).__name__}",
      "a tokenizer with a tokenizer.json",
      "save it again with transformers' save_pretrained",
    )
  for key in ("bos_token", "eos_token"):
    if getattr(tokenizer, key) is None:
      raise DataError(
        where, f"no {key}", "one", "name it in tokenizer_config.json"
      )
  _check_converted(folder, tokenizer)
  # Some files ask for it; prompt.py lays down whole texts.
  tokenizer.backend_tokenizer.no_truncation()
  tokenizer.backend_tokenizer.no_padding()
  if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
  if VOCO_TOKEN not in tokenizer.get_vocab():
    token = transformers.AddedToken(VOCO_TOKEN, special=True, normalized=False)
    tokenizer.add_tokens([token], special_tokens=True)
  return tokenizer


@contextlib.contextmanager
def _copied(folder: str | os.PathLike) -> Iterator[str]:
  """A local copy of what a folder in a bucket has for `load_tokenizer`."""
  with tempfile.TemporaryDirectory() as local:
    with listing(folder):
      paths = list(to_path(folder, DataError).iterdir())
    for path in paths:
      if "token" in path.name or path.suffix == ".json":
        pathlib.Path(local, path.name).write_bytes(read_bytes(path))
    try:
      yield local
    except DataError as e:
      where = str(e.where).replace(local, str(folder))
      raise DataError(where, e.got, e.expected, e.fix) from e


def _check_converted(folder: pathlib.Path, tokenizer) -> None:
  """Without the name of its class, transformers misreads a tokenizer.model."""
  if (folder / _FILES[0]).is_file():
    return
  text = "A chat between two"
  path = str(folder / _FILES[1])
  own = sentencepiece.SentencePieceProcessor(model_file=path).encode(text)
  backend = tokenizer.backend_tokenizer
  found = backend.encode(text, add_special_tokens=False).ids
  if found != own:
    raise DataError(
      f"tokenizer folder {folder}: {_FILES[1]}",
      f"{found} for {text!r}, as transformers reads it",
      f"{own}, as sentencepiece does",
      "put a tokenizer_config.json with its tokenizer_class (LlamaTokenizer) "
      "beside it",
    )


def build_word_level(
  texts: Iterable[str],
) -> transformers.PreTrainedTokenizerFast:
  """Makes a tokenizer with one id for each word and punctuation mark.

  Ids: `<unk>` 0 (also padding), `<s>` 1, `</s>` 2, `<voco>` 3, then the words
  of `texts` in sorted order. Save it with `save_pretrained(folder)`.
  """
  split = pre_tokenizers.Whitespace()
  words = {word for t in texts for word, _ in split.pre_tokenize_str(t)}
  ordered = [*_SPECIAL, *sorted(words - set(_SPECIAL))]
  backend = tokenizers.Tokenizer(
    models.WordLevel({w: i for i, w in enumerate(ordered)}, unk_token="<unk>")
  )
  backend.pre_tokenizer = split
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend,
    unk_token="<unk>",
    pad_token="<unk>",
    bos_token="<s>",
    eos_token="</s>",
    clean_up_tokenization_spaces=False,
  )
  token = transformers.AddedToken(VOCO_TOKEN, special=True, normalized=False)
  tokenizer.add_tokens([token], special_tokens=True)
  return tokenizer
