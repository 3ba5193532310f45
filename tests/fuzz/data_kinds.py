"""LLaVA data, ask jobs, files of answers. Read next: image_kinds.py."""

import functools
import json
import os
import pathlib
from typing import Any
from unittest.mock import ANY

import numpy as np
from PIL import Image

from tests.fuzz import documents, files
from tests.fuzz.documents import Document
from tests.fuzz.kinds import Case, Input, Kind, Parts, attempt
from vocojax import config as config_lib
from vocojax.config import default_config
from vocojax.data import pipeline, sources, tokenizer
from vocojax.evals.benchmarks import predictions
from vocojax.inference import jobs

_TURNS = [
  *("What is it ?", "a cat", "Where does the m\u00fcsli stand ?\t"),
  *("on the \u684c\u5b50", 'Say "\\u00e9" and 7 .', "7"),
]


def _entry(i: int) -> dict[str, Any]:
  """Records about one image, two, and none."""
  images = (["sub/0.png"], ["sub/0.png", "sub/1.png"], [])[i % 3]
  texts = ["<image>\n" * len(images) + _TURNS[0], *_TURNS[1 : 2 + 2 * (i % 3)]]
  roles = ("human", "gpt") * 3
  turns = zip(roles, texts, strict=False)
  entry: dict[str, Any] = {"id": f"r{i}", "model": "harmless"}
  if images:
    entry["image"] = images if len(images) > 1 else images[0]
  entry["conversations"] = [{"from": role, "value": x} for role, x in turns]
  return entry


def _expected(entry: dict[str, Any]) -> tuple:
  """Id, images and texts; where there is no id, any will do."""
  images = entry.get("images", entry.get("image")) or []
  return (
    str(entry["id"]) if "id" in entry else ANY,
    [images] if isinstance(images, str) else images,
    [turn["value"] for turn in entry["conversations"]],
  )


def _make_data(folder: pathlib.Path, lines: bool) -> Parts:
  (folder / "images/sub").mkdir(parents=True)
  for i, name in enumerate(("images/sub/0", "images/sub/1", "secret")):
    pixels = np.random.default_rng(i).integers(0, 256, (9, 12, 3), np.uint8)
    Image.fromarray(pixels).save(folder / f"{name}.png")
  entries = [_entry(i) for i in range(6)]
  rows = [json.dumps(x, ensure_ascii=x["id"] < "r3") for x in entries]
  text = "\n".join(rows) + "\n" if lines else f"[{', '.join(rows)}]"
  (folder / "data.json").write_text(text)
  tokenizer.build_word_level(_TURNS).save_pretrained(folder / "tokenizer")
  return {str(i): _expected(entry) for i, entry in enumerate(entries)}


@functools.cache
def _settings() -> config_lib.Config:
  """A config whose rows have room for all records."""
  config = default_config()
  config.data.update(max_images=2, max_text_length=400, batch_size=1)
  config.training.steps = 1
  return config_lib.phases(config)[0]


def _read_data(folder: pathlib.Path) -> Parts:
  """Records by number; each is made a row of a batch as well."""
  images, config = folder / "images", _settings()
  source = sources.llava_json(folder / "data.json", images)
  words = tokenizer.load_tokenizer(folder / "tokenizer")
  encoder = pipeline.Encoder(words, config.prompt, config.data, 8)

  def read(i: int) -> tuple:
    record = source[i]
    row = encoder(record, np.random.default_rng(0))
    assert row["images"].any() == bool(record.images)
    texts = [text for turn in record.conversations[0] for text in turn]
    names = [os.path.relpath(path, images) for path in record.images]
    return record.id, names, texts

  return {str(i): attempt(read, i) for i in range(len(source))}


def _case(declared, edit) -> Case:
  """A change of the first record, which is about one image."""

  def mutate(given: Input) -> None:
    path = given.folder / "data.json"
    document = Document(path.read_bytes())
    record = document.tree[0]
    edit(record, given)
    if declared == "read":
      given.right["0"] = _expected(record)
    path.write_text(document.text())

  return declared, mutate


def _puts(**fields: Any):
  return lambda record, given: record.update(fields)


def _says(i: int, **turn: str):
  return lambda record, given: record["conversations"][i].update(turn)


def _blind(record, given: Input) -> None:
  record.pop("image")
  record["conversations"][0]["value"] = "What is it ?"


def _no_image(record, given: Input) -> None:
  _blind(record, given)
  record["image"] = None


def _absolute(record, given: Input) -> None:
  given.right["0"] = _expected(record)
  record["image"] = f"{given.folder}/images/sub/0.png"


def _outside(record, given: Input) -> None:
  record["image"] = f"{given.folder}/secret.png"


def _linked(record, given: Input) -> None:
  """A folder of images may be a link, as COCO's often is."""
  (given.folder / "images/sub").rename(given.folder / "elsewhere")
  (given.folder / "images/sub").symlink_to(given.folder / "elsewhere")


def _pipe(record, given: Input) -> None:
  os.mkfifo(given.folder / "images/pipe.png")
  record["image"] = "pipe.png"


_RECORDS = {
  "images_key": ("read", lambda x, _: x.update(images=[x.pop("image")])),
  "image_null": ("read", _no_image),
  "no_image": ("read", _blind),
  "no_id": ("read", lambda record, given: record.pop("id")),
  "id_0": ("read", _puts(id=0)),
  "folder_is_a_link": ("read", _linked),
  "path_in_folder": ("either", _absolute),
  "video_key": ("refuse", _puts(video="a.mp4")),
  "audio_key": ("refuse", _puts(audio="a.wav")),
  "marker_twice": ("refuse", _says(0, value="<image>\n<image>\nWhat ?")),
  "answer_first": ("refuse", _says(1, **{"from": "human"})),
  "no_turns": ("refuse", _puts(conversations=[])),
  "path_outside": ("refuse", _outside),
  "path_of_pipe": ("refuse", _pipe),
  **{
    f"role_{role}": ("refuse", _says(0, **{"from": role}))
    for role in ("user", "humn", "system", "function")
  },
  **{
    f"path_{i}": ("refuse", _puts(image=name))
    for i, name in enumerate(
      (
        *("../secret.png", "sub/../../secret.png", "/etc/passwd", "/dev/zero"),
        *("~root/x.png", "sub/0.png\0", "", "sub", "x" * 5000, "sub/9.png"),
      )
    )
  },
}


def _make_ask(folder: pathlib.Path) -> Parts:
  entries: list[dict[str, Any]] = [
    {"id": "a", "image": "x.png", "question": "Wo ist es ?"},
    {"id": 7, "image": ["x.png", "y.png"], "question": "m\u00fcsli \u684c"},
    {"turns": [["One ?", "1"], ["Two ?", None]], "temperature": 0.5},
    {"id": "b", "question": "?", "max_new_tokens": 3, "stop": ["x", "y"]},
  ]
  text = "".join(json.dumps(entry) + "\n" for entry in entries)
  (folder / "ask.jsonl").write_text(text)
  right = {}
  for number, entry in enumerate(entries, 1):
    names = entry.pop("image", [])
    names = [names] if isinstance(names, str) else names
    turns = entry.pop("turns", [[entry.pop("question", None), None]])
    turns = [tuple(turn) for turn in turns]
    right[str(entry.pop("id", number))] = names, turns, entry
  return right


def _read_ask(folder: pathlib.Path) -> Parts:
  right: Parts = {}
  for job in jobs.read(str(folder / "ask.jsonl")):
    names = [os.path.relpath(name, folder) for name in job.images]
    right[str(job.id)] = names, list(job.turns), dict(job.fields)
    if job.error:
      right[str(job.id)] = job.error
  return right


_ASKED = ("q0", "q1", "7")


def _make_answers(folder: pathlib.Path) -> Parts:
  right = {id_: f"m\u00fcsli {id_}\n" for id_ in _ASKED}
  writer = predictions.PredictionWriter(folder / "a.jsonl", "model")
  for id_, text in right.items():
    writer.add(id_, "What ?", text)
  return dict(right)


def _read_answers(folder: pathlib.Path) -> Parts:
  found = predictions.read_predictions([folder / "a.jsonl"])
  predictions.check_complete(found, _ASKED, "answers")
  return dict(found)


def _kind(make, read, name: str, **more: Case) -> Kind:
  cases = documents.cases(files.one_of(name)) | more
  return Kind(make, read, cases, documents.DRAWN)


KINDS = {
  "data_json": _kind(
    functools.partial(_make_data, lines=False),
    _read_data,
    "data.json",
    **{name: _case(*case) for name, case in _RECORDS.items()},
  ),
  "data_jsonl": _kind(
    functools.partial(_make_data, lines=True), _read_data, "data.json"
  ),
  "ask": _kind(_make_ask, _read_ask, "ask.jsonl"),
  "answers": _kind(_make_answers, _read_answers, "a.jsonl"),
}
