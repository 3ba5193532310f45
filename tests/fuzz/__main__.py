"""Reads damaged and hostile files with every reader of the package.

  python -m tests.fuzz --inputs 2000 --seed 0

Each input is a sound one, changed by a mutation that says what must come of it:
`read` (with the original values), `refuse` (with one of our errors) or `either`
(but nothing else: no other value, where that can be known). It is read in a
process of its own, which may take 60 s and 4 GiB. Exit status 1 if anything
else happened. A fault is printed with what replays it alone:

  python -m tests.fuzz --only images/bits:17

and its input is kept in the folder `--keep`.
"""

import argparse
import collections
import os
import pathlib
import pickle
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings

os.environ |= {"JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false"}
warnings.filterwarnings("ignore", message="os.fork")

import transformers  # noqa: E402  (after the environment)

from tests.fuzz import (  # noqa: E402
  benchmark_kinds,
  cache_kinds,
  checkpoint_kinds,
  child,
  data_kinds,
  image_kinds,
  pickle_kinds,
  weight_kinds,
)
from tests.fuzz.kinds import Kind  # noqa: E402
from vocojax.data import tokenizer  # noqa: E402

KINDS: dict[str, Kind] = (
  data_kinds.KINDS
  | image_kinds.KINDS
  | weight_kinds.KINDS
  | pickle_kinds.KINDS
  | cache_kinds.KINDS
  | benchmark_kinds.KINDS
  | checkpoint_kinds.KINDS
)
for _kind in KINDS.values():
  _kind.cases["unchanged"] = "read", lambda given: None
_DRAWS = 4  # of a mutation that differs by seed, for one of any other
_SOUND = ("read", "refused")


def plan(count: int, seed: int) -> list[tuple[str, str, int]]:
  """(kind, mutation, seed) of `count` inputs, all kinds alike often."""
  rng = random.Random(seed)
  queues = {name: [] for name in KINDS}
  result = []
  for i in range(count):
    name = list(KINDS)[i % len(KINDS)]
    if not queues[name]:
      kind = KINDS[name]
      queues[name] = [*kind.cases, *kind.drawn * (_DRAWS - 1)]
      rng.shuffle(queues[name])
    result.append((name, queues[name].pop(), seed * 10**6 + i))
  return result


def _make(folder: pathlib.Path, names: set[str]) -> None:
  """Writes the sound inputs, in a child.

  Making some of them starts JAX, after which a process cannot be forked.
  """
  if process := os.fork():
    if os.waitpid(process, 0)[1]:
      raise SystemExit("the sound inputs cannot be made")
    return
  try:
    for name in names:
      (folder / name).mkdir()
      right = KINDS[name].make(folder / name)
      (folder / f"{name}.pickle").write_bytes(pickle.dumps(right))
    os._exit(0)
  except BaseException:
    traceback.print_exc()
    os._exit(1)


def _import_all(folder: pathlib.Path) -> None:
  """What transformers imports when it is first used."""
  tokenizer.build_word_level(["a"]).save_pretrained(folder)
  tokenizer.load_tokenizer(folder)
  transformers.LlamaConfig()
  transformers.CLIPVisionConfig()


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--inputs", type=int, default=200)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--only", default="", help="KIND, KIND/MUTATION[:SEED]")
  parser.add_argument("--keep", type=pathlib.Path, help="folder for the faulty")
  options = parser.parse_args()
  inputs = plan(options.inputs, options.seed)
  if options.only:
    name, _, seed = options.only.partition(":")
    kind, _, case = name.partition("/")
    cases = [case] if case else KINDS[kind].cases
    inputs = [(kind, x, int(seed or options.seed)) for x in cases]
  keep = options.keep or pathlib.Path(tempfile.mkdtemp(prefix="fuzz-"))
  counts = collections.Counter()
  began = time.monotonic()
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(temporary)
    _import_all(folder / "imports")
    _make(folder, {kind for kind, *_ in inputs})
    for kind, case, seed in inputs:
      room = folder / "room"
      room.mkdir()
      outcome = child.run(KINDS[kind], case, seed, folder / kind, room)
      counts[kind, outcome.name] += 1
      if outcome.name not in _SOUND or options.only:
        print(
          f"{outcome.name}: {kind}/{case}:{seed} "
          f"({KINDS[kind].cases[case][0]}, {outcome.seconds:.1f} s, "
          f"{outcome.nbytes / 2**20:.0f} MiB): {outcome.text:.400}",
          flush=True,
        )
      if outcome.name not in _SOUND:
        to = keep / f"{kind}-{case}-{seed}"
        shutil.rmtree(to, ignore_errors=True)
        to.parent.mkdir(parents=True, exist_ok=True)
        (room / "input").rename(to)
      shutil.rmtree(room)
  return _report(counts, time.monotonic() - began, keep)


def _report(counts, seconds: float, keep: pathlib.Path) -> int:
  """Prints a table of kinds and outcomes; 1 if there is a fault."""
  names = (*_SOUND, *child.FAULTS)
  print(f"{'':14}" + "".join(f"{name:>10}" for name in names))
  for kind in (*sorted({kind for kind, _ in counts}), "all"):
    row = [
      sum(n for (k, x), n in counts.items() if x == name and kind in (k, "all"))
      for name in names
    ]
    print(f"{kind:14}" + "".join(f"{n:>10}" for n in row))
  faults = sum(n for (_, name), n in counts.items() if name not in _SOUND)
  print(f"{counts.total()} inputs in {seconds:.0f} s, {faults} faults")
  if faults:
    print(f"the inputs of the faults are in {keep}")
  return int(faults > 0)


if __name__ == "__main__":
  sys.exit(main())
