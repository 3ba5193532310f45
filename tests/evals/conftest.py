"""A workdir as training and evaluation leave it, with easy-VQA's images.

Answers, attention and metrics are made up; images and questions are real.
"""

import json
import math

import easy_vqa
import numpy as np
import pytest
from PIL import Image

from vocojax import config as config_lib
from vocojax.config import default_config

LAYERS, HEADS, SIDE = 3, 2, 8
WRONG = 7  # of 240 answers


def small_config(k: int, dtype: str = "float32"):
  """Two phases, 3 layers of 2 key/value heads of 16 numbers, 64 patches."""
  c = default_config()
  c.model.dtype = dtype
  c.model.llm.update(
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    hidden_size=64,
  )
  c.model.vision.update(image_size=64, patch_size=8, num_hidden_layers=2)
  c.model.compressor.num_voco_tokens = k
  c.training.steps = 100
  c.phases = ("upper", "voco")
  c.phase.upper = {"model": {"compressor": {"name": "voco_causal"}}}
  return config_lib.phases(c)


def write_jsonl(path, lines):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def category_of(question: str, answer: str) -> str:
  if answer in ("yes", "no"):
    return "yes/no"
  return "colour" if "color" in question else "shape"


def predictions(num_records: int = 40, wrong: int = WRONG):
  """240 questions of 40 images; every 34th answer is wrong."""
  questions, answers, ids = easy_vqa.get_test_questions()
  lines = []
  for question, answer, i in zip(questions, answers, ids, strict=True):
    if i < num_records and len(lines) < 240:
      lines.append(
        {
          "record_id": f"test-{i}",
          "question": question,
          "answer": answer,
          "prediction": answer,
          "category": category_of(question, answer),
        }
      )
  for n in range(wrong):
    line = lines[n * 34]
    line["prediction"] = "blue" if line["answer"] != "blue" else "no"
  return lines


def right_answers(name, lines):
  """Whether each question is answered right by a model."""
  if name == "voco":
    return [x["prediction"] == x["answer"] for x in lines]
  return [i < {"lower": 130, "upper": 239}[name] for i in range(len(lines))]


def result(name, lines):
  right = right_answers(name, lines)
  by_category = {}
  for line, is_right in zip(lines, right, strict=True):
    counts = by_category.setdefault(
      line["category"], {"correct": 0, "total": 0}
    )
    counts["total"] += 1
    counts["correct"] += is_right
  return {
    "name": name,
    "title": f"easy-VQA, {name}",
    "phase": "upper" if name != "voco" else "voco",
    "step": 100,
    "checkpoint": f"{name}/checkpoints/100",
    "split": "test",
    "accuracy": sum(right) / len(lines),
    "correct": sum(right),
    "total": len(lines),
    "seconds": 30.0,
    "by_category": by_category,
    "provenance": {
      "commit": "0123abc",
      "versions": {"jax": "0.10.2", "flax": "0.12.8"},
      "hardware": "2 CPU cores",
    },
  }


@pytest.fixture
def make_workdir(tmp_path):
  """Returns a function (k, dtype, wrong) -> workdir."""

  def make(k=1, dtype="float32", wrong=WRONG):
    upper, voco = small_config(k, dtype)
    for start, phase in ((0, upper), (1000, voco)):
      folder = tmp_path / phase.name
      write_jsonl(
        folder / "metrics.jsonl",
        (
          {
            "step": step,
            "loss": 2.5 * math.exp(-step / 30) + 0.01,
            "token_accuracy": 1 - math.exp(-step / 25) * 0.8,
            "answer_accuracy": 1 - math.exp(-step / 40) * 0.9,
            "learning_rate": 1e-3,
            "grad_norm": 1.0,
            "images_per_second": 400.0 + step % 20,
            "bad_records": 0,
            "time": 1.7e9 + start + 2 * step,
          }
          for step in range(10, 101, 5)
        ),
      )
      (folder / "config.json").write_text(phase.to_json())
    lines = predictions(wrong=wrong)
    evaluation = tmp_path / "evaluation"
    write_jsonl(evaluation / "voco.predictions.jsonl", lines)
    for name in ("lower", "voco", "upper"):
      text = json.dumps(result(name, lines))
      (evaluation / f"{name}.json").write_text(text)
    write_attention(evaluation / "attention.npz", k)
    return tmp_path

  return make


def write_attention(path, k, count=12):
  paths = easy_vqa.get_test_image_paths()
  images = np.stack(
    [np.asarray(Image.open(paths[i]).convert("RGB")) for i in range(count)]
  )
  # Attention follows what differs from the background, more so with depth.
  patch = images.shape[1] // SIDE
  tiles = images.reshape(count, SIDE, patch, SIDE, patch, 3).astype(float)
  salient = tiles.std(axis=(2, 4)).sum(-1).reshape(count, SIDE * SIDE)
  attention = np.empty((count, LAYERS, HEADS, k, SIDE * SIDE), np.float32)
  for layer in range(LAYERS):
    logits = salient * 0.03 * layer
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    attention[:, layer] = 0.3 * (layer + 1) * weights[:, None, None]
  np.savez(
    path,
    images=images,
    attention=attention,
    record_ids=np.array([f"test-{i}" for i in range(count)]),
  )
