"""What a phase starts from, or is taught by. Read next: `loop.py`."""

import dataclasses
import functools
from collections.abc import Callable

import transformers

from vocojax.config import Config, ModelConfig
from vocojax.training import checkpoint, state


@dataclasses.dataclass(frozen=True)
class Start:
  """Weights, and what they were trained with.

  Attributes:
    path: names them in errors.
    config: of their model.
    tokenizer: theirs.
    missing: given shapes of parameters and the model that wants them, the paths
      of those that there are not; reads no array.
    load: given shapes, dtypes and shardings of parameters and the model that
      wants them, those that there are, and the paths of those that are not.
  """

  path: str
  config: Config
  tokenizer: transformers.PreTrainedTokenizerFast
  missing: Callable[[state.Params, ModelConfig], list[str]] = dataclasses.field(
    repr=False
  )
  load: Callable[
    [state.Params, ModelConfig], tuple[state.Params, list[str]]
  ] = dataclasses.field(repr=False)


def from_checkpoint(path: str, layout: str = "") -> Start:
  """A checkpoint of this package; the arguments are `checkpoint.load`'s.

  Raises:
    CheckpointError: there is none, or it cannot be read.
  """
  loaded = checkpoint.load(path, layout)

  return Start(
    path,
    loaded.config,
    loaded.tokenizer,
    functools.partial(checkpoint.missing_params, path),
    functools.partial(checkpoint.load_params, path),
  )
