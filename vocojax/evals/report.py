"""Writes report.md and its pictures from the files of a workdir.

Nothing is computed by a model here: all numbers come from files that training
and evaluation left, so a report can be written again at any time. Read next:
plots.py for the pictures, retention.py for the percentage.
"""

import collections
import dataclasses
import datetime
import json
import pathlib
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

from vocojax.config import Config
from vocojax.errors import UserError
from vocojax.evals import markdown, plots
from vocojax.evals.retention import retention

MAX_SAMPLES = 12  # panels of the grid of answers
MAX_WRONG = 4  # of these, wrong answers, where there are any
MAX_ATTENTION = 4  # images of the attention picture
BYTES = {"float32": 4, "bfloat16": 2}
# Keys that the files must have, as the report uses them.
_METRICS = (
  "step loss token_accuracy answer_accuracy images_per_second bad_records time"
)
_RESULT = (
  "title phase step checkpoint split accuracy correct total seconds "
  "by_category provenance"
)
_PREDICTION = "record_id question answer prediction category"


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
  evaluation/full.json or lower.json, what needs them is left out.

  Raises:
    UserError: a file is missing, cannot be read or contradicts another.
  """
  evaluation = workdir / "evaluation"
  results = {
    name: _read_result(evaluation / f"{name}.json")
    for name in ("lower", "voco", "full")
    if name == "voco" or (evaluation / f"{name}.json").exists()
  }
  voco = results["voco"]
  predictions = _read_predictions(evaluation / "voco.predictions.jsonl", voco)
  attention = _read_attention(evaluation / "attention.npz")
  config_file = workdir / voco["phase"] / "config.json"
  config_text = _read_text(config_file)
  _parse(config_file, config_text, ())
  config = Config.from_json(config_text, str(config_file))
  metrics = _read_phases(workdir, voco["phase"])

  pictures = workdir / "report"
  try:
    pictures.mkdir(exist_ok=True)
  except OSError as e:
    raise UserError(f"{pictures}: cannot be made ({e}); free the path") from e
  plots.curves(metrics, pictures / "curves.png")
  samples = choose_samples(predictions, attention.record_ids)
  if not samples:
    raise _broken(
      evaluation / "attention.npz", "no prediction is about its records"
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
  path.write_text("\n\n".join(sections) + "\n")
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
    f"an image.\n\n"
    f"- {patches} patches -> {k} {tokens}: {patches / k:g} times fewer.\n"
    f"- The cache of an image, keys and values of every layer, is {kept:,} "
    f"bytes ({config.model.dtype}); of all its patches it would be {whole:,}: "
    f"{100 * (1 - kept / whole):.1f} % saved."
  )


def _scores(results, path: pathlib.Path) -> str:
  roles = {
    "lower": "lower: weights of full, used as voco",
    "voco": "voco: text sees VoCo tokens only",
    "full": "full: text sees every patch",
  }
  colors = {"lower": plots.GREY, "voco": plots.ORANGE, "full": plots.BLUE}
  kept, note = None, ""
  missing = [name for name in ("lower", "full") if name not in results]
  if missing:
    files = " and ".join(f"evaluation/{name}.json" for name in missing)
    note = (
      f"No retention: {files} not found. Evaluate the bounds "
      "(`config.evaluation.bounds`) to have it."
    )
  else:
    lower, voco, full = (
      results[name]["accuracy"] for name in ("lower", "voco", "full")
    )
    if full > lower:
      kept = retention(voco, lower, full)
      note = (
        "Retention is (voco - lower) / (full - lower): the part of what seeing "
        "every patch is worth that survives compression."
      )
    else:
      note = (
        f"No retention: the upper bound ({_percent(full)}) is not above the "
        f"lower bound ({_percent(lower)}); the full phase needs more training."
      )
  plots.score_bars(
    [(roles[name], r["accuracy"], colors[name]) for name, r in results.items()],
    kept,
    path,
  )
  rows = [
    (roles[name], r["correct"], r["total"], _percent(r["accuracy"]))
    for name, r in results.items()
  ]
  if kept is not None:
    rows.append(("**retention**", "", "", f"**{kept:.1f} %**"))
  table = markdown.table(("model", "right", "questions", "accuracy"), rows)
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
  rows = []
  for name, lines in metrics.items():
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
    "![curves](report/curves.png)"
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
  for path in {*workdir.glob("*/metrics.jsonl"), _metrics(workdir, needed)}:
    lines = _read_lines(path, _METRICS.split())
    if not lines:
      raise _broken(path, "it is empty")
    # A resumed run may log a step twice; the later line is the one that
    # counts.
    by_step = {line["step"]: line for line in lines}
    phases[path.parent.name] = [by_step[step] for step in sorted(by_step)]
  return dict(sorted(phases.items(), key=lambda item: item[1][0]["time"]))


def _metrics(workdir: pathlib.Path, phase: str) -> pathlib.Path:
  return workdir / phase / "metrics.jsonl"


def _read_result(path: pathlib.Path) -> dict[str, Any]:
  result = _parse(path, _read_text(path), _RESULT.split())
  if not result["total"]:
    raise _broken(path, "it holds no question")
  return result


def _read_predictions(path: pathlib.Path, result) -> list[dict[str, Any]]:
  predictions = _read_lines(path, _PREDICTION.split())
  found = sum(map(is_correct, predictions)), len(predictions)
  if found != (result["correct"], result["total"]):
    raise _broken(
      path,
      f"it has {found[0]} right of {found[1]}, voco.json has "
      f"{result['correct']} of {result['total']}",
    )
  return predictions


def _read_attention(path: pathlib.Path) -> _Attention:
  try:
    with np.load(path, allow_pickle=False) as arrays:
      images, attention = arrays["images"], arrays["attention"]
      record_ids = [str(x) for x in arrays["record_ids"]]
  except FileNotFoundError as e:
    raise _missing(path) from e
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
    raise _broken(path, str(e)) from e
  lengths = {len(images), len(attention), len(record_ids)}
  if lengths in ({0}, set()) or len(lengths) > 1:
    raise _broken(path, f"its arrays have {sorted(lengths)} entries")
  if images.ndim != 4 or attention.ndim != 5:
    raise _broken(
      path, f"shapes {images.shape}, {attention.shape} are not 4-D and 5-D"
    )
  return _Attention(images, attention.astype(np.float32), record_ids)


def _read_lines(path: pathlib.Path, keys: Sequence[str]) -> list[dict]:
  lines = _read_text(path).splitlines()
  return [
    _parse(f"{path}, line {i}", line, keys) for i, line in enumerate(lines, 1)
  ]


def _parse(where, text: str, keys: Sequence[str]) -> dict[str, Any]:
  try:
    value = json.loads(text)
  except json.JSONDecodeError as e:
    raise _broken(where, f"not JSON: {e}") from e
  if not isinstance(value, dict):
    raise _broken(where, f"found {value!r:.40}, expected an object")
  missing = [key for key in keys if key not in value]
  if missing:
    raise _broken(where, f"without {', '.join(missing)}")
  return value


def _read_text(path: pathlib.Path) -> str:
  try:
    return path.read_text()
  except FileNotFoundError as e:
    raise _missing(path) from e
  except (OSError, UnicodeDecodeError) as e:
    raise _broken(path, str(e)) from e


def _missing(path) -> UserError:
  return UserError(
    f"{path}: not found, and the report needs it; run training or "
    "`python -m vocojax.evaluate` on this workdir first"
  )


def _broken(where, why: str) -> UserError:
  return UserError(
    f"{where}: cannot be used for a report ({why}); run `python -m "
    "vocojax.evaluate` on this workdir again"
  )
