"""Files of questions and of answers, before and after any model."""

import json
import os

import pytest

from vocojax.errors import DataError
from vocojax.inference import jobs

SETTINGS = {"model": "m", "max_new_tokens": 4}


def write(path, *entries):
  path.write_text("".join(json.dumps(e) + "\n" for e in entries))
  return str(path)


def test_lines(tmp_path):
  path = tmp_path / "in.jsonl"
  write(
    path,
    {"image": "a.png", "question": "who ?"},
    {"id": "x", "question": "é ?", "temperature": 1, "stop": "."},
    {
      "image": ["b.png", "/c.png"],
      "turns": [["a ?", "b"], ["c ?", None]],
      "stop": ["x", "y"],
    },
    {"id": 9, "image": None, "question": "?"},
  )
  path.write_text("\n" + path.read_text() + "  \n\n")  # blank lines count
  found = jobs.read(str(path))
  assert [job.id for job in found] == [2, "x", 4, 9]
  assert [job.where for job in found] == [f"{path}:{i}" for i in (2, 3, 4, 5)]
  assert [job.images for job in found] == [
    (f"{tmp_path}/a.png",),
    (),
    (f"{tmp_path}/b.png", "/c.png"),
    (),
  ]
  assert [job.turns for job in found] == [
    (("who ?", None),),
    (("é ?", None),),
    (("a ?", "b"), ("c ?", None)),
    (("?", None),),
  ]
  assert [job.fields for job in found] == [
    {},
    {"temperature": 1, "stop": "."},
    {"stop": ["x", "y"]},
    {},
  ]


@pytest.mark.parametrize(
  ("line", "words"),
  [
    ("{", ":2: not JSON (Expecting property name"),
    ("[1]", ":2: found list, expected an object"),
    ("{}", ":2: has neither 'question' and 'turns', expected one of them"),
    (
      '{"question": "a", "turns": []}',
      ":2: has both 'question' and 'turns', expected one of them",
    ),
    (
      '{"question": "a", "max_new_token": 3}',
      ":2: unknown field 'max_new_token'; the nearest field is "
      "'max_new_tokens'; known are id, image,",
    ),
    ('{"question": " "}', ":2: field 'question': found \" \", expected a"),
    ('{"question": null}', ":2: field 'question': found null, expected a"),
    ('{"turns": []}', ":2: field 'turns': found [], expected [question"),
    ('{"turns": [["a"]]}', ":2: field 'turns': found [\"a\"], expected"),
    ('{"turns": [["a", "b"]]}', ':2: field \'turns\': found ["a", "b"]'),
    (
      '{"turns": [["a", null], ["b", null]]}',
      ":2: field 'turns': found [\"a\", null]",
    ),
    (
      '{"turns": [["a", 1], ["b", null]]}',
      ":2: field 'turns': found [\"a\", 1]",
    ),
    ('{"turns": [["", null]]}', ":2: field 'turns': found \"\", expected a"),
    ('{"question": "a", "image": ""}', ":2: field 'image': found \"\""),
    ('{"question": "a", "image": [1]}', ":2: field 'image': found [1]"),
    ('{"question": "a", "id": 1.5}', ":2: field 'id': found 1.5, expected"),
    ('{"question": "a", "id": true}', ":2: field 'id': found true, expected"),
    ('{"question": "a", "id": ""}', ":2: field 'id': found \"\", expected"),
    ('{"question": "a", "id": 1}', ":2: id 1 is also that of "),
    (
      '{"question": "a", "seed": "1"}',
      ":2: field 'seed': found \"1\", expected a whole",
    ),
    ('{"question": "a", "top_k": true}', ":2: field 'top_k': found true"),
    (
      '{"question": "a", "temperature": "hot"}',
      ":2: field 'temperature': found \"hot\", expected a number",
    ),
    ('{"question": "a", "stop": 1}', ":2: field 'stop': found 1, expected"),
    ('{"question": "a", "stop": [1]}', ":2: field 'stop': found [1], expected"),
    ('{"question": [1, 2]}', ":2: field 'question': found [1, 2], expected"),
    (b'{"question": "\xff"}', ":2: not JSON ("),
  ],
)
def test_bad_line(tmp_path, line, words):
  path = tmp_path / "in.jsonl"
  line = line if isinstance(line, bytes) else line.encode()
  path.write_bytes(b'{"question": "good ?"}\n' + line + b"\n")
  with pytest.raises(DataError) as e:
    jobs.read(str(path))
  assert str(e.value).startswith(str(path) + words)


def test_bad_file(tmp_path):
  (tmp_path / "empty").write_text("\n\n")
  for name, words in (
    ("absent", "cannot be read (No such file or directory)"),
    (".", "cannot be read (Is a directory)"),
    ("empty", "an empty file, expected a line per question"),
  ):
    with pytest.raises(DataError) as e:
      jobs.read(str(tmp_path / name))
    assert str(e.value).startswith(f"{tmp_path / name}: {words}")


@pytest.fixture
def three(tmp_path):
  entries = [{"id": i, "question": f"{i} ?", "image": "a.png"} for i in "abc"]
  return jobs.read(write(tmp_path / "in.jsonl", *entries))


def answered(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_goes_on(tmp_path, three):
  """After a kill: an error and half a line are to be written again."""
  path = tmp_path / "out.jsonl"
  answers = jobs.Answers(str(path), three, SETTINGS)
  assert (answers.done, answers.note) == (set(), "")
  answers.write(three[1], answer="yes\nno", finish_reason="eos")
  answers.write(three[0], error="broken")
  assert [x["id"] for x in answered(path)] == ["b", "a"]  # not closed yet
  answers.close()
  [kept, _] = path.read_bytes().splitlines(keepends=True)
  with path.open("ab") as file:
    file.write(kept[:-1].replace(b'"b"', b'"c"'))
  answers = jobs.Answers(str(path), three, SETTINGS)
  assert answers.done == {"b"}
  assert answers.note == (
    f"{path}: dropped an incomplete last line and 1 line with an error"
  )
  assert path.read_bytes() == kept
  answers.write(three[2], answer="é", finish_reason="eos")
  answers.close()
  assert path.read_bytes().startswith(kept) and "é" in path.read_text()
  answers = jobs.Answers(str(path), three, SETTINGS)
  assert (answers.done, answers.note) == ({"b", "c"}, "")
  answers.close()
  assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl"]


@pytest.mark.parametrize(
  "change",
  [
    {"question": "other ?"},
    {"image": "b.png"},
    {"image": ["a.png", "a.png"]},
    {"id": "z"},
    {"seed": 1},
    {"settings": SETTINGS | {"model": "n"}},
  ],
)
def test_other_job(tmp_path, change):
  entry = {"id": "a", "question": "a ?", "image": "a.png"}
  path = tmp_path / "out.jsonl"
  [job] = jobs.read(write(tmp_path / "in.jsonl", entry))
  answers = jobs.Answers(str(path), [job], SETTINGS)
  answers.write(job, answer="yes", finish_reason="eos")
  answers.close()
  before = path.read_bytes()
  settings = change.pop("settings", SETTINGS)
  other = jobs.read(write(tmp_path / "in.jsonl", entry | change))
  with pytest.raises(DataError) as e:
    jobs.Answers(str(path), other, settings)
  assert str(e.value).startswith(
    f"{path}:1: an answer to id 'a' of another job"
  )
  assert path.read_bytes() == before
  # The order and the names of files do not matter, nor the order of keys.
  write(tmp_path / "in2", {"question": "b ?"}, dict(reversed(entry.items())))
  answers = jobs.Answers(str(path), jobs.read(str(tmp_path / "in2")), SETTINGS)
  assert answers.done == {"a"}
  answers.close()


def test_foreign_or_unwritable_answers(tmp_path, three):
  path = tmp_path / "out.jsonl"
  for content, words in (
    (b"notes\n", f"{path}:1: not JSON"),
    (b"[]\n", f"{path}:1: found list"),
    (b'{"id": []}\n', f"{path}:1: an answer to id [] of another job"),
    (b'{"id": "a", "answer": "x"}\n', f"{path}:1: an answer to id 'a' of"),
  ):
    path.write_bytes(content)
    with pytest.raises(DataError) as e:
      jobs.Answers(str(path), three, SETTINGS)
    assert str(e.value).startswith(words)
    assert path.read_bytes() == content
  with pytest.raises(DataError, match="cannot be written to"):
    jobs.Answers(str(tmp_path), three, SETTINGS)
  with pytest.raises(DataError, match="cannot be written to"):
    jobs.Answers(str(tmp_path / "absent" / "out"), three, SETTINGS)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_disk_full(tmp_path, three):
  answers = jobs.Answers(str(tmp_path / "out.jsonl"), three, SETTINGS)
  with open("/dev/full", "a") as full:
    os.dup2(full.fileno(), answers._file.fileno())
  with pytest.raises(DataError, match=r"out.jsonl: cannot be written to \(No"):
    answers.write(three[0], answer="yes", finish_reason="eos")
  answers.close()
