"""Models that cannot be converted, or that do not fit together.

Each is refused before anything is written, and the message names the tensor or
the key. Read next: `published.py`.
"""

import json
import re
import shutil

import pytest
import torch
import transformers

from tests.weights import published
from tests.weights.test_round_trip import tensors
from vocojax.errors import UserError, WeightsError
from vocojax.weights import into
from vocojax.weights.source import Request


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """One model of every layout, for all tests to copy."""
  folder = tmp_path_factory.mktemp("models")
  published.llava_hf(folder / "llava_hf")
  published.llava_hf(folder / "tied", "tied")
  published.original(folder / "original")
  published.parts(folder / "parts")
  return folder


@pytest.fixture
def model(models, tmp_path):
  def copy(name):
    shutil.copytree(models / name, tmp_path / name)
    return tmp_path / name

  return copy


def refuses(message, error=WeightsError, **request):
  with pytest.raises(error, match=message) as caught:
    into.make_plan(Request(**{k: str(v) for k, v in request.items()}))
  print(f"\nerror: {caught.value}")
  assert "\n" not in str(caught.value)


def edit(folder, change):
  """Changes the tensors of a folder."""
  path = folder / "model.safetensors"
  state = tensors(folder)
  for old in folder.glob("model*"):
    old.unlink()
  change(state)
  published.save_safetensors(state, path)


def set_key(folder, key, value):
  """Changes config.json; the key may be dotted."""
  path = folder / "config.json"
  values = json.loads(path.read_text())
  *parents, last = key.split(".")
  group = values
  for name in parents:
    group = group[name]
  group[last] = value
  path.write_text(json.dumps(values))


UP = "language_model.model.layers.1.mlp.up_proj.weight"


def test_missing_tensor(model):
  source = model("llava_hf")
  edit(source, lambda state: state.pop(UP))
  refuses(f"^{re.escape(UP)}: not in ", source=source)


def test_unknown_tensor(model):
  source = model("llava_hf")
  name = "language_model.model.layers.1.self_attn.q_proj.bias"
  edit(source, lambda state: state.update({name: torch.zeros(16)}))
  refuses(f"^{re.escape(name)}: .*no part of the model", source=source)


def test_one_layer_too_many(model):
  source = model("llava_hf")
  set_key(source, "text_config.num_hidden_layers", 1)
  refuses(r"^language_model\.model\.layers\.1\.", source=source)


def test_shape(model):
  source = model("llava_hf")
  edit(source, lambda state: state.update({UP: torch.zeros(24, 15)}))
  refuses(
    rf"^{re.escape(UP)}: has shape \(24, 15\), expected \(24, 16\)",
    source=source,
  )


def test_number_type(model):
  source = model("llava_hf")
  edit(source, lambda s: s.update({UP: torch.zeros(24, 16).double()}))
  refuses(rf"^{re.escape(UP)}: float64, expected one of bf", source=source)


def test_part_under_two_names(model):
  source = model("llava_hf")

  def double(state):
    for name in list(state):
      if name.startswith("multi_modal"):
        state[f"model.{name}"] = state[name].clone()

  edit(source, double)
  refuses(
    r"multi_modal_projector\.linear_1\.weight and as model\.multi_modal.*twice",
    source=source,
  )


def test_part_in_two_files(model):
  source, parts = model("original"), model("parts")
  refuses(
    "class_embedding: in .*clip, expected in one of them; leave out --vision",
    source=source,
    vision=parts / "clip",
  )
  refuses(
    r"0\.weight: in .*mm_projector\.bin, expected in one of them; leave out",
    source=source,
    projector=parts / "mm_projector.bin",
  )


def test_vocabulary_of_another_size(model):
  source = model("llava_hf")
  set_key(source, "text_config.vocab_size", 65)
  refuses(
    r"embed_tokens\.weight: 64 rows, vocab_size in .*config\.json is 65",
    source=source,
  )
  source = model("original")
  published.tokenizer("w99", "<voco>").save_pretrained(source)
  refuses(
    r"embed_tokens\.weight: 30 rows, the tokenizer of .* has 31 tokens",
    source=source,
  )


def test_image_token_among_words(model):
  source = model("llava_hf")
  set_key(source, "image_token_index", 7)
  refuses("id 7 of the images is that of the token 'w4'", source=source)
  set_key(source, "image_token_index", None)
  refuses("no image_token_index", source=source)


def test_clip_of_another_width(model):
  parts = model("parts")
  tower = transformers.CLIPVisionModel(published.clip_config(hidden_size=12))
  shutil.rmtree(parts / "clip")
  tower.save_pretrained(parts / "clip")
  refuses(
    r"mm_projector\.0\.weight: has shape \(16, 8\), expected \(16, 12\)",
    llm=parts / "llm",
    vision=parts / "clip",
    projector=parts / "mm_projector.bin",
  )


def test_head_that_is_not_tied(model):
  source = model("tied")
  name = "language_model.lm_head.weight"
  embedding = tensors(source)["language_model.model.embed_tokens.weight"]
  edit(source, lambda state: state.update({name: embedding.clone()}))
  plan = into.make_plan(Request(source=str(source)))
  assert plan.ignored == ((name, "the same as the embedding"),)
  edit(source, lambda state: state.update({name: embedding + 1}))
  refuses(f"^{name}: differs from the embedding", source=source)


def test_head_that_is_missing(model):
  source = model("llava_hf")
  edit(source, lambda state: state.pop("language_model.lm_head.weight"))
  refuses("no head in it, expected a tensor such as lm_head", source=source)


def test_ignorable_tensors(model):
  source = model("original")
  names = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2),
    "model.vision_tower.vision_tower.vision_model.embeddings.position_ids": (
      torch.arange(5)[None]
    ),
  }
  edit(source, lambda state: state.update(names))
  plan = into.make_plan(Request(source=str(source)))
  assert {name for name, _ in plan.ignored} == names.keys()


@pytest.mark.parametrize(
  "key, value, message",
  [
    ("text_config.hidden_act", "gelu", "hidden_act is 'gelu', expected 'silu'"),
    ("text_config.attention_bias", True, "attention_bias is True"),
    ("text_config.mlp_bias", True, "mlp_bias is True"),
    ("text_config.model_type", "qwen2", "model_type 'qwen2', expected 'llama'"),
    (
      "text_config.rope_parameters",
      {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
      "rope type 'linear'",
    ),
    ("text_config.rms_norm_eps", "x", "rms_norm_eps"),
    ("vision_config.model_type", "siglip_vision_model", "model_type 'siglip"),
    ("vision_config.hidden_act", "relu", "found 'relu'"),
    ("vision_config.num_channels", 1, "num_channels is 1"),
    ("vision_feature_layer", [-2, -3], r"vision_feature_layer \[-2, -3\]"),
    ("vision_feature_select_strategy", "full", "select_strategy is 'full'"),
    ("projector_hidden_act", "relu", "projector_hidden_act is 'relu'"),
    ("multimodal_projector_bias", False, "multimodal_projector_bias is False"),
    ("quantization_config", {}, "quantization_config, expected plain weights"),
  ],
)
def test_what_we_cannot_represent(model, key, value, message):
  source = model("llava_hf")
  set_key(source, key, value)
  refuses(message, error=UserError, source=source)


@pytest.mark.parametrize(
  "key, value, message",
  [
    ("mm_projector_type", "resampler", "mm_projector_type 'resampler'"),
    ("mm_vision_select_feature", "cls_patch", "select_feature is 'cls_patch'"),
    ("mm_use_im_start_end", True, "mm_use_im_start_end is True"),
    ("mm_vision_tower", "unheard/of", "'unheard/of' is not a tower we know"),
  ],
)
def test_what_we_cannot_represent_of_the_original(model, key, value, message):
  source = model("original")
  set_key(source, key, value)
  refuses(message, source=source)


def test_wrong_folders(model, tmp_path):
  parts, whole = model("parts"), model("llava_hf")
  refuses("no such folder", source=tmp_path / "nowhere")
  refuses("a language model alone, expected a LLaVA", source=parts / "llm")
  refuses("a LLaVA, expected a language model alone", llm=whole)
  refuses("no vision tower in it; name a CLIP folder", llm=parts / "llm")
  refuses(
    "model_type 'llama', expected 'clip' or",
    llm=parts / "llm",
    vision=parts / "llm",
  )
  (whole / "config.json").unlink()
  refuses(r"config\.json: no such file", source=whole)
  (whole / "config.json").write_text("{")
  refuses(r"config\.json: not JSON", source=whole)
