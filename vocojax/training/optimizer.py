"""optax optimisers from a config. Read next: `step.py`.

Sources: AdamW (arXiv 1711.05101); Muon (Jordan et al. 2024) as in
`optax.contrib.muon`, on weight matrices, with AdamW on all else; Lion (arXiv
2302.06675); Adafactor (arXiv 1804.04235) without its first moment.
"""

import math
import re
from collections.abc import Iterable

import optax
from optax import contrib

from vocojax.config import OptimizerConfig
from vocojax.errors import ConfigError
from vocojax.training import state


def schedule(config: OptimizerConfig, peak: float, steps: int):
  """Linear warm-up from 0, then decay to `end_learning_rate * peak`.

  'hf_cosine' is `get_cosine_schedule_with_warmup` of transformers.
  """
  as_hf = config.schedule == "hf_cosine"
  warmup = (math.ceil if as_hf else round)(config.warmup_ratio * steps)
  rest, end = max(steps - warmup, 1), config.end_learning_rate
  decay = {
    "cosine": lambda: optax.cosine_decay_schedule(peak, rest, end),
    "hf_cosine": lambda: optax.cosine_decay_schedule(peak, rest, end),
    "linear": lambda: optax.linear_schedule(peak, peak * end, rest),
    "constant": lambda: optax.constant_schedule(peak),
  }[config.schedule]()
  if not warmup:
    return decay
  if as_hf:
    ramp = optax.linear_schedule(0.0, peak, warmup)
  else:
    # Step 0 already learns: the ramp starts one step in.
    ramp = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
  return optax.join_schedules([ramp, decay], [warmup])


def check_patterns(config: OptimizerConfig, paths: Iterable[str]) -> None:
  """Whether the patterns of a config fit the parameters of a model.

  Raises:
    ConfigError: one matches no parameter, or `freeze` matches all of them.
  """
  paths = list(paths)
  for key in ("freeze", "no_decay"):
    for pattern in getattr(config, key):
      if not any(re.search(pattern, path) for path in paths):
        raise ConfigError(
          f"config.optimizer.{key}",
          f"{pattern!r}, which matches no parameter",
          f"patterns of paths such as {paths[0]}",
          "correct it or leave it out",
        )
  if all(state.matches(path, config.freeze) for path in paths):
    raise ConfigError(
      "config.optimizer.freeze",
      f"{config.freeze!r}, which matches every parameter",
      "some parameter to train",
      "freeze less; () freezes nothing",
    )


def make_optimizer(
  config: OptimizerConfig, steps: int
) -> optax.GradientTransformation:
  """The gradient transformation for a run of `steps` optimiser steps."""

  def by_path(f):
    def tree(params):
      flat = state.flatten(params)
      return state.unflatten({p: f(p, x) for p, x in flat.items()})

    return tree

  def decays(path, _):
    return not state.matches(path, config.no_decay)

  peak = config.learning_rate
  moment = {"mu_dtype": config.first_moment_dtype}
  decay = {
    "weight_decay": config.weight_decay,
    "mask": by_path(decays),
  }

  def adamw(peak, nesterov=False):
    return optax.adamw(
      schedule(config, peak, steps),
      config.b1,
      config.b2,
      config.eps,
      nesterov=nesterov,
      **moment,
      **decay,
    )

  def label(path, _):
    is_matrix = path.endswith("kernel") and "lm_head" not in path
    return "muon" if is_matrix else "adamw"

  if config.name == "adamw":
    optimizer = adamw(peak)
  elif config.name == "lion":
    optimizer = optax.lion(
      schedule(config, peak, steps), config.b1, config.b2, **moment, **decay
    )
  elif config.name == "adafactor":
    # As optax.adafactor, but with a learning rate and decay like the others'.
    optimizer = optax.chain(
      optax.scale_by_factored_rms(),
      optax.clip_by_block_rms(1.0),
      optax.add_decayed_weights(**decay),
      optax.scale_by_learning_rate(schedule(config, peak, steps)),
    )
  else:
    # `contrib.muon` has an AdamW of its own, but without a decay mask.
    muon = contrib.muon(
      schedule(config, peak, steps),
      weight_decay=config.weight_decay,
      weight_decay_mask=by_path(decays),
      muon_weight_dimension_numbers=contrib.MuonDimensionNumbers(-2, -1),
      **moment,
    )
    optimizer = optax.partition(
      {"muon": muon, "adamw": adamw(config.adam_learning_rate, nesterov=True)},
      by_path(label),
    )
  if config.grad_clip:
    return optax.chain(optax.clip_by_global_norm(config.grad_clip), optimizer)
  return optimizer
