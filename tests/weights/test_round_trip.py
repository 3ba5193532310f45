"""Published weights to a checkpoint and back: the same bits, the same model.

Read next: `published.py`.
"""

import json
import pathlib

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open

from tests.weights import published
from tests.weights.test_parity import hf_logits, inputs, original_logits
from vocojax.data.tokenizer import VOCO_TOKEN
from vocojax.errors import CheckpointError, WeightsError
from vocojax.models.compressors import StreamTokens
from vocojax.training import checkpoint, checksums
from vocojax.weights import into, out_of, stream, write_out
from vocojax.weights.source import Request


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
  """Layers in several chunks, tensors in several blocks, several files."""
  monkeypatch.setattr(stream, "_CHUNK_BYTES", 120)
  monkeypatch.setattr(write_out, "_BLOCK_BYTES", 100)
  monkeypatch.setattr(write_out, "_SHARD_BYTES", 5000)


def there_and_back(folder: pathlib.Path, to: str, dtype: str = "", **request):
  """Converts `source` to a checkpoint, and that to layout `to`."""
  request = {"source": str(folder / "source")} | request
  plan = into.make_plan(Request(**request))
  stream.write_checkpoint(plan, folder / "checkpoint")
  out = out_of.make_plan(str(folder / "checkpoint"), to, dtype)
  write_out.write(out, folder / "back")
  return folder / "back"


def tensors(folder: pathlib.Path) -> dict[str, torch.Tensor]:
  """All tensors of a folder, under the names that are always written."""
  found = {}
  for path in folder.glob("*.safetensors"):
    with safe_open(path, "pt") as f:
      found |= {name: f.get_tensor(name) for name in f.keys()}
  return {_canonical(name): x for name, x in found.items()}


def _canonical(name: str) -> str:
  newer = ("model.language_model.", "lm_head.", "model.multi_modal")
  tower = name.startswith("model.vision_tower.")
  if tower and "vision_tower.vision_tower" in name:  # the original
    return name
  return published.older(name) if tower or name.startswith(newer) else name


def assert_same_bits(found, expected):
  assert found.keys() == expected.keys()
  for name, x in expected.items():
    assert (found[name].dtype, found[name].shape) == (x.dtype, x.shape), name
    bits = [y.reshape(-1).view(torch.uint8) for y in (found[name], x)]
    assert torch.equal(*bits), name


def load_hf(folder):
  model, info = transformers.LlavaForConditionalGeneration.from_pretrained(
    folder, output_loading_info=True, attn_implementation="eager"
  )
  assert not info["missing_keys"] and not info["unexpected_keys"], info
  assert not info["mismatched_keys"] and not info["error_msgs"], info
  return model


def load_original(folder):
  model, info = published.OriginalLlava.from_pretrained(
    folder, output_loading_info=True, attn_implementation="eager"
  )
  assert not info["missing_keys"] and not info["unexpected_keys"], info
  return model.float().eval()


@pytest.mark.parametrize(
  "names, voco, kind, dtype",
  [
    ("old", False, "multi-head", torch.float16),
    ("new", False, "tied", torch.bfloat16),
    ("old", True, "grouped, tied, llama3 rope, wide heads", torch.float32),
    ("new", True, "grouped", torch.bfloat16),
  ],
)
def test_llava_hf(tmp_path, names, voco, kind, dtype):
  source = tmp_path / "source"
  published.llava_hf(source, kind, names, voco, dtype)
  back = there_and_back(tmp_path, "llava_hf")
  assert_same_bits(tensors(back), tensors(source))
  words = transformers.AutoTokenizer.from_pretrained(back)
  theirs = transformers.AutoTokenizer.from_pretrained(source)
  assert words.get_vocab() == theirs.get_vocab()
  assert words.pad_token == "<pad>"

  processor = transformers.AutoProcessor.from_pretrained(back)
  assert processor.image_token_id == published.IMAGE_ID
  assert processor.patch_size == 4

  images, ids = inputs()
  tokens = StreamTokens((1,), (), 0)
  np.testing.assert_array_equal(
    hf_logits(load_hf(back).float(), tokens, images, ids),
    hf_logits(load_hf(source).float(), tokens, images, ids),
  )


@pytest.mark.parametrize(
  "voco, kind, dtype",
  [
    (True, "multi-head", torch.bfloat16),
    (False, "tied", torch.float16),
    (True, "grouped, tied, llama3 rope, wide heads", torch.float32),
  ],
)
def test_original(tmp_path, voco, kind, dtype):
  source = tmp_path / "source"
  published.original(source, kind, voco, dtype)
  back = there_and_back(tmp_path, "original")
  assert_same_bits(tensors(back), tensors(source))
  words, theirs = (
    transformers.PreTrainedTokenizerFast.from_pretrained(folder).get_vocab()
    for folder in (back, source)
  )
  assert words == theirs and (VOCO_TOKEN in words) == voco

  again, first = load_original(back), load_original(source)
  if voco:
    images, ids = inputs()
    np.testing.assert_array_equal(
      original_logits(again, images, ids, 1),
      original_logits(first, images, ids, 1),
    )
  values = json.loads((back / "config.json").read_text())
  assert values["mm_vision_tower"] == "tower"


def test_voco_joins_llava_hf(tmp_path):
  """Another layout than the source's: `<voco>` follows `<image>`, `<pad>`."""
  model = published.original(tmp_path / "source")
  back = there_and_back(tmp_path, "llava_hf")
  n = published.NUM_TEXT_TOKENS
  words = transformers.AutoTokenizer.from_pretrained(back)
  ids = words.convert_tokens_to_ids(["<image>", "<pad>", "<voco>"])
  assert ids == [n, n + 1, n + 2]
  embedding = load_hf(back).model.language_model.embed_tokens.weight.detach()
  expected = model.model.embed_tokens.weight.detach()
  assert embedding.shape == (64, 16)
  assert torch.equal(embedding[:n], expected[:n])
  assert torch.equal(embedding[n + 2], expected[n])
  mean = expected[:n].mean(0)
  torch.testing.assert_close(embedding[n], mean)
  torch.testing.assert_close(embedding[63], mean)

  # And back again: the same row is <voco>, the tokenizer is ours.
  plan = into.make_plan(Request(source=str(back)))
  stream.write_checkpoint(plan, tmp_path / "again")
  assert plan.model.compressor.name == "voco"
  assert plan.config.prompt.strip_newlines == "original"
  final = out_of.make_plan(str(tmp_path / "again"), "original")
  write_out.write(final, tmp_path / "final")
  assert_same_bits(tensors(tmp_path / "final"), tensors(tmp_path / "source"))


def test_voco_among_the_words(tmp_path):
  """As in a tokenizer that was made for VoCo: no id moves."""
  published.original(tmp_path / "source", voco=False)
  path = tmp_path / "source" / "tokenizer.json"
  path.write_text(path.read_text().replace('"w0"', '"<voco>"'))
  back = there_and_back(tmp_path, "original")
  assert_same_bits(tensors(back), tensors(tmp_path / "source"))
  loaded = checkpoint.load(str(tmp_path / "checkpoint"))
  assert loaded.config.model.llm.vocab_size == published.NUM_TEXT_TOKENS
  assert loaded.config.model.compressor.name == "voco"
  out = out_of.make_plan(str(tmp_path / "checkpoint"), "llava_hf")
  write_out.write(out, tmp_path / "hf")
  words = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
  ids = words.convert_tokens_to_ids(["<voco>", "<image>", "<pad>"])
  assert ids == [3, published.IMAGE_ID, published.IMAGE_ID + 1]
  plan = into.make_plan(Request(source=str(tmp_path / "hf")))
  assert plan.tokenizer.get_vocab() == loaded.tokenizer.get_vocab()
  stream.write_checkpoint(plan, tmp_path / "again")
  final = out_of.make_plan(str(tmp_path / "again"), "original")
  write_out.write(final, tmp_path / "final")
  assert_same_bits(tensors(tmp_path / "final"), tensors(tmp_path / "source"))


def test_llava_hf_as_original(tmp_path):
  """A LLaVA without <voco> loses the rows that only llava-hf has."""
  published.llava_hf(tmp_path / "source")
  back = there_and_back(tmp_path, "original")
  n = published.NUM_TEXT_TOKENS
  theirs = tensors(tmp_path / "source")
  ours = tensors(back)
  assert ours["model.embed_tokens.weight"].shape == (n, 16)
  for name, path in (
    ("model.embed_tokens.weight", "language_model.model.embed_tokens.weight"),
    ("lm_head.weight", "language_model.lm_head.weight"),
  ):
    found = ours.get(name, ours.get(f"language_model.{name}"))
    assert torch.equal(found, theirs[path][:n])


def test_dtype(tmp_path):
  published.llava_hf(tmp_path / "source")
  back = there_and_back(tmp_path, "llava_hf", dtype="bfloat16")
  for name, x in tensors(tmp_path / "source").items():
    assert torch.equal(tensors(back)[name], x.bfloat16()), name
  values = json.loads((back / "config.json").read_text())
  assert values["dtype"] == "bfloat16"


@pytest.mark.parametrize("kind", ["bin", "sharded bin", "beside", "apart"])
def test_other_files_of_the_original(tmp_path, kind):
  """`.bin`, projector in its own file, tower in its own folder."""
  source = tmp_path / "source"
  whole = published.original(tmp_path / "whole")
  where = {"beside": {"projector": "beside"}, "apart": {"tower": "apart"}}
  published.original(source, **where.get(kind, {}))
  if "bin" in kind:
    state = tensors(source)
    for path in source.glob("model*"):
      path.unlink()
    if kind == "bin":
      torch.save(state, source / "pytorch_model.bin")
    else:
      published.save_bins(state, source, 3)
  del whole
  back = there_and_back(tmp_path, "original")
  assert_same_bits(tensors(back), tensors(tmp_path / "whole"))


def test_seed(tmp_path):
  """The new row of <voco> follows from the seed, in embedding and head."""
  parts = published.parts(tmp_path)

  def rows(seed):
    plan = into.make_plan(
      Request(llm=str(parts.llm), vision=str(parts.vision), seed=seed)
    )
    leaves = {leaf.path: leaf for leaf in plan.leaves}
    everything = {
      path: leaf.read(tuple(slice(0, n) for n in leaf.shape))
      for path, leaf in leaves.items()
    }
    n = published.NUM_TEXT_TOKENS
    return (
      everything["llm/embed_tokens/embedding"][n],
      everything["llm/lm_head/kernel"][:, n],
      everything["projector/linear_1/kernel"],
    )

  first, again, other = rows(0), rows(0), rows(1)
  for a, b, c in zip(first, again, other, strict=True):
    assert np.array_equal(a, b) and not np.array_equal(a, c)
  assert not np.array_equal(first[0], first[1])
  assert abs(np.std(np.concatenate([*first[:2], *other[:2]])) / 0.02 - 1) < 0.3


def test_checkpoint_of_training_can_be_exported(tmp_path):
  """Orbax's own format, with compression and in its own database."""
  import orbax.checkpoint as ocp

  published.original(tmp_path / "source")
  expected = tensors(there_and_back(tmp_path, "original"))
  step = tmp_path / "checkpoint" / "checkpoints" / "0"
  loaded = checkpoint.load(str(tmp_path / "checkpoint"))
  with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as c:
    params = c.restore(step / "params", args=ocp.args.StandardRestore())
    trained = tmp_path / "trained" / "checkpoints" / "3"
    trained.mkdir(parents=True)
    c.save(trained / "params", args=ocp.args.StandardSave(params))
  checkpoint.write_settings(trained, loaded.config, loaded.tokenizer)
  plan = out_of.make_plan(str(tmp_path / "trained"), "original")
  write_out.write(plan, tmp_path / "published")
  assert_same_bits(tensors(tmp_path / "published"), expected)


@pytest.mark.parametrize(
  "key, value, where, got",
  [
    ("num_rows", 10**12, "num_rows", "1000000000000"),
    ("num_rows", "30", "num_rows", "'30'"),
    ("voco_row", -1, "voco_row", "-1"),
    ("layout", 7, "field layout", "7"),
    ("vision_tower", [], "field vision_tower", "[]"),
    ("max_position_embeddings", 0, "max_position_embeddings", "0"),
    ("unheard_of", 1, "unheard_of", "1"),
  ],
)
def test_damaged_origin(tmp_path, key, value, where, got):
  """What the converter stored comes with a stranger's checkpoint."""
  folder = tmp_path / "origin"
  folder.mkdir()
  values = {"num_rows": 30, "voco_row": 29, "layout": "original"}
  values |= {"max_position_embeddings": 256, "vision_tower": "tower"}
  (folder / "metadata").write_text(json.dumps(values))
  assert out_of._origin(tmp_path, 32) == values
  (folder / "metadata").write_text(json.dumps(values | {key: value}))
  with pytest.raises(WeightsError) as e:
    out_of._origin(tmp_path, 32)
  assert (e.value.where, e.value.got) == (f"{folder}: {where}", got)


def test_damaged_parameters(tmp_path):
  """An array of another shape, and one that cannot be read."""
  published.original(tmp_path / "source")
  plan = into.make_plan(Request(source=str(tmp_path / "source")))
  stream.write_checkpoint(plan, tmp_path / "checkpoint")
  step = tmp_path / "checkpoint" / "checkpoints" / "0"
  out = out_of.make_plan(str(tmp_path / "checkpoint"), "original")
  chunk = step / "params" / "llm.norm.scale" / "0"
  chunk.write_bytes(chunk.read_bytes()[:-1])
  with pytest.raises(CheckpointError) as e:
    write_out.write(out, tmp_path / "back")
  assert e.value.where == str(chunk)  # by its checksum
  (step / checksums.FILE).unlink()
  out = out_of.make_plan(str(tmp_path / "checkpoint"), "original")
  with pytest.raises(CheckpointError) as e:
    write_out.write(out, tmp_path / "back")
  assert e.value.where == f"{step}: llm/norm/scale"
  left = sorted(p.name for p in tmp_path.iterdir())
  assert left == ["checkpoint", "source"]

  shapes = into.parameter_shapes(plan.model)
  shapes["llm/norm/scale"] = (17,)
  with pytest.raises(CheckpointError) as e:
    out_of._saved(step, shapes)
  assert (e.value.where, e.value.got) == (f"{step}: llm/norm/scale", "(16,)")
  with pytest.raises(CheckpointError) as e:
    out_of._saved(tmp_path, shapes)
  assert e.value.where == f"{tmp_path}: params"
