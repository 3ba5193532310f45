"""Sources: easy-VQA against its package, LLaVA JSON and its bad records."""

import json
import os
import pickle
import subprocess
import sys

import pytest

from vocojax.data import sources
from vocojax.data.tfds import easy_vqa
from vocojax.errors import DataError, OddRecord, UserError


@pytest.fixture(scope="module")
def easy_vqa_folder(tmp_path_factory):
  return tmp_path_factory.mktemp("tfds")


@pytest.mark.parametrize(
  "split, num_images, num_questions",
  [("train", 4000, 38575), ("test", 1000, 9673)],
)
def test_easy_vqa_equals_its_package(
  easy_vqa_folder, split, num_images, num_questions
):
  source = sources.easy_vqa(split, easy_vqa_folder)
  assert len(source) == num_images
  folder = easy_vqa.package_folder() / split
  theirs = json.loads((folder / "questions.json").read_text())
  assert len(theirs) == num_questions
  ours = []
  for i in range(len(source)):
    record = source[i]
    image_id = int(record.id.removeprefix(f"{split}/"))
    ours += [[*turn, image_id] for (turn,) in record.conversations]
    assert len(record.images) == 1
    assert image_id == i
    if i % 500 == 0:
      png = (folder / "images" / f"{image_id}.png").read_bytes()
      assert record.images[0] == png
  assert sorted(ours) == sorted(theirs)


def test_easy_vqa_splits(easy_vqa_folder):
  whole = sources.easy_vqa("test", easy_vqa_folder)
  part = sources.easy_vqa("test[990:]", easy_vqa_folder)
  assert len(part) == 10 and part[3] == whole[993]
  assert pickle.loads(pickle.dumps(part))[3] == part[3]
  with pytest.raises(DataError) as e:
    sources.easy_vqa("test[:0]", easy_vqa_folder)
  assert e.value.got == "no records in split 'test[:0]'"
  with pytest.raises(DataError) as e:
    sources.easy_vqa("dev", easy_vqa_folder)
  assert (e.value.where, e.value.got) == ("easy_vqa", "no split 'dev'")
  assert e.value.expected.startswith("'train', 'test', or a slice of one")


def test_easy_vqa_folder_that_is_a_file(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(DataError) as e:
    sources.easy_vqa("test", tmp_path / "file")
  assert e.value.where == f"the data of easy_vqa in {tmp_path}/file"
  with pytest.raises(DataError) as e:
    sources.easy_vqa("test", "~nobody-of-this-name")
  assert e.value.got == "a user that does not exist"


def test_easy_vqa_without_its_package(monkeypatch):
  monkeypatch.setitem(sys.modules, "easy_vqa", None)
  with pytest.raises(DataError) as e:
    easy_vqa.package_folder()
  assert e.value.where == "the package easy-vqa"


def test_no_tensorflow(easy_vqa_folder):
  code = (
    "import sys\n"
    "from vocojax.data import pipeline, sources\n"
    f"sources.easy_vqa('test', {str(easy_vqa_folder)!r})[0]\n"
    "assert 'tensorflow' not in sys.modules\n"
  )
  subprocess.run([sys.executable, "-c", code], check=True)


def turn(role, value):
  return {"from": role, "value": value}


QUESTION, ANSWER = turn("human", "<image>\nWhat?"), turn("gpt", "An ä 語.")


def write(tmp_path, entries):
  path = tmp_path / "data.json"
  if not isinstance(entries, bytes):
    text = json.dumps(entries, ensure_ascii=False, indent=1)
    entries = text.encode()
  path.write_bytes(entries)
  return path


def entry(id_="good", **change):
  good = {"id": id_, "image": "1.png", "conversations": [QUESTION, ANSWER]}
  return {k: v for k, v in (good | change).items() if v is not ...}


def asked(question, answer="Red."):
  return [turn("human", question), turn("gpt", answer)]


def read_all(tmp_path, entries):
  source = sources.llava_json(write(tmp_path, entries), tmp_path)
  return [source[i] for i in range(len(source))]


def read_bad(tmp_path, entry):
  """What is wrong with a record; that after it is good."""
  content = entry if isinstance(entry, bytes) else json.dumps(entry).encode()
  path = write(tmp_path, b"[%s, %s]" % (content, json.dumps(GOOD).encode()))
  source = sources.llava_json(path, tmp_path)
  assert source[1].id == "good"
  with pytest.raises(DataError) as e, sources.record_border("record 0"):
    _ = source[0]
  assert len(str(e.value)) < 400 and "\n" not in str(e.value)
  assert pickle.loads(pickle.dumps(e.value)).__dict__ == e.value.__dict__
  where = e.value.where.removeprefix(f"{path} record 0")
  return e.value, where.removeprefix(" (id 'good')").removeprefix(": ")


GOOD = entry()


def test_llava_json(tmp_path):
  path = write(
    tmp_path,
    [
      entry("a", image="x/1.png"),
      entry(
        7,
        image=["1.png", "2.png"],
        conversations=[*asked("<image><image>\nWhat?"), QUESTION, ANSWER],
      ),
      entry("c", image=..., conversations=[ANSWER, *asked("hi")]),
    ],
  )
  with pytest.raises(DataError) as e:
    _ = sources.llava_json(path, tmp_path)[1]
  assert e.value.got == "3 <image>"
  entries = json.loads(path.read_text())
  entries[1]["conversations"][2]["value"] = "And?"
  source = sources.llava_json(write(tmp_path, entries), tmp_path)
  source = pickle.loads(pickle.dumps(source))
  one = ("<image>\nWhat?", "An ä 語.")
  two = (("<image><image>\nWhat?", "Red."), ("And?", "An ä 語."))
  assert [source[i] for i in range(len(source))] == [
    sources.Record("a", (tmp_path / "x/1.png",), ((one,),)),
    sources.Record("7", (tmp_path / "1.png", tmp_path / "2.png"), (two,)),
    sources.Record("c", (), ((("hi", "Red."),),)),
  ]


@pytest.mark.parametrize(
  "change, images",
  [
    ({"id": ...}, ["1.png"]),
    ({"id": None}, ["1.png"]),
    ({"id": 0}, ["1.png"]),
    ({"image": None, "conversations": asked("hi")}, []),
    ({"image": [], "conversations": asked("hi")}, []),
    ({"image": ..., "images": ["1.png"]}, ["1.png"]),
    ({"image": None, "images": "a/../1.png"}, ["1.png"]),
    ({"image": ["1.png", "b/2.png"], "conversations": asked("hi")}, None),
    ({"model": "x", "image_id": 3, "source": "coco/1.jpg"}, ["1.png"]),
    ({"image_url": "http://x/1.png", "width": 5, "video": None}, ["1.png"]),
    ({"audio": [], "caption": "see video 1.mp4 there"}, ["1.png"]),
  ],
)
def test_harmless_fields(tmp_path, change, images):
  (record,) = read_all(tmp_path, [entry(**change)])
  images = images if images is not None else ["1.png", "b/2.png"]
  assert record.images == tuple(tmp_path / name for name in images)
  assert record.id == ("0" if "id" in change else "good")


@pytest.mark.parametrize(
  "encode",
  [
    lambda entries: b"\xef\xbb\xbf" + json.dumps(entries).encode(),
    lambda entries: b"".join(json.dumps(e).encode() + b"\n" for e in entries),
    lambda entries: b"\r\n\r\n".join(json.dumps(e).encode() for e in entries),
    lambda entries: b"\xef\xbb\xbf" + json.dumps(entries[0]).encode(),
    lambda entries: b" \n" + json.dumps(entries, indent=3).encode() + b" \n\t",
  ],
  ids=["byte-order mark", "lines", "blank lines", "one line", "white space"],
)
def test_forms_of_json(tmp_path, encode):
  entries = [entry(f"r{i}") for i in range(3)]
  found = [record.id for record in read_all(tmp_path, encode(entries))]
  assert found == ["r0", "r1", "r2"][: len(found)] and found


@pytest.mark.parametrize(
  "split, ids",
  [
    ("train", range(10)),
    ("train[:3]", range(3)),
    ("train[-2:]", [8, 9]),
    ("train[90%:]", [9]),
    ("train[20%:5]", [2, 3, 4]),
  ],
)
def test_llava_json_splits(tmp_path, split, ids):
  entries = [entry(f"r{i}") for i in range(10)]
  source = sources.llava_json(write(tmp_path, entries), tmp_path, split)
  found = [source[i].id for i in range(len(source))]
  assert found == [f"r{i}" for i in ids]


TURNS = 'a list of {"from": "human" or "gpt", "value": text}'
CONVERSATIONS = "field conversations"
NO_MEDIA = "no media but images, in the field image or images"


@pytest.mark.parametrize(
  "change, where, got, expected",
  [
    ({"id": [1]}, "field id", "[1]", None),
    ({"conversations": ...}, CONVERSATIONS, "nothing", TURNS),
    ({"conversations": {}}, CONVERSATIONS, "{}", TURNS),
    ({"conversations": []}, CONVERSATIONS, "no turns", None),
    ({"conversations": [ANSWER]}, CONVERSATIONS, "no turns", None),
    ({"conversations": ["a"]}, f"{CONVERSATIONS}[0]", "'a'", "an object"),
    (
      {"conversations": [QUESTION, QUESTION]},
      *(f"{CONVERSATIONS}[1]: field from", "'human'", "'gpt'"),
    ),
    (
      {"conversations": [QUESTION, ANSWER, ANSWER]},
      *(f"{CONVERSATIONS}[2]: field from", "'gpt'", "'human'"),
    ),
    (
      {"conversations": [turn("user", "hi"), turn("assistant", "ho")]},
      *(f"{CONVERSATIONS}[0]: field from", "'user'", "'human'"),
    ),
    (
      {"conversations": [QUESTION, turn("chatgpt", "ho")]},
      *(f"{CONVERSATIONS}[1]: field from", "'chatgpt'", "'gpt'"),
    ),
    (
      {"conversations": [QUESTION, {"from": "gpt"}]},
      *(f"{CONVERSATIONS}[1]: field value", "nothing", "text"),
    ),
    (
      {"conversations": [{"from": 1, "value": "a"}, ANSWER]},
      *(f"{CONVERSATIONS}[0]: field from", "1", "text"),
    ),
    ({"image": 3}, "field image", "3", "a path or a list of paths"),
    ({"images": [{"path": "1.png"}], "image": ...}, "field images", None, None),
    ({"images": ["2.png"]}, "field images", "['2.png']", None),
    ({"image": "../1.png"}, "field image", "'../1.png'", None),
    ({"image": "/etc/passwd"}, "field image", "'/etc/passwd'", None),
    ({"image": "a\0.png"}, "field image", "'a\\x00.png'", None),
    ({"image": ["1.png", ""]}, "field image", "''", None),
    ({"image": ..., "video": "v.mp4"}, "field video", "'v.mp4'", NO_MEDIA),
    ({"video": "v"}, "field video", "'v'", NO_MEDIA),
    ({"audios": ["v"]}, "field audios", "['v']", NO_MEDIA),
    ({"img": "v"}, "field img", "'v'", NO_MEDIA),
    ({"image2": "v"}, "field image2", "'v'", NO_MEDIA),
    ({"image": ..., "Image_Path": "v"}, "field Image_Path", "'v'", NO_MEDIA),
    ({"image": ..., "file": "v.JPG"}, "field file", "'v.JPG'", NO_MEDIA),
    (
      {"conversations": asked("<image>\n<image>\nCompare.")},
      *("conversations", "2 <image>", None),
    ),
  ],
)
def test_bad_records(tmp_path, change, where, got, expected):
  error, found = read_bad(tmp_path, entry(**change))
  assert found == where
  assert not isinstance(error, OddRecord)
  assert got in (None, error.got)
  assert expected in (None, error.expected)
  assert error.fix


@pytest.mark.parametrize(
  "content, got",
  [
    (b'{"id": "good", "x": "\\ud83d"}', "half of a surrogate pair ('\\ud83d')"),
    (b'{"id": "good", "x": "caf\xe9"}', "byte 0xe9 at offset 24"),
    (b'{"id": ' + b"9" * 5000 + b"}", "5000 digits"),
    (b'{"id": 1, "x": ' + b"[" * 9999 + b"]" * 9999 + b"}", "nested too deep"),
    (b'{"a": 1, "a": 2}', "the key 'a' twice"),
    (b'"text, [or] { \\" "', "'text, [or] { "),
    (b"null", "None"),
  ],
)
def test_records_that_are_no_json_of_ours(tmp_path, content, got):
  error, where = read_bad(tmp_path, content)
  assert got in error.got and where == ""


@pytest.mark.parametrize(
  "kind, change",
  [
    ("marker", {"image": ...}),
    ("empty", {"conversations": asked("<image>\nWhat?", " ")}),
    ("empty", {"conversations": [*asked(""), QUESTION, ANSWER]}),
    ("unanswered", {"conversations": [QUESTION]}),
    ("unanswered", {"conversations": [*asked("hi"), QUESTION]}),
  ],
)
def test_odd_records(tmp_path, kind, change):
  """What LLaVA's code takes; the kind survives more context and pickling."""
  error, _ = read_bad(tmp_path, entry(**change))
  assert isinstance(error, OddRecord) and kind in sources.ODD
  assert error.kind == error.within("a").kind == kind
  assert pickle.loads(pickle.dumps(error)).kind == kind


def test_system_turn_and_stray_answer(tmp_path):
  system = turn("system", "Rhyme.")
  first, second, third = read_all(
    tmp_path,
    [
      entry(conversations=[system, QUESTION, ANSWER]),
      entry(conversations=[ANSWER, QUESTION, ANSWER]),
      entry(conversations=asked("<image>?", "The tag <image> is one.")),
    ],
  )
  assert (first.system, second.system) == ("Rhyme.", "")
  assert first.conversations == second.conversations
  ((_, answer),) = third.conversations[0]
  assert answer == "The tag <image> is one."


def test_image_folder(tmp_path):
  """Names are checked as they are written; links in the folder are followed."""
  folder = tmp_path / "images"
  (tmp_path / "elsewhere").mkdir()
  folder.mkdir()
  (folder / "coco").symlink_to(tmp_path / "elsewhere")
  path = write(
    tmp_path,
    [
      entry(image=name)
      for name in ("coco/1.png", f"{folder}/1.png", f"{tmp_path}/1.png")
    ],
  )
  inside = sources.llava_json(path, folder)
  assert inside[0].images == (folder / "coco/1.png",)
  assert inside[1].images == (folder / "1.png",)
  with pytest.raises(DataError):
    _ = inside[2]
  # LLaVA's way of naming files by their whole path.
  everywhere = sources.llava_json(path, "/")
  assert everywhere[2].images == (tmp_path / "1.png",)


@pytest.mark.parametrize(
  "content, got",
  [
    (b"", "Neither a list nor an object at byte 0"),
    (b"id,image", "Neither a list nor an object at byte 0"),
    (b'[{"id": 1}', "No comma and no end of the list at byte 10"),
    (b'[{"id": 1} {"id": 2}]', "No comma and no end of the list at byte 11"),
    (b'[{"id": 1}, {"id', "Unterminated string starting at at byte 13"),
    (b'[{"id": 1},]', "Expecting value at byte 11"),
    (b'[{"id": 1}]\n[{"id": 2}]', "More after the end of the list at byte 12"),
    (b'[{"id": 1}] x', "More after the end of the list at byte 12"),
    (b'{"id": 1} {"id": 2}', "Not one object a line at byte 0"),
    (b'{\n"id": 1}\n', "Not one object a line at byte 0"),
    (b"\xff\xfe[\0", "Neither a list nor an object at byte 0"),
    (b"[" * 10**5, "Unterminated value at byte 1"),
    (b"[]", "no records in split 'train'"),
  ],
)
def test_bad_json_files(tmp_path, content, got):
  path = write(tmp_path, content)
  with pytest.raises(DataError) as e:
    sources.llava_json(path, tmp_path)
  assert e.value.where == str(path)
  assert e.value.got.startswith(got)
  assert "mix665k" not in str(e.value)


def test_bad_lines_are_bad_records(tmp_path):
  good = json.dumps(entry()).encode()
  path = write(tmp_path, good + b'\n{"id"\n' + good + b"\n" + good[:-9])
  source = sources.llava_json(path, tmp_path)
  assert len(source) == 4 and source[2].id == "good"
  for i in (1, 3):
    with pytest.raises(DataError) as e:
      _ = source[i]
    assert e.value.where == f"{path} record {i}"


def test_missing_files_say_how_to_get_them(tmp_path):
  own = write(tmp_path, [GOOD])
  mix = tmp_path / "llava_v1_5_mix665k.json"
  mix.write_bytes(own.read_bytes())
  os.mkfifo(tmp_path / "pipe")
  no = tmp_path / "no"
  for arguments, where, got, fix in [
    (("", tmp_path), "config.data.path", "nothing", "LLaVA-Instruct-150K"),
    ((no, tmp_path), f"config.data.path: {no}", "no such file", "correct the"),
    ((no / mix.name, ""), None, "no such file", "LLaVA-Instruct-150K"),
    ((tmp_path / "pipe", tmp_path), f"{tmp_path}/pipe", "a pipe", ""),
    ((tmp_path, tmp_path), str(tmp_path), "a folder", ""),
    ((own, ""), "config.data.image_folder", "nothing", "paths in data.json"),
    ((own, no), f"config.data.image_folder: {no}", None, "paths in data.json"),
    ((mix, ""), "config.data.image_folder", "nothing", "coco/train2017"),
    ((own, tmp_path, "test"), str(own), "no split 'test'", "holdout"),
    ((own, tmp_path, "train[1:]"), None, "no records in split 'train[1:]'", ""),
    (("~nobody-of-this-name/a", tmp_path), None, "a user that does not e", ""),
  ]:
    with pytest.raises(DataError) as e:
      sources.llava_json(*arguments)
    assert where in (None, e.value.where)
    assert got is None or e.value.got.startswith(got)
    assert fix in e.value.fix


def test_border_of_a_record():
  """Any mistake is the record's, but not what no record can help."""
  for mistake in (ValueError("x"), UnicodeDecodeError("a", b"", 0, 1, "b")):
    with pytest.raises(DataError) as e, sources.record_border("record 3"):
      raise mistake
    assert e.value.where == "record 3" and e.value.__cause__ is mistake
    assert e.value.got.startswith(f"{type(mistake).__name__}: ")
  for other in (
    *(KeyboardInterrupt(), MemoryError(), UserError("a", "b", "c", "d")),
    OddRecord("a", "b", "c", "d", kind="empty"),
  ):
    with pytest.raises(type(other)) as e, sources.record_border("record 3"):
      raise other
    assert e.value is other
