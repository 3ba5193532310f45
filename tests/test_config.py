"""Configs: typed, complete, readable; every mistake names its key."""

import dataclasses
import inspect
import json
import pathlib
import re

import pytest
from ml_collections import ConfigDict

from vocojax import config as config_lib
from vocojax.config import default_config
from vocojax.errors import ConfigError

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIGS = sorted(
  path.relative_to(ROOT).as_posix()
  for path in (ROOT / "configs").glob("*.py")
  if path.name != "__init__.py"
)


def base() -> ConfigDict:
  c = default_config()
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
  ("key", "value", "where", "got", "expected"),
  [
    (
      "training.stepz",
      5,
      "config.training.stepz",
      "an unknown key",
      "such a key as 'steps'",
    ),
    (
      "phase.voco",
      {"trainin": {"steps": 5}},
      "config.phase.voco.trainin",
      "an unknown key",
      "such a key as 'training'",
    ),
    (
      "phase.voco",
      {"data": {"batchsize": 5}},
      "config.phase.voco.data.batchsize",
      "an unknown key",
      "such a key as 'batch_size'",
    ),
    ("phases", ("a/b",), "config.phases", "'a/b'", None),
    ("training.steps", "abc", "config.training.steps", "'abc' (str)", "int"),
    ("training.steps", 1.5, "config.training.steps", "1.5 (float)", "int"),
    ("training.steps", True, "config.training.steps", "True (bool)", "int"),
    ("training.steps", 0, "config.training", "steps=0 and epochs=0.0", None),
    (
      "training.epochs",
      1.0,
      "config.training",
      "steps=10 and epochs=1.0",
      "exactly one of them above 0",
    ),
    ("training", 3, "config.training", "3", "a group of keys"),
    (
      "model.compressor.name",
      "vocoo",
      "config.model.compressor.name",
      "'vocoo'",
      None,
    ),
    (
      "optimizer.freeze",
      "^vision/",
      "config.optimizer.freeze",
      "'^vision/' (str)",
      "a tuple of str",
    ),
    ("optimizer.freeze", (1,), "config.optimizer.freeze[0]", "1 (int)", "str"),
    (
      "optimizer.freeze",
      ("(",),
      "config.optimizer.freeze",
      "'(' (missing ), unterminated subpattern at position 0)",
      "a regular expression",
    ),
    ("data.batch_size", 0, "config.data.batch_size", "0", "at least 1"),
    (
      "evaluation.max_records",
      -1,
      "config.evaluation.max_records",
      "-1",
      "0 or more",
    ),
    (
      "model.llm.num_key_value_heads",
      5,
      "config.model.llm.num_key_value_heads",
      "5",
      "a divisor of num_attention_heads (32)",
    ),
    ("model.llm.head_dim", 7, "config.model.llm.head_dim", "7", None),
    (
      "model.vision.patch_size",
      15,
      "config.model.vision.patch_size",
      "15",
      "a divisor of image_size (336)",
    ),
    (
      "model.vision.feature_layer",
      -99,
      "config.model.vision.feature_layer",
      "-99",
      None,
    ),
    (
      "model.llm.rope.theta",
      0.0,
      "config.model.llm.rope.theta",
      "0.0",
      "a number above 0",
    ),
    (
      "model.llm.rms_norm_eps",
      float("inf"),
      "config.model.llm.rms_norm_eps",
      "inf",
      "a finite number",
    ),
    (
      "model.vision.layer_norm_eps",
      -1e-5,
      "config.model.vision.layer_norm_eps",
      "-1e-05",
      "a number above 0",
    ),
  ],
)
def test_wrong_value(key, value, where, got, expected):
  c = base()
  c.phases = ("voco",)
  set_key(c, key, value)
  with pytest.raises(ConfigError) as caught:
    config_lib.phases(c)
  assert (caught.value.where, caught.value.got) == (where, got)
  assert expected in (None, caught.value.expected)
  assert "\n" not in str(caught.value)


def test_missing_key():
  c = base()
  del c.data.batch_size
  with pytest.raises(ConfigError) as caught:
    config_lib.phases(c)
  assert caught.value.where == "config.data.batch_size"
  assert caught.value.got == "nothing"


@pytest.mark.parametrize("path", CONFIGS)
def test_json_round_trip(path):
  for phase in config_lib.phases(config_lib.load_module(str(ROOT / path))):
    saved = json.loads(phase.to_json())
    assert config_lib.Config.from_saved(saved, "config.json") == phase


@pytest.mark.parametrize("saved", [[], {"name": 1}, {"no": 1}])
def test_json_of_another_version(saved):
  with pytest.raises(ConfigError) as caught:
    config_lib.Config.from_saved(saved, "w/config.json")
  assert caught.value.where.startswith("w/config.json: ")


@pytest.mark.parametrize(
  ("group", "key"), [("evaluation", "every"), ("data", "on_long_text")]
)
def test_json_of_before_a_key_was_made(group, key):
  (phase,) = config_lib.phases(base())
  saved = json.loads(phase.to_json())
  del saved[group][key]
  assert config_lib.Config.from_saved(saved, "config.json") == phase


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
  with pytest.raises(ConfigError) as caught:
    config_lib.phases(c)
  key = "config.phase.full.model.compressor.train_num_voco_tokens"
  assert caught.value.where == key


def test_every_key_has_a_comment():
  """On its line or just above."""
  groups = [c for c in vars(config_lib).values() if dataclasses.is_dataclass(c)]
  missing, keys = [], 0
  for group in groups:
    before = ""
    for line in inspect.getsource(group).splitlines():
      if re.match(r"  \w+: .+ = (?!field)", line):
        keys += 1
        if "#" not in line and not before.lstrip().startswith("#"):
          missing.append(line.strip())
      before = line
  assert missing == []
  assert keys == len(DEFAULTS) + 1  # name


def flat(values: dict, prefix: str = "") -> dict:
  result = {}
  for key, value in values.items():
    if isinstance(value, dict):
      result |= flat(value, f"{prefix}{key}.")
    else:
      result[f"{prefix}{key}"] = value
  return result


DEFAULTS = flat(config_lib.default_values())


def resolved(phase: config_lib.Config) -> dict:
  return flat(json.loads(phase.to_json()))


def test_what_a_start_decides_is_none_until_it_is_known():
  unset = {k for k, v in flat(base().to_dict()).items() if v is None}
  shape = {
    k for k in DEFAULTS if re.match(r"model\.(llm|vision|compressor)\.", k)
  }
  assert unset == shape - {"model.llm.rope.round_positions"} | {
    "model.projector",
    "prompt.layout",
    "prompt.strip_newlines",
    "data.pad_to_square",
  }
  (phase,) = config_lib.phases(base())
  assert {k: resolved(phase)[k] for k in unset} == {
    k: DEFAULTS[k] for k in unset
  }


def another(value):
  """A value of the same type."""
  if isinstance(value, str):
    return {"none": "llama3", "quick_gelu": "gelu"}.get(value, "linear")
  return not value if isinstance(value, bool) else 2 * value


FREE = {
  "prompt.layout": "vicuna_v1",
  "data.pad_to_square": False,
  "model.llm.rope.scaling": "llama3",
  "model.llm.initializer_range": 0.1,
  "model.vision.initializer_range": 0.1,
  "model.llm.rope.factor": 2.0,
  "model.llm.rope.low_freq_factor": 2.0,
  "model.llm.rope.high_freq_factor": 2.0,
  "model.llm.rope.original_max_position_embeddings": 100,
  "model.compressor.name": "full",
  "model.compressor.num_voco_tokens": 4,
  "model.compressor.text_sees_bos": True,
  "model.dtype": "float32",
}
# All that says which model it is.
BOUND = {
  k: another(v)
  for k, v in DEFAULTS.items()
  if re.match(r"model\.(llm|vision|projector)", k)
  and k not in FREE
  and not k.endswith("round_positions")
} | {"model.llm.num_key_value_heads": 8}


@pytest.mark.parametrize(("key", "value"), (BOUND | FREE).items())
def test_a_start_decides(key, value):
  """Unset keys are the start's; set ones must be, or are named ones."""
  c = base()
  set_key(c, key, value)
  (start,) = config_lib.phases(c)
  asked, unset = [], base()
  unset.init_from = "elsewhere"
  (taken,) = config_lib.phases(
    unset, lambda p, layout: asked.append((p, layout)) or start
  )
  assert asked == [("elsewhere", "")]
  own = key == "model.dtype"
  assert resolved(taken)[key] == (DEFAULTS[key] if own else value)
  c.init_from = "elsewhere"
  (other,) = config_lib.phases(base())
  if key in FREE:
    (chosen,) = config_lib.phases(c, lambda *_: other)
    assert resolved(chosen)[key] == value
    return
  with pytest.raises(ConfigError) as caught:
    config_lib.phases(c, lambda *_: other)
  assert caught.value.where == f"config.{key}"
  assert caught.value.got == repr(value)
  assert "config.init_from (elsewhere)" in caught.value.expected


def test_later_phases_start_from_the_one_before():
  c = base()
  c.model.llm.rope.theta = 5e5
  c.init_from = "elsewhere"
  c.phases = ("a", "b", "c")
  c.phase.c = {"init_from": "another"}
  (start,) = config_lib.phases(base(), vocab_size=lambda _: 99)
  assert start.model.llm.vocab_size == 99
  with pytest.raises(ConfigError):
    config_lib.phases(c, lambda *_: start)  # has another theta
  c.model.compressor.name = None
  c.phase.a = {"model": {"compressor": {"name": "full", "num_voco_tokens": 2}}}
  found = [phase.model.compressor for phase in config_lib.phases(c)]
  assert [x.name for x in found] == ["full", "voco", "voco"]
  assert [x.num_voco_tokens for x in found] == [2, 1, 1]
  started = [phase.init_from for phase in config_lib.phases(c)]
  assert started == ["elsewhere", "", "another"]
  c.phase.b = {"model": {"llm": {"rope": {"theta": 1e4}}}}
  with pytest.raises(ConfigError) as caught:
    config_lib.phases(c)
  assert caught.value.where == "config.phase.b.model.llm.rope.theta"
  assert "phase a" in caught.value.expected


@pytest.mark.parametrize(
  ("changes", "where"),
  [
    (
      {"data.source": "grid_vqa", "data.flip_images": True},
      "config.data.flip_images",
    ),
    (
      {"model.compressor.name": "qformer", "model.llm.hidden_size": 66},
      "config.model.vision.num_attention_heads",
    ),
  ],
)
def test_keys_that_do_not_go_together(changes, where):
  c = base()
  for key, value in changes.items():
    set_key(c, key, value)
  with pytest.raises(ConfigError) as caught:
    config_lib.phases(c)
  assert caught.value.where == where
