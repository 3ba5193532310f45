"""Sources: random access to records. Read next: pipeline.py.

A record is some images and the conversations about them. Sources of records are
`easy_vqa` and `grid_vqa` (TFDS data sets) and `llava_json` (a LLaVA-format JSON
file beside a folder of images). Opening a source checks files and folders;
what is wrong with one record is raised when that record is read, so that a
long run can skip it.
"""

import dataclasses
import functools
import json
import os
import pathlib
import re
from typing import Protocol, runtime_checkable

import numpy as np
from absl import logging
from jaxtyping import Int64

from vocojax.config import DataConfig
from vocojax.errors import DataError

Turn = tuple[str, str]  # question, answer

_LLAVA_REMEDY = (
  "llava_v1_5_mix665k.json is in the data set liuhaotian/LLaVA-Instruct-150K "
  "on the Hugging Face hub"
)
_IMAGES_REMEDY = (
  "the images of llava_v1_5_mix665k.json belong in coco/train2017, "
  "gqa/images, ocr_vqa/images, textvqa/train_images, vg/VG_100K and "
  "vg/VG_100K_2 under one folder; the README of "
  "https://github.com/haotian-liu/LLaVA says where to download each"
)


@dataclasses.dataclass(frozen=True)
class Record:
  """Images and the conversations about them.

  Attributes:
    id: names the record in errors and results.
    images: encoded image files: their bytes, or their paths.
    conversations: each sees the images, none sees another.
  """

  id: str
  images: tuple[bytes | pathlib.Path, ...]
  conversations: tuple[tuple[Turn, ...], ...]


@runtime_checkable
class Source(Protocol):
  """Random access to records; must survive pickling."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Record:
    """Raises DataError if the record is bad."""
    ...


def make_source(data: DataConfig, split: str) -> Source:
  """Opens the source that `config.data` names, at `split`.

  A split may be sliced: 'train[:1000]', 'train[90%:]'.

  Raises:
    DataError: a file or folder is missing, or the split is unknown or empty.
  """
  if data.source == "easy_vqa":
    return easy_vqa(split, data.path)
  if data.source == "grid_vqa":
    return grid_vqa(data.grid_size, split, data.path)
  return llava_json(data.path, data.image_folder, split)


def easy_vqa(split: str, data_dir: str | os.PathLike = "") -> Source:
  """One record per image of easy-VQA, with ids like 'test/17'.

  The ArrayRecord files are written on first use, from the `easy-vqa` package.

  Args:
    split: 'train' or 'test', or a slice of one.
    data_dir: TFDS folder; '' is TFDS' own default.

  Raises:
    DataError: the package is missing, the folder cannot be written, or the
      split is unknown or empty.
  """
  # Slow to import, and only TFDS sources need it.
  from vocojax.data.tfds.easy_vqa import EasyVqa

  return _tfds("easy_vqa", EasyVqa, split, data_dir)


def grid_vqa(
  grid_size: int, split: str, data_dir: str | os.PathLike = ""
) -> Source:
  """One record per image of GridVQA, with ids like 'test/17'.

  The ArrayRecord files are generated on first use.

  Args:
    grid_size: cells a side, 2 to 4.
    split: 'train', 'validation' or 'test', or a slice of one.
    data_dir: TFDS folder; '' is TFDS' own default.

  Raises:
    DataError: the folder cannot be written, or the split is unknown or empty.
  """
  from vocojax.data.tfds.grid_vqa import GridVqa

  variant = {"config": f"{grid_size}x{grid_size}"}
  return _tfds("grid_vqa", GridVqa, split, data_dir, **variant)


def _tfds(
  name: str, builder_class, split: str, data_dir: str | os.PathLike, **variant
) -> Source:
  """A split of a TFDS data set, which is written if it is not there."""
  import tensorflow_datasets as tfds

  folder = os.path.expanduser(data_dir) or None
  try:
    builder = builder_class(
      data_dir=folder, file_format="array_record", **variant
    )
    if not builder.info.splits:
      tfds.disable_progress_bar()
      logging.info("Writing %s to %s", name, builder.data_dir)
      builder.download_and_prepare()
  except OSError as e:
    raise DataError(
      f"{name}: cannot use the folder {folder or '~/tensorflow_datasets'} "
      f"({e}); set config.data.path to a folder that can be written"
    ) from e
  try:
    count = builder.info.splits[split].num_examples
  except (KeyError, ValueError) as e:
    names = ", ".join(map(repr, builder.info.splits))
    raise DataError(
      f"{name}: no split {split!r}; use {names} or a slice of one, such as "
      "'train[:100]'"
    ) from e
  if not count:
    raise DataError(_empty(name, split))
  rows = builder.as_data_source(
    split=split, decoders={"image": tfds.decode.SkipDecoding()}
  )
  return _TfdsSource(rows, split.partition("[")[0])


class _TfdsSource:
  def __init__(self, rows, name: str):
    self._rows = rows
    self._name = name

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: int) -> Record:
    row = self._rows[index]
    turns = zip(
      row["questions"]["question"], row["questions"]["answer"], strict=True
    )
    return Record(
      id=f"{self._name}/{row['image_id']}",
      images=(row["image"],),
      conversations=tuple(((q.decode(), a.decode()),) for q, a in turns),
    )


def llava_json(
  path: str | os.PathLike,
  image_folder: str | os.PathLike,
  split: str = "train",
) -> Source:
  """One record per entry of a LLaVA-format JSON file.

  The file is a list of objects: "id", "image" (a path or a list of paths
  relative to `image_folder`; none for text only) and "conversations", a list
  of {"from": "human" or "gpt", "value": text} in turn. A first turn that is
  not human is dropped. The file has one split, 'train'.

  Raises:
    DataError: the file or folder is missing, the file is not such a list, or
      the split is unknown or empty. A bad entry raises when it is read.
  """
  if not str(path):
    raise DataError(
      "config.data.path: empty, expected the path of a LLaVA-format JSON "
      f"file; {_LLAVA_REMEDY}"
    )
  path = pathlib.Path(path).expanduser()
  if not path.is_file():
    raise DataError(f"{path}: no such file (config.data.path); {_LLAVA_REMEDY}")
  if not str(image_folder):
    raise DataError(
      "config.data.image_folder: empty, expected the folder that the image "
      f"paths in {path} are relative to; {_IMAGES_REMEDY}"
    )
  folder = pathlib.Path(image_folder).expanduser()
  if not folder.is_dir():
    raise DataError(
      f"{folder}: no such folder (config.data.image_folder); {_IMAGES_REMEDY}"
    )
  spans = _record_spans(path)
  chosen = _slice(len(spans), split, str(path))
  if not chosen:
    raise DataError(_empty(str(path), split))
  return _LlavaJson(path, folder, spans[chosen.start : chosen.stop], chosen)


class _LlavaJson:
  """Holds where each entry is, not the entries: workers get a copy of it."""

  def __init__(
    self,
    path: pathlib.Path,
    folder: pathlib.Path,
    spans: Int64[np.ndarray, "R 2"],
    indices: range,
  ):
    self._path = path
    self._folder = folder
    self._spans = spans
    self._indices = indices

  def __len__(self) -> int:
    return len(self._spans)

  def __getitem__(self, index: int) -> Record:
    start, stop = self._spans[index]
    with self._path.open("rb") as file:
      file.seek(start)
      entry = json.loads(file.read(stop - start))
    return _parse(entry, f"{self._path} record {self._indices[index]}", self)

  def image_path(self, name: str) -> pathlib.Path:
    return self._folder / name


def _parse(entry, where: str, source: _LlavaJson) -> Record:
  """The record of one JSON entry; `where` names it in errors."""
  if not isinstance(entry, dict):
    raise DataError(
      f"{where}: found {type(entry).__name__}, expected an object; remove it"
    )
  id_ = str(entry["id"]) if "id" in entry else ""
  where = f"{where} (id {id_!r})" if id_ else where
  bad = functools.partial(_bad_field, where)
  if not id_:
    raise bad("id", entry.get("id", "nothing"), "a name; add one")
  images = entry.get("image", [])
  images = [images] if isinstance(images, str) else images
  if not isinstance(images, list) or not all(
    isinstance(name, str) and name for name in images
  ):
    raise bad(
      "image", entry["image"], "a path or a list of paths; leave it out if none"
    )
  turns = entry.get("conversations")
  if not isinstance(turns, list):
    found = "nothing" if turns is None else turns
    raise bad("conversations", found, "a list of turns; add it")
  for i, turn in enumerate(turns):
    if not isinstance(turn, dict):
      raise bad(f"conversations[{i}]", turn, "an object; correct it")
    for key in ("from", "value"):
      if not isinstance(turn.get(key), str) or not turn[key].strip():
        raise bad(
          f"conversations[{i}].{key}",
          turn.get(key, "nothing"),
          "text; add it or remove the record",
        )
  if turns and turns[0]["from"] != "human":
    turns = turns[1:]
  roles = [turn["from"] for turn in turns]
  if not roles or roles != ["human", "gpt"] * (len(roles) // 2):
    raise bad(
      "conversations",
      " ".join(roles) or "no turns",
      "human and gpt in turn, ending with gpt; correct it",
    )
  if not images and any("<image>" in turn["value"] for turn in turns):
    raise bad("image", "nothing", "a path, as a turn says <image>; add it")
  return Record(
    id=id_,
    images=tuple(source.image_path(name) for name in images),
    conversations=(
      tuple(
        (human["value"], gpt["value"])
        for human, gpt in zip(turns[::2], turns[1::2], strict=True)
      ),
    ),
  )


def _bad_field(where: str, field: str, found, expected: str) -> DataError:
  found = str(found)
  found = found if len(found) <= 60 else found[:57] + "..."
  return DataError(
    f"{where}: field {field}: found {' '.join(found.split())!r}, expected "
    f"{expected}"
  )


def _record_spans(path: pathlib.Path) -> Int64[np.ndarray, "R 2"]:
  """First byte of each of the R entries of a JSON list, and that after it.

  Raises:
    DataError: the file is not a JSON list.
  """
  # As Latin-1, a character is a byte. Everything that structures JSON is
  # ASCII, and no byte of a longer UTF-8 character is.
  text = path.read_bytes().decode("latin-1")
  remedy = f"expected a JSON list of records; {_LLAVA_REMEDY}"
  scan = json.JSONDecoder().raw_decode

  def skip(at: int) -> int:  # white space
    while text[at : at + 1] and text[at] in " \t\r\n":
      at += 1
    return at

  spans: list[tuple[int, int]] = []
  at = skip(0)
  if text[at : at + 1] != "[":
    raise DataError(f"{path}: begins with {text[at : at + 20]!r}, {remedy}")
  at = skip(at + 1)
  try:
    while text[at : at + 1] != "]":
      stop = scan(text, at)[1]
      spans.append((at, stop))
      at = skip(stop)
      if text[at : at + 1] == ",":
        at = skip(at + 1)
      elif text[at : at + 1] != "]":
        raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
  except json.JSONDecodeError as e:
    raise DataError(
      f"{path}: not JSON at byte {e.pos}, after {len(spans)} records "
      f"({e.msg}), {remedy}"
    ) from e
  return np.array(spans, np.int64).reshape(-1, 2)


def _slice(count: int, split: str, where: str) -> range:
  """Indices of 'train', 'train[a:b]', with a and b numbers or percentages."""
  match = re.fullmatch(r"train(?:\[(-?\d+%?)?:(-?\d+%?)?\])?", split)
  if not match:
    raise DataError(
      f"{where}: no split {split!r}; a JSON file is one split, 'train', of "
      "which 'train[:1000]' or 'train[90%:]' are slices"
    )

  def bound(text: str | None) -> int | None:
    if text is None:
      return None
    if text.endswith("%"):
      return round(int(text[:-1]) * count / 100)
    return int(text)

  return range(count)[bound(match[1]) : bound(match[2])]


def _empty(where: str, split: str) -> str:
  return (
    f"{where}: split {split!r} has no records, expected at least one; choose "
    "another in config.data.train_split or config.evaluation.split"
  )
