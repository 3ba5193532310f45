"""GQA and VQAv2 against values worked out by hand from the official rules."""

import gzip
import json
import os

import pytest

from tests.fields import raises
from vocojax.errors import DataError
from vocojax.evals.benchmarks import vqa_text
from vocojax.evals.benchmarks.base import Benchmark
from vocojax.evals.benchmarks.gqa import Gqa
from vocojax.evals.benchmarks.predictions import (
  PredictionWriter,
  check_complete,
  read_predictions,
)
from vocojax.evals.benchmarks.vqav2 import Vqav2, Vqav2Val, accuracy

SUFFIX = "\nAnswer the question using a single word or phrase."


def gqa_folder(folder):
  def truth(answer, structural, semantic):
    types = {"structural": structural, "semantic": semantic, "detailed": "x"}
    return {"answer": answer, "types": types, "isBalanced": True}

  folder.jsonl(
    "llava_gqa_testdev_balanced.jsonl",
    [
      {
        "question_id": id_,
        "image": "n1.jpg",
        "text": f"Q{id_}?{SUFFIX}",
        "category": "default",
      }
      for id_ in ("201", "202", "203", "204")
    ],
  )
  folder.json(
    "data/testdev_balanced_questions.json",
    {
      "201": truth("yes", "verify", "obj"),
      "202": truth("left", "choose", "rel"),
      "203": truth("t-shirt", "query", "obj"),
      "204": truth("fire hydrant", "query", "rel"),
      "999": truth("not asked", "query", "rel") | {"isBalanced": False},
    },
  )
  folder.images("data/images/n1.jpg")
  return folder


def test_gqa_is_exact_but_for_case_and_last_periods(folder, tmp_path):
  gqa = Gqa(gqa_folder(folder).path)
  assert isinstance(gqa, Benchmark)
  first = next(gqa.questions())
  assert first.prompt == f"Q201?{SUFFIX}"
  assert first.images == (folder.path / "data/images/n1.jpg",)
  predictions = {
    "203": "T-shirt..",  # right: both periods go
    "201": "Yes.",  # right
    "204": "hydrant",  # wrong: no partial match
    "202": "left. ",  # wrong: the space shields the period
  }
  assert dict(gqa.score(predictions)) == {
    "accuracy": 50.0,
    "binary": 50.0,
    "open": 50.0,
    "structural/verify": 100.0,
    "structural/choose": 0.0,
    "structural/query": 50.0,
    "semantic/obj": 100.0,
    "semantic/rel": 0.0,
  }
  (path,) = gqa.write_submission(predictions, tmp_path)
  assert path.name == "testdev_balanced_predictions.json"
  assert json.loads(path.read_text()) == [
    {"questionId": "201", "prediction": "yes"},
    {"questionId": "202", "prediction": "left. "},
    {"questionId": "203", "prediction": "t-shirt"},
    {"questionId": "204", "prediction": "hydrant"},
  ]


def test_a_crash_between_two_answers_changes_no_score(folder, tmp_path):
  gqa = Gqa(gqa_folder(folder).path)
  truth = {"201": "yes", "202": "right", "203": "t-shirt", "204": "No."}
  path, asked = tmp_path / "gqa.jsonl", []

  def run(until):
    writer = PredictionWriter(path, "m")
    for question in gqa.questions():
      if question.id not in writer.answered and len(asked) < until:
        asked.append(question.id)
        writer.add(question.id, question.prompt, truth[question.id])

  run(until=3)
  path.write_bytes(path.read_bytes()[:-9])  # the third answer is cut
  with raises(DataError, "gqa.jsonl:3", "a line that is cut off"):
    read_predictions([path])
  run(until=99)
  assert asked == ["201", "202", "203", "203", "204"]
  predictions = read_predictions([path])
  check_complete(predictions, truth, str(path))
  assert predictions == truth
  assert dict(gqa.score(predictions))["accuracy"] == 50


def test_gqa_names_what_is_wrong_with_its_files(folder):
  gqa = Gqa(gqa_folder(folder).path)
  (folder.path / "data/images/n1.jpg").unlink()
  with raises(DataError, "n1.jpg", "no such image", fix="gqa"):
    list(gqa.questions())
  path = folder.path / "llava_gqa_testdev_balanced.jsonl"
  good = path.read_text()
  entry = {"question_id": "201", "image": "n1.jpg", "text": "Q"}
  for line, where, got in [
    (entry, "", "'201' a second time"),
    (entry | {"question_id": "777"}, "", "question '777', which is not in"),
    (entry | {"image": None}, ": field image", "None"),
    (entry | {"image": ["n1.jpg"]}, ": field image", "['n1.jpg']"),
    (entry | {"question_id": {}}, ": field question_id", "{}"),
    (entry | {"question_id": True}, ": field question_id", "True"),
    ({"text": "Q"}, ": field question_id", "nothing"),
    ([1], "", "[1]"),
  ]:
    path.write_text(good + json.dumps(line) + "\n")
    with raises(DataError, f"balanced.jsonl:5{where}", got):
      Gqa(folder.path)
  for line, got in (
    ('{"question_id": "2\n', "Unterminated string"),
    ('{"question_id": "\\ud800"}\n', "half of a surrogate pair"),
    ('{"question_id": ' + "9" * 5000 + "}\n", "5000 digits"),
    ("[" * 5000 + "\n", "nested too deep"),
  ):
    path.write_text(good + line)
    with raises(DataError, "balanced.jsonl:5", got, fix="eval.zip"):
      Gqa(folder.path)
  path.write_text(good[: good.index("\n") + 1])
  with raises(DataError, "balanced.jsonl", "no question '20", "all balanced"):
    Gqa(folder.path)
  for nothing in ("", "\n \n"):
    path.write_text(nothing)
    with raises(DataError, "balanced.jsonl", "nothing in it"):
      Gqa(folder.path)
  path.write_text(good)
  for known, got in (("[]", "[]"), ("{}", "nothing in it")):
    folder.text("data/testdev_balanced_questions.json", known)
    with raises(DataError, "questions.json", got, fix="dorarad/gqa"):
      Gqa(folder.path)
  types = {"semantic": "x", "structural": "query"}
  for truth, where, got in [
    (None, "", "None"),
    (
      {"answer": "a", "types": {"semantic": "x"}},
      "field structural",
      "nothing",
    ),
    ({"answer": 3, "types": types}, "field answer", "3"),
    (
      {"answer": "a", "types": types, "isBalanced": "no"},
      "field isBalanced",
      "'no'",
    ),
  ]:
    truths = {str(i): truth for i in (201, 202, 203, 204)}
    folder.json("data/testdev_balanced_questions.json", truths)
    with raises(DataError, where, got) as e:
      Gqa(folder.path)
    assert "questions.json: question 20" in e.value.where
  path.write_bytes(gzip.compress(good.encode()))
  with raises(DataError, "balanced.jsonl:1", "byte 0x8b", fix="eval.zip"):
    Gqa(folder.path)


@pytest.mark.parametrize("name", ["/etc/passwd", "../../n1.jpg", "a\0b", ""])
def test_an_image_is_inside_its_folder(folder, name):
  path = gqa_folder(folder).path / "llava_gqa_testdev_balanced.jsonl"
  folder.text("n1.jpg", "not an image of GQA")
  path.write_text(path.read_text().replace("n1.jpg", json.dumps(name)[1:-1], 1))
  with raises(DataError, "question 201: image", repr(name), "a path inside"):
    list(Gqa(folder.path).questions())


def test_links_in_an_image_folder_are_followed(folder):
  path = gqa_folder(folder).path / "data/images"
  path.rename(folder.path / "elsewhere")
  path.symlink_to(folder.path / "elsewhere")
  assert len(list(Gqa(folder.path).questions())) == 4


def test_a_pipe_is_no_file(folder):
  path = gqa_folder(folder).path / "llava_gqa_testdev_balanced.jsonl"
  path.unlink()
  os.mkfifo(path)
  with raises(DataError, path.name, "a pipe"):
    Gqa(folder.path)
  image = folder.path / "data/images/n1.jpg"
  path.unlink()
  gqa = Gqa(gqa_folder(folder).path)
  image.unlink()
  os.mkfifo(image)
  with raises(DataError, "n1.jpg", "no such image"):
    list(gqa.questions())


@pytest.mark.parametrize(
  ("raw", "expected"),
  [
    ("Yes.", "yes"),
    ("The Two dogs", "2 dogs"),
    ("none", "0"),
    ("ten", "10"),
    ("eleven", "eleven"),  # the table ends at ten
    ("a man, an apple and the dog", "man apple and dog"),
    ("dont", "don't"),
    ("don't", "don't"),
    ("couldnt've", "couldn't've"),
    ("couldn'tve", "couldn't've"),
    ("couldntve", "couldntve"),  # with both left out it is not recognised
    ("Im", "im"),  # the official entry is in upper case, and never found
    ("somebody'd", "somebodyd"),  # the official entry is reversed
    ("oclock", "o'clock"),
    ("twas", "'twas"),
    ("well", "well"),
    ("man's hat", "man 's hat"),
    ("1,000", "1000"),
    ("2.5", "2.5"),  # a period before a digit stays
    (".5", ".5"),
    ("5.", "5"),
    ("a.m.", "am"),
    ("10:30", "10:30"),  # colons are not among the marks
    ("black/white", "black white"),  # a mark between words becomes a space
    ("black / white", "black white"),  # beside a space it vanishes
    ("t-shirt", "t shirt"),
    ("t-shirt/-x", "t shirt x"),  # a space that a mark became is none
    ("t-shirt - red", "tshirt red"),  # one space is enough for all of a kind
    ('"stop"', "stop"),
    ("what?!", "what"),
    ("red\nand\tblue ", "red and blue"),
    ("", ""),
    ("the", ""),
    ("." * 40, "." * 8),  # 32 at most: a flag stands where the count belongs
  ],
)
def test_answer_as_it_is_handed_in(raw, expected):
  assert vqa_text.submitted(raw) == expected


def test_digit_groups_take_all_marks_out():
  # The truth keeps its comma until this step; beside it "/" leaves no space.
  assert vqa_text.punctuation("1,000/2,000") == "10002000"
  assert vqa_text.punctuation("1/2") == "1 2"


def test_accuracy_leaves_each_person_out():
  def people(*counts):
    return [answer for answer, count in counts for _ in range(count)]

  # One of ten agrees: leaving that one out gives 0, the nine others 1/3.
  assert accuracy("red", people(("red", 1), ("blue", 9))) == pytest.approx(0.3)
  # Two: 2 x 1/3 + 8 x 2/3. Three: 3 x 2/3 + 7. Four: all 1.
  assert accuracy("red", people(("red", 2), ("blue", 8))) == pytest.approx(0.6)
  assert accuracy("red", people(("red", 3), ("blue", 7))) == pytest.approx(0.9)
  assert accuracy("red", people(("red", 4), ("blue", 6))) == pytest.approx(1.0)
  assert accuracy("green", people(("red", 4), ("blue", 6))) == 0.0


def test_truths_are_cleaned_where_people_differ():
  mixed = ["The 2 cats", "two cats", "2 cats", "Two Cats."] + ["dogs"] * 6
  assert accuracy("2 Cats!", mixed) == pytest.approx(1.0)
  # Where all agree they are compared as they are, but for case.
  assert accuracy("cats", ["The cats"] * 10) == 0.0
  assert accuracy("Yes", [" YES\n"] * 10) == 1.0
  assert accuracy("2", ["two"] * 10) == 0.0
  assert accuracy("2", ["two"] * 9 + ["2"]) == 1.0


def vqa_val_folder(folder):
  questions = [
    {"question_id": 42000, "image_id": 42, "question": "What color?"},
    {"question_id": 42001, "image_id": 42, "question": "How many?"},
  ]
  folder.json(
    "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions}
  )

  def note(id_, kind, start, answers):
    return {
      "question_id": id_,
      "answer_type": kind,
      "question_type": start,
      "answers": [
        {"answer": a, "answer_id": i} for i, a in enumerate(answers, 1)
      ],
    }

  folder.json(
    "v2_mscoco_val2014_annotations.json",
    {
      "annotations": [
        note(42001, "number", "how many", ["two"] * 8 + ["2", "three"]),
        note(42000, "other", "what color", ["red"] * 3 + ["blue"] * 7),
      ]
    },
  )
  folder.images("val2014/COCO_val2014_000000000042.jpg")
  return folder


def test_vqav2_val(folder, tmp_path):
  vqa = Vqav2Val(vqa_val_folder(folder).path)
  questions = list(vqa.questions())
  assert [q.prompt for q in questions] == [
    "What color?" + SUFFIX,
    "How many?" + SUFFIX,
  ]
  name = "COCO_val2014_000000000042.jpg"
  assert questions[0].images == (folder.path / "val2014" / name,)
  predictions = {"42000": "Red.", "42001": "Two"}
  assert dict(vqa.score(predictions)) == pytest.approx(
    {
      "accuracy": 95.0,
      "answer_type/other": 90.0,
      "answer_type/number": 100.0,
      "question_type/what color": 90.0,
      "question_type/how many": 100.0,
    }
  )
  (path,) = vqa.write_submission(predictions, tmp_path)
  assert json.loads(path.read_text()) == [
    {"question_id": 42000, "answer": "red"},
    {"question_id": 42001, "answer": "2"},
  ]


def test_vqav2_val_without_an_annotation(folder):
  vqa_val_folder(folder)
  at = "question 42000: answers"
  for answers, where, got in [
    (
      [{"answer": "red"}],
      "annotations.json",
      "no annotation of question '42001'",
    ),
    ([], at, "none"),
    (["red"], at, "'red'"),
    ([{"answer_id": 1}], f"{at}: field answer", "nothing"),
    ([{"answer": 5}], f"{at}: field answer", "5"),
    ("red", "annotations[0]: field answers", "'red'"),
  ]:
    folder.json(
      "v2_mscoco_val2014_annotations.json",
      {"annotations": [{"question_id": 42000, "answers": answers}]},
    )
    with raises(DataError, where, got):
      Vqav2Val(folder.path)
  folder.json(
    "v2_OpenEnded_mscoco_val2014_questions.json",
    {"questions": [{"question_id": 1, "image_id": "42", "question": "?"}]},
  )
  folder.json("v2_mscoco_val2014_annotations.json", {"annotations": []})
  with raises(DataError, "questions[0]: field image_id", "'42'"):
    Vqav2Val(folder.path)


def test_vqav2_hands_in_every_question_of_test(folder, tmp_path):
  def lines(*ids):
    return [
      {"question_id": i, "image": "a.jpg", "text": "Q", "category": "default"}
      for i in ids
    ]

  folder.jsonl("llava_vqav2_mscoco_test-dev2015.jsonl", lines(7, 8))
  folder.jsonl("llava_vqav2_mscoco_test2015.jsonl", lines(6, 8, 7))
  folder.images("test2015/a.jpg")
  vqa = Vqav2(folder.path)
  assert [q.id for q in vqa.questions()] == ["7", "8"]
  predictions = {"8": "Ten.", "7": "the dont"}
  assert list(vqa.score(predictions)) == []
  (path,) = vqa.write_submission(predictions, tmp_path)
  assert json.loads(path.read_text()) == [
    {"question_id": 6, "answer": ""},
    {"question_id": 8, "answer": "10"},
    {"question_id": 7, "answer": "don't"},
  ]
  folder.jsonl("llava_vqav2_mscoco_test2015.jsonl", lines(6, 8))
  with raises(DataError, "dev2015.jsonl", "question '7', which is not in"):
    Vqav2(folder.path)
