"""The paper's comparison at small scale: every method from the same start.

  python -m benchmarks.study --out=runs/study [--grids 2 3] [--seeds 0 1 2]

For each grid and seed, `full` is trained with all that learns; from there each
method goes on for as many steps on the same data with the vision tower frozen.
Runs that have a result are skipped, and one that was stopped goes on from its
checkpoint. `launch/reproduce_small.sh` installs what this needs. If there is a
GPU, the runs of all cores share it: XLA_PYTHON_CLIENT_PREALLOCATE=false leaves
room for them, and JAX_COMPILATION_CACHE_DIR=DIR lets seeds share what is
compiled. Learning rates are chosen on images that no table is of:

  for rate in 0.01 0.02 0.04; do
    python -m benchmarks.study --out=runs/rates/$rate --starts=runs/study \
      --grids 2 --seeds 0 --only upper voco_1 avgpool_1 qformer_1 \
      --config.optimizer.learning_rate=$rate \
      --config.evaluation.split=validation
  done
  python -m vocojax.report runs/rates

Read next: configs/gridvqa.py, ../vocojax/evals/tables.py that makes the tables.
"""

import argparse
import concurrent.futures
import dataclasses
import fnmatch
import itertools
import json
import os
import pathlib
import queue
import shlex
import subprocess
import sys
from collections.abc import Sequence

import tqdm

from vocojax.data import sources

_START = "start"
# Steps by cells of a side, of the start and then of a method. With a third of
# those VoCo still learns fast on 3x3.
_STEPS = {2: (800, 800), 3: (1600, 2400), 4: (1600, 2400)}
# Seconds of a step, about, on one of two busy cores of an AMD EPYC, 2026-11-25.
_SECONDS = {
  "start": 0.8,
  "voco_causal": 0.7,
  "full": 0.7,
  "voco": 0.5,
  "distill": 0.9,
  "other": 0.4,
}


@dataclasses.dataclass(frozen=True)
class Method:
  """One row of the tables.

  Attributes:
    name: of its folder.
    compressor: what text sees.
    k: tokens of an image.
    flags: further ones of vocojax.train.
    evaluations: flags of further calls of vocojax.evaluate, and the results
      that they leave.
  """

  name: str
  compressor: str
  k: int = 1
  flags: tuple[str, ...] = ()
  evaluations: tuple[tuple[tuple[str, ...], str], ...] = ()

  @property
  def result(self) -> str:
    """Name of what training leaves in the folder `evaluation`."""
    return "upper" if self.compressor == "voco_causal" else self.compressor


def _distilled(weight: str, teacher: str) -> Method:
  flags = [f"--config.training.distill_weight={weight}"]
  if teacher == "start":
    flags.append("--config.training.teacher={start}")
  name = f"voco_1_distilled_{weight}_{teacher}"
  return Method(name, "voco", 1, tuple(flags))


_TRUNCATED = tuple(
  ((f"--num_voco_tokens={m}",), f"voco_m{m}") for m in (1, 2, 4, 8)
)
METHODS = (
  Method("upper", "voco_causal", 1, (), ((("--compressor=voco",), "lower"),)),
  Method("full", "full"),
  Method("voco_1", "voco"),
  Method("avgpool_1", "avgpool"),
  Method("qformer_1", "qformer"),
  Method("blind", "blind"),
  *(Method(f"voco_{k}", "voco", k) for k in (2, 4, 8, 16)),
  Method(
    "voco_16_elastic",
    "voco",
    16,
    ("--config.model.compressor.train_num_voco_tokens=elastic",),
    (*_TRUNCATED, (("--adaptive",), "voco_adaptive")),
  ),
  *(
    _distilled(weight, teacher)
    for teacher in ("self", "start")
    for weight in ("0.5", "1.0", "2.0")
  ),
  # The tower learns on, as it does not in the paper.
  Method("voco_1_free", "voco", 1, ("--config.optimizer.freeze=()",)),
  Method("avgpool_1_free", "avgpool", 1, ("--config.optimizer.freeze=()",)),
)


@dataclasses.dataclass(frozen=True)
class Run:
  """One folder of results: a method, or the start of all, for a seed."""

  folder: pathlib.Path
  start: pathlib.Path  # folder of the run that it goes on from, or is
  grid: int
  seed: int
  method: Method | None
  flags: tuple[str, ...]  # of vocojax.train, after its own

  @property
  def name(self) -> str:
    return "/".join(self.folder.parts[-3:])

  @property
  def commands(self) -> list[tuple[list[str], pathlib.Path]]:
    """What is to be run, and the file that each leaves when it is done."""
    start = self.start / _START
    train = [
      "-m",
      "vocojax.train",
      "--config=configs/gridvqa.py",
      f"--workdir={self.folder}",
      f"--config.data.grid_size={self.grid}",
    ]
    results = self.folder / "evaluation"
    if self.method is None:
      # Not evaluated, or it would be a row `full`.
      train += [
        f"--config.phases={_START}",
        f"--config.phase.{_START}.seed={1000 + self.seed}",
        f"--config.phase.{_START}.training.steps={self.steps}",
      ]
      flags = [
        flag.replace("--config.", f"--config.phase.{_START}.", 1)
        for flag in self.flags
      ]
      # Written last by training:
      return [([*train, *flags], start / "config.json")]
    m = self.method
    train += [
      f"--config.seed={self.seed}",
      f"--config.training.steps={self.steps}",
      f"--config.init_from={start}",
      f"--config.model.compressor.name={m.compressor}",
      f"--config.model.compressor.num_voco_tokens={m.k}",
      *(flag.format(start=start) for flag in m.flags),
      *self.flags,
    ]
    checkpoint = f"--checkpoint={self.folder / m.compressor}"
    return [
      (train, results / f"{m.result}.json"),
      *(
        (["-m", "vocojax.evaluate", checkpoint, *flags], results / f"{r}.json")
        for flags, r in m.evaluations
      ),
    ]

  @property
  def steps(self) -> int:
    """Those of training, if no flag says otherwise."""
    return _STEPS[self.grid][self.method is not None]

  @property
  def done(self) -> bool:
    return all(result.is_file() for _, result in self.commands)

  @property
  def seconds(self) -> float:
    """About how long it takes."""
    kind = self.method.compressor if self.method else "start"
    if self.method and "distilled" in self.method.name:
      kind = "distill"
    kind = kind if kind in _SECONDS else "other"
    return self.steps * _SECONDS[kind]


def plan(
  out: pathlib.Path,
  grids: list[int],
  seeds: list[int],
  only: list[str],
  flags: Sequence[str] = (),
  starts: pathlib.Path | None = None,
) -> list[Run]:
  """All runs in the order in which they are best begun.

  Args:
    out: folder of their folders.
    grids: cells of a side.
    seeds: of data and weights.
    only: patterns of names of methods.
    flags: of vocojax.train for all of them.
    starts: where the starts of another study lie; None for `out`.
  """
  methods = [
    m for m in METHODS if any(fnmatch.fnmatch(m.name, x) for x in only)
  ]
  runs = []
  for grid, method, seed in itertools.product(grids, (None, *methods), seeds):
    parts = f"grid{grid}", f"seed{seed}"
    start = (starts or out).joinpath(*parts, _START)
    folder = out.joinpath(*parts, method.name) if method else start
    runs.append(Run(folder, start, grid, seed, method, tuple(flags)))
  return runs


def _cores() -> list[int]:
  """Those that this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return sorted(os.sched_getaffinity(0))
  return list(range(os.cpu_count() or 1))  # macOS, which pins nothing


def _pin(core: int) -> None:
  if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, [core])


def perform(run: Run, core: int) -> str:
  """Runs what is not done of it; says what went wrong, if anything did."""
  run.folder.mkdir(parents=True, exist_ok=True)
  with (run.folder / "log.txt").open("a") as log:
    for command, result in run.commands:
      if result.is_file():
        continue
      process = subprocess.Popen(
        [sys.executable, *command],
        stdout=log,
        stderr=log,
        # Before its first JAX call, which starts a thread for every core.
        preexec_fn=lambda: _pin(core),
      )
      if process.wait():
        return f"{run.name}: exit status {process.returncode}, see {log.name}"
      if not result.is_file():
        return f"{run.name}: left no {result.name}, see {log.name}"
  return ""


def perform_all(runs: list[Run]) -> list[str]:
  """Each run on a core of its own, when its start is there."""
  cores: queue.SimpleQueue[int] = queue.SimpleQueue()
  for core in _cores():
    cores.put(core)
  failed = []
  bar = tqdm.tqdm(
    total=round(sum(r.seconds for r in runs)), unit="s of work", smoothing=0
  )

  starts: dict[pathlib.Path, concurrent.futures.Future[str]] = {}

  def one(run: Run) -> str:
    # Begun before it, so there is a core that works on it.
    if run.method and run.start in starts and starts[run.start].result():
      return f"{run.name}: not begun, as there is no start"
    core = cores.get()
    try:
      return perform(run, core)
    finally:
      cores.put(core)

  pool = concurrent.futures.ThreadPoolExecutor(cores.qsize())
  try:
    begun = {}
    for run in runs:
      future = pool.submit(one, run)
      begun[future] = run
      if not run.method:
        starts[run.folder] = future
    for future in concurrent.futures.as_completed(begun):
      bar.update(round(begun[future].seconds))
      bar.set_postfix_str(f"last {begun[future].name}")
      if future.result():
        failed.append(future.result())
  finally:
    bar.close()
    # After Ctrl-C, which the runs get as well, none is begun any more.
    pool.shutdown(cancel_futures=True)
  return failed


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__.splitlines()[0], allow_abbrev=False
  )
  parser.add_argument("--out", type=pathlib.Path, required=True)
  parser.add_argument(
    "--starts",
    type=pathlib.Path,
    help="folder of a study whose starts are to be used",
  )
  parser.add_argument(
    "--grids", type=int, nargs="+", choices=_STEPS, default=[2, 3]
  )
  parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
  parser.add_argument(
    "--only", nargs="+", default=["*"], help="methods, such as upper 'voco_*'"
  )
  parser.add_argument("--dry_run", action="store_true", help="print commands")
  args, flags = parser.parse_known_args()
  if foreign := [flag for flag in flags if not flag.startswith("--config.")]:
    parser.error(f"{foreign[0]}: unknown; --config.KEY=VALUE is for all runs")
  out = args.out.absolute()
  starts = (args.starts or out).absolute()
  runs = plan(out, args.grids, args.seeds, args.only, flags, starts)
  if not any(run.method for run in runs):
    names = ", ".join(method.name for method in METHODS)
    parser.error(f"--only {' '.join(args.only)}: found none, expected {names}")
  left = [run for run in runs if not run.done]
  begin = [run for run in left if not run.method]
  if args.starts and begin:
    # Not made here: the flags of these runs would be those of the start.
    parser.error(f"--starts={args.starts}: {begin[0].name} is not done in it")
  cores = len(_cores())
  hours = sum(run.seconds for run in left) / cores / 3600
  print(
    f"{len(left)} of {len(runs)} runs are to be done: about {hours:.1f} h on "
    f"{cores} cores"
  )
  known = out / "flags.json"
  try:
    before = json.loads(known.read_text()) if known.is_file() else flags
  except ValueError as e:
    parser.error(f"{known}: not JSON ({e}), expected flags; remove the file")
  if before != flags:
    parser.error(
      f"{known}: the runs in {out} have the flags {before}, found {flags}; "
      "give the same, or another --out"
    )
  if args.dry_run:
    for run in left:
      for command, result in run.commands:
        if not result.is_file():
          print(shlex.join(["python", *command]))
    return 0
  out.mkdir(parents=True, exist_ok=True)
  known.write_text(json.dumps(flags))
  given = dict(flag.partition("=")[::2] for flag in flags)
  path = given.get("--config.data.path", "")
  for grid in args.grids:
    sources.grid_vqa(grid, "test", path)  # or all runs would write it at once
  try:
    failed = perform_all(left)
  except KeyboardInterrupt:
    print("interrupted: the same command goes on from there", file=sys.stderr)
    return 130
  for line in failed:
    print(f"error: {line}", file=sys.stderr)
  return 1 if failed else 0


if __name__ == "__main__":
  sys.exit(main())
