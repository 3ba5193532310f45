"""Writes report.md and its pictures from the files of a workdir.

Nothing is computed by a model here: all numbers come from files that training
and evaluation left, so a report can be written again at any time. Read next:
plots.py for the pictures, retention.py for the percentage.
"""

import collections
import dataclasses
import datetime
import math
import pathlib
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

from vocojax.config import Config
from vocojax.core import files, lock
from vocojax.errors import UserError, shorten
from vocojax.evals import markdown, plots
from vocojax.evals.matches import note_on_length
from vocojax.evals.retention import retention

MAX_SAMPLES = 12  # panels of the grid of answers
MAX_WRONG = 4  # of these, wrong answers, where there are any
MAX_ATTENTION = 4  # images of the attention picture
_MOST_PACKED = 10  # bytes of its arrays to a byte of a file
BYTES = {"float32": 4, "bfloat16": 2}
# Keys that the files must have, as the report uses them.
_NUMBER = (float, type(None))  # null where it is no finite number
_METRICS = {
  "step": int,
  "loss": _NUMBER,
  "token_accuracy": _NUMBER,
  "answer_accuracy": _NUMBER,
  "images_per_second": float,
  "bad_records": int,
  "time": float,
}
_VALIDATION = {
  "step": int,
  "validation_loss": _NUMBER,
  "validation_token_accuracy": _NUMBER,
  "validation_answer_accuracy": _NUMBER,
  "time": float,
}
_RESULT = {
  "title": str,
  "phase": str,
  "step": int,
  "checkpoint": str,
  "split": str,
  "accuracy": float,
  "correct": int,
  "total": int,
  "seconds": float,
  "by_category": dict,
  "provenance": dict,
}
# Not of results from before there were such matches.
_NORMALIZED = {
  "normalized_accuracy": float,
  "normalized_correct": int,
  "median_answer_words": float,
}
_COUNTS = {"correct": int, "total": int}
_PREDICTION = {
  "record_id": (str, int),
  "question": str,
  "answer": str,
  "prediction": str,
  "category": str,
}
_AGAIN = "run `python -m vocojax.evaluate` on this workdir again"


@dataclasses.dataclass(frozen=True)
class _Attention:
  """The content of attention.npz."""

  images: UInt8[np.ndarray, "n S S 3"]
  attention: Float32[np.ndarray, "n L H K N"]
  record_ids: list[str]


def write_report(workdir: pathlib.Path) -> pathlib.Path:
  """Writes WORKDIR/report.md and WORKDIR/report/*.png; returns the former.

  Needs evaluation/voco.json, voco.predictions.jsonl, attention.npz, and
  config.json and metrics.jsonl of the phase that voco.json names. Without
  bounds, which are upper.json and lower.json, what needs them is left out;
  full.json is a further row.

  Raises:
    UserError: a file is missing, cannot be read or contradicts another, or
      there is no room.
  """
  # Evaluations of one workdir may end at the same time.
  with lock.held(workdir, "report", wait_seconds=60.0):
    return _write_report(workdir)


def _write_report(workdir: pathlib.Path) -> pathlib.Path:
  evaluation = workdir / "evaluation"
  results = {
    name: _read_result(evaluation / f"{name}.json")
    for name in ("lower", "voco", "upper", "full_voco", "full")
    if name == "voco" or (evaluation / f"{name}.json").exists()
  }
  voco = results["voco"]
  predictions = _read_predictions(evaluation / "voco.predictions.jsonl", voco)
  attention = _read_attention(evaluation / "attention.npz")
  config_file = workdir / voco["phase"] / "config.json"
  saved = files.read_json(config_file, dict, UserError)
  config = Config.from_saved(saved, str(config_file))
  metrics = _read_phases(workdir, voco["phase"])

  pictures = workdir / "report"
  with files.storage(pictures):
    pictures.mkdir(exist_ok=True)
  plots.curves(metrics, pictures / "curves.png")
  samples = choose_samples(predictions, attention.record_ids)
  if not samples:
    raise UserError(
      evaluation / "attention.npz",
      "records that no prediction is about",
      "those of voco.predictions.jsonl",
      _AGAIN,
    )
  _draw_samples(samples, attention, pictures / "answers.png")
  shown = slice(MAX_ATTENTION)
  plots.attention_maps(
    attention.images[shown],
    attention.attention[shown],
    pictures / "attention.png",
  )

  sections = [
    f"# Report: {voco['title']}",
    _headline(config, voco),
    _scores(results, pictures / "scores.png"),
    _categories(results),
    _answers(samples, voco),
    _attention_section(config, len(attention.images[shown])),
    _training(metrics, results),
    _again(workdir, voco),
    _provenance(config_file.relative_to(workdir), voco),
  ]
  path = workdir / "report.md"
  files.write_atomic(path, "\n\n".join(sections) + "\n")
  return path


def cache_bytes(config: Config) -> int:
  """Bytes that keep one image for ever: keys and values of its VoCo tokens.

  2 * L * G * P numbers a token, in the dtype that the model computes in.
  """
  llm = config.model.llm
  numbers = 2 * llm.num_hidden_layers * llm.num_key_value_heads * llm.head_dim
  k = config.model.compressor.num_voco_tokens
  return numbers * BYTES[config.model.dtype] * k


def is_correct(prediction: Mapping[str, Any]) -> bool:
  """Answers are compared as strings, without white space around them."""
  return prediction["prediction"].strip() == prediction["answer"].strip()


def choose_samples(
  predictions: Sequence[Mapping[str, Any]], record_ids: Sequence[str]
) -> list[Mapping[str, Any]]:
  """Picks up to `MAX_SAMPLES` predictions about the given records.

  At most `MAX_WRONG` wrong ones come last. Images and categories seen least
  so far go first, so that the picture is varied; the choice is not random.
  """
  known = [p for p in predictions if str(p["record_id"]) in record_ids]
  used = collections.Counter()

  def choose(pool, count):
    pool, chosen = list(pool), []
    while pool and len(chosen) < count:
      best = min(
        pool, key=lambda p: (used[_image_key(p)], used[_category_key(p)])
      )
      used.update((_image_key(best), _category_key(best)))
      pool.remove(best)
      chosen.append(best)
    return chosen

  wrong = choose((p for p in known if not is_correct(p)), MAX_WRONG)
  right = filter(is_correct, known)
  return choose(right, MAX_SAMPLES - len(wrong)) + wrong


def _image_key(prediction) -> tuple[str, str]:
  return "image", str(prediction["record_id"])


def _category_key(prediction) -> tuple[str, str]:
  return "category", prediction["category"]


def _draw_samples(samples, attention: _Attention, path: pathlib.Path) -> None:
  plots.sample_grid(
    [
      plots.Sample(
        image=attention.images[attention.record_ids.index(str(p["record_id"]))],
        question=p["question"],
        answer=p["answer"],
        prediction=p["prediction"].strip(),
        correct=is_correct(p),
      )
      for p in samples
    ],
    path,
  )


def _headline(config: Config, voco) -> str:
  k = config.model.compressor.num_voco_tokens
  patches = config.model.vision.num_patches
  kept = cache_bytes(config)
  whole = kept // k * patches
  tokens = "token" if k == 1 else "tokens"
  return (
    f"**{_percent(voco['accuracy'])} of {voco['total']:,} questions answered "
    f"right** ({voco['correct']:,}), by greedy decoding from {k} VoCo {tokens} "
    f"an image.{_normalized(voco)}\n\n"
    f"- {patches} patches -> {k} {tokens}: {patches / k:g} times fewer.\n"
    f"- The cache of an image, keys and values of every layer, is {kept:,} "
    f"bytes ({config.model.dtype}); of all its patches it would be {whole:,}: "
    f"{100 * (1 - kept / whole):.1f} % saved."
  )


def _normalized(voco) -> str:
  """Matches that are not exact, and what a match means; '' where unknown."""
  if "normalized_accuracy" not in voco:
    return ""
  text = (
    " An answer is right if it is the true one to the letter; "
    f"{_percent(voco['normalized_accuracy'])} "
    f"({voco['normalized_correct']:,}) are if case, punctuation, articles and "
    "the spelling of numbers do not count, as in the VQA challenge."
  )
  note = note_on_length(voco["median_answer_words"])
  return text + (f"\n\n**{note[0].upper()}{note[1:]}.**" if note else "")


def _bounds(results) -> tuple[str, str] | None:
  """Names of lower and upper bound: one phase, read in two ways.

  The paper's, or else those of before there was `voco_causal`, when the lower
  bound of `full` was called `lower`.
  """
  for lower, upper in (
    ("lower", "upper"),
    ("full_voco", "full"),
    ("lower", "full"),
  ):
    if (
      lower in results
      and upper in results
      and results[lower]["phase"] == results[upper]["phase"]
    ):
      return lower, upper
  return None


def _scores(results, path: pathlib.Path) -> str:
  bounds = _bounds(results)
  roles = {
    "lower": "lower: weights of upper, text sees VoCo tokens only",
    "voco": "voco: text sees VoCo tokens only",
    "upper": "upper: text sees every patch and the VoCo tokens",
    "full_voco": "full_voco: weights of full, text sees VoCo tokens only",
    "full": "full: LLaVA, text sees every patch, no VoCo tokens",
  }
  if bounds == ("lower", "full"):
    roles["lower"] = roles["full_voco"].replace("full_voco:", "lower:")
  kept, note, whose = None, "", ""
  if bounds is None:
    missing = [name for name in ("lower", "upper") if name not in results]
    names = " and ".join(f"evaluation/{name}.json" for name in missing)
    note = (
      f"No retention: {names or 'bounds of one phase'} not found. Evaluate the "
      "bounds (`config.evaluation.bounds`) to have it."
    )
  else:
    low, voco, high = (
      results[name]["accuracy"] for name in (bounds[0], "voco", bounds[1])
    )
    if high > low:
      kept = retention(voco, low, high)
      note = (
        f"Retention is (voco - {bounds[0]}) / ({bounds[1]} - {bounds[0]}): the "
        "part of what seeing every patch is worth that survives compression."
      )
    else:
      note = (
        f"No retention: the upper bound ({_percent(high)}) is not above the "
        f"lower bound ({_percent(low)}); its phase needs more training."
      )
    if bounds[1] == "full":
      whose = " (bounds: full)"
      note += (
        " These bounds are not the paper's: its upper bound is a phase of "
        "compressor `voco_causal`, and its lower bound the same weights read "
        "as `voco`."
      )
  colors = {
    "lower": plots.GREY,
    "voco": plots.ORANGE,
    "upper": plots.BLUE,
    "full_voco": plots.GREY,
    "full": plots.GREEN,
  }
  plots.score_bars(
    [(roles[name], r["accuracy"], colors[name]) for name, r in results.items()],
    kept,
    path,
  )
  rows = [
    (
      roles[name],
      r["correct"],
      r["total"],
      _percent(r["accuracy"]),
      _percent(r["normalized_accuracy"]) if "normalized_accuracy" in r else "-",
    )
    for name, r in results.items()
  ]
  if kept is not None:
    rows.append((f"**retention**{whose}", "", "", f"**{kept:.1f} %**", ""))
  table = markdown.table(
    ("model", "right", "questions", "accuracy", "normalised"), rows
  )
  return f"## Scores\n\n{table}\n\n{note}\n\n![scores](report/{path.name})"


def _categories(results) -> str:
  rows = []
  for category in results["voco"]["by_category"]:
    counts = [r["by_category"].get(category) for r in results.values()]
    total = results["voco"]["by_category"][category]["total"]
    scores = [
      _percent(c["correct"] / c["total"]) if c and c["total"] else "-"
      for c in counts
    ]
    rows.append((category, total, *scores))
  table = markdown.table(("category", "questions", *results), rows)
  return f"## By category\n\n{table}"


def _answers(samples, voco) -> str:
  wrong = sum(not is_correct(p) for p in samples)
  all_wrong = voco["total"] - voco["correct"]
  text = (
    f"{len(samples)} questions about test images; the answer below each is "
    "what the model generated: green and ticked if right, red and crossed "
    "with the truth under it if wrong. "
  )
  if wrong:
    text += (
      f"The last {wrong} are wrong, picked on purpose: over all questions "
      f"{all_wrong:,} of {voco['total']:,} are."
    )
  elif all_wrong:
    text += (
      f"None of these images has a wrong answer; over all questions "
      f"{all_wrong:,} of {voco['total']:,} are wrong."
    )
  else:
    text += "No question of the test was answered wrong."
  return f"## Answers\n\n{text}\n\n![answers](report/answers.png)"


def _attention_section(config: Config, count: int) -> str:
  which = "the VoCo token"
  if config.model.compressor.num_voco_tokens > 1:
    which = "the first VoCo token"
  return (
    "## Where the VoCo token looks\n\n"
    f"Attention of {which} over the patches of {count} images, mean over "
    "heads, by layer. Red is much; each panel has its own scale. The "
    "percentage is the share of attention that goes to patches, the rest "
    "goes to BOS, separators and VoCo tokens.\n\n"
    "![attention](report/attention.png)"
  )


def _training(metrics, results) -> str:
  rows, validated = [], []
  for name, all_lines in metrics.items():
    lines = [x for x in all_lines if "loss" in x]
    held_out = [x for x in all_lines if "validation_loss" in x]
    if held_out:
      best = min(held_out, key=_validation_loss)
      for which, x in (("best", best), ("last", held_out[-1])):
        right = _percent(x["validation_answer_accuracy"])
        loss = f"{x['validation_loss']:.4f}"
        validated.append((f"{name}, {which}", x["step"], loss, right))
    first, last = lines[0], lines[-1]
    speed = float(np.median([x["images_per_second"] for x in lines]))
    rows.append(
      (
        name,
        last["step"],
        _duration(last["time"] - first["time"]),
        f"{speed:,.0f}",
        f"{last['loss']:.4f}",
        _percent(last["answer_accuracy"]),
        last["bad_records"],
      )
    )
  header = (
    "phase",
    "steps",
    "time",
    "images/s",
    "last loss",
    "last answer accuracy",
    "bad records",
  )
  seconds = [
    (name, _duration(r["seconds"]), f"{r['total'] / r['seconds']:,.0f}")
    for name, r in results.items()
    if r["seconds"] > 0
  ]
  return (
    f"## Training and time\n\n{markdown.table(header, rows)}\n\n"
    "Time is from the first to the last logged step, pauses of a resumed run "
    "included; images/s is the median. Evaluation:\n\n"
    f"{markdown.table(('model', 'time', 'questions/s'), seconds)}\n\n"
    f"{_validations(validated)}![curves](report/curves.png)"
  )


def _validation_loss(line) -> float:
  loss = line["validation_loss"]
  return loss if math.isfinite(loss) else math.inf


def _validations(rows) -> str:
  if not rows:
    return ""
  header = ("phase", "step", "validation loss", "validation answer accuracy")
  return (
    "On held-out records, where the model predicts each token of a true "
    "answer from those before it; the checkpoint of the best is PHASE/best:\n\n"
    f"{markdown.table(header, rows)}\n\n"
  )


def _again(workdir: pathlib.Path, voco) -> str:
  command = voco["provenance"].get(
    "command", f"python -m vocojax.train --config=CONFIG --workdir={workdir}"
  )
  return (
    "## Run it again\n\n"
    f"```bash\n{command}\n"
    f"python -m vocojax.evaluate --checkpoint={workdir / voco['phase']}\n"
    "```\n\n"
    "The first goes on where it stopped if its workdir has checkpoints; name "
    "a new workdir to start afresh. The second evaluates the last checkpoint "
    "and writes this report."
  )


def _provenance(config_file: pathlib.Path, voco) -> str:
  rows = [
    ("checkpoint", f"{voco['checkpoint']} (step {voco['step']})"),
    ("config", config_file),
    ("split", voco["split"]),
  ]
  for key, value in voco["provenance"].items():
    if isinstance(value, Mapping):
      value = ", ".join(f"{k} {v}" for k, v in value.items())
    rows.append((key, value))
  now = datetime.datetime.now(datetime.UTC)
  rows.append(("report written", f"{now:%Y-%m-%d %H:%M} UTC"))
  return f"## Provenance\n\n{markdown.table(('what', 'which'), rows)}"


def _percent(fraction: float) -> str:
  return f"{100 * fraction:.2f} %"


def _duration(seconds: float) -> str:
  minutes, rest = divmod(round(seconds), 60)
  return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _read_phases(workdir: pathlib.Path, needed: str) -> dict[str, list[dict]]:
  """Metrics of every phase that has some, in the order they were run."""
  phases = {}
  needed_file = workdir / needed / "metrics.jsonl"
  for path in {*workdir.glob("*/metrics.jsonl"), needed_file}:
    lines = _read_lines(path, _METRICS, _VALIDATION)
    if not any("loss" in line for line in lines):
      raise UserError(path, "nothing in it", "a line for each step", _AGAIN)
    # A resumed run may log a step twice; the later line is the one that
    # counts.
    by_step = {
      (line["step"], "loss" in line): {
        k: math.nan if v is None else v for k, v in line.items()
      }
      for line in lines
    }
    phases[path.parent.name] = [by_step[step] for step in sorted(by_step)]
  return dict(sorted(phases.items(), key=lambda item: item[1][0]["time"]))


def _read_result(path: pathlib.Path) -> dict[str, Any]:
  with files.remedy(_AGAIN):
    result = files.read_json(path, dict, UserError)
    files.check_fields(result, path, _RESULT, UserError)
    if "normalized_accuracy" in result:
      files.check_fields(result, path, _NORMALIZED, UserError)
    if result["total"] <= 0:
      raise UserError(f"{path}: total", str(result["total"]), "questions")
    # It becomes a path.
    files.file_name(result["phase"], f"{path}: phase", UserError)
    for name, counts in result["by_category"].items():
      where = f"{path}: by_category: {shorten(name)}"
      files.check_fields(counts, where, _COUNTS, UserError)
  return result


def _read_predictions(path: pathlib.Path, result) -> list[dict[str, Any]]:
  predictions = _read_lines(path, _PREDICTION)
  found = sum(map(is_correct, predictions)), len(predictions)
  if found != (result["correct"], result["total"]):
    raise UserError(
      path,
      f"{found[0]} right of {found[1]}",
      f"{result['correct']} of {result['total']}, as in voco.json",
      _AGAIN,
    )
  return predictions


def _read_attention(path: pathlib.Path) -> _Attention:
  try:
    with files.open_regular(path, UserError) as file:
      with zipfile.ZipFile(file) as archive:
        unpacked = sum(x.file_size for x in archive.infolist())
      if unpacked > _MOST_PACKED * files.size_of(file):
        raise ValueError(f"{unpacked:,} bytes, packed")
      with np.load(file, allow_pickle=False) as arrays:
        images, attention = arrays["images"], arrays["attention"]
        record_ids = [str(x) for x in arrays["record_ids"]]
    shapes = f"{images.dtype} {images.shape}, {attention.dtype} "
    shapes += f"{attention.shape}, {len(record_ids)} records"
    n = len(record_ids)
    if (
      not n
      or (images.dtype, images.ndim, images.shape[-1]) != (np.uint8, 4, 3)
      or (attention.dtype.kind, attention.ndim) != ("f", 5)
      or (len(images), len(attention)) != (n, n)
      or not (images.size and attention.size)
    ):
      raise ValueError(f"arrays {shapes}")
    return _Attention(images, attention.astype(np.float32), record_ids)
  except UserError:
    raise
  # NumPy raises nearly anything on a damaged file.
  except Exception as e:
    raise UserError(
      path, str(e) or type(e).__name__, "images with attention", _AGAIN
    ) from e


def _read_lines(
  path: pathlib.Path,
  fields: Mapping[str, Any],
  validation: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
  """Lines with these fields, or those of a validation."""
  with files.remedy(_AGAIN):
    return [
      files.check_fields(
        line,
        where,
        validation if validation and "validation_loss" in line else fields,
        UserError,
      )
      for where, line in files.read_json_lines(path, dict, UserError, nan=True)
    ]
