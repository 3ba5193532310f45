"""Token ids of published models and ours. Read next: `into.py`.

Ours are the text tokens 0 to n-1 and `<voco>` = n. llava-hf has `<image>` = n
and `<pad>` = n+1 there, in the tokenizer and in the rows of embedding and head.
Those two tokens leave the tokenizer; their rows go where they disturb nobody
and are found again: row n to row R, R being how many rows the source has, and
later rows stay, in what is padding for us. A tokenizer that has `<voco>` among
its text tokens is taken as it is.
"""

import dataclasses
import json
import pathlib
import tempfile
from collections.abc import Set
from typing import Any

import transformers

from vocojax.core import files
from vocojax.data.tokenizer import VOCO_TOKEN, load_tokenizer
from vocojax.errors import DataError, WeightsError, shorten
from vocojax.weights.leaves import Move

IMAGE_TOKEN, PAD_TOKEN = "<image>", "<pad>"
_BYTES = 2**27  # of a file; those of large vocabularies have tens of MB
_FILES = ("tokenizer*", "added_tokens.json", "special_tokens_map.json")


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
  """The vocabulary of a source as ours.

  Attributes:
    tokenizer: ours, `<voco>` included.
    num_rows: rows of the source's embedding, R.
    source_voco: which of them is that of `<voco>`, if any.
    voco_is_guessed: whether no token says so.
  """

  tokenizer: transformers.PreTrainedTokenizerFast
  num_rows: int
  source_voco: int | None
  voco_is_guessed: bool = False

  @property
  def size(self) -> int:
    return len(self.tokenizer)

  @property
  def voco_id(self) -> int:
    return self.tokenizer.get_vocab()[VOCO_TOKEN]

  @property
  def moves(self) -> tuple[Move, ...]:
    """Where the rows of the source go."""
    R, v = self.num_rows, self.voco_id
    if v + 1 < self.size:  # among the text tokens
      return (Move(0, 0, R),)
    moves = [Move(0, 0, v)]
    if R > v + 1:
      moves.append(Move(v + 1, v + 1, R - v - 1))
    if self.source_voco is not None:
      moves.append(Move(v, self.source_voco, 1))
    if R > v and self.source_voco != v:
      moves.append(Move(R, v, 1))
    return tuple(moves)

  def multiple(self, preferred: int) -> int:
    """What to pad to so that all rows have a place."""
    needed = max(self.size, *(m.target + m.count for m in self.moves))
    while -(-self.size // preferred) * preferred < needed:
      preferred *= 2
    return preferred


def read(
  folder: pathlib.Path,
  num_rows: int,
  where: str,
  image_token_id: int | None = None,
  last_row_is_voco: bool = False,
) -> Vocabulary:
  """The vocabulary of a model folder.

  Args:
    folder: holds the tokenizer.
    num_rows: of its embedding.
    where: names the embedding in errors.
    image_token_id: llava-hf's `<image>`; None in other layouts.
    last_row_is_voco: whether one row more than there are tokens is that of
      `<voco>`, the tokenizer being from before it was added.

  Raises:
    WeightsError: embedding and tokenizer do not fit, or the tokenizer cannot
      be read.
  """
  tokenizer = _load_apart(folder)
  has_voco = any(
    f'"{VOCO_TOKEN}"' in files.read_text(path, WeightsError, _BYTES)
    for path in _tokenizer_files(folder)
    if path.suffix == ".json"
  )
  vocabulary = tokenizer.get_vocab()
  tokens = {i: token for token, i in vocabulary.items()}
  if len(tokens) != max(tokens) + 1:
    raise WeightsError(
      f"{folder}: tokenizer",
      f"{len(tokens)} tokens with ids up to {max(tokens)}",
      "ids without gaps",
      "use the tokenizer that the model was trained with",
    )
  drop = {VOCO_TOKEN}
  if image_token_id is not None:
    drop |= {PAD_TOKEN, tokens.get(image_token_id, "")}
  n = len(tokens)
  while tokens[n - 1] in drop:
    n -= 1
  if image_token_id is not None and image_token_id < n:
    token = shorten(tokens[image_token_id])
    raise WeightsError(
      f"{folder}: image_token_index",
      f"{image_token_id}, the id of the token {token}",
      f"one above {n - 1}, the last of the text tokens",
      "use config.json and tokenizer of the same model",
    )
  voco = vocabulary[VOCO_TOKEN]
  source_voco = voco if has_voco else None
  guessed = last_row_is_voco and not has_voco and num_rows == n + 1
  if guessed:
    source_voco = n
  expected = max(n, -1 if source_voco is None else source_voco + 1)
  if num_rows < expected:
    raise WeightsError(
      f"{folder}: tokenizer",
      f"{expected} tokens",
      f"at most {num_rows}, the rows of {where}",
      "use the tokenizer that the model was trained with",
    )
  dropped = {tokens[i] for i in range(n, len(tokens))}
  return Vocabulary(without(tokenizer, dropped), num_rows, source_voco, guessed)


def _tokenizer_files(folder: pathlib.Path) -> list[pathlib.Path]:
  return [p for name in _FILES for p in folder.glob(name) if not p.is_dir()]


def _load_apart(folder: pathlib.Path) -> transformers.PreTrainedTokenizerFast:
  """Loads a tokenizer without the config.json beside it.

  transformers reads that, too, and stumbles over models that it does not know,
  such as LLaVA's own.
  """
  with tempfile.TemporaryDirectory() as temporary:
    for path in _tokenizer_files(folder):
      content = files.read_bytes(path, WeightsError, _BYTES)
      if path.suffix == ".json":
        text = files.decode(content, path, WeightsError)
        files.parse_json(text, path, dict, WeightsError)
        content = text.encode()  # without a byte-order mark
      pathlib.Path(temporary, path.name).write_bytes(content)
    try:
      return load_tokenizer(temporary)
    except DataError as e:
      raise WeightsError(
        f"{folder}: tokenizer",
        e.got,
        e.expected,
        "copy the tokenizer's files of the model into this folder",
      ) from e


def without(
  tokenizer: transformers.PreTrainedTokenizerFast, tokens: Set[str]
) -> transformers.PreTrainedTokenizerFast:
  """The tokenizer without its last tokens, and then with `<voco>`."""
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(temporary)
    strip_files(tokenizer, tokens, folder)
    return load_tokenizer(folder)


def strip_files(
  tokenizer: transformers.PreTrainedTokenizerFast,
  tokens: Set[str],
  folder: pathlib.Path,
) -> None:
  """Writes the files of the tokenizer without its last tokens."""
  tokenizer.save_pretrained(folder)
  for path in folder.glob("*.json"):
    kept = _strip(json.loads(path.read_text()), tokens)
    path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n")


def _strip(values: Any, tokens: Set[str]) -> Any:
  """JSON without entries that are one of the tokens."""

  def is_token(key, value):
    content = value.get("content") if isinstance(value, dict) else value
    return key in tokens or (isinstance(content, str) and content in tokens)

  if isinstance(values, dict):
    return {
      k: _strip(v, tokens) for k, v in values.items() if not is_token(k, v)
    }
  if isinstance(values, list):
    return [_strip(v, tokens) for v in values if not is_token("", v)]
  return values
