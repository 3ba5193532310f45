"""Decoding speed: the engine against Hugging Face's `generate`.

  python -m benchmarks.decode [--sizes small 135m] [--repeats 5]

The same language model, weights, images of 576 patches and prompts, float32,
two CPU cores, in turn in one process. Hugging Face runs as VoCo-LLaMA was meant
to: `generate` over [<s>, patches, VoCo, text] with its key/value cache, and in
every step a 4-D mask that lets text see the VoCo tokens and text only. The
engine answers from the cache of the VoCo token. Read next: efficiency.py.
"""

import argparse
import statistics
import time

import jax
import numpy as np
import torch
import transformers

from benchmarks import efficiency, hardware, tables
from vocojax.models.compressors import ImageStream
from vocojax.training import state
from vocojax.weights import hf, hf_config

TEXT_LENGTH = 32
NEW_TOKENS = 64  # timed; the first one comes from the prompt and is not
BATCHES = (1, 8)
_CONTEXT = 2048  # positions; Hugging Face wants to know


class VocoForCausalLM(transformers.LlamaForCausalLM):
  """LLaMA under the two-stage mask, at the prompt and at every step."""

  stream: ImageStream

  def forward(
    self,
    input_ids=None,
    attention_mask=None,
    past_key_values=None,
    inputs_embeds=None,
    **kwargs,
  ):
    del attention_mask  # of 1s: no row is padded
    new = inputs_embeds if inputs_embeds is not None else input_ids
    before = past_key_values.get_seq_length() if past_key_values else 0
    index = torch.arange(before + new.shape[1])
    rows = index[before:, None]
    seen = torch.isin(index, torch.tensor(self.stream.visible))
    length = self.stream.length
    allowed = (index <= rows) & ((rows < length) | (index >= length) | seen)
    lowest = torch.finfo(torch.float32).min
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, lowest)
    return super().forward(
      input_ids=input_ids,
      attention_mask=mask.expand(len(new), 1, -1, -1),
      past_key_values=past_key_values,
      inputs_embeds=inputs_embeds,
      **kwargs,
    )


class HuggingFace:
  """Hugging Face's side, with our weights."""

  def __init__(self, setting: efficiency.Setting):
    model = setting.model("voco")
    llm = model.config.llm
    config = transformers.LlamaConfig(
      **hf_config.published_llama(llm, llm.vocab_size, _CONTEXT)
    )
    self._model = VocoForCausalLM(config).eval()
    self._model.stream = model.stream
    params = state.flatten(jax.tree.map(np.asarray, setting.params))
    weights = {}
    for part, prefix in hf.written_parts("original", model.config):
      if part.name not in ("llm", "head"):
        continue
      for rule in part.rules:
        x = params[rule.path]
        names = part.names(rule, prefix, config.num_hidden_layers)
        for name, y in zip(names, x if rule.stacked else [x], strict=True):
          y = hf.to_published(y, rule.transform, 1)
          weights[name] = torch.tensor(y)
    missing, unknown = self._model.load_state_dict(weights, strict=False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if set(missing) - tied or unknown:
      raise RuntimeError(f"weights: missing {missing}, unknown {unknown}")
    self._model.tie_weights()
    image = setting.image[None]
    x = jax.jit(model.embed_images)(setting.params, image)
    self._image = torch.from_numpy(np.array(x))

  def run(self, prompts: list[list[int]], new_tokens: int) -> np.ndarray:
    """Tokens [B, new_tokens]."""
    with torch.inference_mode():
      text = self._model.get_input_embeddings()(torch.tensor(prompts))
      image = self._image.expand(len(prompts), -1, -1)
      return self._model.generate(
        inputs_embeds=torch.cat([image, text], dim=1),
        generation_config=transformers.GenerationConfig(
          do_sample=False,
          max_new_tokens=new_tokens,
          pad_token_id=0,
          eos_token_id=None,
        ),
      ).numpy()


class Ours:
  """The engine's side."""

  def __init__(self, setting: efficiency.Setting, batch: int):
    self._setting = setting
    self._engine = setting.engine(
      "voco", batch, TEXT_LENGTH + NEW_TOKENS + 1 - efficiency.ANSWER
    )
    self._cache = self._engine.compress(setting.image)

  def run(self, batch: int, new_tokens: int) -> np.ndarray:
    """Tokens [B, new_tokens]."""
    requests = [
      self._setting.question(i, TEXT_LENGTH, self._cache, new_tokens)
      for i in range(batch)
    ]
    results = efficiency.answers(self._engine, requests)
    return np.array([r.token_ids for r in results])


def prompts(setting: efficiency.Setting, batch: int) -> list[list[int]]:
  """Token ids of the questions."""
  words = setting.tokenizer.get_vocab()
  asked = [setting.question(i, TEXT_LENGTH, None) for i in range(batch)]
  return [[words[w] for w in r.turns[0][0].split()] for r in asked]


def tokens_per_second(run, batch: int) -> float:
  """Of the decoding steps: what an answer takes beyond its first token."""
  taken = []
  for new_tokens in (1, NEW_TOKENS + 1):
    start = time.perf_counter()
    run(new_tokens)
    taken.append(time.perf_counter() - start)
  return batch * NEW_TOKENS / (taken[1] - taken[0])


def measure(name: str, batch: int, repeats: int) -> list:
  """One row of the table."""
  setting = efficiency.Setting(efficiency.SIZES[name])
  reference, ours = HuggingFace(setting), Ours(setting, batch)
  ids = prompts(setting, batch)
  runs = {
    "ours": lambda n: ours.run(batch, n),
    "theirs": lambda n: reference.run(ids, n),
  }
  found = [run(NEW_TOKENS + 1) for run in runs.values()]  # and warms up
  same = np.mean(found[0] == found[1])
  speeds = {side: [] for side in runs}
  for _ in range(repeats):
    for side, run in runs.items():
      speeds[side].append(tokens_per_second(run, batch))
  ratios = [a / b for a, b in zip(*speeds.values(), strict=True)]
  medians = [statistics.median(x) for x in speeds.values()]
  spread = f"({min(ratios):.2f}-{max(ratios):.2f})"
  return [
    name,
    batch,
    *[f"{x:.1f}" for x in medians],
    f"{statistics.median(ratios):.2f} {spread}",
    f"{same:.1%}",
  ]


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  sizes = efficiency.SIZES
  parser.add_argument("--sizes", nargs="+", choices=sizes, default=list(sizes))
  parser.add_argument("--repeats", type=int, default=5)
  args = parser.parse_args()
  hardware.use()
  torch.set_num_threads(2)
  rows = []
  for name in args.sizes:
    for batch in BATCHES:
      print(f"{name}, batch {batch} ...", flush=True)
      rows.append(measure(name, batch, args.repeats))
  head = ["size", "batch", "vocojax tokens/s", "Hugging Face tokens/s"]
  head += ["vocojax / Hugging Face", "same tokens"]
  print("\n" + tables.markdown(head, rows) + "\n")
  tables.print_provenance(
    "benchmarks.decode",
    torch=torch.__version__,
    transformers=transformers.__version__,
  )


if __name__ == "__main__":
  main()
