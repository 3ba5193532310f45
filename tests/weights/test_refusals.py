"""Models that cannot be converted, or that do not fit together.

Each is refused before anything is written, and the message names the tensor or
the key. Read next: `published.py`.
"""

import json
import os
import shutil

import pytest
import torch
import transformers

from tests.weights import published
from tests.weights.test_round_trip import tensors
from vocojax.errors import WeightsError
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


def refused(**request) -> WeightsError:
  """The error that a request gives, which is complete and in one line."""
  with pytest.raises(WeightsError) as e:
    into.make_plan(Request(**{k: str(v) for k, v in request.items()}))
  print(f"\nerror: {e.value}")
  error = e.value
  assert "\n" not in str(error)
  assert error.got and error.expected and error.fix
  assert str(error).count(error.where) == 1
  return error


def refuses(where, got: str, **request) -> None:
  """Checks where the error is and how the value begins that was got."""
  error = refused(**request)
  assert error.where == str(where)
  assert error.got.startswith(got), error.got


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
  refuses(f"{source}: {UP}", "no such tensor", source=source)


def test_unknown_tensor(model):
  source = model("llava_hf")
  name = "language_model.model.layers.1.self_attn.q_proj.bias"
  edit(source, lambda state: state.update({name: torch.zeros(16)}))
  refuses(f"{source}: {name}", "a tensor that the config has", source=source)


def test_one_layer_too_many(model):
  source = model("llava_hf")
  set_key(source, "text_config.num_hidden_layers", 1)
  name = "language_model.model.layers.1.input_layernorm.weight"
  refuses(f"{source}: {name}", "a tensor that the config has", source=source)


def test_shape(model):
  source = model("llava_hf")
  edit(source, lambda state: state.update({UP: torch.zeros(24, 15)}))
  error = refused(source=source)
  assert (error.where, error.got) == (f"{source}: {UP}", "shape (24, 15)")
  assert error.expected == "(24, 16) by the config"


def test_embedding_that_is_none(model):
  source = model("llava_hf")
  name = "language_model.model.embed_tokens.weight"
  edit(source, lambda state: state.update({name: torch.zeros(64)}))
  refuses(f"{source}: {name}", "shape (64,)", source=source)


def test_number_type(model):
  source = model("llava_hf")
  edit(source, lambda s: s.update({UP: torch.zeros(24, 16).double()}))
  refuses(f"{source}: {UP}", "numbers of type float64", source=source)


def test_eight_bits(model):
  source = model("llava_hf")
  weights = torch.zeros(24, 16).to(torch.float8_e4m3fn)
  edit(source, lambda state: state.update({UP: weights}))
  error = refused(source=source)
  assert error.where == f"{source / 'model.safetensors'}: {UP}"
  assert error.got == "numbers of type 'F8_E4M3'"
  assert error.fix == "use the model before it was quantised"


def test_part_under_two_names(model):
  source = model("llava_hf")

  def double(state):
    for name in list(state):
      if name.startswith("multi_modal"):
        state[f"model.{name}"] = state[name].clone()

  edit(source, double)
  refuses(
    "model.multi_modal_projector.linear_1.weight",
    "the projector once more, besides multi_modal_projector.linear_1.weight",
    source=source,
  )


def test_part_in_two_files(model):
  source, parts = model("original"), model("parts")
  error = refused(source=source, vision=parts / "clip")
  assert error.where == (
    f"{parts / 'clip'}: vision_model.embeddings.class_embedding"
  )
  assert error.got == f"a vision tower that {source} has, too"
  assert error.fix == "leave out --vision"
  file = parts / "mm_projector.bin"
  error = refused(source=source, projector=file)
  assert error.where == f"{file}: model.mm_projector.0.weight"
  assert error.fix == "leave out --projector"


def test_projector_with_more(model, tmp_path):
  """As LLaVA saves it when it trained rows of the embedding, too."""
  parts = model("parts")
  file = parts / "mm_projector.bin"
  state = torch.load(file) | {"model.embed_tokens.weight": torch.zeros(29, 16)}
  torch.save(state, file)
  request = {"llm": parts / "llm", "vision": parts / "clip", "projector": file}
  error = refused(**request)
  assert error.where == f"{file}: model.embed_tokens.weight"
  assert error.got == "a tensor that is none of the projector's"
  assert "--llm" not in error.fix
  torch.save({"model.norm.weight": torch.zeros(16)}, file)
  refuses(file, "no projector", **request)


def test_vocabulary_of_another_size(model):
  source = model("llava_hf")
  set_key(source, "text_config.vocab_size", 65)
  error = refused(source=source)
  assert error.where == f"{source / 'config.json'}: text_config: vocab_size"
  assert error.got == "65"
  assert error.expected == (
    "64, the rows of language_model.model.embed_tokens.weight"
  )
  source = model("original")
  published.tokenizer("w99", "<voco>").save_pretrained(source)
  error = refused(source=source)
  assert (error.where, error.got) == (f"{source}: tokenizer", "31 tokens")


def test_image_token_among_words(model):
  source = model("llava_hf")
  set_key(source, "image_token_index", 7)
  where = f"{source}: image_token_index"
  refuses(where, "7, the id of the token 'w4'", source=source)
  where = f"{source / 'config.json'}: image_token_index"
  set_key(source, "image_token_index", None)
  refuses(where, "nothing", source=source)
  set_key(source, "image_token_index", 29)
  set_key(source, "image_token_id", 30)
  refuses(where, "another than image_token_id", source=source)


def test_clip_of_another_width(model):
  parts = model("parts")
  tower = transformers.CLIPVisionModel(published.clip_config(hidden_size=12))
  shutil.rmtree(parts / "clip")
  tower.save_pretrained(parts / "clip")
  file = parts / "mm_projector.bin"
  refuses(
    f"{file}: model.mm_projector.0.weight",
    "shape (16, 8)",
    llm=parts / "llm",
    vision=parts / "clip",
    projector=file,
  )


def test_head_that_is_not_tied(model):
  source = model("tied")
  name = "language_model.lm_head.weight"
  embedding = tensors(source)["language_model.model.embed_tokens.weight"]
  edit(source, lambda state: state.update({name: embedding.clone()}))
  plan = into.make_plan(Request(source=str(source)))
  assert plan.ignored == ((name, "the same as the embedding"),)
  edit(source, lambda state: state.update({name: embedding + 1}))
  refuses(f"{source}: {name}", "other values than", source=source)


def test_head_that_is_missing(model):
  source = model("llava_hf")
  edit(source, lambda state: state.pop("language_model.lm_head.weight"))
  refuses(source, "no output head", source=source)


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


def test_spare_row(model):
  """A guess is called one, and can be refused."""
  source = model("original")
  published.tokenizer().save_pretrained(source)
  plan = into.make_plan(Request(source=str(source)))
  (note,) = plan.notes
  assert "guess" in note and "row 29 " in note and "--compressor=full" in note
  assert plan.model.compressor.name == "voco"
  assert plan.origin["voco_row"] == 29
  # Said otherwise, by the user or by the config: <im_patch> has the row.
  plan = into.make_plan(Request(source=str(source), compressor="full"))
  assert plan.notes == () and plan.origin["voco_row"] is None
  assert plan.config.prompt.layout == "vicuna_v1"
  set_key(source, "mm_use_im_patch_token", True)
  plan = into.make_plan(Request(source=str(source)))
  assert plan.notes == () and plan.origin["voco_row"] is None
  assert plan.model.compressor.name == "full"
  # Nothing is guessed where the tokenizer says it.
  published.tokenizer("<voco>").save_pretrained(source)
  plan = into.make_plan(Request(source=str(source)))
  assert plan.notes == () and plan.origin["voco_row"] == 29


_ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0}
_ROPE |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_ROPE |= {"original_max_position_embeddings": 128}


@pytest.mark.parametrize(
  "key, value, where, got",
  [
    ("text_config.hidden_act", "gelu", "", "'gelu'"),
    ("text_config.attention_bias", True, "", "True"),
    ("text_config.mlp_bias", True, "", "True"),
    ("text_config.sliding_window", 4096, "", "4096"),
    ("text_config.attn_logit_softcapping", 50.0, "", "50.0"),
    ("text_config.partial_rotary_factor", 0.5, "", "0.5"),
    ("text_config.logits_scaling", 8.0, "", "8.0"),
    ("text_config.pruned_heads", {"1": [0]}, "", "{'1': [0]}"),
    ("text_config.is_encoder_decoder", True, "", "True"),
    ("text_config.model_type", "qwen2", "", "'qwen2'"),
    ("text_config.model_type", ["llama"], "", "['llama']"),
    (
      "text_config.rope_parameters",
      {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
      "text_config.rope_parameters.rope_type",
      "'linear'",
    ),
    (
      "text_config.rope_scaling",
      {"type": "dynamic", "factor": 2.0},
      "text_config.rope_scaling.type",
      "'dynamic'",
    ),
    (
      "text_config.rope_scaling",
      {"type": "llama3", "rope_type": "yarn"},
      "text_config.rope_scaling.rope_type",
      "'yarn'",
    ),
    (
      "text_config.rope_scaling",
      {"rope_theta": 1e6},
      "text_config.rope_scaling.rope_theta",
      "1000000.0",
    ),
    (
      "text_config.rope_parameters",
      _ROPE | {"attention_factor": 1.3},
      "text_config.rope_parameters.attention_factor",
      "1.3",
    ),
    (
      "text_config.rope_parameters",
      _ROPE | {"factor": -1.0},
      "text_config.rope_parameters.factor",
      "-1.0",
    ),
    (
      "text_config.rope_parameters",
      _ROPE | {"high_freq_factor": 1.0},
      "text_config.high_freq_factor",
      "1.0",
    ),
    (
      "text_config.rope_parameters",
      {"rope_type": "llama3"},
      "text_config.factor",
      "nothing",
    ),
    ("text_config.rope_theta", 0, "", "0"),
    ("text_config.rope_theta", -1e4, "", "-10000.0"),
    ("text_config.rope_theta", 1e300, "", "1e+300"),
    ("text_config.rms_norm_eps", 0.0, "", "0.0"),
    ("text_config.rms_norm_eps", -1e-5, "", "-1e-05"),
    ("text_config.rms_norm_eps", 1e39, "", "1e+39"),
    ("text_config.rms_norm_eps", 10**400, "", "1000"),
    ("text_config.rms_norm_eps", "x", "", "'x'"),
    ("text_config.rms_norm_eps", None, "", "None"),
    ("text_config.num_hidden_layers", 10**9, "", "1000000000"),
    ("text_config.num_hidden_layers", True, "", "True"),
    ("text_config.hidden_size", 2**40, "", "1099511627776"),
    ("text_config.hidden_size", 16.0, "", "16.0"),
    ("text_config.head_dim", 3, "", "3"),
    ("text_config.num_key_value_heads", 3, "", "3"),
    ("text_config.tie_word_embeddings", "no", "text_config.field tie", "'no'"),
    ("tie_word_embeddings", 0, "field tie_word_embeddings", "0"),
    ("vision_config.model_type", "siglip_vision_model", "", "'siglip"),
    ("vision_config.hidden_act", "relu", "", "'relu'"),
    ("vision_config.num_channels", 1, "", "1"),
    ("vision_config.layer_norm_eps", -1.0, "", "-1.0"),
    ("vision_config.patch_size", 3, "", "3"),
    ("vision_config.num_attention_heads", 3, "", "3"),
    ("vision_config.qkv_bias", False, "", "False"),
    ("vision_config", [], "", "[]"),
    ("text_config", "llama", "field text_config", "'llama'"),
    ("vision_feature_layer", [-2, -3], "", "[-2, -3]"),
    ("vision_feature_layer", 99, "", "99"),
    ("vision_feature_select_strategy", "full", "", "'full'"),
    ("projector_hidden_act", "relu", "", "'relu'"),
    ("multimodal_projector_bias", False, "", "False"),
    ("quantization_config", {}, "", "{}"),
    ("image_token_index", "29", "", "'29'"),
    ("model_type", "llava_next", "", "'llava_next'"),
    ("model_type", None, "", "None"),
    ("image_grid_pinpoints", [[336, 672]], "", "[[336, 672]]"),
    ("unheard_of", {"a": 1}, "", "{'a': 1}"),
  ],
)
def test_key_that_is_refused(model, key, value, where, got):
  source = model("llava_hf")
  set_key(source, key, value)
  error = refused(source=source)
  place = (where or key).replace(".", ": ")
  assert error.where.startswith(f"{source / 'config.json'}: {place}")
  assert error.got.startswith(got)


@pytest.mark.parametrize(
  "key, value, where, got",
  [
    ("mm_projector_type", "resampler", "", "'resampler'"),
    ("mm_projector_type", None, "", "None"),
    ("mm_vision_select_feature", "cls_patch", "", "'cls_patch'"),
    ("mm_vision_select_layer", "-2", "", "'-2'"),
    ("mm_use_im_start_end", True, "", "True"),
    ("mm_patch_merge_type", "spatial_unpad", "", "'spatial_unpad'"),
    ("mm_resampler_type", "perceiver", "", "'perceiver'"),
    ("image_aspect_ratio", "anyres", "", "'anyres'"),
    ("image_aspect_ratio", ["pad"], "", "['pad']"),
    ("s2", True, "", "True"),
    ("use_mm_proj", False, "", "False"),
    ("model_type", "mistral", "", "'mistral'"),
    ("model_type", "llava_qwen", "", "'llava_qwen'"),
    ("model_type", "llama", "", "'llama'"),
    ("mm_vision_tower", "unheard/of", "", "'unheard/of'"),
    ("mm_vision_tower", "../../etc", "", "'../../etc'"),
    ("mm_vision_tower", "/proc/self/root", "", "'/proc/self/root'"),
    ("mm_vision_tower", "a\0b", "", "'a\\x00b'"),
    ("mm_vision_tower", "a" * 5000, "", "'aaa"),
    ("mm_vision_tower", 7, "field mm_vision_tower", "7"),
    ("rope_theta", 0, "", "0"),
  ],
)
def test_key_that_is_refused_of_the_original(model, key, value, where, got):
  source = model("original")
  set_key(source, key, value)
  error = refused(source=source)
  assert error.where == f"{source / 'config.json'}: {where or key}"
  assert error.got.startswith(got)


def test_tower_that_was_trained(model):
  """The weights of LLaVA say so; then they must be there."""
  source = model("original")
  set_key(source, "unfreeze_mm_vision_tower", True)
  into.make_plan(Request(source=str(source)))
  edit(
    source,
    lambda state: [state.pop(k) for k in list(state) if "vision_tower" in k],
  )
  where = f"{source / 'config.json'}: unfreeze_mm_vision_tower"
  refuses(where, "true, and no vision tower", source=source)


@pytest.mark.parametrize(
  "content, where, got",
  [
    ("{", "", "Expecting property name"),
    ("[]", "", "[]"),
    ("null", "", "None"),
    ("[" * 100_000, "", "lists or objects nested too deep"),
    (
      '{"rms_norm_eps": Infinity}',
      "",
      "the number 'Infinity' of 'rms_norm_eps'",
    ),
    ('{"rms_norm_eps": NaN}', "", "the number 'NaN' of 'rms_norm_eps'"),
    ('{"rms_norm_eps": 1e999}', "", "the number '1e999' of 'rms_norm_eps'"),
    ('{"hidden_size": 8, "hidden_size": 9}', "", "the key 'hidden_size' twice"),
    (b'{"a": "\xff"}', "", "byte 0xff at offset 7"),
  ],
)
def test_damaged_config(model, content, where, got):
  source = model("llava_hf")
  path = source / "config.json"
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  refuses(f"{path}{where}", got, source=source)


def test_byte_order_mark(model):
  source = model("llava_hf")
  before = into.make_plan(Request(source=str(source)))
  for path in source.glob("*.json"):
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
  after = into.make_plan(Request(source=str(source)))
  assert after.config == before.config
  assert after.tokenizer.get_vocab() == before.tokenizer.get_vocab()


@pytest.mark.parametrize(
  "file", ["config.json", "tokenizer.json", "tokenizer_config.json"]
)
def test_pipe_among_the_files(model, file):
  source = model("llava_hf")
  (source / file).unlink()
  os.mkfifo(source / file)
  refuses(source / file, "a pipe", source=source)


@pytest.mark.parametrize(
  "file, content, got",
  [
    ("tokenizer.json", "[1]", "[1]"),
    ("tokenizer.json", "{", "Expecting property name"),
    ("tokenizer_config.json", '"x"', "'x'"),
    ("tokenizer_config.json", b"\xff\xfe", "byte 0xff at offset 0"),
    ("special_tokens_map.json", "7", "7"),
    ("added_tokens.json", "[]", "[]"),
  ],
)
def test_damaged_tokenizer(model, file, content, got):
  source = model("llava_hf")
  path = source / file
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  refuses(path, got, source=source)


def test_tokenizer_that_is_none(model):
  """The remedy is for the person who converts."""
  source = model("llava_hf")
  (source / "tokenizer.json").write_text('{"model": {"type": "Unheard"}}')
  for _ in range(2):
    error = refused(source=source)
    assert error.where == f"{source}: tokenizer"
    assert "config.data" not in str(error) and "/tmp/tmp" not in str(error)
    for path in source.glob("tokenizer*"):
      path.unlink()


_PREPROCESSOR = {
  "crop_size": {"height": 8, "width": 8},
  "do_center_crop": True,
  "do_convert_rgb": True,
  "do_normalize": True,
  "do_rescale": True,
  "do_resize": True,
  "image_mean": [0.48145466, 0.4578275, 0.40821073],
  "image_processor_type": "CLIPImageProcessor",
  "image_std": [0.26862954, 0.26130258, 0.27577711],
  "processor_class": "LlavaProcessor",
  "resample": 3,
  "rescale_factor": 0.00392156862745098,
  "size": {"shortest_edge": 8},
}


@pytest.mark.parametrize(
  "change, pads",
  [
    ({}, False),
    ({"size": 8, "crop_size": 8}, False),
    ({"do_pad": True}, False),  # which CLIP's own ignores
    ({"do_pad": True, "image_processor_type": "LlavaImageProcessor"}, True),
    ({"do_pad": False, "image_processor_type": "LlavaImageProcessor"}, False),
  ],
)
def test_preprocessor(model, change, pads):
  source = model("llava_hf")
  values = json.dumps(_PREPROCESSOR | change)
  (source / "preprocessor_config.json").write_text(values)
  plan = into.make_plan(Request(source=str(source)))
  assert plan.config.data.pad_to_square == pads


@pytest.mark.parametrize(
  "change",
  [
    {"image_mean": [0.5, 0.5, 0.5]},
    {"image_mean": 0.5},
    {"image_std": [0.26862954, 0.26130258]},
    {"rescale_factor": 0.0078},
    {"resample": 2},
    {"do_center_crop": False},
    {"do_normalize": False},
    {"crop_size": 336},
    {"size": {"height": 8, "width": 8}},
    {"size": {"longest_edge": 8}},
    {"image_grid_pinpoints": [[336, 672]]},
  ],
)
@pytest.mark.parametrize("file", ["preprocessor_config", "processor_config"])
def test_preprocessor_of_other_pixels(model, change, file):
  source = model("llava_hf")
  values = _PREPROCESSOR | change
  if file == "processor_config":
    values = {"image_processor": values, "processor_class": "LlavaProcessor"}
  path = source / f"{file}.json"
  path.write_text(json.dumps(values))
  (key,) = change
  refuses(f"{path}: {key}", repr(change[key]), source=source)


def test_preprocessor_of_a_tower(model):
  source = model("original")
  path = source / "tower" / "preprocessor_config.json"
  path.write_text(json.dumps(_PREPROCESSOR | {"resample": 2}))
  refuses(f"{path}: resample", "2", source=source)
  path.write_text("[]")
  refuses(path, "[]", source=source)


def test_clip_that_contradicts_itself(model):
  """Older configs have the vision half twice."""
  parts = model("parts")
  request = {"llm": parts / "llm", "vision": parts / "clip"}
  set_key(parts / "clip", "vision_config_dict", {"patch_size": 4})
  into.make_plan(Request(**{k: str(v) for k, v in request.items()}))
  set_key(parts / "clip", "vision_config_dict", {"patch_size": 8})
  where = f"{parts / 'clip' / 'config.json'}: vision_config_dict: patch_size"
  refuses(where, "8", **request)


def test_wrong_folders(model, tmp_path):
  parts, whole = model("parts"), model("llava_hf")
  nowhere = tmp_path / "nowhere"
  refuses(f"--source={nowhere}", "no such folder", source=nowhere)
  refuses("~nosuchuser/x", "a user that does not", source="~nosuchuser/x")
  refuses(
    "~nosuchuser/x", "a user that", llm=parts / "llm", vision="~nosuchuser/x"
  )
  llm = parts / "llm"
  error = refused(source=llm)
  assert (error.where, error.got) == (
    f"--source={llm}",
    "a language model alone",
  )
  refuses(f"--llm={whole}", "a LLaVA", llm=whole)
  refuses(llm, "no vision tower", llm=llm)
  where = f"{llm / 'config.json'}: model_type"
  refuses(where, "'llama'", llm=llm, vision=llm)
  (whole / "config.json").unlink()
  refuses(whole / "config.json", "no such file", source=whole)


def test_lora(model):
  """Of LLaVA's own, which have a config.json, and of peft's."""
  source = model("original")
  for path in source.glob("model*"):
    path.unlink()
  (source / "adapter_config.json").write_text("{}")
  (source / "adapter_model.safetensors").write_bytes(b"")
  refuses(source, "a LoRA adapter", source=source)
  (source / "config.json").unlink()
  error = refused(source=source)
  assert (error.where, error.got) == (str(source), "a LoRA adapter")
  assert "merge" in error.fix
