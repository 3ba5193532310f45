"""What compressing once saves, and where it costs: the paper's Table 7, made.

  python -m benchmarks.efficiency [--sizes small 135m] [--repeats 3] [--plot F]
    [--json F]
  python -m benchmarks.efficiency --platform=gpu --sizes 7B

Three ways to ask several questions about one image of 576 patches, with the
same weights, the same prompts and the same engine, in one run:

- none: nothing is kept; every question brings the image again (LLaVA);
- full: the keys and values of <s> and all patches are kept;
- voco: those of one VoCo token are kept.

Weights are random, since speed does not depend on them; `135m` has the shape of
SmolLM2-135M with CLIP ViT-L/14-336 before it. Answers have 16 tokens. `7B`, the
published model in bfloat16, is for a GPU of 40 GiB or more; where it is not
measured it is counted by the formula of vocojax/models/flops.py. `--json`
writes what `python -m vocojax.report` makes a table of. Read next:
vocojax/inference/engine.py.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import statistics
import time

import jax
import matplotlib
import numpy as np

from benchmarks import hardware, tables
from configs import voco_1tok
from vocojax import assemble
from vocojax import config as config_lib
from vocojax.data import tokenizer as tokenizer_lib
from vocojax.evals.report import cache_bytes
from vocojax.inference.cache import VocoCache
from vocojax.inference.engine import Engine, Request, Result
from vocojax.models import flops
from vocojax.models.vlm import VisionLanguageModel

_COMMON = {
  "prompt.layout": "qa_v1",
  "model.dtype": "float32",
  "model.remat": "none",
  "model.llm.vocab_multiple": 1,
}
# Changes to configs/voco_1tok.py.
SIZES = {
  "small": _COMMON
  | {
    "model.llm.vocab_size": 4096,
    "model.llm.hidden_size": 512,
    "model.llm.intermediate_size": 1376,
    "model.llm.num_hidden_layers": 8,
    "model.llm.num_attention_heads": 8,
    "model.llm.num_key_value_heads": 8,
    "model.llm.head_dim": 64,
    "model.vision.hidden_size": 512,
    "model.vision.intermediate_size": 2048,
    "model.vision.num_hidden_layers": 8,
    "model.vision.num_attention_heads": 8,
  },
  "135m": _COMMON
  | {
    "model.llm.vocab_size": 49152,
    "model.llm.hidden_size": 576,
    "model.llm.intermediate_size": 1536,
    "model.llm.num_hidden_layers": 30,
    "model.llm.num_attention_heads": 9,
    "model.llm.num_key_value_heads": 3,
    "model.llm.head_dim": 64,
    "model.llm.tie_word_embeddings": True,
    "model.llm.rope.theta": 100000.0,
  },
  "7B": _COMMON
  | {
    "model.dtype": "bfloat16",
    "model.param_dtype": "bfloat16",
  },
}
WAYS = {"none": "full", "full": "full", "voco": "voco"}  # their compressors
TITLES = {"none": "no cache", "full": "full cache", "voco": "VoCo cache"}
TEXT_LENGTHS = (32, 128, 512)
QUESTIONS = (1, 10, 100)
ANSWER = 16  # tokens
SLOTS = 10  # questions answered side by side, in all three ways
THROUGHPUT_SLOTS = 32


@dataclasses.dataclass(frozen=True)
class Row:
  """Measured seconds of one way and text length."""

  way: str
  text_length: int
  prefill: float  # of one question, its image kept (or just made)
  decode: float  # of one token of one answer
  first: float  # one question, from pixels
  ten: float  # ten questions, from pixels


@dataclasses.dataclass(frozen=True)
class Measured:
  """Of one size."""

  name: str
  config: config_lib.Config
  stream_length: dict[str, int]
  cached_tokens: dict[str, int]
  cached_bytes: dict[str, int]
  vision: float  # seconds of the vision tower and projector
  compress: dict[str, float]  # seconds of the language model's stage 1
  rows: list[Row]
  throughput: dict[int, float]  # slots: tokens a second

  def row(self, way: str, text_length: int) -> Row:
    [found] = [
      r for r in self.rows if (r.way, r.text_length) == (way, text_length)
    ]
    return found

  def seconds(self, row: Row, questions: int) -> float:
    """From pixels to all answers; for 100, ten times ten."""
    if questions == 1:
      return row.first
    once = 0.0
    if row.way != "none":
      once = self.vision + self.compress[row.way]
    return once + (row.ten - once) * questions / 10


def make_config(overrides: dict) -> config_lib.Config:
  """configs/voco_1tok.py with other values; dotted keys."""
  c = voco_1tok.get_config()
  c.update_from_flattened_dict(overrides)
  return config_lib.phases(c)[0]


class Setting:
  """One size: weights, and engines on them."""

  def __init__(self, overrides: dict):
    self.config = make_config(overrides)
    words = (f"w{i}" for i in range(self.config.model.llm.vocab_size - 4))
    self.tokenizer = tokenizer_lib.build_word_level(words)
    model = self.model("voco")
    self.params = self._mute(jax.jit(model.init)(jax.random.key(0)))
    self.engine = functools.cache(self._engine)
    size = self.config.model.vision.image_size
    rng = np.random.default_rng(0)
    self.image = rng.integers(0, 256, (size, size, 3), np.uint8)

  def _mute(self, params):
    """Makes the logit of `</s>` 0, so that no answer ends early."""
    end = self.tokenizer.eos_token_id
    llm = params["llm"]
    table = llm["embed_tokens"]["embedding"].at[end].set(0)
    llm = llm | {"embed_tokens": {"embedding": table}}
    if "lm_head" in llm:
      kernel = llm["lm_head"]["kernel"].at[:, end].set(0)
      llm = llm | {"lm_head": {"kernel": kernel}}
    return params | {"llm": llm}

  def model(self, compressor: str) -> VisionLanguageModel:
    return assemble.make_model(
      assemble.with_compressor(self.config, compressor, None), self.tokenizer
    )

  def _engine(self, compressor: str, slots: int, text_length: int) -> Engine:
    config = assemble.with_compressor(self.config, compressor, None)
    return Engine(
      config,
      self.model(compressor),
      self.params,
      self.tokenizer,
      slots=slots,
      max_text_length=text_length + ANSWER,
      compress_batch=1,
    )

  def question(
    self,
    number: int,
    text_length: int,
    images: VocoCache | np.ndarray | None,
    new_tokens: int = ANSWER,
  ) -> Request:
    """Question `number`: so many words, all of them questions differ."""
    rng = np.random.default_rng(number)
    words = rng.integers(self.config.model.llm.vocab_size - 4, size=text_length)
    text = " ".join(f"w{i}" for i in words)
    shown = [images] if isinstance(images, np.ndarray) else images
    return Request([(text, None)], shown, max_new_tokens=new_tokens)


def seconds(function, repeats: int) -> float:
  """Median over so many calls; what they run must be compiled."""
  taken = []
  for _ in range(repeats):
    start = time.perf_counter()
    function()
    taken.append(time.perf_counter() - start)
  return statistics.median(taken)


def answers(engine: Engine, requests: list[Request]) -> list[Result]:
  results = engine.run(requests)
  for request, result in zip(requests, results, strict=True):
    if len(result.token_ids) != request.max_new_tokens:
      raise RuntimeError(
        f"an answer of {len(result.token_ids)} tokens, expected "
        f"{request.max_new_tokens}: the random model said </s>"
      )
  return results


def measure_rows(setting: Setting, text_length: int, repeats: int) -> list[Row]:
  """Times of all ways to ask, which take turns, at one text length."""
  calls = {}
  for way, compressor in WAYS.items():
    engines = {
      slots: setting.engine(compressor, slots, max(TEXT_LENGTHS))
      for slots in (1, SLOTS)
    }
    cache = engines[1].compress(setting.image)
    for engine in engines.values():  # compiles what follows
      engine.compress(setting.image)
      answers(engine, [setting.question(0, text_length, cache, 2)])

    def ask(
      slots: int,
      count: int,
      keep: bool,
      new_tokens: int = ANSWER,
      way=way,
      engines=engines,
      cache=cache,
    ):
      images = setting.image
      if keep:
        images = cache
      elif way != "none":  # once, for all questions
        images = engines[slots].compress(setting.image)
      requests = [
        setting.question(i, text_length, images, new_tokens)
        for i in range(count)
      ]
      return answers(engines[slots], requests)

    calls[way, "prefill"] = functools.partial(ask, 1, 1, True, 1)
    calls[way, "answer"] = functools.partial(ask, 1, 1, True)
    calls[way, "first"] = functools.partial(ask, 1, 1, False)
    calls[way, "ten"] = functools.partial(ask, SLOTS, 10, False)
  taken = {call: [] for call in calls}
  for _ in range(repeats):
    for what in ("prefill", "answer", "first", "ten"):
      for way in WAYS:
        start = time.perf_counter()
        calls[way, what]()
        taken[way, what].append(time.perf_counter() - start)
  median = {call: statistics.median(times) for call, times in taken.items()}
  return [
    Row(
      way,
      text_length,
      prefill=median[way, "prefill"],
      decode=(median[way, "answer"] - median[way, "prefill"]) / (ANSWER - 1),
      first=median[way, "first"],
      ten=median[way, "ten"],
    )
    for way in WAYS
  ]


def measure_throughput(setting: Setting, slots: int, repeats: int) -> float:
  """Tokens a second of 64 answers from VoCo caches, texts of 32 tokens."""
  engine = setting.engine("voco", slots, 32)
  cache = engine.compress(setting.image)
  requests = [setting.question(i, 32, cache) for i in range(64)]
  answers(engine, requests[:1])  # compiles
  taken = seconds(lambda: answers(engine, requests), repeats)
  return len(requests) * ANSWER / taken


def measure(name: str, overrides: dict, repeats: int) -> Measured:
  """All of one size."""
  setting = Setting(overrides)
  vision = jax.jit(setting.model("voco").embed_images)
  image = setting.image[None]

  def run_vision():
    jax.block_until_ready(vision(setting.params, image))

  run_vision()  # compiles
  vision_seconds = seconds(run_vision, repeats)
  lengths, tokens, sizes, compress = {}, {}, {}, {}
  for way, compressor in WAYS.items():
    engine = setting.engine(compressor, 1, max(TEXT_LENGTHS))
    cache = engine.compress(setting.image)  # compiles
    whole = seconds(lambda e=engine: e.compress(setting.image), repeats)
    lengths[way] = setting.model(compressor).stream.length
    tokens[way] = 0 if way == "none" else cache.num_voco_tokens
    sizes[way] = 0 if way == "none" else cache.nbytes
    compress[way] = whole - vision_seconds
  rows = []
  for text_length in TEXT_LENGTHS:
    rows += measure_rows(setting, text_length, repeats)
    for row in rows[-len(WAYS) :]:
      print(f"{name}: {row}", flush=True)
  setting.engine.cache_clear()
  throughput = {
    slots: measure_throughput(setting, slots, repeats)
    for slots in (1, THROUGHPUT_SLOTS)
  }
  return Measured(
    name,
    setting.config,
    lengths,
    tokens,
    sizes,
    vision_seconds,
    compress,
    rows,
    throughput,
  )


def operations(
  config: config_lib.ModelConfig,
  way: str,
  text_length: int,
  questions: int,
  stream_length: int,
  cached_tokens: int,
) -> int:
  """Floating-point operations from pixels to all answers, by formula."""
  llm = config.llm
  image = flops.vision(config) + flops.causal(llm, stream_length)
  # The last token of an answer is not read.
  text = flops.causal(llm, text_length + ANSWER - 1, cached_tokens)
  question = text + ANSWER * flops.head(llm)
  images = questions if way == "none" else 1
  return images * image + questions * question


def _short(x: float) -> str:
  """Three digits, or all before the point."""
  return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def operations_table(
  config: config_lib.ModelConfig, lengths: dict[str, tuple[int, int]]
) -> str:
  """TFLOP of all ways; `lengths` are (stream, cached tokens) of each."""
  rows = []
  for text_length in TEXT_LENGTHS:
    for questions in QUESTIONS:
      counts = [
        operations(config, way, text_length, questions, *lengths[way])
        for way in WAYS
      ]
      cells = [_short(count / 1e12) for count in counts]
      saved = 1 - counts[-1] / counts[0]
      rows.append([text_length, questions, *cells, f"{saved:.1%}"])
  head = ["text", "questions", *TITLES.values(), "VoCo saves"]
  return tables.markdown(head, rows)


def report(results: list[Measured]) -> str:
  """The tables as Markdown."""
  parts = []
  for m in results:
    cache = tables.markdown(
      ["", "image stream", "cached tokens", "cache, bytes", "ViT", "compress"],
      [
        [
          TITLES[way],
          m.stream_length[way],
          m.cached_tokens[way],
          f"{m.cached_bytes[way]:,}",
          f"{1e3 * m.vision:.0f}",
          f"{1e3 * m.compress[way]:.0f}",
        ]
        for way in WAYS
      ],
    )
    rows = []
    for row in m.rows:
      times = [m.seconds(row, q) for q in QUESTIONS]
      base = [m.seconds(m.row("none", row.text_length), q) for q in QUESTIONS]
      cells = [
        f"{t:.2f} ({b / t:.2f}x)" for t, b in zip(times, base, strict=True)
      ]
      rows.append(
        [
          row.text_length,
          TITLES[row.way],
          f"{1e3 * row.prefill:.0f}",
          f"{1e3 * row.decode:.1f}",
          *cells,
        ]
      )
    head = ["text", "", "prefill, ms", "ms per decoded token"]
    head += [f"{q} question{'s' * (q > 1)}, s" for q in QUESTIONS]
    one, many = m.throughput[1], m.throughput[THROUGHPUT_SLOTS]
    lengths = {w: (m.stream_length[w], m.cached_tokens[w]) for w in WAYS}
    lengths["none"] = lengths["full"]
    parts.append(
      f"### {m.name}\n\nOnce an image; ViT and compress in milliseconds:\n\n"
      f"{cache}\n\nEvery question; in brackets how many times as fast as "
      f"without a cache; 100 questions are ten times ten:\n\n"
      f"{tables.markdown(head, rows)}\n\nEngine: {many:.0f} tokens/s in "
      f"{THROUGHPUT_SLOTS} slots, {one:.0f} in one, {many / one:.1f}x.\n\n"
      f"TFLOP by formula:\n\n{operations_table(m.config.model, lengths)}"
    )
  return "\n\n".join(parts)


def seven_b_lengths(
  config: config_lib.Config,
) -> dict[str, tuple[int, int]]:
  """(stream, cached tokens), with the original's two separators and <s>."""
  patches = config.model.vision.num_patches
  full = (1 + patches, 1 + patches)
  return {"none": full, "full": full, "voco": (1 + patches + 2 + 1, 1)}


def seven_b() -> str:
  """The 7B by formula."""
  config = make_config({})
  table = operations_table(config.model, seven_b_lengths(config))
  return f"### 7B, TFLOP by formula\n\n{table}"


def json_rows(results: list[Measured]) -> list[dict]:
  """What a question costs whose image was seen before, and the 7B's by formula.

  Without a cache that is all of a first question; else its own text alone.
  """

  def row(name, config, way, text_length, lengths, nbytes, seconds):
    one, two = (
      operations(config.model, way, text_length, q, *lengths) for q in (1, 2)
    )
    return {
      "size": name,
      "way": way,
      "text_length": text_length,
      "answer_length": ANSWER,
      "cached_tokens": 0 if way == "none" else lengths[1],
      "cached_bytes": nbytes,
      "seconds": seconds,
      "operations": two - one,
    }

  rows = []
  for m in results:
    for r in m.rows:
      whole = "full" if r.way == "none" else r.way
      lengths = m.stream_length[whole], m.cached_tokens[whole]
      kept = r.prefill + (ANSWER - 1) * r.decode
      seconds = r.first if r.way == "none" else kept
      nbytes = m.cached_bytes[r.way]
      rows.append(
        row(m.name, m.config, r.way, r.text_length, lengths, nbytes, seconds)
      )
  if any(m.name == "7B" for m in results):
    return rows
  config = make_config({})
  each = cache_bytes(config)  # of one VoCo token
  for text_length in TEXT_LENGTHS:
    for way, lengths in seven_b_lengths(config).items():
      nbytes = 0 if way == "none" else each * lengths[1]
      rows.append(row("7B", config, way, text_length, lengths, nbytes, None))
  return rows


def plot(results: list[Measured], path: str) -> None:
  """Seconds from pixels to all answers over the number of questions."""
  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  figure, axes = plt.subplots(
    1, len(results), figsize=(5 * len(results), 4), squeeze=False
  )
  for axis, m in zip(axes[0], results, strict=True):
    for way, title in TITLES.items():
      row = m.row(way, TEXT_LENGTHS[0])
      times = [m.seconds(row, q) for q in QUESTIONS]
      axis.plot(QUESTIONS, times, marker="o", label=title)
    axis.set(
      xscale="log",
      yscale="log",
      xlabel="questions about one image",
      ylabel="seconds, from pixels to all answers",
      title=f"{m.name}, text of {TEXT_LENGTHS[0]} tokens",
    )
    axis.set_xticks(QUESTIONS, [str(q) for q in QUESTIONS])
    axis.legend()
    axis.grid(alpha=0.3)
  figure.tight_layout()
  figure.savefig(path, dpi=120)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    "--sizes", nargs="+", choices=SIZES, default=["small", "135m"]
  )
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--plot", help="PNG file to draw the times into")
  parser.add_argument("--json", help="efficiency.json for vocojax.report")
  hardware.add_flag(parser)
  args = parser.parse_args()
  hardware.use(args.platform)
  results = [measure(name, SIZES[name], args.repeats) for name in args.sizes]
  print("\n" + report(results) + "\n\n" + seven_b() + "\n")
  if args.plot:
    plot(results, args.plot)
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps({"rows": json_rows(results)}))
  tables.print_provenance("benchmarks.efficiency")


if __name__ == "__main__":
  main()
