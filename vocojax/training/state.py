"""The training state and paths into parameter trees. Next: `step.py`."""

import dataclasses
import functools
import re
from typing import Any

import jax
from jaxtyping import Array, Int32

Params = dict[str, Any]


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["step", "params", "opt_state"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything a step reads and writes."""

  step: Int32[Array, ""] | Any  # finished optimiser steps
  params: Params
  opt_state: Any


def flatten(params: Params, prefix: str = "") -> dict[str, Any]:
  """Nested dict to {'a/b/c': leaf}, in the order of the tree."""
  flat = {}
  for key in sorted(params):
    if isinstance(params[key], dict):
      flat |= flatten(params[key], f"{prefix}{key}/")
    else:
      flat[prefix + key] = params[key]
  return flat


def unflatten(flat: dict[str, Any]) -> Params:
  """The inverse of `flatten`."""
  params: Params = {}
  for path, leaf in flat.items():
    *parents, name = path.split("/")
    node = params
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = leaf
  return params


def matches(path: str, patterns: tuple[str, ...]) -> bool:
  """Whether any of the regular expressions is found in the path."""
  return any(re.search(p, path) for p in patterns)


def split(params: Params, freeze: tuple[str, ...]) -> tuple[Params, Params]:
  """Parameters to (trained, frozen): two trees without common leaves."""
  flat = flatten(params)
  frozen = {p: x for p, x in flat.items() if matches(p, freeze)}
  trained = {p: x for p, x in flat.items() if p not in frozen}
  return unflatten(trained), unflatten(frozen)


def merge(trained: Params, frozen: Params) -> Params:
  """The inverse of `split`."""
  return unflatten(flatten(trained) | flatten(frozen))
