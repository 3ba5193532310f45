"""One optimiser step as a pure function. Read next: `loop.py`."""

import functools
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import optax

from vocojax.models import precision
from vocojax.models.vlm import VisionLanguageModel
from vocojax.training import losses, state
from vocojax.training.state import TrainState

# Metrics that are means over tokens.
PER_TOKEN = {"loss", "distill_loss", "teacher_loss"}


def make_eval_step(model: VisionLanguageModel) -> Callable:
  """`(params, batch) -> sums`: `loss` summed over tokens, and `losses.sums`."""

  def eval_step(params: state.Params, batch):
    targets = losses.next_tokens(batch["labels"], batch["segment_ids"])
    each, right = model.token_losses(params, batch, jnp.maximum(targets, 0))
    loss, sums = losses.sums(each, right, targets, batch["segment_ids"])
    return sums | {"loss": loss}

  return eval_step


def init_state(
  params: state.Params,
  optimizer: optax.GradientTransformation,
  freeze: tuple[str, ...],
) -> TrainState:
  """Step 0 with these parameters; frozen ones get no optimiser state.

  The state is float32 (but for a first moment that is asked for otherwise) also
  where parameters are not: a second moment changes by too little a step.
  """
  trained, _ = state.split(params, freeze)
  trained = jax.tree.map(lambda x: x.astype(jnp.float32), trained)
  return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(trained))


def make_train_step(
  model: VisionLanguageModel,
  optimizer: optax.GradientTransformation,
  freeze: tuple[str, ...],
  accumulate: int,
  distill_weight: float = 0.0,
) -> Callable:
  """`(state, batch, teacher=None) -> (state, metrics)`.

  The batch is cut into `accumulate` parts, one after the other. What is trained
  on is the mean over all trained tokens of the whole batch, whatever the parts
  hold. Where the batch has `micro_batch_ids` [B], it is the mean over the
  trained tokens of each micro-batch, and then over these. Metrics are float32
  scalars: `loss` (always the mean over tokens), `grad_norm`, `param_norm` (of
  what is trained, after the step), and the counts of `losses.sums`.

  With a `distill_weight`, so many times the divergence from a teacher (see
  `VisionLanguageModel.distilled_losses`) is trained on beside the cross-entropy
  that `loss` still is. The divergence of a token is the metric `distill_loss`,
  the teacher's own cross-entropy `teacher_loss`. `teacher` are the parameters
  of another model, None is the model itself.
  """

  def loss_sum(slots, trained, frozen, batch, teacher):
    params = state.merge(precision.with_slots(trained, slots), frozen)
    targets = losses.next_tokens(batch["labels"], batch["segment_ids"])
    arguments = (params, batch, jnp.maximum(targets, 0))
    of_teacher = {}
    if distill_weight:
      each, right, divergence, taught = model.distilled_losses(
        *arguments, teacher
      )
      of_teacher = {"distill_loss": divergence, "teacher_loss": taught}
    else:
      each, right = model.token_losses(*arguments)
    loss, sums = losses.sums(each, right, targets, batch["segment_ids"])
    sums |= {"loss": loss} | {
      k: losses.trained_sum(x, targets) for k, x in of_teacher.items()
    }
    if "row_weights" not in batch:
      return loss + distill_weight * sums.get("distill_loss", 0.0), sums
    each = each + distill_weight * of_teacher.get("distill_loss", 0.0)
    weighted = each * batch["row_weights"][:, None]
    return losses.trained_sum(weighted, targets), sums

  def train_step(train_state: TrainState, batch, teacher=None):
    grad = jax.value_and_grad(
      functools.partial(loss_sum, teacher=teacher), has_aux=True
    )
    trained, frozen = state.split(train_state.params, freeze)
    slots = precision.slots(trained, model.config.dtype)
    if "micro_batch_ids" in batch:
      targets = losses.next_tokens(batch["labels"], batch["segment_ids"])
      batch = batch | {
        "row_weights": losses.row_weights(targets, batch["micro_batch_ids"])
      }
    if accumulate == 1:
      (_, sums), grads = grad(slots, trained, frozen, batch)
    else:
      # Row i goes to part i % accumulate: each keeps the sharding.
      parts = jax.tree.map(
        lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch
      )

      def add(total, one):
        return jax.tree.map(
          jnp.add, total, grad(slots, trained, frozen, one)
        ), None

      zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, jnp.float32),
        jax.eval_shape(
          grad, slots, trained, frozen, jax.tree.map(lambda x: x[0], parts)
        ),
      )
      ((_, sums), grads), _ = jax.lax.scan(add, zeros, parts)
    count = jnp.maximum(sums["tokens"], 1.0)
    grads = jax.tree.map(lambda g: g.astype(jnp.float32) / count, grads)
    updates, opt_state = optimizer.update(grads, train_state.opt_state, trained)
    trained = cast(state.Params, optax.apply_updates(trained, updates))
    metrics = sums | {k: sums[k] / count for k in PER_TOKEN & sums.keys()}
    metrics |= {
      "grad_norm": optax.tree.norm(grads),
      "param_norm": optax.tree.norm(trained),
    }
    return (
      TrainState(train_state.step + 1, state.merge(trained, frozen), opt_state),
      metrics,
    )

  return train_step
