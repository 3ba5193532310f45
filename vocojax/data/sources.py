"""Sources: random access to records. Read next: pipeline.py.

A record is some images and the conversations about them. Sources of records are
`easy_vqa` and `grid_vqa` (TFDS data sets) and `llava_json` (a LLaVA-format JSON
file beside a folder of images). Opening a source checks files and folders;
what is wrong with one record is raised when that record is read, so that a
long run can skip it.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import numpy as np
from absl import logging
from jaxtyping import Bool, Int64

from vocojax.config import Config
from vocojax.core import files
from vocojax.data import prompt
from vocojax.errors import ConfigError, DataError, OddRecord, UserError, shorten

Turn = tuple[str, str]  # question, answer

# Kinds of records that LLaVA's code takes as they are.
ODD = {
  "marker": "<image> in a text without images",
  "empty": "empty turns",
  "unanswered": "a human turn last",
  "long": "texts longer than a row",
  "cut": "all answers beyond the end of a row",
}

_MIX = "llava_v1_5_mix665k.json"
_MIX_REMEDY = (
  f"{_MIX} is in the data set liuhaotian/LLaVA-Instruct-150K on the Hugging "
  "Face hub"
)
_MIX_IMAGES = (
  f"the images of {_MIX} belong in coco/train2017, gqa/images, ocr_vqa/images, "
  "textvqa/train_images, vg/VG_100K and vg/VG_100K_2 under one folder; the "
  "README of https://github.com/haotian-liu/LLaVA says where to download each"
)
_JSON = "a JSON list of records, or one record a line"
# Fields of media, as data sets of others call them, and of where media are.
_MEDIUM = (
  r"(image|img|pic|picture|photo|gif|pixel|video|vid|clip|frame|audio|sound|"
  r"speech|voice)s?_?\d*"
)
_PLACE = r"_?(path|file|filename|name|url|uri|list|base64|bytes|value)s?"
_MEDIA_FILE = re.compile(
  r".+\.(jpe?g|png|gif|bmp|webp|tiff?|heic|avif|mp4|avi|mov|mkv|webm|mp3|wav|"
  r"flac|m4a|ogg)",
  re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Record:
  """Images and the conversations about them.

  Attributes:
    id: names the record in errors and results.
    images: encoded image files: their bytes, or their paths.
    conversations: each sees the images, none sees another.
    system: what is said to the model before all of them; mostly nothing.
  """

  id: str
  images: tuple[bytes | pathlib.Path, ...]
  conversations: tuple[tuple[Turn, ...], ...]
  system: str = ""


@runtime_checkable
class Source(Protocol):
  """Random access to records; must survive pickling."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Record:
    """Raises DataError if the record is bad."""
    ...


@contextlib.contextmanager
def record_border(where: str) -> Iterator[None]:
  """Turns whatever goes wrong with one record into a DataError.

  Training, evaluation and the doctor leave out a record at this border. What
  is not the record's fault passes: Ctrl-C, no memory, a package that is not
  installed.

  Args:
    where: the record, for errors that do not name it.

  Raises:
    DataError: the record cannot be used.
  """
  try:
    yield
  except (UserError, MemoryError):
    raise
  except Exception as e:
    raise DataError(
      where,
      f"{type(e).__name__}: {e}",
      "a record that can be read",
      "correct it or remove it",
    ) from e


def make_source(config: Config, split: str) -> Source:
  """Opens the source that `config.data` names, at `split`.

  A split may be sliced: 'train[:1000]', 'train[90%:]'. Of JSON files, 'test' is
  those of `config.evaluation.path`, or else the records that
  `config.evaluation.holdout` keeps from 'train'. Several files are one source,
  in their order.

  Raises:
    ConfigError: a key says something that this source cannot heed.
    DataError: a file or folder is missing, or the split is unknown or empty.
  """
  data, evaluation = config.data, config.evaluation
  if data.source == "llava_json":
    if _is_test(split) and evaluation.path:
      folder = evaluation.image_folder or data.image_folder
      return _open_files("evaluation", evaluation.path, folder, split)
    if data.weights and len(data.weights) != len(_names(data.path)):
      raise ConfigError(
        "config.data.weights",
        f"{len(data.weights)} weights",
        f"one for each of the {len(_names(data.path))} files of "
        "config.data.path",
        "write as many, or () for the sizes of the files",
      )
    return _open_files(
      "data", data.path, data.image_folder, split, evaluation.holdout
    )
  for key, value in (
    ("data.weights", data.weights),
    ("evaluation.path", evaluation.path),
    ("evaluation.holdout", evaluation.holdout),
  ):
    if value:
      raise ConfigError(
        f"config.{key}",
        f"{value!r} with config.data.source {data.source!r}",
        "'llava_json', the source of files",
        "leave one of them out",
      )
  if data.source == "easy_vqa":
    return easy_vqa(split, data.path)
  return grid_vqa(data.grid_size, split, data.path)


def identity(config: Config) -> str:
  """What tells the training data of a config from any other.

  Of JSON files it is a hash of their bytes, about a second for each GiB, and
  of how they are mixed and held out. It says nothing of the images. Of a TFDS
  data set it is the name and version.

  Raises:
    DataError: a file cannot be read.
  """
  data = config.data
  if data.source == "easy_vqa":
    from vocojax.data.tfds.easy_vqa import EasyVqa

    return f"easy_vqa/{EasyVqa.VERSION}"
  if data.source == "grid_vqa":
    from vocojax.data.tfds.grid_vqa import GridVqa

    size = data.grid_size
    return f"grid_vqa/{size}x{size}/{GridVqa.VERSION}"
  digests = []
  for path in _names(data.path):
    with files.open_regular(files.expand_user(path)) as file:
      digests.append(hashlib.file_digest(file, "sha256").hexdigest())
  used = (*digests, data.weights, config.evaluation.holdout)
  if used == (digests[0], (), 0.0):
    return f"sha256:{digests[0]}"
  return f"sha256:{hashlib.sha256(repr(used).encode()).hexdigest()}"


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

  folder = os.fspath(files.expand_user(data_dir)) if data_dir else None
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
      f"the data of {name} in {folder or '~/tensorflow_datasets'}",
      e.strerror or str(e),
      "a folder that can be written",
      "set config.data.path to another folder",
    ) from e
  try:
    count = builder.info.splits[split].num_examples
  except (KeyError, ValueError) as e:
    names = ", ".join(map(repr, builder.info.splits))
    raise _no_split(name, split, f"{names}, or a slice of one") from e
  if not count:
    raise _no_records(name, split)
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

  The file is a list of objects, or has one object a line: "image" or "images"
  (a path in `image_folder` or a list of such; none for text only) and
  "conversations", a list of {"from": "human" or "gpt", "value": text} in turn.
  "id" names the record; its index does if there is none. A first turn of gpt
  is dropped, as LLaVA does; that of a system becomes `Record.system`. The
  questions have a `<image>` for each image, or none at all. Other fields are
  ignored, unless they name media. The file has one split, 'train'.

  Raises:
    DataError: the file or folder is missing, the file is not such a list, or
      the split is unknown or empty. A bad entry raises when it is read.
  """
  return _open_files("data", os.fspath(path), os.fspath(image_folder), split)


class Files:
  """Several JSON files, one after the other; ids begin with a file's name."""

  def __init__(self, parts: dict[str, "_LlavaJson"]):
    self._names, self._parts = list(parts), list(parts.values())
    self.sizes = tuple(map(len, self._parts))
    self._ends = np.cumsum(self.sizes)

  def __len__(self) -> int:
    return int(self._ends[-1])

  def __getitem__(self, index: int) -> Record:
    at = int(np.searchsorted(self._ends, index, "right"))
    record = self._parts[at][index - int(self._ends[at])]
    return dataclasses.replace(record, id=f"{self._names[at]}:{record.id}")


def _open_files(
  group: str, paths: str, folders: str, split: str, holdout: float = 0.0
) -> Source:
  """The JSON files of config.`group`, each with its folder of images."""
  names, folder_names = _names(paths), _names(folders)
  if len(names) == 1:
    folder_names = [folders]
  elif len(folder_names) == 1:
    folder_names *= len(names)
  elif len(folder_names) != len(names):
    raise ConfigError(
      f"config.{group}.image_folder",
      f"{len(folder_names)} folders",
      f"one for each of the {len(names)} files of config.{group}.path, or one "
      "for all",
      "write as many, separated by commas",
    )
  parts = {
    name: _LlavaJson(name, folder, group)
    for name, folder in zip(names, folder_names, strict=True)
  }
  if len(parts) < len(names):
    raise ConfigError(
      f"config.{group}.path", "a file twice", "each once", "leave one out"
    )
  held_out = _is_test(split)
  if holdout:
    for part in parts.values():
      part.keep(part.held_out(holdout) == held_out)
  elif held_out and group == "data":
    raise DataError(
      paths,
      f"no split {split!r}",
      "records that are held out",
      "set config.evaluation.path to a file of them, or "
      "config.evaluation.holdout to a share of the records before training; "
      "'train' is what is trained on",
    )
  count = sum(map(len, parts.values()))
  chosen, start = _slice(count, split, paths), 0
  if not chosen:
    raise _no_records(paths, split)
  for part in parts.values():
    indices = np.arange(start, start := start + len(part))
    part.keep((chosen.start <= indices) & (indices < chosen.stop))
  return Files(parts) if len(parts) > 1 else next(iter(parts.values()))


def _is_test(split: str) -> bool:
  return split.partition("[")[0] == "test"


def _names(paths: str) -> list[str]:
  """What commas separate; one file may have commas in its name."""
  if "," not in paths or files.expand_user(paths).exists():
    return [paths]
  return [name.strip() for name in paths.split(",")]


def _given(key: str, path: str, fix: str) -> pathlib.Path:
  if not path:
    raise DataError(key, "nothing", "a path", fix)
  return files.expand_user(path)


class _LlavaJson:
  """Holds where each entry is, not the entries: workers get a copy of it."""

  def __init__(self, path: str, image_folder: str, group: str):
    key = f"config.{group}.path"
    self._path = _given(key, path, f"set it; {_MIX_REMEDY}")
    if not self._path.exists():
      raise DataError(
        f"{key}: {self._path}",
        "no such file",
        "a LLaVA-format JSON file",
        _MIX_REMEDY if self._path.name == _MIX else "correct the path",
      )
    key = f"config.{group}.image_folder"
    remedy = f"set it to the folder that the image paths in {self._path.name} "
    remedy += "start from"
    if self._path.name == _MIX:
      remedy = _MIX_IMAGES
    self._folder = _given(key, image_folder, remedy)
    if not self._folder.is_dir():
      raise DataError(
        f"{key}: {self._folder}",
        "no such folder",
        "the folder of the images",
        remedy,
      )
    self._spans = _record_spans(self._path)
    self._numbers = np.arange(len(self._spans))

  def __len__(self) -> int:
    return len(self._spans)

  def keep(self, kept: Bool[np.ndarray, " R"]) -> None:
    """Leaves out all but these of the records."""
    self._spans, self._numbers = self._spans[kept], self._numbers[kept]

  def held_out(self, share: float) -> Bool[np.ndarray, " R"]:
    """Which records to hold out: about this share, whatever the others are.

    A hash of the name of a record's first image decides, of its text where it
    has none, so no such image or text is on both sides.
    """
    data, found = files.read_bytes(self._path), []
    for start, stop in self._spans.tolist():
      key = data[start:stop]
      with contextlib.suppress(ValueError, RecursionError, AttributeError):
        entry = json.loads(key)
        images = entry.get("image") or entry.get("images")
        if isinstance(images, list):
          images = images[0]
        key = json.dumps(images or entry.get("conversations")).encode()
      digest = hashlib.sha256(key).digest()
      found.append(int.from_bytes(digest[:8]) < share * 2**64)
    return np.array(found, bool)

  def __getitem__(self, index: int) -> Record:
    start, stop = map(int, self._spans[index])
    number = self._numbers[index]
    where = f"{self._path} record {number}"
    with files.open_regular(self._path) as file:
      file.seek(start)
      entry = files.parse_json(file.read(stop - start), where)
    id_ = files.get_field(
      entry, "id", (str, int, float, type(None)), where, default=None
    )
    if id_ in (None, ""):
      return _parse(entry, where, str(number), self._folder)
    where = f"{where} (id {shorten(str(id_))})"
    return _parse(entry, where, str(id_), self._folder)


def _parse(entry: dict, where: str, id_: str, folder: pathlib.Path) -> Record:
  """The record of a JSON entry; `where` names it in errors."""
  images = tuple(
    files.path_inside(folder, name, f"{where}: field image")
    for name in _image_names(entry, where)
  )
  system, turns = _turns(entry, where)
  questions = [question for question, _ in turns]
  prompt.check_markers(questions, len(images), f"{where}: conversations")
  return Record(id_, images, (turns,), system)


def _image_names(entry: dict, where: str) -> list[str]:
  """What the fields of an entry name; refuses media that are not images."""
  found = [key for key in ("image", "images") if entry.get(key)]
  for key, value in entry.items():
    if key in ("image", "images", "id", "conversations"):
      continue
    if not value or not isinstance(value, str | list | dict):
      continue
    if re.fullmatch(_MEDIUM, key, re.IGNORECASE) or (
      not found  # else it may say more of the image
      and (
        re.fullmatch(_MEDIUM + _PLACE, key, re.IGNORECASE)
        or (isinstance(value, str) and _MEDIA_FILE.fullmatch(value))
      )
    ):
      raise DataError(
        f"{where}: field {key}",
        shorten(value),
        "no media but images, in the field image or images",
        "rename the field to image if it names one, or remove the record",
      )
  if len(found) == 2:
    raise DataError(
      f"{where}: field images",
      shorten(entry["images"]),
      "nothing, as the field image names images, too",
      "name all of them in one field",
    )
  names = entry[found[0]] if found else []
  names = [names] if isinstance(names, str) else names
  if not isinstance(names, list) or not all(
    isinstance(name, str) for name in names
  ):
    raise DataError(
      f"{where}: field {found[0]}",
      shorten(names),
      "a path or a list of paths",
      "correct it, or leave it out if there is no image",
    )
  return names


def _turns(entry: dict, where: str) -> tuple[str, tuple[Turn, ...]]:
  """The text of the system, if any, and the questions and their answers."""
  where = f"{where}: field conversations"
  turns = entry.get("conversations")
  if not isinstance(turns, list):
    raise DataError(
      where,
      "nothing" if turns is None else shorten(turns),
      'a list of {"from": "human" or "gpt", "value": text}',
      "add it, or remove the record",
    )
  texts: list[tuple[str, str]] = []
  for i, turn in enumerate(turns):
    turn = files.check_kind(turn, f"{where}[{i}]", dict)
    texts.append(
      (
        files.get_field(turn, "from", str, f"{where}[{i}]"),
        files.get_field(turn, "value", str, f"{where}[{i}]"),
      )
    )
  first = texts[0][0] if texts else ""
  skipped = int(first in ("system", "gpt"))
  for i, (role, _) in enumerate(texts[skipped:]):
    if role != ("human", "gpt")[i % 2]:
      known = role in ("human", "gpt", "system")
      raise DataError(
        f"{where}[{i + skipped}]: field from",
        shorten(role),
        repr(("human", "gpt")[i % 2]),
        "correct the order of the turns, or remove the record"
        if known
        else "call the person human and the model gpt",
      )
  spoken = texts[skipped:]
  if not spoken:
    raise DataError(
      where, "no turns", "human and gpt in turn", "remove the record"
    )
  for i, (_, value) in enumerate(spoken, skipped):
    if not value.strip():
      raise OddRecord(
        f"{where}[{i}]: field value",
        shorten(value),
        "text",
        "write some, or remove the record",
        kind="empty",
      )
  if len(spoken) % 2:
    raise OddRecord(
      where,
      "a human turn last",
      "an answer to it",
      "remove the turn, or the record",
      kind="unanswered",
    )
  values = [value for _, value in spoken]
  return texts[0][1] if first == "system" else "", tuple(
    zip(values[::2], values[1::2], strict=True)
  )


# Numbers need not be made while records are counted, and may be too long to.
_SCAN = json.JSONDecoder(parse_int=str, parse_float=str).raw_decode
_STRUCTURE = re.compile(r'"(?:[^"\\]|\\.)*"|[][{}]', re.DOTALL)


def _record_spans(path: pathlib.Path) -> Int64[np.ndarray, "R 2"]:
  """First byte of each of the R records of a JSON file, and that after it.

  Raises:
    DataError: the file is neither a JSON list nor one object a line.
  """
  # As Latin-1, a character is a byte. Everything that structures JSON is
  # ASCII, and no byte of a longer UTF-8 character is.
  text = files.read_bytes(path).decode("latin-1")
  at = _skip(text, 3 if text.startswith("\xef\xbb\xbf") else 0)
  spans: list[tuple[int, int]] = []
  try:
    if text[at : at + 1] == "[":
      spans.extend(_list_spans(text, at))
    elif text[at : at + 1] == "{":
      spans.extend(_line_spans(text, at))
    else:
      raise json.JSONDecodeError("Neither a list nor an object", text, at)
  except json.JSONDecodeError as e:
    raise DataError(
      path,
      f"{e.msg} at byte {e.pos}, {shorten(text[e.pos : e.pos + 20])}",
      _JSON,
      "correct the file, or write or download it again",
    ) from e
  return np.array(spans, np.int64).reshape(-1, 2)


def _skip(text: str, at: int) -> int:
  """The index of what comes after white space."""
  while text[at : at + 1] and text[at] in " \t\r\n":
    at += 1
  return at


def _value_end(text: str, at: int) -> int:
  """The index after the JSON value that begins at `at`."""
  try:
    return _SCAN(text, at)[1]
  except RecursionError:  # refused when the record is read
    depth = 0
    for match in _STRUCTURE.finditer(text, at):
      depth += (match[0] in "[{") - (match[0] in "]}")
      if not depth:
        return match.end()
    raise json.JSONDecodeError("Unterminated value", text, at) from None


def _list_spans(text: str, at: int) -> Iterator[tuple[int, int]]:
  """Where the values of the list that begins at `at` are; nothing follows."""
  at = _skip(text, at + 1)
  more = text[at : at + 1] != "]"
  while more:
    stop = _value_end(text, at)
    yield at, stop
    at = _skip(text, stop)
    more = text[at : at + 1] == ","
    if more:
      at = _skip(text, at + 1)
    elif text[at : at + 1] != "]":
      raise json.JSONDecodeError("No comma and no end of the list", text, at)
  at = _skip(text, at + 1)
  if at < len(text):
    raise json.JSONDecodeError("More after the end of the list", text, at)


def _line_spans(text: str, at: int) -> Iterator[tuple[int, int]]:
  """Where the lines are; only the first one is looked at."""
  after = _value_end(text, at)
  line_end = text.find("\n", at)
  if text[after : line_end if line_end >= 0 else None].strip() or (
    0 <= line_end < after
  ):
    raise json.JSONDecodeError("Not one object a line", text, at)
  while at < len(text):
    stop = text.find("\n", at)
    stop = len(text) if stop < 0 else stop
    if text[at:stop].strip():
      yield at, stop
    at = stop + 1


def _slice(count: int, split: str, where: str) -> range:
  """Indices of 'train', 'train[a:b]', with a and b numbers or percentages."""
  match = re.fullmatch(r"(?:train|test)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?", split)
  if not match:
    raise _no_split(where, split, "'train', 'test', or a slice of one")

  def bound(text: str | None) -> int | None:
    if text is None:
      return None
    if text.endswith("%"):
      return round(int(text[:-1]) * count / 100)
    return int(text)

  return range(count)[bound(match[1]) : bound(match[2])]


def _no_split(where: str, split: str, expected: str) -> DataError:
  return DataError(
    where,
    f"no split {split!r}",
    f"{expected}, such as 'train[:1000]' or 'train[90%:]'",
    "correct config.data.train_split or config.evaluation.split",
  )


def _no_records(where: str, split: str) -> DataError:
  return DataError(
    where,
    f"no records in split {split!r}",
    "at least one",
    "choose another config.data.train_split or config.evaluation.split",
  )
