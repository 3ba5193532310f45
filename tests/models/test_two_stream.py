"""Two streams against the joint masked pass: logits, loss, every gradient.

The joint pass with the two-stage mask is the specification. The layouts are
drawn at random; the settings below meet each other in pairs.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import builders
from vocojax.models import layers, masks
from vocojax.models.vlm import VisionLanguageModel

TOLERANCE = 1e-5  # relative, float32


@dataclasses.dataclass(frozen=True)
class Case:
  """One model and the shape of its batch."""

  # 'bos' is voco with text_sees_bos, 'elastic' with a number of tokens drawn
  # for each group of images; 'elastic bos' is both. 'causal' is voco_causal.
  compressor: str
  k: int
  slots: int
  heads: tuple[int, int]  # attention heads, key/value heads
  tied: bool
  scan: bool
  remat: str
  text_length: int
  side: int  # patches along a side of the image
  num_layers: int = 2

  @property
  def vlm(self):
    return builders.model(
      {
        "compressor.name": {"full": "full", "causal": "voco_causal"}.get(
          self.compressor, "voco"
        ),
        "compressor.text_sees_bos": "bos" in self.compressor,
        "compressor.train_num_voco_tokens": (
          "elastic" if "elastic" in self.compressor else "fixed"
        ),
        "compressor.num_voco_tokens": self.k,
        "llm.num_attention_heads": self.heads[0],
        "llm.num_key_value_heads": self.heads[1],
        "llm.num_hidden_layers": self.num_layers,
        "llm.tie_word_embeddings": self.tied,
        "vision.image_size": 4 * self.side,
        "scan_layers": self.scan,
        "remat": self.remat,
      }
    )


CASES = [
  Case("voco", 1, 1, (4, 4), False, True, "none", 8, 2),
  Case("voco", 2, 2, (4, 2), True, False, "full", 14, 3),
  Case("voco", 5, 3, (4, 1), False, True, "dots", 16, 2),
  Case("voco", 16, 2, (2, 2), True, False, "none", 9, 3),
  Case("voco", 1, 3, (6, 3), True, True, "full", 15, 1, num_layers=3),
  Case("voco", 2, 1, (4, 1), False, False, "dots", 10, 3),
  Case("voco", 5, 1, (4, 4), True, False, "dots", 5, 1, num_layers=3),
  Case("voco", 16, 3, (4, 2), False, True, "full", 17, 2),
  Case("full", 1, 2, (4, 4), False, True, "dots", 13, 2),
  Case("full", 1, 1, (4, 2), True, False, "none", 7, 3),
  Case("full", 1, 3, (4, 1), False, True, "full", 18, 2),
  Case("causal", 2, 1, (4, 2), False, True, "full", 12, 2),
  Case("causal", 5, 3, (4, 1), True, False, "none", 14, 2),
  Case("bos", 5, 2, (4, 4), False, True, "full", 12, 2),
  Case("bos", 1, 3, (2, 1), True, False, "none", 16, 1, num_layers=1),
  Case("bos", 16, 1, (4, 4), False, True, "dots", 11, 3),
  Case("bos", 2, 2, (4, 1), True, True, "none", 12, 2),
  Case("elastic", 5, 3, (4, 2), False, True, "full", 16, 2),
  Case("elastic", 2, 1, (4, 4), True, False, "none", 13, 3),
  Case("elastic", 16, 2, (4, 1), False, True, "dots", 14, 2, num_layers=3),
  Case("elastic bos", 4, 2, (4, 2), False, False, "full", 15, 2),
]
ELASTIC = CASES[-4]


@functools.cache
def _inputs(case: Case):
  """Parameters and a batch of four rows, the first two always the same kind."""
  seed = CASES.index(case)
  rng = np.random.default_rng(seed)
  F, T = case.slots, case.text_length
  third = T // 3
  rows = [
    # Two conversations about the same images, one about none, no padding.
    ((1,) * F, [(1, third), (1, third), (0, T - 2 * third)]),
    # Empty slots, text only, padding.
    ((0,) * F, [(0, T - 2)]),
    *builders.random_rows(rng, 2, F, T),
  ]
  return builders.init(case.vlm, seed), builders.batch(rng, case.vlm, rows, T)


def _outputs(vlm, params, batch):
  """Logits of real rows and columns, loss, gradients."""

  def loss(params):
    logits = vlm.text_logits(params, batch)
    total, count = builders.loss_of(logits, batch)
    return total / count, logits

  batch = jax.tree.map(jnp.asarray, batch)
  compute = jax.jit(
    jax.value_and_grad(loss, has_aux=True),
    compiler_options=builders.QUICK_COMPILE,
  )
  (loss_value, logits), gradients = compute(params)
  real = np.asarray(batch["segment_ids"] > 0)
  vocab = vlm.config.llm.vocab_size
  return jax.tree.map(
    np.asarray,
    {
      "logits": logits[..., :vocab][real],
      "loss": loss_value,
      "gradients": gradients,
    },
  )


@functools.cache
def _reference(case: Case):
  """The joint pass; layers run the other way, nothing recomputed."""
  vlm = case.vlm
  config = dataclasses.replace(
    vlm.config, attention="bias", scan_layers=not case.scan, remat="none"
  )
  return _outputs(VisionLanguageModel(config, vlm.tokens), *_inputs(case))


def _relative_errors(found, expected) -> dict[str, float]:
  """Largest difference over largest expected value, leaf by leaf.

  A gradient that is zero in exact arithmetic (a key bias, an unused layer) has
  no scale of its own: scales below a hundredth of the largest gradient count
  as that.
  """
  floor = 1e-2 * max(
    np.abs(x).max() for x in jax.tree.leaves(expected["gradients"])
  )
  errors = {}
  for path, b in jax.tree_util.tree_leaves_with_path(expected):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    a = found
    for key in path:
      a = a[key.key]
    assert a.shape == b.shape and np.isfinite(b).all(), name
    scale = np.abs(b).max()
    if name.startswith("gradients"):
      scale = max(scale, floor)
    errors[name] = float(np.abs(a - b).max() / scale)
  return errors


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_streams_equal_the_joint_pass(case):
  found = _outputs(case.vlm, *_inputs(case))
  errors = _relative_errors(found, _reference(case))
  worst = max(errors, key=errors.get)
  print(
    f"\nrelative error: logits {errors['logits']:.1e}, loss "
    f"{errors['loss']:.1e}, worst of {len(errors) - 2} gradients "
    f"{errors[worst]:.1e} ({worst})"
  )
  assert errors[worst] <= TOLERANCE, worst


@pytest.mark.parametrize("case", [CASES[2], CASES[8]], ids=str)
def test_the_code_of_other_platforms(case, monkeypatch):
  """Attention and products as GPU and TPU get them, compiled for the CPU."""
  monkeypatch.setattr(layers, "platform", lambda: "gpu")
  found = _outputs(case.vlm, *_inputs(case))
  monkeypatch.undo()
  assert max(_relative_errors(found, _reference(case)).values()) <= TOLERANCE


@pytest.mark.parametrize("case", [CASES[2], CASES[1], ELASTIC], ids=str)
def test_splash_attention_equals_the_joint_pass(case):
  """As a TPU runs it, from pixels to gradients, interpreted here."""
  config = dataclasses.replace(case.vlm.config, attention_kernel="splash")
  vlm = dataclasses.replace(case.vlm, config=config)
  found = _outputs(vlm, *_inputs(case))
  assert max(_relative_errors(found, _reference(case)).values()) <= TOLERANCE


def _show_one_image_token(monkeypatch):
  stream = VisionLanguageModel.stream.fget

  def broken(self):
    right = stream(self)
    return dataclasses.replace(right, visible=(2, *right.visible))

  monkeypatch.setattr(VisionLanguageModel, "stream", property(broken))


def _shift_voco_positions(monkeypatch):
  offsets = masks.image_offsets
  monkeypatch.setattr(masks, "image_offsets", lambda *a: offsets(*a) + 1)


def _ignore_segments(monkeypatch):
  mask = masks.text_mask
  monkeypatch.setattr(
    masks, "text_mask", lambda i, s, t: mask(i, jnp.minimum(s, 1), t)
  )


def _ignore_groups(monkeypatch):
  mask = masks.text_mask
  monkeypatch.setattr(
    masks, "text_mask", lambda i, s, t: mask(jnp.minimum(i, 1), s, t)
  )


def _ignore_segments_in_positions(monkeypatch):
  positions = masks.text_positions
  monkeypatch.setattr(
    masks,
    "text_positions",
    lambda i, s, t, *n: positions(i, jnp.minimum(s, 1), t, *n),
  )


@pytest.mark.parametrize(
  "break_it",
  [
    _show_one_image_token,
    _shift_voco_positions,
    _ignore_segments,
    _ignore_groups,
    _ignore_segments_in_positions,
  ],
)
def test_a_broken_path_is_noticed(break_it, monkeypatch):
  case = CASES[2]
  expected = _reference(case)
  with monkeypatch.context() as patch:
    break_it(patch)
    found = _outputs(case.vlm, *_inputs(case))
  errors = _relative_errors(found, expected)
  gradients = [e for name, e in errors.items() if "gradients" in name]
  print(
    f"\nbroken: logits {errors['logits']:.1e}, loss {errors['loss']:.1e}, "
    f"gradients {max(gradients):.1e}"
  )
  assert min(errors["logits"], max(gradients)) > 1000 * TOLERANCE
  assert errors["loss"] > 10 * TOLERANCE
