"""LLaVA data files, ask jobs and files of answers. Read next: image_kinds.py."""

import functools
import json
import os
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from configs import common
from tests.fuzz import documents, files
from tests.fuzz.documents import Document
from tests.fuzz.kinds import Case, Input, Kind, Parts, attempt
from vocojax import config as config_lib
from vocojax.data import pipeline, sources, tokenizer
from vocojax.evals.benchmarks import predictions
from vocojax.inference import jobs

_TURNS = (
  ("<image>\nWhat is it ?", "a cat"),
  ("Where does the m\u00fcsli stand ?\t", "on the \u684c\u5b50"),
  ('Say "\\u00e9" and 7 .', "7"),
)


def _entry(i: int) -> dict[str, Any]:
  """Records about one image, two, and none."""
  entry: dict[str, Any] = {"id": f"r{i}", "conversations": []}
  if i % 3 == 0:
    entry["image"] = f"sub/{i % 2}.png"
  elif i % 3 == 1:
    entry |= {"image": ["sub/0.png", "sub/1.png"], "model": "harmless"}
  marks = (1, 2, 0)[i % 3]
  for n, (question, answer) in enumerate(_TURNS[: 1 + i % 3]):
    question = question.removeprefix("<image>\n")
    if n == 0:
      question = "<image>\n" * marks + question
    entry["conversations"] += [
      {"from": "human", "value": question},
      {"from": "gpt", "value": answer},
    ]
  return entry


def _make_data(folder: pathlib.Path, lines: bool) -> Parts:
  (folder / "images/sub").mkdir(parents=True)
  for i in range(2):
    pixels = np.random.default_rng(i).integers(0, 256, (9, 12, 3), np.uint8)
    Image.fromarray(pixels).save(folder / f"images/sub/{i}.png")
    Image.fromarray(pixels).save(folder / "secret.png")
  entries = [_entry(i) for i in range(6)]
  dumped = [
    json.dumps(x, ensure_ascii=i % 2 > 0) for i, x in enumerate(entries)
  ]
  text = "\n".join(dumped) + "\n" if lines else f"[{', '.join(dumped)}]"
  (folder / "data.json").write_text(text)
  words = (text for turns in _TURNS for text in turns)
  tokenizer.build_word_level(words).save_pretrained(folder / "tokenizer")
  right: Parts = {}
  for i, entry in enumerate(entries):
    texts = [turn["value"] for turn in entry["conversations"]]
    names = entry.get("image", [])
    names = [names] if isinstance(names, str) else names
    right[str(i)] = entry["id"], names, texts
  return right


@functools.cache
def _settings() -> config_lib.Config:
  """A config whose rows have room for all records."""
  config = common.get_config()
  config.data.update(max_images=2, max_text_length=400, batch_size=1)
  config.training.steps = 1
  return config_lib.phases(config)[0]


def _read_data(folder: pathlib.Path) -> Parts:
  """Records by number; each is made a row of a batch as well."""
  images = folder / "images"
  source = sources.llava_json(folder / "data.json", images)
  words = tokenizer.load_tokenizer(folder / "tokenizer")
  config = _settings()
  encoder = pipeline.Encoder(words, config.prompt, config.data, 8)

  def read(i: int):
    record = source[i]
    row = encoder(record, np.random.default_rng(0))
    assert row["images"].any() == bool(record.images)
    texts = [text for turn in record.conversations[0] for text in turn]
    texts[0] = "<image>\n" * len(record.images) + texts[0].replace(
      "<image>\n", ""
    )
    names = [os.path.relpath(path, images) for path in record.images]
    return record.id, names, texts

  return {
    str(i): attempt(functools.partial(read, i)) for i in range(len(source))
  }


def _edit(change) -> files.Change:
  """A mutation of the first record, which is about one image."""

  def mutate(given: Input) -> None:
    document = Document(given.folder / "data.json")
    change(document.tree[0], given)
    document.write()

  return mutate


def _puts(key: str, value: Any):
  return _edit(lambda record, given: record.update({key: value}))


def _says(i: int, **turn: str):
  def change(record, given):
    record["conversations"][i].update(turn)

  return _edit(change)


def _renames_image(record, given) -> None:
  record["images"] = [record.pop("image")]


def _leaves_out(*keys: str):
  def change(record, given):
    for key in keys:
      del record[key]
    if "image" in keys:
      record["conversations"][0]["value"] = "What is it ?"
      given.right["0"] = "r0", [], ["What is it ?", "a cat"]

  return _edit(change)


def _null_image(record, given) -> None:
  record["image"] = None
  record["conversations"][0]["value"] = "What is it ?"
  given.right["0"] = "r0", [], ["What is it ?", "a cat"]


def _other_id(record, given) -> None:
  record["id"] = 0
  given.right["0"] = "0", *given.right["0"][1:]


def _without_id(record, given) -> None:
  """LLaVA needs no id; what stands for it is our own affair."""
  del record["id"]
  given.right = None


def _path(name: str):
  def change(record, given):
    record["image"] = name.replace("FOLDER", str(given.folder))

  return _edit(change)


def _inside(record, given) -> None:
  record["image"] = f"{given.folder}/images/sub/0.png"


def _linked(record, given) -> None:
  """A folder of images may be a link, as COCO's often is."""
  (given.folder / "images/sub").rename(given.folder / "elsewhere")
  (given.folder / "images/sub").symlink_to(given.folder / "elsewhere")


def _pipe(record, given) -> None:
  os.mkfifo(given.folder / "images/pipe.png")
  record["image"] = "pipe.png"


def _role(record, given) -> None:
  record["conversations"][0]["from"] = given.rng.choice(
    ("user", "humn", "system", "USER", "function")
  )


_DATA_CASES: dict[str, Case] = {
  "images_key": ("read", _edit(_renames_image)),
  "image_null": ("read", _edit(_null_image)),
  "no_image": ("read", _leaves_out("image")),
  "no_id": ("read", _edit(_without_id)),
  "id_0": ("read", _edit(_other_id)),
  "path_in_folder": ("read", _edit(_inside)),
  "folder_is_a_link": ("read", _edit(_linked)),
  "video_key": ("refuse", _puts("video", "a.mp4")),
  "audio_key": ("refuse", _puts("audio", "a.wav")),
  "role": ("refuse", _edit(_role)),
  "marker_twice": ("refuse", _says(0, value="<image>\n<image>\nWhat ?")),
  "answer_first": ("refuse", _says(1, **{"from": "human"})),
  "no_turns": ("refuse", _puts("conversations", [])),
  "path_up": ("refuse", _path("../secret.png")),
  "path_up_later": ("refuse", _path("sub/../../secret.png")),
  "path_absolute": ("refuse", _path("FOLDER/secret.png")),
  "path_of_system": ("refuse", _path("/etc/passwd")),
  "path_of_device": ("refuse", _path("/dev/zero")),
  "path_home": ("refuse", _path("~root/x.png")),
  "path_nul": ("refuse", _path("sub/0.png\0")),
  "path_empty": ("refuse", _path("")),
  "path_of_folder": ("refuse", _path("sub")),
  "path_long": ("refuse", _path("x" * 5000)),
  "path_missing": ("refuse", _path("sub/9.png")),
  "path_of_pipe": ("refuse", _edit(_pipe)),
}


def _make_ask(folder: pathlib.Path) -> Parts:
  entries = [
    {"id": "a", "image": "x.png", "question": "Wo ist es ?"},
    {"id": 7, "image": ["x.png", "y.png"], "question": "m\u00fcsli \u684c"},
    {"turns": [["One ?", "1"], ["Two ?", None]], "temperature": 0.5},
    {"id": "b", "question": "?", "max_new_tokens": 3, "stop": ["x", "y"]},
  ]
  text = "".join(json.dumps(entry) + "\n" for entry in entries)
  (folder / "ask.jsonl").write_text(text)
  right = {}
  for number, entry in enumerate(entries, 1):
    names = entry.get("image", [])
    right[str(entry.get("id", number))] = (
      [names] if isinstance(names, str) else names,
      [tuple(x) for x in entry.get("turns", [[entry.get("question"), None]])],
      {key: entry[key] for key in jobs.FIELDS if key in entry},
    )
  return right


def _read_ask(folder: pathlib.Path) -> Parts:
  return {
    str(job.id): (
      [os.path.relpath(name, folder) for name in job.images],
      list(job.turns),
      dict(job.fields),
    )
    for job in jobs.read(str(folder / "ask.jsonl"))
  }


def _make_answers(folder: pathlib.Path) -> Parts:
  right = {f"q{i}": f"m\u00fcsli {i}\n" for i in range(5)}
  with predictions.PredictionWriter(folder / "a.jsonl", "model") as writer:
    for id_, text in right.items():
      writer.add(id_, "What ?", text)
  return dict(right)


def _read_answers(folder: pathlib.Path) -> Parts:
  return dict(predictions.read_predictions([folder / "a.jsonl"]))


_DATA = files.one_of("data.json")
KINDS = {
  "data_json": Kind(
    functools.partial(_make_data, lines=False),
    _read_data,
    documents.cases(_DATA) | _DATA_CASES,
    documents.DRAWN,
  ),
  "data_jsonl": Kind(
    functools.partial(_make_data, lines=True),
    _read_data,
    documents.cases(_DATA),
    documents.DRAWN,
  ),
  "ask": Kind(
    _make_ask,
    _read_ask,
    documents.cases(files.one_of("ask.jsonl")),
    documents.DRAWN,
  ),
  "answers": Kind(
    _make_answers,
    _read_answers,
    documents.cases(files.one_of("a.jsonl")),
    documents.DRAWN,
  ),
}
