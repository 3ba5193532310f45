"""POPE and MME against values worked out by hand from the official rules."""

import pytest

from tests.fields import raises
from vocojax.errors import DataError
from vocojax.evals.benchmarks.mme import (
  COGNITION,
  PERCEPTION,
  Mme,
  yes_no_other,
)
from vocojax.evals.benchmarks.pope import Pope, yes_or_no


@pytest.mark.parametrize(
  ("answer", "expected"),
  [
    ("No", "no"),
    ("No, there is not.", "no"),
    ("Yes. No, wait", "yes"),  # the first sentence alone counts
    ("There is. No.", "yes"),
    ("There is no dog", "no"),
    ("No, a cat", "no"),
    ("It is not there", "no"),
    ("NO", "yes"),  # neither No nor no
    ("Not", "yes"),  # neither not
    ("no!", "yes"),  # a word ends at a space
    ("no\nyes", "yes"),  # at a space, not at a newline
    ("None", "yes"),
    ("I know", "yes"),
    ("", "yes"),
    (". No", "yes"),
  ],
)
def test_pope_yes_or_no(answer, expected):
  assert yes_or_no(answer) == expected


LABELS = {
  "adversarial": ("yes", "no", "yes", "no"),
  "popular": ("no", "yes"),
  "random": ("no", "no"),
}


def pope_folder(folder):
  questions, number = [], 0
  # In LLaVA's file the categories are mixed with the ids counting through.
  for category in ("random", "adversarial", "popular"):
    labels = LABELS[category]
    lines = []
    for i, label in enumerate(labels):
      image = f"COCO_{category}_{i}.jpg"
      folder.images(f"val2014/{image}")
      questions.append(
        {
          "question_id": number,
          "image": image,
          "text": f"Is there a dog {number}?",
          "category": category,
        }
      )
      number += 1
      lines.append({"question_id": i + 1, "image": image, "label": label})
    folder.jsonl(f"coco/coco_pope_{category}.json", lines)
  folder.jsonl("llava_pope_test.jsonl", questions)
  return folder


def test_pope_figures(folder):
  pope = Pope(pope_folder(folder).path)
  questions = {q.id: q for q in pope.questions()}
  assert questions["2"].reference == {
    "answer": "yes",
    "category": "adversarial",
  }
  # 0, 1 are random (no, no); 2-5 adversarial (yes, no, yes, no); 6, 7 popular
  # (no, yes). In another order than they are asked.
  predictions = {
    "7": "Yes",
    "6": "Yes",
    "5": "No, there is no dog.",
    "4": "No",
    "3": "Yes. No.",
    "2": "yes",
    "1": "No",
    "0": "no",
  }
  scores = dict(pope.score(predictions))
  # Adversarial: yes yes no no against yes no yes no.
  assert scores["adversarial/accuracy"] == 50
  assert scores["adversarial/precision"] == 50
  assert scores["adversarial/recall"] == 50
  assert scores["adversarial/f1"] == 50
  assert scores["adversarial/yes_ratio"] == 50
  # Popular: yes yes against no yes.
  assert scores["popular/accuracy"] == 50
  assert scores["popular/precision"] == 50
  assert scores["popular/recall"] == 100
  assert scores["popular/f1"] == pytest.approx(200 / 3)
  assert scores["popular/yes_ratio"] == 100
  # Random: no no against no no; nothing to find, nothing found.
  assert scores["random/accuracy"] == 100
  assert scores["random/f1"] == 0
  assert scores["mean_f1"] == pytest.approx((50 + 200 / 3) / 3)
  assert len(scores) == 16


def test_pope_labels_of_another_version_are_refused(folder):
  pope_folder(folder)
  path = folder.path / "coco/coco_pope_random.json"
  lines = path.read_text().splitlines()
  path.write_text("\n".join([*lines, lines[0]]))
  with raises(DataError, "random.json", "3 labels", "2, one for", "e3e39262"):
    Pope(folder.path)
  path.write_text("\n".join(reversed(lines)))
  with raises(
    DataError, "random.json:1", "image 'COCO_random_1.jpg'", "COCO_random_0.jpg"
  ):
    Pope(folder.path)


def test_pope_with_byte_order_marks(folder):
  expected = list(Pope(pope_folder(folder).path).questions())
  for path in folder.path.rglob("*.json*"):
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
  assert list(Pope(folder.path).questions()) == expected


@pytest.mark.parametrize(
  ("answer", "expected"),
  [
    ("Yes", "yes"),
    ("YES.", "yes"),
    ("no", "no"),
    ("Yes, no", "yes"),
    ("not yes", "no"),  # only the first four characters count
    ("Know", "no"),  # which may be within a word
    ("I no longer", "no"),
    ("The yes", "other"),
    ("A yes", "other"),
    ("I say no", "other"),
    ("", "other"),
  ],
)
def test_mme_yes_no_other(answer, expected):
  assert yes_no_other(answer) == expected


RELEASE = "MME_Benchmark_release_version"
SUFFIX = "\nAnswer the question using a single word or phrase."


def mme_folder(folder, images=2):
  """Every subtask has `images` images; OCR keeps its texts in a folder."""
  lines = []
  for subtask in PERCEPTION + COGNITION:
    deep = subtask == "OCR"
    for i in range(images):
      image = f"{subtask}/{'images/' if deep else ''}{i}.jpg"
      folder.images(f"{RELEASE}/{image}")
      # Some official questions have two spaces before "Please".
      folder.text(
        f"{RELEASE}/{subtask}/{'questions_answers_YN/' if deep else ''}{i}.txt",
        f"Is it {i}? Please answer yes or no.\tYes\n"
        f"Is it {i} not?  Please answer yes or no.\tNo\n",
      )
      lines += [
        {
          "question_id": f"{subtask}/{i}.jpg",
          "image": image,
          "text": f"{question}{SUFFIX}",
          "category": "default",
        }
        for question in (f"Is it {i} not?", f"Is it {i}?")
      ]
  folder.jsonl("llava_mme.jsonl", lines)
  return folder


def test_mme_points(folder, tmp_path):
  mme = Mme(mme_folder(folder).path)
  questions = list(mme.questions())
  assert [q.id for q in questions[:3]] == [
    "existence/0.jpg#1",
    "existence/0.jpg#2",
    "existence/1.jpg#1",
  ]
  assert [q.reference["answer"] for q in questions[:2]] == ["no", "yes"]
  assert questions[0].prompt == f"Is it 0 not?{SUFFIX}"
  predictions = {q.id: q.reference["answer"].title() for q in questions}
  scores = dict(mme.score(predictions))
  assert scores["perception"] == 2000
  assert scores["cognition"] == 800
  # One of existence's four answers wrong: accuracy 75, accuracy+ 50.
  predictions["existence/1.jpg#2"] = "I think no"
  # Both of one OCR image wrong: 50 and 50.
  predictions["OCR/0.jpg#1"] = "A  no"
  predictions["OCR/0.jpg#2"] = "No\tway\r\nout"
  # One of each image wrong: 50 and 0.
  predictions["code_reasoning/0.jpg#1"] = "yes"
  predictions["code_reasoning/1.jpg#2"] = "no"
  scores = dict(mme.score(predictions))
  assert scores["existence/accuracy"] == 75
  assert scores["existence/accuracy_plus"] == 50
  assert scores["existence/points"] == 125
  assert scores["OCR/points"] == 100
  assert scores["code_reasoning/points"] == 50
  assert scores["perception"] == 2000 - 75 - 100
  assert scores["cognition"] == 800 - 150
  paths = mme.write_submission(predictions, tmp_path)
  assert {p.name for p in paths} == {
    f"{subtask}.txt" for subtask in PERCEPTION + COGNITION
  }
  assert (tmp_path / "OCR.txt").read_text() == (
    "0.txt\tIs it 0 not?  Please answer yes or no.\tNo\tA  no\n"
    "0.txt\tIs it 0? Please answer yes or no.\tYes\tNo way  out\n"
    "1.txt\tIs it 1 not?  Please answer yes or no.\tNo\tNo\n"
    "1.txt\tIs it 1? Please answer yes or no.\tYes\tYes\n"
  )


def test_mme_refuses_half_pairs_and_missing_parts(folder):
  path = mme_folder(folder).path / "llava_mme.jsonl"
  lines = path.read_text().splitlines(keepends=True)
  path.write_text("".join(lines[1:]))
  with raises(
    DataError, "llava_mme.jsonl:1", "1 questions about existence/0.txt", "two"
  ):
    Mme(folder.path)
  path.write_text("".join(lines[4:]))
  with raises(DataError, "llava_mme.jsonl", "no question of existence"):
    Mme(folder.path)
  path.write_text("".join(lines))
  truth = folder.path / RELEASE / "count/0.txt"
  truth.write_text("Is it 5? Please answer yes or no.\tYes\n")
  got = "question 'Is it 0 not?', which is not in"
  with raises(DataError, "llava_mme.jsonl:5", got):
    Mme(folder.path)
  truth.write_text("Is it 0? Please answer yes or no. Yes\n")
  with raises(DataError, "count/0.txt:1", "answer yes or no. Yes'", "a tab"):
    Mme(folder.path)
  truth.write_bytes(b"\x1f\x8b\x08\xff")
  with raises(DataError, "count/0.txt", "decode byte", "UTF-8 text"):
    Mme(folder.path)
  truth.unlink()
  with raises(DataError, "count/0.txt", "no such file", fix="BradyFU"):
    Mme(folder.path)
  bad = "../existence"
  bad_lines = "".join(lines[:4]).replace('"existence/', f'"{bad}/')
  path.write_text(bad_lines + "".join(lines))
  with raises(DataError, ": question_id", "'..'", "a path inside"):
    Mme(folder.path)
