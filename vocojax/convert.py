r"""Turns published weights into a checkpoint, and a checkpoint into such.

  python -m vocojax.convert --source=LLAVA --out=DIR
  python -m vocojax.convert --llm=VICUNA --vision=CLIP --projector=FILE \
    --out=DIR
  python -m vocojax.convert --source=DIR --to=llava_hf --out=FOLDER

LLAVA is a folder of LLaVA's own, of VoCo-LLaMA or of llava-hf; which one is
seen from its config.json. DIR then serves as --checkpoint of evaluate and as
config.init_from. `--to` is the way out. Read next: weights/hf.py.
"""

import pathlib
import sys
from collections.abc import Sequence
from typing import cast

import transformers
from absl import flags, logging

from vocojax import cli
from vocojax.core import files
from vocojax.data import prompt
from vocojax.errors import UserError
from vocojax.weights import (
  check,
  hf,
  incomplete,
  into,
  out_of,
  plans,
  stream,
  write_out,
)
from vocojax.weights.source import Request

_SOURCE = flags.DEFINE_string(
  "source", "", "Folder of a whole model; with --to, a checkpoint."
)
_LLM = flags.DEFINE_string(
  "llm", "", "Folder of a LLaMA, when the parts of a model are apart."
)
_VISION = flags.DEFINE_string(
  "vision", "", "CLIP folder, where the model's own does not hold the tower."
)
_PROJECTOR = flags.DEFINE_string(
  "projector",
  "",
  "File of the projector; with --llm and without this, a random one.",
)
_OUT = flags.DEFINE_string("out", "", "Folder to write.")
_TO = flags.DEFINE_enum(
  "to",
  None,
  ["original", "llava_hf"],
  "Turns a checkpoint into weights as LLaVA or as llava-hf publishes them.",
)
_COMPRESSOR = flags.DEFINE_enum(
  "compressor",
  None,
  ["voco", "full"],
  "What text is to see of the image; by default 'full' for a LLaVA without "
  "<voco>, else 'voco'.",
)
_NUM_VOCO_TOKENS = flags.DEFINE_integer(
  "num_voco_tokens", 1, "k, tokens that stand for an image.", lower_bound=1
)
_LAYOUT = flags.DEFINE_enum(
  "layout",
  None,
  list(prompt.LAYOUTS),
  "Prompt layout; by default 'vicuna_v1' for a LLaVA without <voco>, else "
  "'voco_v1'.",
)
_DTYPE = flags.DEFINE_enum(
  "dtype",
  None,
  ["float32", "bfloat16", "float16"],
  "Of the written weights; by default that of the source.",
)
_SEED = flags.DEFINE_integer("seed", 0, "Of weights that the source lacks.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Prints what would be written.")
_CHECK = flags.DEFINE_bool(
  "check",
  False,
  "Afterwards compares logits of source and target; needs torch, and memory "
  "for both models in float32.",
)


def main() -> int:
  try:
    with incomplete.terminable():
      _main()
  except incomplete.Terminated as e:
    print(f"error: {e}", file=sys.stderr)
    return incomplete.STOPPED
  return 0


def _main() -> None:
  logging.set_verbosity(logging.ERROR)
  transformers.logging.set_verbosity_error()  # its guesses about config.json
  if bool(_SOURCE.value) == bool(_LLM.value):
    raise UserError(
      "--source, --llm",
      "both" if _LLM.value else "neither",
      "one: the folder of a whole model or that of a language model",
      "give one of them; --help lists all flags",
    )
  if not (_OUT.value or _DRY_RUN.value):
    raise UserError(
      "--out", "nothing", "a folder", "name one, or use --dry_run"
    )
  out = files.expand_user(_OUT.value, UserError)
  if _TO.value:
    _convert_out(out)
  else:
    _convert_in(out)


def _convert_in(out: pathlib.Path) -> None:
  plan = into.make_plan(_request())
  if _DRY_RUN.value:
    print(plans.describe_into(plan))
    return
  _prepare_check(plan.random)
  stream.write_checkpoint(plan, out)
  print(f"{out}: {plans.summary_into(plan)}")
  for note in plan.notes:
    print(note)
  if _CHECK.value:
    _check(plan, str(out))


def _convert_out(out: pathlib.Path) -> None:
  for flag in (_LLM, _VISION, _PROJECTOR, _COMPRESSOR, _LAYOUT):
    if flag.value:
      raise UserError(
        f"--{flag.name}",
        f"{flag.value!r} with --to",
        "nothing, since the checkpoint says it all",
        "leave it out",
      )
  layout = cast(hf.Layout, _TO.value)
  plan = out_of.make_plan(_SOURCE.value, layout, _DTYPE.value or "")
  if _DRY_RUN.value:
    print(plans.describe_out(plan))
    return
  _prepare_check(())
  write_out.write(plan, out)
  print(f"{out}: {plans.summary_out(plan)}")
  if _CHECK.value:
    written = into.make_plan(Request(source=str(out)))
    _check(written, _SOURCE.value)


def _prepare_check(random: Sequence[str]) -> None:
  """What would fail after the work is done."""
  if not _CHECK.value:
    return
  check.require_torch()
  if drawn := [name for name in random if name.startswith("projector")]:
    raise UserError(
      "--check",
      f"{drawn[0]}, which is drawn at random",
      "published weights to compare with",
      "name a --projector or leave --check out",
    )


def _check(plan: into.Plan, path: str) -> None:
  error = check.compare(plan, path)
  print(f"logits of source and target differ by {error:.1e} of the largest")


def _request() -> Request:
  return Request(
    source=_SOURCE.value,
    llm=_LLM.value,
    vision=_VISION.value,
    projector=_PROJECTOR.value,
    compressor=_COMPRESSOR.value or "",
    num_voco_tokens=_NUM_VOCO_TOKENS.value,
    layout=_LAYOUT.value or "",
    dtype=_DTYPE.value or "",
    seed=_SEED.value,
  )


if __name__ == "__main__":
  cli.run(main, __doc__)
