"""Configs: typed, complete, readable; every mistake names its key."""

import dataclasses
import json
import pathlib
import re

import pytest
from ml_collections import ConfigDict

from configs import common
from vocojax import config as config_lib
from vocojax.errors import ConfigError

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIGS = sorted(
  path.relative_to(ROOT).as_posix()
  for path in (ROOT / "configs").glob("*.py")
  if path.name not in ("__init__.py", "common.py")
)


def base() -> ConfigDict:
  c = common.get_config()
  c.training.steps = 10
  return c


def set_key(c: ConfigDict, key: str, value) -> None:
  *groups, last = key.split(".")
  for group in groups:
    c = c[group]
  with c.ignore_type():
    c[last] = value


def test_single_phase_is_named_by_its_compressor():
  (phase,) = config_lib.phases(base())
  assert phase.name == "voco"
  assert phase.model.llm.padded_vocab_size == 32128
  assert phase.model.vision.num_patches == 576
  assert phase.model.vision.num_feature_layers == 23


def test_phases_overlay_the_rest():
  c = base()
  c.phases = ("full", "voco")
  c.phase.full = {
    "model": {"compressor": {"name": "full"}},
    "optimizer": {"learning_rate": 1},  # an integer is a float too
  }
  c.phase.voco = {"training": {"steps": 20}}
  full, voco = config_lib.phases(c)
  assert (full.name, voco.name) == ("full", "voco")
  assert full.model.compressor.name == "full"
  assert full.model.compressor.num_voco_tokens == 1
  assert full.optimizer.learning_rate == 1.0
  assert full.training.steps == 10
  assert voco.model.compressor.name == "voco"
  assert voco.optimizer.learning_rate == 2e-5
  assert voco.training.steps == 20


def test_phases_run_in_the_order_given_and_may_change_nothing():
  c = base()
  c.phases = ("z", "a")
  assert [phase.name for phase in config_lib.phases(c)] == ["z", "a"]


@pytest.mark.parametrize(
  ("key", "value", "words"),
  [
    (
      "training.stepz",
      5,
      "config.training.stepz: unknown key; the nearest key is 'steps'",
    ),
    (
      "phase.voco",
      {"trainin": {"steps": 5}},
      "config.phase.voco.trainin: unknown key; the nearest key is 'training'",
    ),
    (
      "phase.voco",
      {"data": {"batchsize": 5}},
      "config.phase.voco.data.batchsize: unknown key; the nearest key is "
      "'batch_size'",
    ),
    ("phases", ("a/b",), "config.phases: 'a/b' must be letters"),
    (
      "training.steps",
      "abc",
      "config.training.steps: found 'abc' (str), expected int",
    ),
    (
      "training.steps",
      1.5,
      "config.training.steps: found 1.5 (float), expected int",
    ),
    ("training.steps", True, "config.training.steps: found True (bool)"),
    ("training.steps", 0, "config.training: steps is 0 and epochs is 0"),
    ("training.epochs", 1.0, "exactly one of them must be above 0"),
    ("training", 3, "config.training: found 3, expected a group of keys"),
    (
      "model.compressor.name",
      "vocoo",
      "config.model.compressor.name: found 'vocoo', expected one of voco, ",
    ),
    (
      "optimizer.freeze",
      "^vision/",
      "config.optimizer.freeze: found '^vision/', expected a tuple of str",
    ),
    ("optimizer.freeze", (1,), "config.optimizer.freeze[0]: found 1 (int)"),
    (
      "optimizer.freeze",
      ("(",),
      "config.optimizer.freeze: '(' is not a regular expression",
    ),
    (
      "data.batch_size",
      0,
      "config.data.batch_size: found 0, expected at least 1",
    ),
    (
      "evaluation.max_records",
      -1,
      "config.evaluation.max_records: found -1, expected 0 or more",
    ),
    (
      "model.llm.num_key_value_heads",
      5,
      "config.model.llm.num_key_value_heads: 5 does not divide",
    ),
    ("model.llm.head_dim", 7, "config.model.llm.head_dim: 7 is odd"),
    (
      "model.vision.patch_size",
      15,
      "config.model.vision.patch_size: 15 does not divide image_size (336)",
    ),
    (
      "model.vision.feature_layer",
      -99,
      "config.model.vision.feature_layer: -99 is outside",
    ),
  ],
)
def test_wrong_value(key, value, words):
  c = base()
  c.phases = ("voco",)
  set_key(c, key, value)
  with pytest.raises(ConfigError, match=re.escape(words)) as caught:
    config_lib.phases(c)
  assert "\n" not in str(caught.value)


def test_missing_key():
  c = base()
  del c.data.batch_size
  with pytest.raises(ConfigError, match=r"config\.data\.batch_size: missing"):
    config_lib.phases(c)


@pytest.mark.parametrize("path", CONFIGS)
def test_json_round_trip(path):
  for phase in config_lib.phases(config_lib.load_module(str(ROOT / path))):
    text = phase.to_json()
    assert config_lib.Config.from_json(text, "config.json") == phase


@pytest.mark.parametrize("text", ["{", '{"name": 1}', '{"no": 1}'])
def test_json_of_another_version(text):
  with pytest.raises(ConfigError, match=r"^w/config\.json: "):
    config_lib.Config.from_json(text, "w/config.json")


def test_numbers_of_voco_tokens_to_train_with():
  for k, expected in (
    (1, (1,)),
    (4, (1, 2, 4)),
    (6, (1, 2, 4, 6)),
    (128, (1, 2, 4, 8, 16, 32, 64, 128)),
  ):
    c = base()
    c.model.compressor.num_voco_tokens = k
    (fixed,) = config_lib.phases(c)
    c.model.compressor.train_num_voco_tokens = "elastic"
    (elastic,) = config_lib.phases(c)
    assert fixed.model.compressor.budgets == ()
    assert elastic.model.compressor.budgets == expected


def test_only_voco_tokens_can_be_cut():
  c = base()
  c.phases = ("full", "voco")
  c.phase.full = {"model": {"compressor": {"name": "full"}}}
  elastic = {"compressor": {"train_num_voco_tokens": "elastic"}}
  c.phase.voco = {"model": elastic}
  full, voco = config_lib.phases(c)
  # What was trained so may be used with another compressor, as a bound.
  other = dataclasses.replace(voco.model.compressor, name="full")
  assert other.budgets == () != voco.model.compressor.budgets
  assert full.model.compressor.budgets == ()
  c.model.update(elastic)
  with pytest.raises(ConfigError, match=r"config\.phase\.full\.model\.compr"):
    config_lib.phases(c)


def uncommented(source: str) -> list[str]:
  """Lines that set a plain key with no comment on them or just above."""
  groups = ("llm", "vision", "c")
  missing = []
  before = ""
  for line in source.splitlines():
    key = re.match(rf"\s*(?:{'|'.join(groups)})\.[\w.]+ = (.*)", line)
    if key and not key[1].startswith("ConfigDict("):
      if "#" not in line and not before.lstrip().startswith("#"):
        missing.append(line.strip())
    before = line
  return missing


def test_every_common_key_has_a_comment():
  missing = uncommented((ROOT / "configs" / "common.py").read_text())
  assert missing == []


def test_every_common_key_is_typed():
  c = base()
  (phase,) = config_lib.phases(c)
  typed = json.loads(phase.to_json())
  written = json.loads(c.to_json())
  assert typed.keys() - {"name"} == written.keys() - {"phases", "phase"}
  for group in typed.keys() & written.keys():
    assert typed[group] == written[group]


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    (
      {"data.source": "grid_vqa", "data.flip_images": True},
      "config.data.flip_images: found True with config.data.source 'grid_vqa'",
    ),
    (
      {"model.compressor.name": "qformer", "model.llm.hidden_size": 66},
      "config.model.vision.num_attention_heads: 16, which the Q-Former has",
    ),
  ],
)
def test_keys_that_do_not_go_together(changes, words):
  c = base()
  for key, value in changes.items():
    set_key(c, key, value)
  with pytest.raises(ConfigError, match=re.escape(words)):
    config_lib.phases(c)
