"""All benchmarks by name. Read next: gqa.py, the simplest of them."""

import os
from collections.abc import Callable

from vocojax import config as config_lib
from vocojax.errors import UserError, shorten
from vocojax.evals.benchmarks import mmbench, video_qa
from vocojax.evals.benchmarks.base import Benchmark
from vocojax.evals.benchmarks.gqa import Gqa
from vocojax.evals.benchmarks.judge import Judge
from vocojax.evals.benchmarks.mme import Mme
from vocojax.evals.benchmarks.pope import Pope
from vocojax.evals.benchmarks.scienceqa import ScienceQa
from vocojax.evals.benchmarks.seed import SeedBench
from vocojax.evals.benchmarks.vqav2 import Vqav2, Vqav2Val

IMAGE: dict[str, Callable[[str | os.PathLike], Benchmark]] = {
  "gqa": Gqa,
  "vqav2": Vqav2,
  "vqav2_val": Vqav2Val,
  "pope": Pope,
  "mme": Mme,
  "mmbench": mmbench.english,
  "mmbench_cn": mmbench.chinese,
  "seed": SeedBench,
  "scienceqa": ScienceQa,
}
VIDEO: dict[str, Callable[[str | os.PathLike, Judge | None], Benchmark]] = {
  "msvd_qa": video_qa.msvd,
  "msrvtt_qa": video_qa.msrvtt,
  "activitynet_qa": video_qa.activitynet,
}


def check_name(name: str) -> None:
  """Whether there is a benchmark of this name.

  Raises:
    UserError: there is none.
  """
  names = (*IMAGE, *VIDEO)
  if name not in names:
    near = config_lib.nearest(name, names)
    raise UserError(
      "--benchmark",
      shorten(name),
      f"one of {', '.join(names)}",
      f"write {near}" if near else "name one of them",
    )


def open_benchmark(
  name: str, folder: str | os.PathLike, judge: Judge | None = None
) -> Benchmark:
  """Opens a benchmark whose official files are in `folder`.

  Args:
    name: key of IMAGE or VIDEO.
    folder: what `--data` says; each class documents its layout.
    judge: for benchmarks of videos.

  Raises:
    UserError: there is no such benchmark, or it takes no judge.
    DataError: a file is missing or is not what it should be.
  """
  check_name(name)
  if name in VIDEO:
    return VIDEO[name](folder, judge)
  if judge:
    raise UserError(
      f"--benchmark={name}",
      "a judge",
      "none, since its rule compares strings",
      "leave --judge_url, --judge_model and --judge_cache out",
    )
  return IMAGE[name](folder)
