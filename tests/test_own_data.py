"""The commands of README's section on own data, run as they stand there."""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import easy_vqa
import pytest
import skimage
import sklearn
from PIL import Image

from tests import runs
from tests.weights import published

PHOTOS = {
  "astronaut.png": "astronaut",
  "brick.png": "bricks",
  "camera.png": "photographer",
  "cell.png": "cell",
  "chelsea.png": "cat",
  "coffee.png": "cup",
  "coins.png": "coins",
  "grass.png": "grass",
  "gravel.png": "gravel",
  "horse.png": "horse",
  "hubble_deep_field.jpg": "galaxies",
  "ihc.png": "tissue",
  "microaneurysms.png": "vessels",
  "moon.png": "moon",
  "motorcycle_left.png": "motorcycle",
  "page.png": "page",
  "phantom.png": "phantom",
  "retina.jpg": "eye",
  "rocket.jpg": "rocket",
  "text.png": "text",
  "china.jpg": "temple",
  "flower.jpg": "flower",
}
QUESTION = "what is this ?"


def images(folder: pathlib.Path) -> list[str]:
  """Writes 22 photos and 18 images of easy-VQA; what each shows."""
  paths = [
    pathlib.Path(skimage.__file__).parent / "data",
    pathlib.Path(sklearn.__file__).parent / "datasets" / "images",
  ]
  found = []
  for name, shown in PHOTOS.items():
    (path,) = (p / name for p in paths if (p / name).exists())
    found.append((path, shown))
  folder_of_shapes = pathlib.Path(easy_vqa.__file__).parent / "data" / "train"
  questions = json.loads((folder_of_shapes / "questions.json").read_text())
  named = {
    i: answer
    for _, answer, i in questions
    if answer in ("circle", "rectangle", "triangle")
  }
  for n, shown in list(named.items())[: 40 - len(found)]:
    found.append((folder_of_shapes / "images" / f"{n}.png", shown))
  folder.mkdir()
  for i, (path, _) in enumerate(found):
    with Image.open(path) as image:
      image.convert("RGB").resize((96, 64)).save(folder / f"{i}.jpg")
  return [shown for _, shown in found]


def record(i: int, files: list[str], *turns: str) -> dict:
  roles = ("human", "gpt") * len(turns)
  return {
    "id": f"r{i}",
    "image": files[0] if len(files) == 1 else files,
    "conversations": [
      {"from": role, "value": text}
      for role, text in zip(roles, turns, strict=False)
    ],
  }


def write_data(folder: pathlib.Path) -> None:
  """Records of one image, of three turns, of two images and of none."""
  shown = images(folder / "images")
  names = [f"{i}.jpg" for i in range(40)]
  records = [
    record(i, [name], f"<image>\n{QUESTION}", shown[i])
    for i, name in enumerate(names)
  ]
  for i in range(0, 40, 5):
    turns = [f"<image>\n{QUESTION}", shown[i], "is it a photo ?"]
    turns += ["yes" if i < len(PHOTOS) else "no", "say it again .", shown[i]]
    records.append(record(100 + i, [names[i]], *turns))
  for i in range(0, 40, 8):
    turns = ["<image> and <image> : what are they ?"]
    turns += [f"{shown[i]} and {shown[i + 1]}"]
    records.append(record(200 + i, names[i : i + 2], *turns))
  for i in range(6):
    records.append(record(300 + i, [], f"what is {i} plus 1 ?", f"{i + 1}"))
  (folder / "data.json").write_text(json.dumps(records))
  more = [json.dumps(records[i] | {"id": f"m{i}"}) + "\n" for i in range(3)]
  (folder / "more.jsonl").write_text("".join(more))


def commands() -> list[list[str]]:
  """Those of the first block of README's section, without their variables."""
  text = (runs.ROOT / "README.md").read_text()
  section = re.search(r"^## Your own data\n(.*?)^## ", text, re.M | re.S)
  assert section
  block = re.search(r"```bash\n(.*?)```", section[1], re.S)
  assert block
  lines = block[1].replace("\\\n", " ").splitlines()
  return [shlex.split(x, comments=True) for x in lines if not x.startswith("#")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Data, images and a base model, and what each command printed."""
  folder = tmp_path_factory.mktemp("own")
  write_data(folder)
  entries = json.loads((folder / "data.json").read_text())
  words = {
    w
    for e in entries
    for t in e["conversations"]
    for w in re.findall(r"\w+|[^\w\s]", t["value"])
  }
  llava = folder / "weights" / "llava"
  published.original(llava, voco=False, words=tuple(sorted(words)))
  return folder


def run(folder, arguments: list[str]) -> str:
  """What a command prints."""
  assert arguments[0] == "python"
  process = subprocess.run(
    [sys.executable, *arguments[1:]],
    cwd=folder,
    env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(runs.ROOT)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert process.returncode == 0, process.stderr
  return process.stdout


def results(workdir: pathlib.Path) -> dict[str, dict]:
  """Of each evaluation: what it found, with the records asked about."""
  found = {}
  for path in (workdir / "evaluation").glob("*.json"):
    answers = path.with_suffix(".predictions.jsonl").read_text().splitlines()
    asked = {json.loads(answer)["record_id"] for answer in answers}
    found[path.stem] = json.loads(path.read_text()) | {"records": asked}
  return found


@pytest.mark.slow
def test_readme(folder):
  """Trained, evaluated on what was held out, on the rest, and asked."""
  outs = [run(folder, arguments) for arguments in commands()]
  # From scratch: it knows by heart what it has seen.
  own = results(folder / "runs/own")
  assert set(own) == {"voco", "voco_train"}
  held_out, seen = own["voco"]["records"], own["voco_train"]["records"]
  # One image, three turns, no image; of images 6, 15 and 27.
  assert held_out == {"r6", "r15", "r115", "r27", "r302"}
  records = json.loads((folder / "data.json").read_text())
  assert seen == {x["id"] for x in records} - held_out
  assert own["voco_train"]["accuracy"] > 0.8
  assert outs[-1].splitlines()[-1] == "astronaut"
  config = json.loads((folder / "runs/own/voco/config.json").read_text())
  words = json.loads((folder / "runs/own/tokenizer/tokenizer.json").read_text())
  assert config["model"]["llm"]["vocab_size"] == len(words["model"]["vocab"])
  # From a model: all that it is comes from there.
  config = json.loads((folder / "runs/tuned/voco/config.json").read_text())
  assert config["model"]["llm"]["hidden_size"] == 16
  assert config["model"]["vision"]["image_size"] == published.IMAGE_SIZE
  tuned = results(folder / "runs/tuned")
  assert tuned["voco"]["records"] == {"r6", "r15", "r115"}
  assert tuned["voco_more_first_100"]["records"] == {f"m{i}" for i in range(3)}
