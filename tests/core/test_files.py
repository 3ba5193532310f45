"""The readers of JSON and text, and the rule of names."""

import os
import pathlib
import pickle

import pytest

from vocojax.core import files
from vocojax.errors import DataError, UserError, WeightsError, one_line


@pytest.mark.parametrize(
  ("data", "got"),
  [
    (b'{"a": "caf\xe9"}', "byte 0xe9 at offset 10"),
    (b'{"a": 1} x', "Extra data at line 1, column 10"),
    (b'{"a": 1,}', "at line 1, column 9"),
    (b"[" * 100_000, "nested too deep"),
    (b'{"a": ' + b"9" * 5000 + b"}", "5000 digits"),
    (b'{"a": 1, "a": 2}', "the key 'a' twice in one object"),
    (b'{"b": 1, "a": NaN}', "the number 'NaN' of 'a'"),
    (b'{"b": {"a": [Infinity]}}', "the number 'Infinity'"),
    (b'{"b": 1, "a": -1e999}', "the number '-1e999' of 'a'"),
    (b'{"a": "\\ud800"}', "half of a surrogate pair"),
    (b'{"\\uDFFF": 1}', "half of a surrogate pair"),
    (b"[1]", "[1]"),
    (b"", "Expecting value"),
  ],
)
def test_bad_json_is_an_error_that_names_it(data, got):
  with pytest.raises(WeightsError) as e:
    files.parse_json(data, "a.json", dict, WeightsError)
  assert e.value.where == "a.json"
  assert got in e.value.got
  assert len(str(e.value)) < 300


def test_good_json_is_read():
  text = '\ufeff{"a": ["\\ud83d\\ude00", 1.5, null, true]}'
  expected = {"a": ["\U0001f600", 1.5, None, True]}
  assert files.parse_json(text.encode(), "a.json") == expected


@pytest.mark.parametrize(
  ("value", "kind", "fine"),
  [(True, int, False), (1, float, True), (1.0, int, False), (1, bool, False)],
)
def test_types_of_numbers(value, kind, fine):
  if fine:
    assert files.check_kind(value, "x", kind) is value
    return
  with pytest.raises(DataError) as e:
    files.check_kind(value, "x", kind)
  assert e.value.got == repr(value)


@pytest.mark.parametrize(
  ("folder", "name", "path"),
  [
    ("images", "coco/a.png", "images/coco/a.png"),
    ("images", "x/../a.png", "images/a.png"),
    ("/data/images", "/data/images/a.png", "/data/images/a.png"),
    ("/", "/data/a.png", "/data/a.png"),
    ("/", "data/a.png", "/data/a.png"),
    (".", "a.png", "a.png"),
    ("..", "a.png", "../a.png"),
    ("images", "..a.png", "images/..a.png"),
  ],
)
def test_names_inside_a_folder(folder, name, path):
  assert str(files.path_inside(folder, name, "record 0")) == path


@pytest.mark.parametrize("folder", ["images", "/data/images", ".", ".."])
@pytest.mark.parametrize(
  "name",
  [
    "/etc/passwd",
    "../a.png",
    "a/../../a.png",
    "../images2/a.png",
    "a\0.png",
    "\ud800.png",
    "",
    " ",
    ".",
    "a/..",
    "/data/images2/a.png",
    "a" * 256,
    "a/" * 2100,
  ],
)
def test_names_that_lead_out_of_a_folder(folder, name):
  with pytest.raises(DataError) as e:
    files.path_inside(folder, name, "record 0")
  assert e.value.where == "record 0"


@pytest.mark.parametrize("name", ["a/b.json", "..", "a\0", "/a", "./a", ""])
def test_a_file_name_has_no_folder(name):
  with pytest.raises(DataError):
    files.file_name(name, "index")
  assert files.file_name("a.json", "index") == "a.json"


def test_only_regular_files_are_opened(tmp_path):
  os.mkfifo(tmp_path / "pipe")
  (tmp_path / "link").symlink_to(tmp_path / "file")
  (tmp_path / "file").write_bytes(b"x")
  assert files.read_bytes(tmp_path / "link") == b"x"
  for path, got in (
    (tmp_path / "pipe", "a pipe"),
    ("/dev/zero", "a device"),
    (tmp_path, "a folder"),
    (tmp_path / "file" / "x", "no such file"),
  ):
    with pytest.raises(DataError) as e:
      files.read_bytes(path)
    assert (e.value.where, e.value.got) == (str(path), got)


def test_lines_of_json(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_text('\ufeff{"a": "\u2028\x85"}\r\n\n {"a": 2}', "utf-8")
  found = list(files.read_json_lines(path))
  assert found == [
    (f"{path}:1", {"a": "\u2028\x85"}),
    (f"{path}:3", {"a": 2}),
  ]
  for bad, got in ((b"\xff", "byte 0xff"), (b"[1]", "[1]"), (b"{", "line 1")):
    path.write_bytes(b'{"a": 1}\n' + bad + b"\n")
    with pytest.raises(WeightsError) as e:
      list(files.read_json_lines(path, dict, WeightsError))
    assert e.value.where == f"{path}:2"
    assert got in e.value.got


def test_a_user_that_does_not_exist():
  assert files.expand_user("~/a") == pathlib.Path.home() / "a"
  with pytest.raises(DataError) as e:
    files.expand_user("~nosuchuser/a")
  assert e.value.where == "~nosuchuser/a"
  assert e.value.got == "a user that does not exist"


def test_a_file_that_is_too_large_is_refused(tmp_path):
  (tmp_path / "file").write_bytes(b"12345")
  with pytest.raises(DataError) as e:
    files.read_bytes(tmp_path / "file", limit=4)
  assert e.value.got == "5 bytes"


def test_write_atomic_leaves_nothing_of_a_write_that_failed(tmp_path):
  files.write_atomic(tmp_path / "a", "old")
  (tmp_path / "folder").mkdir()
  with pytest.raises(UserError) as e:
    files.write_atomic(tmp_path / "folder", "new")
  assert e.value.where == str(tmp_path / "folder")
  assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "folder"]
  assert (tmp_path / "a").read_text() == "old"


@pytest.mark.parametrize(
  ("cause", "got", "expected"),
  [
    (
      OSError(28, "No space left on device"),
      "No space left on device",
      "room to write",
    ),
    # As TensorStore and the tokenizers say it.
    (
      ValueError("RESOURCE_EXHAUSTED: a/b [os_error_code='28']"),
      "No space left on device",
      "room to write",
    ),
    (
      Exception("Read-only file system (os error 30)"),
      "Read-only file system",
      "a place that can be written",
    ),
  ],
)
def test_errors_of_writing(cause, got, expected):
  with pytest.raises(DataError) as e, files.storage("a", DataError):
    raise RuntimeError("saving failed") from cause
  found = e.value
  assert (found.where, found.got, found.expected) == ("a", got, expected)


def test_errors_of_writing_are_no_others():
  for error in (ValueError("28"), DataError("b", "x", "y", "z")):
    with pytest.raises(type(error)) as e, files.storage("a"):
      raise error
    assert e.value is error


def test_an_error_keeps_its_fields_through_pickle_and_within():
  error = WeightsError("a.json", "a\nlist \x1b[1m", "an object", "mend it")
  again = pickle.loads(pickle.dumps(error.within("model")))
  assert type(again) is WeightsError
  assert again.where == "model: a.json"
  assert again.got == "a list \\x1b[1m"
  assert str(again) == (
    "model: a.json: got a list \\x1b[1m, expected an object. Fix: mend it"
  )
  assert one_line("\ud800") == "\\ud800"
