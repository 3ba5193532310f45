"""Runs one phase: restore, train, log, save. Read next: `checkpoint.py`."""

import contextlib
import dataclasses
import functools
import math
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
import tqdm
import transformers
from absl import logging
from jax.sharding import Mesh

from vocojax import config as config_lib
from vocojax.config import Config
from vocojax.core.orbax_calls import orbax_quiet
from vocojax.data import pipeline, sources
from vocojax.data.sources import Source
from vocojax.data.tokenizer import check_same
from vocojax.errors import CheckpointError, ConfigError, DataError, UserError
from vocojax.models.vlm import VisionLanguageModel
from vocojax.training import (
  checkpoint,
  distributed,
  metrics,
  sharding,
  starts,
  state,
  step,
)
from vocojax.training.feed import Feed
from vocojax.training.optimizer import (
  check_patterns,
  make_optimizer,
  schedule,
)
from vocojax.training.starts import Start
from vocojax.training.state import TrainState
from vocojax.training.validation import Validation


class NotFiniteError(UserError):
  """Loss, gradient or parameters became NaN or infinite."""


class Stopped(Exception):
  """SIGTERM or Ctrl-C came to a host; everything is saved.

  Attributes:
    status: of the program, as a shell has it: 128 + the signal's number.
  """

  def __init__(self, message: str, status: int):
    super().__init__(message)
    self.status = status


@dataclasses.dataclass
class Phase:
  """What is needed to run one phase."""

  config: Config
  folder: pathlib.Path
  model: VisionLanguageModel
  tokenizer: transformers.PreTrainedTokenizerFast
  source: Source
  mesh: Mesh
  open_start: Callable[..., Start] = starts.from_checkpoint

  @functools.cached_property
  def steps(self) -> int:
    """Optimiser steps of the whole phase."""
    config, training = self.config, self.config.training
    if training.steps:
      return training.steps
    rows = pipeline.rows_per_epoch(
      self.source, self.encoder, config.data, config.seed
    )
    batches = rows / config.data.batch_size
    if config.data.batching == "group_by_length":
      batches = math.ceil(batches)  # the last one of an epoch is filled up
    return max(1, round(training.epochs * batches))

  @functools.cached_property
  def held_out(self) -> Source | None:
    """What validation reads; None if there is none.

    Raises:
      DataError: a file or folder is missing, or the split is unknown or empty.
    """
    config = self.config
    if not config.evaluation.every:
      return None
    return sources.make_source(config, config.evaluation.split)

  @property
  def encoder(self) -> pipeline.Encoder:
    """Makes rows of records."""
    config, model = self.config, self.config.model
    return pipeline.Encoder(
      self.tokenizer,
      config.prompt,
      config.data,
      model.vision.image_size,
      model.compressor.budgets,
      (self.model.stream.start, self.model.stream.stride),
    )


def check(phase: Phase, earlier: Sequence[Phase] = ()) -> None:
  """What can be said of a phase before any is run; reads no array.

  Args:
    phase: to be run.
    earlier: phases that are run before it.

  Raises:
    ConfigError: the batch cannot be split, patterns of the optimiser do not fit
      the parameters, or what is frozen starts from nothing.
    UserError: what it starts from, or is taught by, cannot be used.
    DataError: there is to be validation, and nothing to validate on.
  """
  config = phase.config
  _ = phase.held_out
  sharding.check_batch(
    phase.mesh, config.data.batch_size, config.training.accumulate
  )
  params = abstract_params(phase.model, phase.mesh)
  check_patterns(config.optimizer, state.flatten(params))
  by_path = {str(other.folder): other for other in earlier}

  def open_start(path: str, layout: str = "") -> Start:
    if path not in by_path:
      return phase.open_start(path, layout)
    other = by_path[path]
    has = state.flatten(abstract_params(other.model, other.mesh)).keys()
    return Start(
      path,
      other.config,
      other.tokenizer,
      lambda abstract, _: sorted(state.flatten(abstract).keys() - has),
      lambda abstract, model: phase.open_start(path, layout).load(
        abstract, model
      ),
    )

  _open_teacher(dataclasses.replace(phase, open_start=open_start))
  folder = phase.folder / checkpoint.FOLDER
  if folder.is_dir() and checkpoint.steps(folder):
    return  # it resumes
  start, missing = None, list(state.flatten(params))
  if config.init_from:
    start = open_start(config.init_from, config.prompt.layout)
    missing = start.missing(params, phase.model.config)
  _check_frozen(start, missing, config.optimizer.freeze)


def _check_frozen(
  start: Start | None, missing: list[str], freeze: tuple[str, ...]
) -> None:
  """Makes sure that no parameter stays random.

  Raises:
    ConfigError: one that the start lacks is frozen.
  """
  if random := [name for name in missing if state.matches(name, freeze)]:
    raise ConfigError(
      "config.init_from",
      f"{start.path if start else ''!r}, which lacks {random[0]} and "
      f"{len(random) - 1} more parameters",
      "a checkpoint that has what config.optimizer.freeze keeps from learning",
      "name one that has them, or freeze less",
    )


def run(phase: Phase) -> state.Params:
  """Trains, or goes on where a checkpoint in the folder ends.

  Returns:
    The parameters after the last step.

  Raises:
    UserError: the configuration, a checkpoint or the data cannot be used.
    NotFiniteError: the loss is not finite; nothing after it was saved.
    Stopped: SIGTERM or Ctrl-C arrived and the state is on disk.
  """
  check(phase)
  with orbax_quiet(), jax.set_mesh(phase.mesh):
    return _run(phase)


def abstract_params(model: VisionLanguageModel, mesh: Mesh) -> state.Params:
  """Shapes, dtypes and shardings of the parameters."""
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0)))
  return _laid(shapes, sharding.param_shardings(shapes, mesh))


def _laid(shapes, shardings):
  """A tree of shapes, lying as a tree of shardings says."""
  return jax.tree.map(
    lambda s, to: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=to),
    shapes,
    shardings,
  )


def abstract_state(
  config: Config,
  model: VisionLanguageModel,
  mesh: Mesh,
  optimizer: optax.GradientTransformation,
) -> TrainState:
  """Shapes, dtypes and shardings of the training state."""
  params = abstract_params(model, mesh)
  shapes = jax.eval_shape(
    lambda p: step.init_state(p, optimizer, config.optimizer.freeze), params
  )
  shardings = TrainState(
    sharding.replicated(mesh),
    sharding.param_shardings(params, mesh),
    sharding.opt_state_shardings(shapes.opt_state, params, mesh),
  )
  return _laid(shapes, shardings)


def jit_train_step(
  config: Config,
  model: VisionLanguageModel,
  mesh: Mesh,
  optimizer: optax.GradientTransformation,
  abstract: TrainState,
) -> jax.stages.Wrapped:
  """The step, with everything where it belongs; `abstract_state` laid it.

  Called with a state, a batch and what `load_teacher` returns.
  """
  teacher = abstract_teacher(config, model, mesh)
  return jax.jit(
    step.make_train_step(
      model,
      optimizer,
      config.optimizer.freeze,
      config.training.accumulate,
      config.training.distill_weight,
    ),
    in_shardings=(
      jax.tree.map(lambda s: s.sharding, abstract),
      sharding.rows(mesh),
      jax.tree.map(lambda s: s.sharding, teacher),
    ),
    out_shardings=(
      jax.tree.map(lambda s: s.sharding, abstract),
      sharding.replicated(mesh),
    ),
    donate_argnums=0,
  )


def abstract_teacher(
  config: Config, model: VisionLanguageModel, mesh: Mesh
) -> state.Params | None:
  """Shapes, dtypes and shardings of a teacher; None if it is the model."""
  training = config.training
  if not training.distill_weight or training.teacher == "self":
    return None
  return abstract_params(model.teacher, mesh)


def load_teacher(phase: Phase) -> state.Params | None:
  """Parameters of the checkpoint that teaches; None if it is the model.

  Raises:
    CheckpointError: it is no checkpoint of a `full` phase in this prompt.
    ConfigError: it is of another model or tokenizer.
  """
  teacher = _open_teacher(phase)
  abstract = abstract_teacher(phase.config, phase.model, phase.mesh)
  if teacher is None or abstract is None:
    return None
  return teacher.load(abstract, phase.model.config)[0]


def _open_teacher(phase: Phase) -> Start | None:
  """What `load_teacher` reads, which has all that it needs."""
  config = phase.config
  abstract = abstract_teacher(config, phase.model, phase.mesh)
  if abstract is None:
    return None
  key, path = "config.training.teacher", config.training.teacher
  try:
    teacher = phase.open_start(path)
  except UserError as e:
    raise e.within(key) from e
  taught = teacher.config
  for name, found, expected in (
    ("model.compressor.name", taught.model.compressor.name, "full"),
    ("prompt.layout", taught.prompt.layout, config.prompt.layout),
  ):
    if found != expected:
      raise CheckpointError(
        key,
        f"{path}, trained with config.{name} {found!r}",
        f"a checkpoint trained with {expected!r}",
        "name a phase that saw all patches, in the prompt of this one",
      )
  config_lib.check_same_model(config, taught, f"{key} ({path})")
  check_same(phase.tokenizer, teacher.tokenizer, f"{key} ({path})")
  if missing := teacher.missing(abstract, phase.model.config):
    raise CheckpointError(
      key,
      f"{path}, which lacks {missing[0]} and {len(missing) - 1} more "
      "parameters",
      "a checkpoint that has them",
      "name another checkpoint",
    )
  return teacher


def init_params(
  model: VisionLanguageModel,
  mesh: Mesh,
  seed: int,
  start: Start | None,
  freeze: tuple[str, ...] = (),
) -> state.Params:
  """Parameters to start from, and random ones where there are none.

  Raises:
    ConfigError: random ones would match `freeze`, and so stay random.
    CheckpointError: a parameter has another shape.
  """
  abstract = abstract_params(model, mesh)
  loaded, missing = {}, None
  if start:
    loaded, missing = start.load(abstract, model.config)
    logging.info("%s: all parameters but %s", start.path, missing or "none")
  if missing == []:
    return loaded
  names = list(state.flatten(abstract)) if missing is None else missing
  _check_frozen(start, names, freeze)

  def fresh(key):
    flat = state.flatten(model.init(key))
    return {name: flat[name] for name in names}

  shardings = {n: x.sharding for n, x in state.flatten(abstract).items()}
  new = jax.jit(fresh, out_shardings={n: shardings[n] for n in names})(
    jax.random.key(seed)
  )
  return state.unflatten(state.flatten(loaded) | new)


def _run(phase: Phase) -> state.Params:
  source = _source(phase)
  with contextlib.ExitStack() as opened:
    feed = _feed(phase)
    opened.callback(feed.close)
    checkpoints = checkpoint.Checkpointer(
      phase.folder, phase.config, phase.tokenizer
    )
    opened.callback(checkpoints.close)
    try:
      return _train(phase, feed, source, checkpoints)
    except Stopped:
      raise
    except BaseException as e:
      distributed.leave(e)
      if isinstance(e, KeyboardInterrupt):
        opened.pop_all()  # to close them is to wait for what they are doing
      raise


def _train(
  phase: Phase,
  feed: Feed,
  source: dict[str, Any],
  checkpoints: checkpoint.Checkpointer,
) -> state.Params:
  config, mesh = phase.config, phase.mesh
  training, freeze = config.training, config.optimizer.freeze
  optimizer = make_optimizer(config.optimizer, phase.steps)
  distilled = training.distill_weight > 0
  teacher = load_teacher(phase)
  abstract = abstract_state(config, phase.model, mesh, optimizer)
  latest = checkpoints.latest
  if latest is None:
    start = None
    if config.init_from:
      start = phase.open_start(config.init_from, config.prompt.layout)
    # Donated: what it keeps is not held twice.
    train_state = jax.jit(
      lambda p: step.init_state(p, optimizer, freeze),
      out_shardings=jax.tree.map(lambda s: s.sharding, abstract),
      donate_argnums=0,
    )(init_params(phase.model, mesh, config.seed, start, freeze))
    sums = metrics.Sums(distilled=distilled)
  else:
    # A phase that is done reads no data.
    same_order = latest >= phase.steps or _same_order(
      phase, checkpoints.path(latest), checkpoints.source(latest), source
    )
    train_state, shares, progress = checkpoints.restore(
      latest, abstract, feed.shard_count
    )
    if same_order:
      feed.go_to(shares)
    sums = metrics.Sums(progress, distilled)
    if latest < phase.steps and jax.process_index() == 0:
      print(
        f"{config.name}: resuming after step {latest} of {phase.steps}",
        file=sys.stderr,
      )
  compiled = jit_train_step(config, phase.model, mesh, optimizer, abstract)

  def train_step(*state_and_batch):
    return compiled(*state_and_batch, teacher)

  validate = None
  if phase.held_out is not None:
    validate = Validation(
      config,
      phase.model,
      phase.tokenizer,
      phase.held_out,
      abstract.params,
      mesh,
    )
  return _loop(
    phase, train_step, train_state, feed, source, checkpoints, sums, validate
  )


def _feed(phase: Phase) -> Feed:
  config = phase.config
  return Feed(
    phase.source,
    phase.encoder,
    config.data,
    config.seed,
    phase.mesh,
    config.training.loss_mean == "micro_batches",
  )


def _source(phase: Phase) -> dict[str, Any]:
  """What a checkpoint keeps of the data; the first process looks at it."""
  known = None
  if jax.process_index() == 0:
    known = {
      "records": len(phase.source),
      "identity": sources.identity(phase.config),
    }
  return distributed.gather(known)[0]


def _same_order(
  phase: Phase,
  where: pathlib.Path,
  before: dict[str, Any] | None,
  source: dict[str, Any],
) -> bool:
  """Whether the data can be read on from where a checkpoint ends.

  Raises:
    CheckpointError: it is other data, which `config.data.on_changed_data` does
      not accept.
  """
  if before == source:
    return True
  first_host, name = jax.process_index() == 0, phase.config.name
  if before is None:
    if first_host:
      print(
        f"{name}: {where} does not say what data it was trained on; resuming "
        "as if it were the same",
        file=sys.stderr,
      )
    return True
  if phase.config.data.on_changed_data == "stop":
    raise CheckpointError(
      f"{where}: the data",
      _in_words(source),
      f"{_in_words(before)}, which it was trained on",
      "give the run its data again, or go on with this by setting "
      "config.data.on_changed_data to 'accept'",
    )
  same = before["records"] == source["records"]
  if first_host:
    print(
      f"{name}: the data has changed, which config.data.on_changed_data "
      f"accepts; it is read {'on' if same else 'from its beginning'}",
      file=sys.stderr,
    )
  return same


def _in_words(source: dict[str, Any]) -> str:
  return f"{source['records']:,} records ({source['identity'][:24]})"


def _loop(
  phase, train_step, train_state, feed, source, checkpoints, sums, validate
):
  """The steps themselves. A step's metrics are read while the next one runs."""
  config, training = phase.config, phase.config.training
  first = int(train_state.step)
  rate = schedule(config.optimizer, config.optimizer.learning_rate, phase.steps)
  first_host = jax.process_index() == 0
  writer = metrics.MetricsWriter(phase.folder, first) if first_host else None
  bar = tqdm.tqdm(
    initial=first,
    total=phase.steps,
    desc=config.name,
    unit="step",
    mininterval=1 if sys.stderr.isatty() else 20,
    dynamic_ncols=True,
    disable=not first_host,
  )
  started = time.perf_counter()
  since_log = first
  trained = 0.0  # tokens
  on_cpu = phase.mesh.devices.flat[0].platform == "cpu"
  bad_before = sums.values["bad_records"]

  def settle(number: int, values, bad_records: int) -> None:
    """Takes the metrics of a finished step."""
    nonlocal started, since_log, trained
    values = {k: float(v) for k, v in values.items()}
    checked = ("loss", "grad_norm", "param_norm")
    if not all(math.isfinite(values[k]) for k in checked):
      checkpoints.wait()
      good = checkpoints.latest
      raise NotFiniteError(
        f"{config.name}: step {number}",
        f"a loss of {values['loss']}, a gradient norm of "
        f"{values['grad_norm']} and a norm of the parameters of "
        f"{values['param_norm']}",
        "finite numbers",
        "try a lower config.optimizer.learning_rate; "
        + (
          "no checkpoint was written yet"
          if good is None
          else f"the last good checkpoint is {checkpoints.path(good)}"
        ),
      )
    sums.add(values)
    trained += values["tokens"]
    if number % training.log_every and number != phase.steps:
      return
    if not trained:
      raise DataError(
        f"{config.name}: steps {first + 1} to {number}",
        "no token that is trained",
        "answers that the model learns",
        "check the answers of the data, config.prompt.layout and "
        "config.data.max_text_length",
      )
    checkpoints.check()
    sums.values["bad_records"] = bad_before + feed.total(bad_records)
    seconds = time.perf_counter() - started
    line = sums.means() | {
      "learning_rate": float(np.asarray(rate(number - 1))),
      "grad_norm": values["grad_norm"],
      "images_per_second": (number - since_log)
      * config.data.batch_size
      * config.data.max_images
      * sums.means()["image_fill"]
      / seconds,
      "bad_records": sums.values["bad_records"],
    }
    if writer:
      writer.write(number, line)
    bar.set_postfix_str(
      f"loss {line['loss']:.4f}, answers right {line['answer_accuracy']:.1%}, "
      f"{line['images_per_second']:.0f} images/s",
      refresh=False,
    )
    sums.reset()
    started, since_log = time.perf_counter(), number

  def is_best(number: int) -> bool:
    """Validates after a step; whether no loss before was as low."""
    nonlocal started
    begun = time.perf_counter()
    found = validate(train_state.params)
    if writer:
      writer.write(number, found)
    started += time.perf_counter() - begun
    loss = found["validation_loss"]
    sums.values["validated_step"] = number
    if not loss < sums.values.get("best_loss", math.inf):
      return False
    sums.values |= {"best_step": number, "best_loss": loss}
    return True

  def is_due(number: int) -> bool:
    every = config.evaluation.every
    return bool(every) and (number % every == 0 or number == phase.steps)

  number, stop = first, False
  closing = contextlib.closing(writer) if writer else contextlib.nullcontext()
  with distributed.Preemption() as preemption, bar, closing:
    pending = None
    if first < phase.steps and first and is_due(first):
      # A run that is stopped saves first and leaves the validation to the next.
      if sums.values.get("validated_step") != first:
        is_best(first)
    for number in range(first + 1, phase.steps + 1):
      train_state, values = train_step(train_state, next(feed))
      if pending:
        settle(*pending)
      pending = (number, values | feed.fill, feed.bad_records)
      if on_cpu:  # nothing would go on meanwhile
        settle(*pending)
        pending = None
      last = number == phase.steps
      stop = preemption.arrived()  # ask once: it may come at any moment
      saves = last or stop or number % training.checkpoint_every == 0
      validates = is_due(number) and (last or not stop)
      if saves or validates:
        # Settle first: parameters after a step that is not finite are never
        # written.
        if pending:
          settle(*pending)
        pending = None
      if validates:
        saves = is_best(number) or saves
      if saves:
        sums.values["bad_records"] = bad_before + feed.total(feed.bad_records)
        if writer:
          writer.flush()  # lines up to a checkpoint must not be lost
        checkpoints.save(train_state, feed.states(), sums.values, source)
      bar.update()
      if stop:
        break
    checkpoints.wait()
    if stop or preemption.arrived():
      cause = preemption.cause()
      name = "Ctrl-C" if cause == signal.SIGINT else "SIGTERM"
      raise Stopped(
        f"{config.name}: stopped by {name} after step {number}, saved as "
        f"{checkpoints.path(number)}; the same command resumes from there",
        128 + cause,
      )
  if number > first and first_host and "best_step" in sums.values:
    print(
      f"{config.name}: the lowest validation loss, "
      f"{sums.values['best_loss']:.4f}, is that of step "
      f"{sums.values['best_step']:.0f}, kept as "
      f"{phase.folder / checkpoint.BEST}",
      file=sys.stderr,
    )
  return train_state.params
