"""launch/paper_7b.sh on tiny parts, from published files to the lower bound."""

import json
import shlex
import subprocess
import sys

import pytest

from tests import benchmark_data, runs
from tests.weights import published
from vocojax import config as config_lib
from vocojax.training import checkpoint
from vocojax.weights import out_of

STAGES = ("start", "align/full", "tune/voco", "tune/voco_causal")


def write_parts(folder):
  """A tiny Vicuna, CLIP, LLaVA's two files with their images, and GQA."""
  models, data = folder / "models", folder / "data"
  published.parts(models)
  (models / "llm").rename(models / "vicuna-7b-v1.5")
  (models / "clip").rename(models / "clip-vit-large-patch14-336")
  pairs = data / "LLaVA-Pretrain"
  for images in (pairs / "images", data / "coco"):
    images.mkdir(parents=True)
    runs.write_data(images)
  captions, chats = [], []
  for i in range(runs.NUM_RECORDS):
    turns = [f"w{i % 20 + 3} w4 <image>", f"w5 w{i % 9 + 3}"]
    record = {
      "id": f"r{i}",
      "conversations": [
        {"from": who, "value": text}
        for who, text in zip(("human", "gpt"), turns, strict=True)
      ],
    }
    captions.append(record | {"image": f"{i}.png"})
    if i % 6:
      chats.append(record | {"image": f"coco/{i}.png"})
    else:
      text = json.dumps(record).replace(" <image>", "")
      chats.append(json.loads(text))
  for path, content in (
    (pairs / "blip_laion_cc_sbu_558k.json", captions),
    (data / "llava_v1_5_mix665k.json", chats),
  ):
    path.write_text(json.dumps(content))
  benchmark_data.gqa(data / "coco", folder / "benchmarks" / "gqa", 2)


def commands(folder, *flags):
  """What the script would run."""
  shown = subprocess.run(
    [
      "bash",
      "launch/paper_7b.sh",
      f"--models={folder / 'models'}",
      f"--data={folder / 'data'}",
      f"--benchmarks={folder / 'benchmarks'}",
      f"--out={folder / 'out'}",
      "--dry-run",
      *flags,
    ],
    cwd=runs.ROOT,
    capture_output=True,
    text=True,
  )
  assert shown.returncode == 0, shown.stderr
  found = [shlex.split(line) for line in shown.stdout.splitlines()]
  assert all(words[:2] == [".venv/bin/python", "-m"] for words in found)
  return [words[2:] for words in found]


def perform(folder, command):
  process = runs.start_cached(folder, *command)
  out, err = process.communicate(timeout=600)
  assert process.returncode == 0, (command, err)
  return out


# In place of a day of 8 GPUs; the model is that of the parts.
SMALL = (
  "--config.model.dtype=float32",
  "--config.data.batch_size=8",
  "--config.data.micro_batch_size=4",
  "--config.data.max_text_length=96",
  "--config.training.steps=2",
  "--config.training.epochs=0.0",
)


@pytest.mark.slow
def test_three_stages_and_their_bounds(tmp_path):
  write_parts(tmp_path)
  convert, *rest = commands(tmp_path)
  assert convert[0] == "vocojax.convert"
  assert len(rest) == 3 + 3 + 1
  perform(tmp_path, convert)
  for command in commands(tmp_path, *SMALL):
    print(perform(tmp_path, command), end="", file=sys.stderr)
  out = tmp_path / "out"
  configs = [checkpoint.load(str(out / stage)).config for stage in STAGES[1:]]
  names = [c.model.compressor.name for c in configs]
  assert names == ["full", "voco", "voco_causal"]
  origins = [c.init_from for c in configs]
  assert origins == [str(out / "start"), *[str(out / "align" / "full")] * 2]
  for config in configs:
    assert config.training.loss_mean == "micro_batches"
    assert config.optimizer.schedule == "hf_cosine"
  scored = out / "tune" / "benchmarks" / "gqa"
  results = {
    name: json.loads((scored / name / "result.json").read_text())
    for name in ("voco", "upper", "lower")
  }
  used = {name: r["settings"] for name, r in results.items()}
  # GQA's four patches, BOS, two separators and the VoCo token.
  assert used["upper"]["tokens_per_image"] > used["lower"]["tokens_per_image"]
  assert used["lower"]["tokens_per_image"] == 1
  assert {x["dtype"] for x in used.values()} == {"float16"}
  assert results["lower"]["checkpoint"] == results["upper"]["checkpoint"]
  # The row of <voco> is trained, so it is published.
  plan = out_of.make_plan(str(out / "tune" / "voco_causal"), "original")
  assert plan.rows.voco_id == 29
  # Nothing is converted a second time.
  again = commands(tmp_path, *SMALL)
  assert [c[0] for c in again].count("vocojax.convert") == 0


@pytest.mark.parametrize(
  ("missing", "message"),
  [
    ("models/vicuna-7b-v1.5", "models/vicuna-7b-v1.5: not there; --help says"),
    ("data/llava_v1_5_mix665k.json", "mix665k.json: not there; --help says"),
  ],
)
def test_what_is_missing_is_named(tmp_path, missing, message):
  write_parts(tmp_path)
  (tmp_path / missing).rename(tmp_path / "away")
  process = subprocess.run(
    ["bash", "launch/paper_7b.sh", "--dry-run"]
    + [f"--{name}={tmp_path / name}" for name in ("models", "data")],
    cwd=runs.ROOT,
    capture_output=True,
    text=True,
  )
  assert (process.returncode, process.stdout) == (2, "")
  assert message in process.stderr and process.stderr.count("\n") == 1


def test_the_recipe_is_7b():
  """What is dry-run on tiny parts is made of these two files."""
  for name in ("align", "voco_1tok"):
    path = runs.ROOT / "configs" / f"{name}.py"
    [config] = config_lib.phases(config_lib.load_module(str(path)))
    llm = config.model.llm
    assert (llm.hidden_size, llm.num_hidden_layers) == (4096, 32)
