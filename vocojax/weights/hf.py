"""Names of published weights and ours: one table, read in both directions.

Published tensors are [out, in] and one for each layer; ours are [in, out] and
stacked on axis 0. A `Rule` joins a name and a path, a `Part` the rules of one
part of the model with the prefixes that it has been published under. Read
next: `into.py` (published to ours), `out_of.py` (ours to published).

Sources of the names: HF transformers' `modeling_llama.py`, `modeling_clip.py`,
`modeling_llava.py` and its conversion script; LLaVA's `llava_arch.py`.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np
from jaxtyping import Shaped

from vocojax.config import ModelConfig
from vocojax.errors import WeightsError
from vocojax.weights.transpose import transposed

# `copy`: the same; `transpose`: [out, in] <-> [in, out]; `patches`: the
# convolution [D, 3, p, p] <-> [p*p*3, D], rows and columns before channels, as
# clip.py cuts the image.
Transform = Literal["copy", "transpose", "patches"]


@dataclasses.dataclass(frozen=True)
class Rule:
  """A published tensor and the parameter it is, or is one layer of.

  Attributes:
    name: after the prefix of its part; `{i}` is the number of the layer.
    path: in our tree of parameters.
    transform: between the two.
    vocabulary: whether its rows are those of the vocabulary.
  """

  name: str
  path: str
  transform: Transform = "copy"
  vocabulary: bool = False

  @property
  def stacked(self) -> bool:
    return "{i}" in self.name

  def published_shape(
    self, shape: tuple[int, ...], config: ModelConfig
  ) -> tuple[int, ...]:
    """Shape of (one layer of) the published tensor, from that of ours."""
    if self.stacked:
      shape = shape[1:]
    if self.transform == "copy":
      return shape
    if self.transform == "transpose":
      return shape[::-1]
    p = config.vision.patch_size
    return (shape[1], 3, p, p)


@dataclasses.dataclass(frozen=True)
class Part:
  """A part of the model and the names it has been published under."""

  name: Literal["llm", "head", "vision", "projector"]
  prefixes: tuple[str, ...]
  rules: tuple[Rule, ...]

  @property
  def probe(self) -> str:
    """A name that is there in every model that has this part."""
    return self.rules[0].name

  def names(self, rule: Rule, prefix: str, num_layers: int) -> list[str]:
    """The published names of a rule, one for each layer."""
    if not rule.stacked:
      return [prefix + rule.name]
    return [prefix + rule.name.format(i=i) for i in range(num_layers)]


def _dense(name: str, path: str, bias: bool = True) -> tuple[Rule, ...]:
  weight = Rule(f"{name}weight", f"{path}/kernel", "transpose")
  return (weight, Rule(f"{name}bias", f"{path}/bias")) if bias else (weight,)


def _norm(name: str, path: str) -> tuple[Rule, ...]:
  return (
    Rule(f"{name}weight", f"{path}/scale"),
    Rule(f"{name}bias", f"{path}/bias"),
  )


def _llm() -> Iterator[Rule]:
  embedding = "llm/embed_tokens/embedding"
  yield Rule("embed_tokens.weight", embedding, vocabulary=True)
  layer, ours = "layers.{i}.", "llm/layers/"
  for norm in ("input_layernorm", "post_attention_layernorm"):
    yield Rule(f"{layer}{norm}.weight", f"{ours}{norm}/scale")
  for block, names in (
    ("self_attn", ("q_proj", "k_proj", "v_proj", "o_proj")),
    ("mlp", ("gate_proj", "up_proj", "down_proj")),
  ):
    for name in names:
      yield from _dense(
        f"{layer}{block}.{name}.", f"{ours}{block}/{name}", bias=False
      )
  yield Rule("norm.weight", "llm/norm/scale")


def _vision() -> Iterator[Rule]:
  theirs, ours = "embeddings.", "vision/embeddings/"
  yield Rule(f"{theirs}class_embedding", f"{ours}class_embedding")
  yield Rule(
    f"{theirs}patch_embedding.weight",
    f"{ours}patch_embedding/kernel",
    "patches",
  )
  yield Rule(f"{theirs}position_embedding.weight", f"{ours}position_embedding")
  yield from _norm("pre_layrnorm.", "vision/pre_layernorm")  # their spelling
  layer, ours = "encoder.layers.{i}.", "vision/layers/"
  for norm in ("layer_norm1", "layer_norm2"):
    yield from _norm(f"{layer}{norm}.", f"{ours}{norm}")
  for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
    yield from _dense(f"{layer}self_attn.{name}.", f"{ours}{name}")
  for name in ("fc1", "fc2"):
    yield from _dense(f"{layer}mlp.{name}.", f"{ours}{name}")
  yield from _norm("post_layernorm.", "vision/post_layernorm")


_HEAD = Rule("lm_head.weight", "llm/lm_head/kernel", "transpose", True)
_LINEARS = ("projector/linear_1", "projector/linear_2")

# Prefixes: LLaVA's own, llava-hf's older and newer, and those of a part by
# itself; CLIP's with and without its inner `vision_model`.
PARTS = (
  Part(
    "llm",
    ("model.", "language_model.model.", "model.language_model."),
    tuple(_llm()),
  ),
  Part("head", ("", "language_model."), (_HEAD,)),
  Part(
    "vision",
    (
      "model.vision_tower.vision_tower.vision_model.",
      "vision_tower.vision_model.",
      "model.vision_tower.vision_tower.",
      "model.vision_tower.vision_model.",
      "model.vision_tower.",
      "vision_tower.",
      "vision_model.",
      "",
    ),
    tuple(_vision()),
  ),
  Part(
    "projector",
    ("", "multi_modal_projector.", "model.multi_modal_projector."),
    (*_dense("linear_1.", _LINEARS[0]), *_dense("linear_2.", _LINEARS[1])),
  ),
  # LLaVA's own names of the same: places in a torch Sequential.
  Part(
    "projector",
    ("model.mm_projector.", "mm_projector.", ""),
    (*_dense("0.", _LINEARS[0]), *_dense("2.", _LINEARS[1])),
  ),
  # LLaVA's `linear` projector.
  Part(
    "projector",
    ("model.mm_projector.", "mm_projector.", ""),
    _dense("", _LINEARS[0]),
  ),
)

Layout = Literal["original", "llava_hf"]

# The prefixes that are written. All versions of transformers read these.
_WRITTEN = {
  "original": {
    "llm": "model.",
    "head": "",
    "vision": "model.vision_tower.vision_tower.vision_model.",
    "projector": "model.mm_projector.",
  },
  "llava_hf": {
    "llm": "language_model.model.",
    "head": "language_model.",
    "vision": "vision_tower.vision_model.",
    "projector": "multi_modal_projector.",
  },
}


def written_parts(
  layout: Layout, config: ModelConfig
) -> Iterator[tuple[Part, str]]:
  """The parts of a model and the prefixes to write them with."""
  paths = {"projector/linear_1/kernel", "projector/linear_2/kernel"}
  if config.projector == "linear":
    paths.remove("projector/linear_2/kernel")
  for part in PARTS:
    prefix = _WRITTEN[layout][part.name]
    if part.name == "head" and config.llm.tie_word_embeddings:
      continue
    kernels = {r.path for r in part.rules if r.path.endswith("kernel")}
    if part.name == "projector" and (
      prefix not in part.prefixes or kernels != paths
    ):
      continue
    yield part, prefix


# Names that may be there besides, and why they say nothing.
IGNORABLE = (
  (r"\brotary_emb\.inv_freq$", "follows from the config"),
  (r"\bembeddings\.position_ids$", "0, 1, 2 and so on"),
  (r"^text_model\.", "CLIP's text half"),
  (r"^(text|visual)_projection\.weight$", "joins CLIP's halves"),
  (r"^logit_scale$", "joins CLIP's halves"),
)


def why_ignorable(name: str) -> str | None:
  """The reason to leave a tensor aside, or None."""
  return next((why for p, why in IGNORABLE if re.search(p, name)), None)


def find_part(name: str, tensors: Iterable[str]) -> tuple[Part, str] | None:
  """Which of the known names a part of the model has, and its prefix.

  Returns:
    None where the part is not there.

  Raises:
    WeightsError: it is there twice.
  """
  names = set(tensors)
  found = [
    (part, prefix)
    for part in PARTS
    if part.name == name
    for prefix in part.prefixes
    if prefix + part.probe in names
  ]
  if len(found) > 1:
    twice = [prefix + part.probe for part, prefix in found]
    raise WeightsError(
      twice[1],
      f"the {name} once more, besides {twice[0]}",
      f"one {name}",
      "remove the other one's tensors",
    )
  return found[0] if found else None


def to_ours(
  x: Shaped[np.ndarray, "..."], transform: Transform
) -> Shaped[np.ndarray, "..."]:
  """One published tensor, or rows of it, in our order; may be a view."""
  if transform == "transpose":
    return transposed(x)
  if transform == "patches":
    return transposed(x.transpose(0, 2, 3, 1).reshape(len(x), -1))
  return x


def to_published(
  x: Shaped[np.ndarray, "..."], transform: Transform, patch_size: int
) -> Shaped[np.ndarray, "..."]:
  """The inverse of `to_ours`."""
  if transform == "transpose":
    return transposed(x)
  if transform == "patches":
    x = transposed(x).reshape(-1, patch_size, patch_size, 3)
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2))
  return x
