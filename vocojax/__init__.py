"""vocojax: vision-language models that read an image as k VoCo tokens, in JAX.

  engine = vocojax.load("runs/a/voco")
  cache = engine.compress("cat.png")
  print(engine.ask("what color is it ?", cache))

Read next: configs/easyvqa_1tok.py, then models/masks.py.
"""

import os
import signal
import sys

__version__ = "0.1.0"


def _end_interrupted(*_) -> None:
  os.write(2, b"error: interrupted\n")
  os._exit(130)


# Of `python -m vocojax.X`, which imports this before X and all that X imports:
# until `cli.run` begins, Ctrl-C has nothing to save and no trace to show.
if (
  sys.argv[:1] == ["-m"]
  and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
  signal.signal(signal.SIGINT, _end_interrupted)

# transformers says on each start that it found no PyTorch, and needs none here.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

# Slower to import than all of the above.
from typing import TYPE_CHECKING  # noqa: E402

if TYPE_CHECKING:
  from vocojax.assemble import load as load


def __getattr__(name: str):
  """Imports JAX and the rest only when `vocojax.load` is first used."""
  if name == "load":
    from vocojax.assemble import load

    return load
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
