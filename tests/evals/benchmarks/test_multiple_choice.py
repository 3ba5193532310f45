"""MMBench, SEED-Bench, ScienceQA against values by hand from their rules."""

import base64
import csv
import gzip
import io
import json
import xml.etree.ElementTree as ET
import zipfile

import pytest

from tests.fields import raises
from vocojax.errors import DataError
from vocojax.evals.benchmarks import mmbench
from vocojax.evals.benchmarks.mmbench import infer
from vocojax.evals.benchmarks.scienceqa import ScienceQa, letter
from vocojax.evals.benchmarks.seed import SeedBench

SUFFIX = "\nAnswer with the option's letter from the given choices directly."
OPTIONS = {"A": "a cat", "B": "Dog", "C": "doghouse", "D": "3"}


@pytest.mark.parametrize(
  ("answer", "expected"),
  [
    ("B", "B"),
    ("B.", "B"),
    ("(C)", "C"),
    ("(C).", "C"),
    ("The answer is D:", "D"),
    ("Answer :D", "D"),
    ("A", "A"),
    ("A it is", "A"),
    ("A thing like that", ""),  # more than three words: an article
    ("A thing like that (A)", "A"),  # unless marked as a letter
    ("A or B", ""),  # two letters
    ("A. or B.", ""),
    ("A and B.", "A"),  # bare letters come first, and B. is none
    ("E", "E"),  # understood, never right
    ("b", ""),  # small letters are none
    ("B. a cat", "B"),  # letters come before text
    ("It is A cat", "A"),  # the text of an option
    ("a cat", "A"),
    ("dog", "B"),
    ("the DOGHOUSE", ""),  # holds Dog as well
    ("13", "D"),  # anywhere in the answer
    ("fish", ""),
    ("", ""),
  ],
)
def test_mmbench_infers(answer, expected):
  assert infer(answer, OPTIONS) == expected


IMAGE = b"\xff\xd8 an image" * 20_000  # its cell is longer than csv's limit
HEADER = (
  *("index", "question", "hint", "A", "B", "C", "D", "answer", "category"),
  *("image", "source", "l2-category", "comment", "split"),
)


def mmbench_rows():
  """Question 1 with four options, 2 with two; all rotations."""

  def row(index, question, hint, options, answer, category):
    options = (*options, "", "")[:4] if len(options) < 4 else options
    cells = (index, question, hint, *options, answer, category)
    image = base64.b64encode(IMAGE).decode()
    return (*cells, image, "src", f"l2 {category}", "", "dev")

  four, two = ["cat", "dog", "NA", "cow"], ["one", "two"]
  four[2] = "hen"
  rows = []
  for n, answer in enumerate("ADCB"):  # the right one moves as they rotate
    options = four[n:] + four[:n]
    rows.append(
      row(1 + n * 10**6, 'Which "pet"?', "Look.", options, answer, "x")
    )
  for n, answer in enumerate("BA"):
    options = two[n:] + two[:n]
    rows.append(row(2 + n * 10**6, "How\nmany?", "", options, answer, "y"))
  return rows


def mmbench_folder(folder, rows=None, header=HEADER, name="dev_20230712"):
  out = io.StringIO(newline="")
  table = csv.writer(out, delimiter="\t", lineterminator="\n")
  table.writerow(header)
  table.writerows(rows or mmbench_rows())
  folder.text(f"mmbench_{name}.tsv", out.getvalue())
  return folder


def test_mmbench_asks(folder):
  bench = mmbench.english(mmbench_folder(folder).path)
  questions = list(bench.questions())
  assert [q.id for q in questions][:3] == ["1", "1000001", "2000001"]
  assert questions[0].images == (IMAGE,)
  assert questions[0].prompt == (
    'Look.\nWhich "pet"?\nA. cat\nB. dog\nC. hen\nD. cow' + SUFFIX
  )
  assert questions[4].prompt == "How\nmany?\nA. one\nB. two" + SUFFIX
  chinese = mmbench.chinese(mmbench_folder(folder, name="dev_cn_20231003").path)
  assert next(chinese.questions()).prompt.endswith(
    "D. cow\n请直接回答选项字母。"
  )


@pytest.mark.parametrize(
  "empty", ["", "nan", "NaN", "None", "none", "NA", "N/A"]
)
def test_mmbench_options_end_where_there_is_none(folder, empty):
  rows = mmbench_rows()[4:5]
  rows[0] = (
    *rows[0][:2],
    empty,
    *rows[0][3:5],
    empty,
    "left out",
    *rows[0][7:],
  )
  bench = mmbench.english(mmbench_folder(folder, rows).path)
  (question,) = bench.questions()
  assert question.prompt == "How\nmany?\nA. one\nB. two" + SUFFIX


def test_mmbench_wants_every_rotation(folder):
  bench = mmbench.english(mmbench_folder(folder).path)
  right = {q.id: q.reference["answer"] for q in bench.questions()}
  right |= {"1": "cat", "2": "The answer is B."}  # text; sentence
  assert dict(bench.score(right)) == {
    "circular": 100.0,
    "category/x": 100.0,
    "category/y": 100.0,
    "l2-category/l2 x": 100.0,
    "l2-category/l2 y": 100.0,
    "static": 100.0,
    "few_rotations": 0.0,
    "not_inferred": 0.0,
  }
  one_rotation = right | {"2000001": "B"}
  scores = dict(bench.score(one_rotation))
  assert scores["circular"] == 50 and scores["static"] == 100
  assert scores["category/x"] == 0 and scores["category/y"] == 100
  unclear = right | {"1000002": "one or two"}
  scores = dict(bench.score(unclear))
  assert scores["circular"] == 50
  assert scores["not_inferred"] == pytest.approx(100 / 6)
  original = right | {"2": "A"}
  scores = dict(bench.score(original))
  assert scores["circular"] == 50 and scores["static"] == 50


def test_mmbench_of_which_the_end_is_lost(folder):
  bench = mmbench.english(mmbench_folder(folder, mmbench_rows()[:5]).path)
  right = {q.id: q.reference["answer"] for q in bench.questions()}
  scores = dict(bench.score(right))
  assert (scores["circular"], scores["few_rotations"]) == (100, 50)


def sheet(path):
  space = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
  with zipfile.ZipFile(path) as archive:
    for name in archive.namelist():
      ET.fromstring(archive.read(name))  # well formed
    root = ET.fromstring(archive.read("xl/worksheets/sheet1.xml"))
  return [
    [
      int(cell[0].text) if cell.get("t") is None else cell[0][0].text or ""
      for cell in row
    ]
    for row in root.iter(f"{space}row")
  ]


def test_mmbench_hands_in_a_table(folder, tmp_path):
  bench = mmbench.english(mmbench_folder(folder).path)
  said = {q.id: f"{q.id}: <B> & \x00\ud800 猫" for q in bench.questions()}
  (path,) = bench.write_submission(said, tmp_path)
  assert path.name == "mmbench_dev_20230712.xlsx"
  header, first, *rest = sheet(path)
  assert header == [
    *("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
  ]
  assert first == [
    *(1, 'Which "pet"?', "cat", "dog", "hen", "cow", "1: <B> &  猫", "A", "dev")
  ]
  assert [row[0] for row in rest] == [1000001, 2000001, 3000001, 2, 1000002]
  assert rest[3][4:6] == ["", ""]


def test_mmbench_without_truths_is_handed_in_alone(folder, tmp_path):
  rows = [(*row[:7], "", *row[8:]) for row in mmbench_rows()]
  bench = mmbench.english(mmbench_folder(folder, rows).path)
  said = {q.id: "A" for q in bench.questions()}
  assert list(bench.score(said)) == [] and bench.headline == ""
  assert len(bench.write_submission(said, tmp_path)) == 1


def test_mmbench_names_bad_rows(folder):
  rows = mmbench_rows()
  without_answer = (*rows[4][:7], "", *rows[4][8:])
  for bad, where, got in [
    ([rows[0], rows[0]], "tsv:3", "id '1' a second time"),
    ([rows[0][:5]], "tsv:2", "another number of cells"),
    ([(*rows[0], "more")], "tsv:2", "another number of cells"),
    ([rows[0], without_answer], "tsv", "no answer in the row of index 2"),
    ([rows[1]], "tsv", "rotation 1000001 of a question that is not there"),
    ([("x", *rows[0][1:])], "tsv:2: column index", "'x'"),
    ([("9" * 5000, *rows[0][1:])], "tsv:2: column index", "'999"),
    ([("²", *rows[0][1:])], "tsv:2: column index", "'²'"),
  ]:
    with raises(DataError, where, got):
      mmbench.english(mmbench_folder(folder, bad).path)
  for image in ("no base64!", "é"):
    bad_image = [(*rows[0][:9], image, *rows[0][10:])]
    bench = mmbench.english(mmbench_folder(folder, bad_image).path)
    with raises(DataError, "tsv:2: column image", expected="base64"):
      list(bench.questions())
  header = ("id", *HEADER[1:])
  with raises(DataError, "tsv", "['id', 'question'", "a column index"):
    mmbench.english(mmbench_folder(folder, header=header).path)
  path = folder.path / "mmbench_dev_20230712.tsv"
  path.write_bytes(gzip.compress(path.read_bytes()))
  with raises(DataError, "tsv", "decode byte", "UTF-8", "it is at https:"):
    mmbench.english(folder.path)


def test_mmbench_with_a_byte_order_mark(folder):
  plain = mmbench.english(mmbench_folder(folder).path)
  expected = list(plain.questions())
  path = folder.path / "mmbench_dev_20230712.tsv"
  path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
  assert list(mmbench.english(folder.path).questions()) == expected


def seed_folder(folder):
  types = {"Instance Counting": 5, "Action Recognition": 10}
  truths = [
    ("101", "image", 5, "C"),
    ("102", "image", 5, "A"),
    ("v10_7", "video", 10, "B"),
    ("103", "image", 5, "D"),
  ]
  folder.json(
    "SEED-Bench.json",
    {
      "question_type": types,
      "questions": [
        {
          "question_id": id_,
          "data_type": kind,
          "question_type_id": number,
          "answer": answer,
          "question": "?",
          "choice_a": "x",
        }
        for id_, kind, number, answer in truths
      ],
    },
  )
  # LLaVA's file has numbers where it can.
  folder.jsonl(
    "llava-seed-bench.jsonl",
    [
      {
        "question_id": int(id_) if id_.isdecimal() else id_,
        "image": f"SEED-Bench-{kind}/{id_}",
        "text": f"Q{id_}{SUFFIX}",
        "category": "x",
      }
      for id_, kind, *_ in truths
    ],
  )
  folder.images(*(f"SEED-Bench-{kind}/{id_}" for id_, kind, *_ in truths))
  return folder


def test_seed_takes_the_letter_and_nothing_else(folder, tmp_path):
  seed = SeedBench(seed_folder(folder).path)
  questions = list(seed.questions())
  assert questions[0].prompt == f"Q101{SUFFIX}"
  assert questions[0].images == (folder.path / "SEED-Bench-image/101",)
  said = {"103": "D", "101": "C.", "102": "a", "v10_7": "B"}
  assert dict(seed.score(said)) == {
    "all": 50.0,
    "image": pytest.approx(100 / 3),
    "video": 100.0,
    "type/Instance Counting": pytest.approx(100 / 3),
    "type/Action Recognition": 100.0,
  }
  (path,) = seed.write_submission(said, tmp_path)
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  assert lines == [
    {"question_id": "101", "prediction": "C."},
    {"question_id": "102", "prediction": "a"},
    {"question_id": "v10_7", "prediction": "B"},
    {"question_id": "103", "prediction": "D"},
  ]


def test_seed_files_must_agree(folder):
  path = seed_folder(folder).path / "llava-seed-bench.jsonl"
  lines = path.read_text().splitlines(keepends=True)
  path.write_text("".join(lines[1:]))
  with raises(DataError, ": questions[0]", "question '101' of type 5"):
    SeedBench(folder.path)
  path.write_text("".join(lines) + lines[0].replace("101", "105"))
  with raises(DataError, "SEED-Bench.json", "without '105'", fix="first rel"):
    SeedBench(folder.path)
  known = json.loads((folder.path / "SEED-Bench.json").read_text())
  for types, where, got in (
    (["a type"], "field question_type", "['a type']"),
    ({"a": ["b"]}, ": question_type: field a", "['b']"),
  ):
    folder.json("SEED-Bench.json", known | {"question_type": types})
    with raises(DataError, where, got):
      SeedBench(folder.path)


@pytest.mark.parametrize(
  ("answer", "expected"),
  [
    ("B", "B"),
    ("B. Because", "B"),
    ("The answer is B.", "B"),
    ("So. The answer is B. BECAUSE: x", "B"),
    ("The answer is B", ""),  # something must follow
    ("The answer is B\n", ""),  # and no newline
    ("The answer is Blue", "B"),  # the period stands for anything
    ("The answer is A. The answer is B.", ""),  # once only
    ("the answer is B.", ""),
    ("B.", ""),  # no space after the period
    ("B ", ""),
    ("AB", ""),  # a letter, not a piece of the alphabet
    ("b", ""),
    ("F. x", ""),
    ("The answer is F.", "F"),  # read, and never right
    ("", ""),
  ],
)
def test_scienceqa_letter(answer, expected):
  assert letter(answer) == expected


def test_scienceqa_asks_what_has_an_image(folder, tmp_path):
  def entry(id_, **more):
    value = "Context: N/A\nQuestion: Q?\nOptions: (A) x (B) y\n"
    turns = [{"from": "human", "value": value}, {"from": "gpt", "value": "z"}]
    return {"id": id_, "conversations": turns, **more}

  asked = [
    entry("4", image="4/image.png"),
    entry("5"),
    entry("6", image="6/image.png"),
    entry("7", image="7/image.png"),
  ]
  asked[0]["conversations"][0]["value"] = "<image>\nContext: C\nQuestion: Q?\n"
  folder.json("llava_test_CQM-A.json", asked)
  problems = {
    "4": {"choices": ["x", "y"], "answer": 1, "subject": "natural science"},
    "5": {"choices": ["x", "y"], "answer": 1, "subject": "natural science"},
    "6": {"choices": ["x", "y"], "answer": 0, "subject": "social science"},
    "7": {"choices": ["x", "y"], "answer": 0, "subject": "natural science"},
  }
  folder.json("problems.json", problems)
  folder.images(*(f"images/test/{i}/image.png" for i in (4, 6, 7)))
  sqa = ScienceQa(folder.path)
  questions = list(sqa.questions())
  assert [q.id for q in questions] == ["4", "6", "7"]
  assert questions[0].prompt == f"Context: C\nQuestion: Q?{SUFFIX}"
  assert questions[0].images == (folder.path / "images/test/4/image.png",)
  assert questions[0].reference["answer"] == "B"
  said = {"4": "The answer is B.", "6": "A", "7": "x"}
  assert dict(sqa.score(said)) == {
    "img_accuracy": pytest.approx(200 / 3),
    "subject/natural science": 50.0,
    "subject/social science": 100.0,
    "failed": pytest.approx(100 / 3),
  }
  assert sqa.write_submission(said, tmp_path) == []
  for bad, where, got in [
    ({"conversations": []}, "record 0: conversations[0]", "None"),
    ({"conversations": ["?"]}, "record 0: conversations[0]", "'?'"),
    ({"conversations": {}}, "record 0: field conversations", "{}"),
    ({"image": None}, "llava_test_CQM-A.json", "no question with an image"),
    ({"image": 7}, "record 0: field image", "7"),
    ({"id": 1.5}, "record 0: field id", "1.5"),
  ]:
    folder.json("llava_test_CQM-A.json", [asked[0] | bad])
    with raises(DataError, where, got):
      ScienceQa(folder.path)
  folder.json("llava_test_CQM-A.json", asked)
  for answer, where in (
    (-1, "problem 6: answer"),  # would be the last letter
    (2, "problem 6: answer"),
    ("A", "problem 6: field answer"),
  ):
    bad = {"6": problems["6"] | {"answer": answer}}
    folder.json("problems.json", problems | bad)
    with raises(DataError, where, str(answer)):
      ScienceQa(folder.path)
  del problems["6"]
  folder.json("problems.json", problems)
  with raises(DataError, "record 2: id", "'6', which is not in"):
    ScienceQa(folder.path)
