"""Sources: easy-VQA against its package, LLaVA JSON and its bad records."""

import json
import pickle
import subprocess
import sys

import pytest

from vocojax.data import sources
from vocojax.data.tfds import easy_vqa
from vocojax.errors import DataError


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
  with pytest.raises(DataError, match=r"split 'test\[:0\]' has no records"):
    sources.easy_vqa("test[:0]", easy_vqa_folder)
  with pytest.raises(DataError, match="no split 'dev'; use 'train', 'test'"):
    sources.easy_vqa("dev", easy_vqa_folder)


def test_easy_vqa_folder_that_is_a_file(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(DataError, match=r"cannot use the folder .*config\.data"):
    sources.easy_vqa("test", tmp_path / "file")


def test_easy_vqa_without_its_package(monkeypatch):
  monkeypatch.setitem(sys.modules, "easy_vqa", None)
  with pytest.raises(DataError, match="pip install easy-vqa"):
    easy_vqa.package_folder()


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
  text = (
    entries
    if isinstance(entries, str)
    else json.dumps(entries, ensure_ascii=False, indent=1)
  )
  path.write_text(text, encoding="utf-8")
  return path


def test_llava_json(tmp_path):
  path = write(
    tmp_path,
    [
      {"id": "a", "image": "x/1.png", "conversations": [QUESTION, ANSWER]},
      {
        "id": 7,
        "image": ["1.png", "2.png"],
        "conversations": [QUESTION, ANSWER] * 2,
      },
      {"id": "c", "conversations": [ANSWER, turn("human", "hi"), ANSWER]},
    ],
  )
  source = sources.llava_json(path, tmp_path)
  source = pickle.loads(pickle.dumps(source))
  asked = ("<image>\nWhat?", "An ä 語.")
  assert [source[i] for i in range(len(source))] == [
    sources.Record("a", (tmp_path / "x/1.png",), ((asked,),)),
    sources.Record(
      "7", (tmp_path / "1.png", tmp_path / "2.png"), ((asked, asked),)
    ),
    sources.Record("c", (), ((("hi", "An ä 語."),),)),
  ]


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
  entries = [
    {"id": f"r{i}", "conversations": [turn("human", "hi"), ANSWER]}
    for i in range(10)
  ]
  source = sources.llava_json(write(tmp_path, entries), tmp_path, split)
  found = [source[i].id for i in range(len(source))]
  assert found == [f"r{i}" for i in ids]


GOOD = {"id": "good", "image": "1.png", "conversations": [QUESTION, ANSWER]}


@pytest.mark.parametrize(
  "change, message",
  [
    ({"id": None}, "field id: found"),
    ({"conversations": None}, "field conversations: found 'nothing'"),
    ({"conversations": []}, "field conversations: found 'no turns'"),
    ({"conversations": [QUESTION]}, "found 'human', expected human and gpt"),
    ({"conversations": [QUESTION, QUESTION]}, "found 'human human'"),
    ({"conversations": [QUESTION, {"from": "gpt"}]}, r"\[1\].value: found 'no"),
    ({"conversations": [{"value": "a"}, ANSWER]}, r"\[0\].from: found 'no"),
    ({"conversations": [QUESTION, turn("gpt", " ")]}, r"\[1\].value: found ''"),
    ({"conversations": ["a"]}, r"\[0\]: found 'a', expected an object"),
    ({"image": 3}, "field image: found '3'"),
    ({"image": None}, "field image: found 'nothing', expected a path"),
  ],
)
def test_bad_records(tmp_path, change, message):
  bad = {k: v for k, v in (GOOD | change).items() if v is not None}
  source = sources.llava_json(write(tmp_path, [GOOD, bad]), tmp_path)
  assert source[0].id == "good"
  with pytest.raises(DataError, match=message) as e:
    _ = source[1]
  assert "data.json record 1" in str(e.value)
  assert "\n" not in str(e.value)


@pytest.mark.parametrize(
  "text, message",
  [
    ("", r"begins with '', expected a JSON list"),
    ('{"id": 1}', r"begins with '{\"id\": 1}', expected a JSON list"),
    ('[{"id": 1}', r"not JSON at byte 10, after 1 records"),
    ('[{"id": 1}, {"id', r"not JSON at byte \d+, after 1 records"),
    ("[]", r"split 'train' has no records"),
  ],
)
def test_bad_json_files(tmp_path, text, message):
  with pytest.raises(DataError, match=message):
    sources.llava_json(write(tmp_path, text), tmp_path)


def test_missing_files_say_how_to_get_them(tmp_path):
  path = write(tmp_path, [GOOD])
  hub = "liuhaotian/LLaVA-Instruct-150K"
  images = r"config\.data\.image_folder.*coco/train2017"
  for arguments, message in [
    (("", tmp_path), rf"config\.data\.path: empty.*{hub}"),
    ((tmp_path / "no.json", tmp_path), rf"no\.json: no such file.*{hub}"),
    ((path, ""), images),
    ((path, tmp_path / "no"), images),
    ((path, tmp_path, "test"), "no split 'test'"),
    ((path, tmp_path, "train[1:]"), r"split 'train\[1:\]' has no records"),
  ]:
    with pytest.raises(DataError, match=message):
      sources.llava_json(*arguments)
