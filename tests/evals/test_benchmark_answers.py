"""Each image is read and compressed once, whatever the order of questions.

The program is tested in tests/test_evaluate_benchmarks.py.
"""

import base64
import dataclasses
import json

import pytest

from tests import runs
from tests.fields import raises
from tests.inference import engines
from vocojax.errors import DataError
from vocojax.evals import benchmark_answers
from vocojax.evals.benchmarks import registry
from vocojax.evals.benchmarks.base import Question
from vocojax.inference.engine import Engine, Request

COLUMNS = ("index", "question", "hint", "A", "B", "answer", "image")
LIMIT = 12  # tokens of an answer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """MMBench: three questions about two images, each in two rotations.

  Images are base64 cells, and nothing but their bytes says which are the same.
  """
  folder = tmp_path_factory.mktemp("mmbench")
  engines.setup(folder)
  rows = [COLUMNS]
  for rotation in range(2):
    for i, image in enumerate((0, 1, 0)):
      content = (folder / f"{image}.png").read_bytes()
      options = ("red", "green")[:: -1 if rotation else 1]
      rows.append(
        (
          str(i + rotation * 1_000_000),
          f"what color is this ? number {i}",
          "nan",
          *options,
          "BA"[rotation == i % 2],
          base64.b64encode(content).decode(),
        )
      )
  table = "".join("\t".join(row) + "\n" for row in rows)
  (folder / "mmbench_dev_20230712.tsv").write_text(table)
  return folder


@pytest.fixture(scope="module")
def engine(folder):
  with runs.quick_compile():
    parts = engines.setup(folder)
    sizes = {"slots": 4, "prefill_rows": 2, "compress_batch": 3}
    yield Engine(*parts, max_images=1, max_text_length=80, **sizes)


def asker(folder, engine):
  config, *_ = engines.setup(folder)
  return benchmark_answers.Asker(engine, config, LIMIT, False, "a test")


def test_neighbours(folder):
  bench = registry.open_benchmark("mmbench", folder)
  found = benchmark_answers.collect(bench)
  assert [q.id for q in found] == "0 2 1000000 1000002 1 1000001".split()
  assert found[0].images[0] is found[3].images[0]  # kept once
  as_asked = {q.id: q for q in bench.questions()}
  assert {q.id: q for q in found} == as_asked


def test_longest_prompt(folder, engine):
  config, *_ = engines.setup(folder)
  bench = registry.open_benchmark("mmbench", folder)
  questions = benchmark_answers.collect(bench)
  longest = benchmark_answers.longest_prompt(
    questions, config, engine.tokenizer
  )
  results = [
    engine.run([Request([(q.prompt, None)], list(q.images))]) for q in questions
  ]
  assert longest == max(result.num_prompt_tokens for (result,) in results)


def test_every_image_is_compressed_once(folder, engine, tmp_path, monkeypatch):
  bench = registry.open_benchmark("mmbench", folder)
  expected = {
    q.id: engine.ask(q.prompt, list(q.images), max_new_tokens=LIMIT)
    for q in bench.questions()
  }
  assert len(set(expected.values())) > 2
  compressed, compress = [], engine.compress

  def count(images):
    compressed.append(len(images))
    return compress(images)

  monkeypatch.setattr(engine, "compress", count)
  questions = benchmark_answers.collect(bench)
  found = asker(folder, engine).answer(questions, tmp_path, "m")
  assert found == (expected, 0)
  assert compressed == [2]
  again = asker(folder, engine).answer(questions, tmp_path, "m")
  assert again == (expected, 0) and compressed == [2]


def test_bad_image_names_the_question(folder, engine, tmp_path):
  questions = [
    Question(id=id_, prompt="?", images=(content,))
    for id_, content in (
      ("good", (folder / "0.png").read_bytes()),
      ("bad", b"not an image"),
    )
  ]
  with pytest.raises(DataError) as e:
    asker(folder, engine).answer(questions, tmp_path, "m")
  assert e.value.where.startswith("question bad: ")


def test_bad_image_is_answered_with_nothing(folder, engine, tmp_path):
  """Where bad records are skipped; once it is good, it is asked about."""
  contents = {
    "bad": b"not an image",
    "good": (folder / "0.png").read_bytes(),
    "empty": b"",
  }

  def questions():
    return [
      Question(id=id_, prompt="what ?", images=(content,))
      for id_, content in contents.items()
    ]

  asking = asker(folder, engine)
  data = dataclasses.replace(asking.config.data, on_bad_record="skip")
  config = dataclasses.replace(asking.config, data=data)
  asking = dataclasses.replace(asking, config=config)
  found, count = asking.answer(questions(), tmp_path, "m")
  assert count == 2 and (found["bad"], found["empty"]) == ("", "")
  assert found["good"] == engine.ask(
    "what ?", contents["good"], max_new_tokens=LIMIT
  )
  contents["bad"] = (folder / "1.png").read_bytes()
  contents["empty"] = contents["good"]
  again, count = asking.answer(questions(), tmp_path, "m")
  assert count == 0 and again["empty"] == again["good"] == found["good"]
  assert again["bad"] == engine.ask(
    "what ?", contents["bad"], max_new_tokens=LIMIT
  )


def test_question_without_text(tmp_path):
  entry = {"id": 7, "video_id": "a", "question": " \n", "answer": "b"}
  (tmp_path / "test_qa.json").write_text(json.dumps([entry]))
  (tmp_path / "video").mkdir()
  (tmp_path / "video" / "a.mp4").write_bytes(b"")
  bench = registry.open_benchmark("msvd_qa", tmp_path)
  with raises(DataError, "question '7'", "no text"):
    benchmark_answers.collect(bench)
