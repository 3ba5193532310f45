r"""Evaluates a checkpoint on held-out questions, or on an official benchmark.

  python -m vocojax.evaluate --checkpoint=WORKDIR/voco
  python -m vocojax.evaluate --checkpoint=WORKDIR/voco --data=FILE --images=DIR
  python -m vocojax.evaluate --checkpoint=WORKDIR/voco --benchmark=gqa \
    --data=DIR

The first asks the held-out questions of the checkpoint's data, the second those
of another file; they write WORKDIR/evaluation/NAME.json, the answers, and the
report again. The third writes WORKDIR/benchmarks/gqa/NAME/result.json beside
the answers and the file to hand in; the same command resumes it. With
`--compressor=voco` on a `voco_causal` checkpoint (the upper bound) either gives
the lower bound. A checkpoint whose prompt layout this version lacks is refused
unless `--layout` names one; NAME then ends in it, as it does in `int8` with
`--int8`, in `m4` with `--num_voco_tokens=4`, in `adaptive` with `--adaptive`,
and in whatever of `config.evaluation` is changed so that answers may: in the
name of FILE, in `train_-100` with `--split=train[:100]`, in `adaptive_0.05`
with `--adaptive --config.evaluation.adaptive_threshold=0.05`. Read next:
evals/answers.py, evals/benchmark_answers.py.
"""

import dataclasses
import json
import os
import pathlib
from typing import Any

import jax
from absl import flags, logging

from vocojax import assemble, cli
from vocojax.core.files import expand_user, storage, to_path
from vocojax.data import prompt
from vocojax.errors import UserError
from vocojax.evals import answers, benchmark_answers
from vocojax.evals.benchmarks import registry
from vocojax.evals.benchmarks.base import Benchmark
from vocojax.evals.benchmarks.files import data_hash
from vocojax.evals.benchmarks.judge import Judge, Server
from vocojax.evals.benchmarks.result import Asked, write_result
from vocojax.evals.benchmarks.video_qa import VideoQa
from vocojax.evals.report import write_report
from vocojax.training import checkpoint, distributed

distributed.define_flags()
_CHECKPOINT = flags.DEFINE_string(
  "checkpoint",
  None,
  "Phase folder of a workdir, or one step of it.",
  required=True,
)
_COMPRESSOR = flags.DEFINE_enum(
  "compressor",
  None,
  ["voco", "full"],
  "What text sees of the image; by default what the checkpoint was trained "
  "with.",
)
_LAYOUT = flags.DEFINE_enum(
  "layout",
  None,
  list(prompt.LAYOUTS),
  "Prompt layout, on purpose another than the checkpoint was trained with.",
)
_INT8 = flags.DEFINE_bool(
  "int8",
  False,
  "Answers from 8-bit caches, as vocojax.compress --int8 stores them.",
)
_FLOAT16 = flags.DEFINE_bool(
  "float16",
  False,
  "Computes in float16, as the original is evaluated; by default in the dtype "
  "that the checkpoint was trained in. The result has the same name.",
)
_NUM_VOCO_TOKENS = flags.DEFINE_integer(
  "num_voco_tokens",
  None,
  "Answers from the first so many VoCo tokens of each image; by default all.",
)
_ADAPTIVE = flags.DEFINE_bool(
  "adaptive",
  False,
  "Answers each question from as few VoCo tokens as will do, see "
  "inference/adaptive.py; not with --benchmark.",
)
_BENCHMARK = flags.DEFINE_string(
  "benchmark",
  None,
  "Official benchmark to answer: "
  f"{', '.join((*registry.IMAGE, *registry.VIDEO))}.",
)
_DATA = flags.DEFINE_string(
  "data",
  None,
  "JSON files to ask about instead of the checkpoint's own data, separated by "
  "commas; with --benchmark the folder of its files, as README.md says.",
)
_IMAGES = flags.DEFINE_string(
  "images",
  None,
  "Folder of the images of --data; by default config.data.image_folder.",
)
_SPLIT = flags.DEFINE_string(
  "split",
  None,
  "What to ask about: 'test' is what was held out, 'train' the rest, "
  "'train[:100]' a slice. By default config.evaluation.split.",
)
# Keys of config.evaluation that may be changed, by flags of the same meaning.
_KEYS: dict[str, flags.FlagHolder] = {
  "path": _DATA,
  "image_folder": _IMAGES,
  "split": _SPLIT,
}
for _key, _flag in _KEYS.items():
  flags.DEFINE_alias(f"config.evaluation.{_key}", _flag.name)
for _key, _define, _help in (
  ("max_records", flags.DEFINE_integer, "Records to ask about; 0 is all."),
  ("max_new_tokens", flags.DEFINE_integer, "Tokens that answers are cut at."),
  ("batch_size", flags.DEFINE_integer, "Records at once: memory against time."),
  (
    "adaptive_threshold",
    flags.DEFINE_float,
    "With --adaptive: by how much the probability of an answer may change.",
  ),
):
  _KEYS[_key] = _define(
    f"config.evaluation.{_key}",
    None,
    f"{_help} By default as in the checkpoint's config.",
  )
_OUT = flags.DEFINE_string(
  "out",
  None,
  "Folder for answers and result of the benchmark; by default "
  "WORKDIR/benchmarks/BENCHMARK/NAME.",
)
_JUDGE_URL = flags.DEFINE_string(
  "judge_url",
  None,
  "Server of OpenAI's chat protocol that judges answers about videos, such as "
  "http://localhost:8000/v1; without it they are compared as strings. Its key "
  "is read from the variable JUDGE_API_KEY.",
)
_JUDGE_MODEL = flags.DEFINE_string(
  "judge_model", None, "Name of the judge at that server."
)
_JUDGE_CACHE = flags.DEFINE_string(
  "judge_cache",
  None,
  "Folder where verdicts are kept, each asked for once; by default "
  "WORKDIR/benchmarks.",
)
_JUDGE_KEY = "JUDGE_API_KEY"


def main() -> None:
  logging.set_verbosity(logging.WARNING)
  with distributed.joined():
    distributed.ignore_preemption()
    _run()


def _run() -> None:
  made_by = assemble.provenance(assemble.command_line("vocojax.evaluate"))
  loaded = checkpoint.load(_CHECKPOINT.value, _LAYOUT.value or "")
  loaded, changes = _with_keys(loaded)
  if _FLOAT16.value:
    half = dataclasses.replace(loaded.config.model, dtype="float16")
    config = dataclasses.replace(loaded.config, model=half)
    loaded = dataclasses.replace(loaded, config=config)
  workdir = loaded.path.parents[2]
  compressor = _COMPRESSOR.value or loaded.config.model.compressor.name
  if _BENCHMARK.value is not None:
    if _ADAPTIVE.value:
      raise _useless(_ADAPTIVE, "--benchmark", "leave one of them out")
    benchmark, data = _open_benchmark(_BENCHMARK.value, workdir / "benchmarks")
    _run_benchmark(loaded, benchmark, data, compressor, made_by)
    return
  for flag in (_OUT, _JUDGE_URL, _JUDGE_MODEL, _JUDGE_CACHE):
    if flag.value is not None:
      raise _useless(flag, "no --benchmark", "give both or none")
  assemble.evaluate(
    loaded,
    workdir,
    compressor,
    made_by,
    _INT8.value,
    _NUM_VOCO_TOKENS.value,
    _ADAPTIVE.value,
    changes,
  )
  if jax.process_index():
    return
  if (workdir / "evaluation" / "voco.json").exists():
    print(f"report: {write_report(workdir)}")


def _with_keys(
  loaded: checkpoint.Loaded,
) -> tuple[checkpoint.Loaded, tuple[str, ...]]:
  """The checkpoint with the keys of the flags, and what answers differ by.

  Raises:
    UserError: a key has no effect or a useless value.
  """
  given: dict[str, Any] = {
    k: f.value for k, f in _KEYS.items() if f.value is not None
  }
  if "adaptive_threshold" in given and not _ADAPTIVE.value:
    flag = _KEYS["adaptive_threshold"]
    raise _useless(flag, "no --adaptive", "give both or none")
  if _BENCHMARK.value is not None:
    given.pop("path", None)  # of the benchmark's files
    for key in given.keys() - {"batch_size"}:
      raise _useless(_KEYS[key], "--benchmark", "leave one of them out")
  config = loaded.config
  before = config.evaluation
  values: dict[str, Any] = {}
  if "path" in given:
    values.update(split="test", image_folder="", holdout=0.0)
    data = dataclasses.replace(config.data, source="llava_json", weights=())
    config = dataclasses.replace(config, data=data)
  elif given.get("split", "test").partition("[")[0] != "test":
    values.update(path="", image_folder="")
  evaluation = dataclasses.replace(before, **(values | given))
  changed = {k: v for k, v in given.items() if v != getattr(before, k)}
  words = {
    "adaptive_threshold": "{:g}",
    "path": "{}",
    "split": "{}",
    "max_records": "first {}",
    "max_new_tokens": "{} new tokens",
  }
  if "path" in changed:
    names = changed["path"].split(",")
    changed["path"] = "+".join(pathlib.PurePath(name).stem for name in names)
  labels = [words[k].format(changed[k]) for k in words if k in changed]
  config = dataclasses.replace(config, evaluation=evaluation)
  return dataclasses.replace(loaded, config=config), tuple(labels)


def _useless(flag: flags.FlagHolder, beside: str, fix: str) -> UserError:
  """What to raise for a flag that has no effect beside another."""
  return UserError(f"--{flag.name}", beside, "a flag that it works with", fix)


def _run_benchmark(
  loaded: checkpoint.Loaded,
  benchmark: Benchmark,
  data: pathlib.Path,
  compressor: str,
  made_by: dict,
) -> None:
  """Answers a benchmark, scores it and prints the result in one line.

  The engine gets room for the longest question and the longest answer that the
  benchmark's protocol allows.

  Raises:
    UserError: the checkpoint, an image, a file of answers or the judge cannot
      be used.
  """
  questions = benchmark_answers.collect(benchmark)
  name, title = assemble.result_name(
    loaded, compressor, _INT8.value, _NUM_VOCO_TOKENS.value
  )
  out = loaded.path.parents[2] / "benchmarks" / benchmark.name / name
  if _OUT.value is not None:
    out = to_path(_OUT.value)
  with storage(out):
    out.mkdir(parents=True, exist_ok=True)
  with distributed.held(out, "evaluation"):
    config, limit = loaded.config, benchmark.max_new_tokens
    longest = benchmark_answers.longest_prompt(
      questions, config, loaded.tokenizer
    )
    video = benchmark if isinstance(benchmark, VideoQa) else None
    slots = config.evaluation.batch_size * answers.SLOTS_PER_RECORD
    engine = assemble.make_engine(
      loaded,
      compressor,
      _NUM_VOCO_TOKENS.value,
      slots=slots,
      max_images=config.data.max_images if video else 1,
      max_text_length=longest + limit,
      compress_batch=config.evaluation.batch_size,
      prefill_rows=-(-slots // answers.PREFILLS),
    )
    settings: dict[str, Any] = {
      "step": loaded.step,
      "model": engine.origin.model_fingerprint,
      "name": name,
      "tokens_per_image": engine.num_image_tokens,
      "strip_newlines": config.prompt.strip_newlines,
      "dtype": config.model.dtype,
      "max_new_tokens": limit,
    }
    if video:
      settings |= {"frames_per_second": 1, "max_frames": config.data.max_images}
    stamp = settings | {
      "model": engine.origin.model_fingerprint[:16],
      "data": data_hash(benchmark.files)[:16],
      "layout": engine.origin.layout,
    }
    model_id = ", ".join(f"{key} {value}" for key, value in stamp.items())
    asker = benchmark_answers.Asker(
      engine, config, limit, _INT8.value, f"{benchmark.name}, {title}"
    )
    predictions, num_bad = asker.answer(questions, out, model_id)
    distributed.part()  # a judge may take hours
    if jax.process_index():
      return
    files = benchmark.write_submission(predictions, out)
    scores = list(benchmark.score(predictions))
    judged = video.judged if video else None
    settings["judge"] = judged
    result = write_result(
      out / "result.json",
      benchmark,
      len(questions),
      num_bad,
      scores,
      Asked(
        str(loaded.path),
        json.loads(config.to_json()),
        engine.origin.layout,
        str(data),
        settings,
        made_by,
      ),
    )
    score = "answered"
    if benchmark.headline:
      score = f"{benchmark.headline} {result['value']:.2f}"
    if video:
      title += f", at most {config.data.max_images} frames of a video"
    print(f"{benchmark.name}: {score}, {len(questions):,} questions, {title}")
    if num_bad:
      print(f"answered with nothing, for want of the image: {num_bad:,}")
    if judged and judged["without_verdict"]:
      print(f"wrong for lack of a verdict: {judged['without_verdict']:,}")
    if files:
      print(f"to hand in: {', '.join(map(str, files))}")
    print(f"result: {out / 'result.json'}")


def _open_benchmark(
  name: str, benchmarks: pathlib.Path
) -> tuple[Benchmark, pathlib.Path]:
  """The benchmark of the flags, with its judge, and the folder of its files.

  Raises:
    UserError: the flags do not go together, or name nothing that is there.
  """
  registry.check_name(name)
  data = expand_user(_DATA.value or "", UserError).absolute()
  if not _DATA.value or not data.is_dir():
    raise UserError(
      "--data",
      f"no folder {_DATA.value}" if _DATA.value else "nothing",
      f"the folder of the files of {name}",
      "name it; README.md says what is in it",
    )
  return registry.open_benchmark(name, data, _judge(benchmarks)), data


def _judge(benchmarks: pathlib.Path) -> Judge | None:
  """The judge of the flags; its verdicts are kept in `benchmarks` by default.

  Raises:
    UserError: the flags do not go together, or verdicts cannot be read.
  """
  url, model, cache = _JUDGE_URL.value, _JUDGE_MODEL.value, _JUDGE_CACHE.value
  if url is None and model is None and cache is None:
    return None
  if not url or not model:
    missing = _JUDGE_MODEL if url else _JUDGE_URL
    raise UserError(
      f"--{missing.name}",
      "nothing",
      "--judge_url and --judge_model together",
      "give both, or no judge",
    )
  if jax.process_index():
    return None  # the first one asks it
  folder = to_path(cache or benchmarks)
  server = Server(url, model, os.environ.get(_JUDGE_KEY, ""))
  return Judge(server, folder / "verdicts.jsonl")


if __name__ == "__main__":
  cli.run(main, __doc__)
