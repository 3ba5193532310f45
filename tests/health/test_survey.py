"""The doctor's survey of broken data, against what the trainer then does."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from tests import runs
from tests.health.setups import config_of
from vocojax.data import pipeline
from vocojax.data.sources import Record, make_source
from vocojax.data.tokenizer import load_tokenizer
from vocojax.errors import DataError
from vocojax.health import data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """The tiny data set, and one with something wrong in many records."""
  folder = tmp_path_factory.mktemp("data")
  runs.write_data(folder)
  runs.write_config(folder, "one.py", runs.ONE_PHASE)
  entries = [runs.entry(i) for i in range(runs.NUM_RECORDS)]
  entries[1]["image"] = "none.png"
  entries[2]["image"] = "text.png"
  (folder / "text.png").write_text("no image")
  entries[3].pop("conversations")
  entries[4]["image"] = ["4.png", "5.png"]
  entries[5]["conversations"][0]["value"] = "green " * 30
  entries[6]["image"] = "long.png"
  Image.new("RGB", (200, 17)).save(folder / "long.png")
  entries[7]["id"] = entries[8]["id"] = "r0"
  entries[9].pop("image")
  entries[10]["image"] = "cut.png"
  whole = (folder / "10.png").read_bytes()
  (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
  entries[11] = "no object"
  entries[12]["image"] = "none.png"
  entries[13]["image"] = "small.png"
  Image.new("RGB", (40, 15)).save(folder / "small.png")
  entries[14]["image"] = "empty.png"
  (folder / "empty.png").touch()
  (folder / "broken.json").write_text(json.dumps(entries))
  return folder


def survey(config, **options):
  source = make_source(config, config.data.train_split)
  return data.survey(
    source, load_tokenizer(config.data.tokenizer), config, **options
  )


def broken(folder, **changes):
  return config_of(folder, path=str(folder / "broken.json"), **changes)


def encoder(config):
  tokenizer = load_tokenizer(config.data.tokenizer)
  size = config.model.vision.image_size
  return pipeline.Encoder(tokenizer, config.prompt, config.data, size)


def test_refuses_what_the_trainer_refuses(folder):
  """The same records, with the same words."""
  config = broken(folder)
  source = make_source(config, "train")
  rng = np.random.default_rng(0)
  refused = []
  for i in range(len(source)):
    try:
      encoder(config)(source[i], rng)
    except DataError as e:
      refused.append(str(e))
  found = survey(config)
  assert sorted(found.refused) == sorted(refused)
  assert len(refused) == 9
  kinds = {kind: len(messages) for kind, messages in found.bad.items()}
  assert {kind: n for kind, n in kinds.items() if n} == {
    "entry": 2,
    "missing": 2,
    "images": 1,
    "long": 1,
    "decode": 3,
  }


def odd(entry, kind):
  """Makes a record one of those that LLaVA's code takes as they are."""
  question, answer = entry["conversations"] = entry["conversations"][:2]
  if kind == "marker":
    entry["image"] = None
    question["value"] = "<image> is it green ?"
  elif kind == "empty":
    answer["value"] = " "
  elif kind == "unanswered":
    entry["conversations"].append(dict(question))
  elif kind == "long":
    answer["value"] = "no " * 50
  elif kind == "cut":
    question["value"] = "is " * 50


@pytest.mark.parametrize("on_long_text", ["refuse", "truncate"])
@pytest.mark.parametrize("on_bad_record", ["stop", "skip"])
def test_odd_records_are_counted(folder, on_long_text, on_bad_record):
  """By kind; what is cut away stops no run."""
  counts = {"marker": 2, "empty": 3, "unanswered": 4, "long": 5, "cut": 1}
  kinds = [kind for kind, n in counts.items() for _ in range(n)]
  entries = [runs.entry(i) for i in range(runs.NUM_RECORDS)]
  for i, kind in zip(
    np.random.default_rng(0).permutation(len(entries)), kinds, strict=False
  ):
    odd(entries[i], kind)
  (folder / "odd.json").write_text(json.dumps(entries))
  config = config_of(
    folder,
    path=str(folder / "odd.json"),
    on_long_text=on_long_text,
    on_bad_record=on_bad_record,
  )
  found = survey(config, image_positions=(1, 1))
  refused = {kind: len(found.bad[kind]) for kind in found.bad}
  expected = {"marker": 2, "empty": 3, "unanswered": 4}
  if on_long_text == "refuse":
    expected["long"] = 6
  else:
    expected["cut"] = 1
  assert {kind: n for kind, n in refused.items() if n} == expected
  assert len(found.shortened) == (0 if on_long_text == "refuse" else 5)
  status = {f.check.split(", ")[1]: f.status for f in findings(found, config)}
  bad = "error" if on_bad_record == "stop" else "warning"
  assert status["empty turns"] == status["records"] == bad
  if on_long_text == "truncate":
    assert status["all answers beyond the end of a row"] == "warning"
    assert status["texts that are cut off"] == "warning"


def findings(found, config):
  return list(data.findings(found, config))


def test_findings(folder):
  config = broken(folder)
  image = f"record %s: {folder}/%s: "
  where = f"{folder}/broken.json record 3 (id 'r3')"
  lines = [str(f) for f in data.findings(survey(config), config)]
  assert lines == [
    f"data of voco, bad records: 2: error: {where}: field conversations: got "
    'nothing, expected a list of {"from": "human" or "gpt", "value": text}. '
    "Fix: add it, or remove the record (and 1 more)",
    "data of voco, texts longer than a row: 1: error: record r5: got a "
    "conversation of 40 tokens, expected at most 24. Fix: raise "
    "config.data.max_text_length, shorten it, or have it cut by "
    "config.data.on_long_text=truncate",
    "data of voco, missing images: 2: error: "
    + image % ("r1", "none.png")
    + "got no such file, expected a file. Fix: check the path and the folder "
    "it is in (and 1 more)",
    "data of voco, too many images: 1: error: record r4: got 2 images, "
    "expected at most 1. Fix: raise config.data.max_images, or remove the "
    "record",
    "data of voco, images that cannot be decoded: 3: error: "
    + image % ("r2", "text.png")
    + "got a file that begins with b'no image', expected an image (AVIF, BMP, "
    "GIF, JPEG, PNG, PPM, TIFF, WEBP). Fix: save it as PNG or JPEG (and 2 "
    "more)",
    f"data of voco, images of odd size: 2, the first: record r6: {folder}"
    "/long.png 200x17: warning: look at them: they are below 16 pixels high or "
    "wide, or more than 10 times as long as wide",
    "data of voco, repeated ids: 1, r0 3 times: warning: harmless in training; "
    "other ids would tell the records apart in errors",
    "data of voco, records: 15 of 24 can be trained on (images of 18 decoded): "
    "error: training stops at the first other one; correct them, or set "
    "config.data.on_bad_record=skip to leave them out",
    lines[8],
  ]
  assert lines[8].startswith("data of voco, text: 22 conversations of ")
  assert lines[8].endswith(", the longest 40, a row 24: OK")


def test_skipping_is_no_error(folder):
  config = broken(folder, on_bad_record="skip")
  found = list(data.findings(survey(config), config))
  assert {f.status for f in found} == {"warning", "OK"}
  (records,) = (f for f in found if f.check == "data of voco, records")
  assert records.remedy == "training leaves out the others"


def test_sample(folder):
  """What costs little is checked of all; images are decoded for some."""
  full, none = survey(broken(folder)), survey(broken(folder), sample=0)
  assert none.decoded == 0
  assert none.bad == full.bad | {"decode": []}
  assert none.odd == []
  assert none.lengths == full.lengths
  some = survey(broken(folder), sample=12)
  assert 0 < some.decoded <= 12
  assert set(some.bad["decode"]) <= set(full.bad["decode"])


class Records(list):
  """Records in memory are a source, too."""


def test_conversations_that_are_left_out(folder):
  """As the encoder leaves them out: one after the other, until the row ends."""
  image = (folder / "0.png").read_bytes()
  turn = ("is it green ?", "yes it is")  # 8 tokens, </s> included
  other = ("is it green ?", "no")  # 6
  source = Records(
    Record(f"r{i}", (image,), conversations)
    for i, conversations in enumerate(
      [
        ((turn,), (turn,)),
        ((turn,), (turn,), (turn,)),
        ((other,), (other,)),
        (),
      ]
    )
  )
  config = config_of(folder, max_text_length=20, source="easy_vqa")
  tokenizer = load_tokenizer(config.data.tokenizer)

  def check(config):
    found = data.survey(source, tokenizer, config)
    rows = [encoder(config)(r, np.random.default_rng(1)) for r in source]
    laid = [int(row["segment_ids"].max()) for row in rows]
    return found, laid

  found, laid = check(config)
  assert sorted(found.lengths) == [6, 6, 8, 8, 8, 8, 8]
  assert (found.cut, laid) == (["record r1"], [2, 2, 2, 0])
  assert found.empty == ["record r3"]
  lines = [str(f) for f in data.findings(found, config)]
  assert lines[0] == (
    "data of voco, conversations that are left out: some of 1, the first: "
    "record r1: warning: all that do not fit into 20 tokens with those before "
    "them; raise config.data.max_text_length"
  )
  assert lines[1] == (
    "data of voco, records without text: 1, the first: record r3: warning: "
    "config.data.skip_answers leaves out all that they have; remove them"
  )
  # Two of three are sampled, and two always fit.
  two = dataclasses.replace(config.data, conversations_per_record=2)
  found, laid = check(dataclasses.replace(config, data=two))
  assert (found.cut, laid) == ([], [2, 2, 2, 0])
  skip = dataclasses.replace(config.data, skip_answers=("no",))
  found, laid = check(dataclasses.replace(config, data=skip))
  assert (found.empty, laid) == (["record r2", "record r3"], [2, 2, 0, 0])


def test_no_record_can_be_used(folder):
  (folder / "bad.json").write_text('[1, {"id": "a"}]')
  config = config_of(folder, path=str(folder / "bad.json"))
  found = survey(config)
  bad, records = data.findings(found, config)
  assert (bad.check, bad.found) == ("data of voco, bad records", "2")
  assert records.found.startswith("0 of 2 can be trained on")
