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
      "image": ["b.png", "sub/c.png"],
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
    (f"{tmp_path}/b.png", f"{tmp_path}/sub/c.png"),
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


DEEP = b"[" * 100_000


@pytest.mark.parametrize(
  ("line", "where", "got"),
  [
    ("{", "line", "Expecting property name enclosed in double quotes at "),
    ("[1]", "line", "[1]"),
    ("{}", "line", "neither question and turns"),
    ('{"question": "a", "turns": []}', "line", "both question and turns"),
    (
      '{"question": "a", "max_new_token": 3}',
      "line",
      "the field 'max_new_token'",
    ),
    ('{"question": " "}', "line: field question", "' '"),
    ('{"question": null}', "line: field question", "None"),
    ('{"question": [1, 2]}', "line: field question", "[1, 2]"),
    ('{"turns": []}', "line: field turns", "[]"),
    ('{"turns": [["a"]]}', "line: field turns", "['a']"),
    ('{"turns": [["a", "b"]]}', "line: field turns", "['a', 'b']"),
    (
      '{"turns": [["a", null], ["b", null]]}',
      "line: field turns",
      "['a', None]",
    ),
    ('{"turns": [["a", 1], ["b", null]]}', "line: field turns", "['a', 1]"),
    ('{"turns": [["", null]]}', "line: field turns", "''"),
    ('{"question": "a", "image": ""}', "line: field image", "''"),
    ('{"question": "a", "image": [1]}', "line: field image", "[1]"),
    ('{"question": "a", "image": "/c.png"}', "line: field image", "'/c.png'"),
    (
      '{"question": "a", "image": ["b", "../c.png"]}',
      "line: field image",
      "'../c.png'",
    ),
    (
      '{"question": "a", "image": "a\\u0000.png"}',
      "line: field image",
      "'a\\x00.png'",
    ),
    ('{"question": "a", "id": true}', "line: field id", "True"),
    ('{"question": "a", "id": []}', "line: field id", "[]"),
    ('{"question": "a", "seed": "1"}', "line: field seed", "'1'"),
    ('{"question": "a", "top_k": true}', "line: field top_k", "True"),
    (
      '{"question": "a", "temperature": "hot"}',
      "line: field temperature",
      "'hot'",
    ),
    (
      '{"question": "a", "temperature": 1' + "0" * 400 + "}",
      "line: field temperature",
      "100000",
    ),
    ('{"question": "a", "temperature": NaN}', "line", "the number 'NaN'"),
    ('{"question": "a", "seed": ' + "9" * 5000 + "}", "line", "Exceeds the"),
    ('{"question": "a", "stop": 1}', "line: field stop", "1"),
    ('{"question": "a", "stop": [1]}', "line: field stop", "[1]"),
    ('{"question": "\\ud83d"}', "line", "half of a surrogate pair"),
    (b'{"question": "\xff"}', "line", "byte 0xff at offset 14"),
    (b'{"question": ' + DEEP, "line", "lists or objects nested too deep"),
    ('{"question": "a", "question": "b"}', "line", "the key 'question' twice"),
  ],
)
def test_bad_line(tmp_path, line, where, got):
  """It has an error, and the others are as they are."""
  path = tmp_path / "in.jsonl"
  line = line if isinstance(line, bytes) else line.encode()
  good = b'{"question": "good ?"}\n'
  path.write_bytes(good + line + b"\n" + good)
  jobs_read = jobs.read(str(path))
  assert [job.id for job in jobs_read] == [1, 2, 3]
  assert [job.error is None for job in jobs_read] == [True, False, True]
  job = jobs_read[1]
  assert (job.where, job.images, job.turns) == (f"{path}:2", (), ())
  assert job.error.where == where
  assert job.error.got.startswith(got)
  assert len(str(job.error)) < 400


@pytest.mark.parametrize(
  ("first", "ids"),
  [
    (b'{"id": 0, "question": "a"}', [0, 2]),
    (b'{"id": 1.5, "question": "a"}', [1.5, 2]),
    (b'{"id": "", "question": "a"}', ["", 2]),
    (b'{"id": null, "question": "a"}', [1, 2]),
    (b'{"id": 2, "question": "a"}', [2, "line 2"]),
    (b'{"id": "x", "question": "\\ud83d"}', ["x", 2]),
    (b'{"id": "x", "question": "\xff"}', ["x", 2]),
    (b'{"id": "x", "question": 3}', ["x", 2]),
    (b'{"id": "\\ud83d", "question": "a"}', [1, 2]),
    (b'{"id": NaN, "question": "a"}', [1, 2]),
    (b'{"id": {}, "question": "a"}', [1, 2]),
    (b'\xef\xbb\xbf{"id": "x", "question": "a"}', ["x", 2]),
  ],
)
def test_ids(tmp_path, first, ids):
  """Any text or number, also of a line that cannot be used otherwise."""
  path = tmp_path / "in.jsonl"
  path.write_bytes(first + b'\n{"question": "b"}')
  assert [job.id for job in jobs.read(str(path))] == ids


def test_two_lines_with_one_id(tmp_path):
  entries = [{"id": i, "question": "a ?"} for i in ("a", 1, "b", 1.0)]
  path = write(tmp_path / "in.jsonl", *entries)
  with pytest.raises(DataError) as e:
    jobs.read(path)
  assert e.value.where == f"{path}:4"
  assert e.value.got == f"the id 1.0, as in {path}:2"


def test_image_folder(tmp_path):
  names = ["a.png", f"{tmp_path}/images/b.png", "c/../d.png"]
  path = write(tmp_path / "in", {"image": names, "question": "a ?"})
  [job] = jobs.read(path, f"{tmp_path}/images")
  assert job.images == tuple(f"{tmp_path}/images/{x}.png" for x in "abd")
  [job] = jobs.read(path, "/")
  assert job.images == ("/a.png", names[1], "/d.png")
  [job] = jobs.read(path, f"{tmp_path}/other")
  assert job.error.got.startswith(f"'{tmp_path}/images/b.png"[:50])
  assert "--image_folder" in job.error.fix


def test_bad_file(tmp_path):
  (tmp_path / "empty").write_text("\n\n")
  os.mkfifo(tmp_path / "pipe")
  for name, got in (
    ("absent", "no such file"),
    ("", "a folder"),
    ("pipe", "a pipe"),
    ("empty", "an empty file"),
  ):
    with pytest.raises(DataError) as e:
      jobs.read(str(tmp_path / name))
    assert (e.value.where, e.value.got) == (str(tmp_path / name), got)
  with pytest.raises(DataError) as e:
    jobs.read("~nosuchuser/in.jsonl")
  assert e.value.where == "~nosuchuser/in.jsonl"


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
  assert e.value.where == f"{path}:1"
  assert e.value.got.startswith("an answer to id 'a' of another job")
  assert path.read_bytes() == before
  # The order and the names of files do not matter, nor the order of keys.
  write(tmp_path / "in2", {"question": "b ?"}, dict(reversed(entry.items())))
  answers = jobs.Answers(str(path), jobs.read(str(tmp_path / "in2")), SETTINGS)
  assert answers.done == {"a"}
  answers.close()


@pytest.mark.parametrize(
  ("content", "where", "got"),
  [
    (b"notes\n", ":1", "Expecting value"),
    (b"notes", ":1", "Expecting value"),
    (b'{"question": "mine"}', ":1: field id", "nothing"),
    (b'{"id": "a", "question": "mine"}', ":1: field key", "nothing"),
    (b"[]\n", ":1", "[]"),
    (b'\n{"id": []}\n', ":2: field id", "[]"),
    (b'{"id": {"a": 1}}\n', ":1: field id", "{'a': 1}"),
    (b'{"id": "a", "key": 1}\n', ":1: field key", "1"),
    (b'{"id": "a", "key": "KEY"}\n', ":1: field answer", "nothing"),
    (b'{"id": "a", "key": "KEY", "answer": 1}\n', ":1: field answer", "1"),
    (b'{"id": "a", "answer": "x"}\n', ":1: field key", "nothing"),
    (
      b'{"id": "a", "answer": "x", "key": "x"}\n',
      ":1",
      "an answer to id 'a' of another job",
    ),
    (
      b'{"id": "z", "answer": "x", "key": "KEY"}\n',
      ":1",
      "an answer to id 'z' of another job",
    ),
    (b'{"id": "a", "answer": "x", "k\n', ":1", "Unterminated string"),
    (b'{"id": "a", "answer": "\xff"}\n', ":1", "byte 0xff"),
    (b'{"id": "a", "answer": ' + DEEP + b"\n", ":1", "lists or objects nes"),
  ],
)
def test_foreign_or_damaged_answers(tmp_path, three, content, where, got):
  """They stay as they are."""
  path = tmp_path / "out.jsonl"
  answers = jobs.Answers(str(path), three, SETTINGS)
  answers.write(three[0], answer="yes", finish_reason="eos")
  answers.close()
  key = json.loads(path.read_text())["key"].encode()
  content = content.replace(b"KEY", key)
  path.write_bytes(content)
  with pytest.raises(DataError) as e:
    jobs.Answers(str(path), three, SETTINGS)
  assert e.value.where == f"{path}{where}"
  assert e.value.got.startswith(got)
  assert path.read_bytes() == content


@pytest.mark.parametrize(
  "torn",
  [
    b"{",
    b'{"id": ',
    b'{"id": "b", "answer": "ye',
    b'{"id": "b", "answer": "ye' + b"\0" * 50,
    b"\0" * 50,
  ],
)
def test_what_a_crash_leaves_is_dropped(tmp_path, three, torn):
  path = tmp_path / "out.jsonl"
  answers = jobs.Answers(str(path), three, SETTINGS)
  answers.write(three[0], answer="yes", finish_reason="eos")
  answers.close()
  kept = path.read_bytes()
  path.write_bytes(kept + torn)
  answers = jobs.Answers(str(path), three, SETTINGS)
  answers.close()
  assert answers.done == {"a"}
  assert answers.note == f"{path}: dropped an incomplete last line"
  assert path.read_bytes() == kept


def test_a_corrected_line_is_answered_at_the_next_run(tmp_path):
  bad, good = {"id": "a", "question": 1}, {"id": "b", "question": "b ?"}
  path, out = tmp_path / "in", tmp_path / "out"
  todo = jobs.read(write(path, bad, good))
  answers = jobs.Answers(str(out), todo, SETTINGS)
  answers.write(todo[0], error="...")
  answers.write(todo[1], answer="yes", finish_reason="eos")
  answers.close()
  todo = jobs.read(write(path, bad | {"question": "a ?"}, good))
  answers = jobs.Answers(str(out), todo, SETTINGS)
  answers.close()
  assert answers.done == {"b"}


def test_unwritable_answers(tmp_path, three):
  os.mkfifo(tmp_path / "pipe")
  for path, got in (
    (tmp_path, "a folder"),
    (tmp_path / "pipe", "a pipe"),
    (tmp_path / "absent" / "out", "No such file or directory"),
  ):
    with pytest.raises(DataError) as e:
      jobs.Answers(str(path), three, SETTINGS)
    assert (e.value.where, e.value.got) == (str(path), got)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_disk_full(tmp_path, three):
  answers = jobs.Answers(str(tmp_path / "out.jsonl"), three, SETTINGS)
  with open("/dev/full", "a") as full:
    os.dup2(full.fileno(), answers._file.fileno())
  with pytest.raises(DataError) as e:
    answers.write(three[0], answer="yes", finish_reason="eos")
  assert e.value.where == str(tmp_path / "out.jsonl")
  assert e.value.got == "No space left on device"
  answers.close()
