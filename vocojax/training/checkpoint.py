"""Checkpoints: all that a run is, in one folder. Read next: `loop.py`.

PHASE/checkpoints/STEP holds `params`, `optimizer` (state and step), `data` (how
far each share of the data was read), `config`, `tokenizer` (its files),
`layout` (name and version of the prompt layout) and `progress` (metrics that
are summed but not logged yet, and the step with the best validation so far).
PHASE/best names the checkpoint of that step, which is kept. Orbax writes them
in the background, all hosts together, and the first host renames the folder
when it is complete, so a half-written one is never picked up. Whoever only
wants weights needs `params`, `config`, `tokenizer` and `layout`.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
import transformers
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from vocojax.config import HOW_COMPUTED, Config, ModelConfig
from vocojax.core import files
from vocojax.core.orbax_calls import orbax_call
from vocojax.data import prompt
from vocojax.data.tokenizer import check_same, load_tokenizer
from vocojax.errors import (
  CheckpointError,
  ConfigError,
  DataError,
  UserError,
  shorten,
)
from vocojax.training import checksums, state
from vocojax.training.state import TrainState

FOLDER = "checkpoints"
BEST = "best"
# Files of the item `tokenizer`: the first two are written today.
_TOKENIZER_FILES = (
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
)
_JSON_BYTES = 2**28  # the largest tokenizers have a tenth of it
_START_FROM = (
  "use another --workdir, and config.init_from to start from its weights"
)


def steps(folder: pathlib.Path) -> list[int]:
  """Steps whose checkpoint is complete, ascending."""
  with files.listing(folder, CheckpointError):
    return sorted(ocp.utils.checkpoint_steps(folder))


def read_json(folder: pathlib.Path, item: str) -> dict[str, Any]:
  """A JSON item of a step.

  Raises:
    CheckpointError: it is missing or is no object in JSON.
  """
  return files.read_json(
    folder / item / "metadata", dict, CheckpointError, _JSON_BYTES
  )


class _ArrayHandler(ocp.StandardCheckpointHandler):
  """Orbax's, but each process sums the files that it wrote."""

  step_folder: pathlib.Path  # what is being written, under its temporary name

  async def async_save(self, directory: Any, *args: Any, **kwargs: Any) -> Any:
    self.step_folder = files.to_path(directory).parent
    written = await super().async_save(directory, *args, **kwargs)
    own = functools.partial(checksums.write_own, directory)
    return [ocp.future.ChainedFuture(written or [], own)]

  @classmethod
  def typestr(cls) -> str:
    """What the checkpoint says of it: Orbax alone can read it, too."""
    return ocp.StandardCheckpointHandler.typestr()


@dataclasses.dataclass
class _LatestAndBest(preservation_policy.PreservationPolicy):
  """Keeps the newest checkpoints, and that of the step `best`."""

  latest: int
  best: float | None = None

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    first = len(checkpoints) - self.latest
    return [
      i >= first or saved.step == self.best
      for i, saved in enumerate(checkpoints)
    ]


class Checkpointer:
  """Saves and restores the checkpoints of one phase."""

  def __init__(
    self,
    phase: pathlib.Path,
    config: Config,
    tokenizer: transformers.PreTrainedTokenizerFast,
  ):
    self._folder = phase / FOLDER
    self._config = config
    self._layout = prompt.LAYOUTS[config.prompt.layout]
    self._tokenizer = tokenizer
    self._tokenizer_item = tokenizer_files(tokenizer)
    self._kept = _LatestAndBest(config.training.keep_checkpoints)
    self._handler = _ArrayHandler()
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for item, handler in (
      ("params", self._handler),
      ("optimizer", _ArrayHandler()),
    ):
      registry.add(item, ocp.args.StandardSave, handler)
      registry.add(item, ocp.args.StandardRestore, handler)
    with files.storage(self._folder), orbax_call():
      self._manager = ocp.CheckpointManager(
        self._folder.absolute(),
        options=ocp.CheckpointManagerOptions(
          preservation_policy=self._kept,
          # Otherwise each host lists the folder, and file systems that hosts
          # share may show a new checkpoint to some of them only.
          single_host_load_and_broadcast=True,
          # On the first host, before the folder gets its final name.
          async_options=ocp.AsyncOptions(
            post_finalization_callback=self._write_checksums
          ),
        ),
        handler_registry=registry,
      )

  def _write_checksums(self) -> None:
    folder = self._handler.step_folder
    checksums.write(folder, int(folder.name.partition(".")[0]))

  @property
  def latest(self) -> int | None:
    """Newest complete step, or None."""
    return self._manager.latest_step()

  def path(self, step: int) -> pathlib.Path:
    return self._folder / str(step)

  def save(
    self,
    train_state: TrainState,
    shares: list[dict],
    progress: dict,
    source: dict | None = None,
  ) -> None:
    """Starts writing; a step that is already there is left as it is.

    Args:
      train_state: parameters and optimiser state, after this step.
      shares: state of the iterator over each share of the data.
      progress: sums of metrics that are not logged yet; the checkpoint of its
        `best_step` is not deleted to make room.
      source: what tells the data from any other; see `source`.
    """
    step = int(train_state.step)
    if step in self._manager.all_steps():
      return
    self._kept.best = progress.get("best_step")
    optimizer = {"step": train_state.step, "state": train_state.opt_state}
    items = ocp.args.Composite(
      params=ocp.args.StandardSave(train_state.params),
      optimizer=ocp.args.StandardSave(optimizer),
      data=ocp.args.JsonSave(
        {"shares": shares} | ({"source": source} if source else {})
      ),
      config=ocp.args.JsonSave(json.loads(self._config.to_json())),
      tokenizer=ocp.args.JsonSave(self._tokenizer_item),
      layout=ocp.args.JsonSave(self._layout.stamp()),
      # A copy: it is written later, while the original counts on.
      progress=ocp.args.JsonSave(dict(progress)),
    )
    with files.storage(self.path(step)), orbax_call():
      self._manager.save(step, args=items)

  def restore(
    self, step: int, abstract: TrainState, shard_count: int
  ) -> tuple[TrainState, list[dict], dict]:
    """The state laid out as `abstract`, iterator states, and the progress.

    The devices, hosts and mesh may be others than those it was written on.

    Args:
      step: which checkpoint.
      abstract: shapes, dtypes and shardings.
      shard_count: how many shares the data now has.

    Raises:
      CheckpointError: the checkpoint belongs to another model or prompt, or
        its shares of the data cannot be cut into `shard_count`.
    """
    where = self.path(step)
    if not (where / "optimizer").is_dir():
      raise CheckpointError(
        where,
        "weights without a run to resume",
        "an item optimizer",
        _START_FROM,
      )
    items = ("config", "layout", "data", "progress", "tokenizer")
    with checked(where, step, items):
      _check_same(where, _read_config(where), self._config)
      _check_layout(where, _START_FROM)
      saved = _read_tokenizer(where)
      check_same(self._tokenizer, saved, f"{where}, which it resumes")
      shares = _reshare(where, read_shares(where), shard_count)
      progress = read_progress(where)
    optimizer = {"step": abstract.step, "state": abstract.opt_state}
    with (
      _readable(where),
      checked(where, step, ("params", "optimizer"), together=True),
    ):
      restored = self._manager.restore(
        step,
        args=ocp.args.Composite(
          params=ocp.args.StandardRestore(abstract.params),
          optimizer=ocp.args.StandardRestore(optimizer),
        ),
      )
    train_state = TrainState(
      restored["optimizer"]["step"],
      restored["params"],
      restored["optimizer"]["state"],
    )
    if int(train_state.step) != step:
      raise CheckpointError(
        where / "optimizer",
        f"step {int(train_state.step)}",
        f"step {step}, as the folder is named",
        "use another step, or copy this one again",
      )
    return train_state, shares, progress

  def source(self, step: int) -> dict[str, Any] | None:
    """What the data of a step was; None if it does not say so.

    Its number of `records` and its `identity`, as `sources.identity` has it.

    Raises:
      CheckpointError: it is of another form.
    """
    item = f"{self.path(step)}/data"
    saved = read_json(self.path(step), "data")
    kinds = (dict, type(None))
    found = files.get_field(saved, "source", kinds, item, CheckpointError, None)
    if found is not None:
      for key, kind in (("records", int), ("identity", str)):
        files.get_field(found, key, kind, f"{item}: source", CheckpointError)
    return found

  def wait(self) -> None:
    """Until what was started is on disk."""
    with files.storage(self._folder):
      self._manager.wait_until_finished()

  def check(self) -> None:
    """Raises what went wrong with a save in the background, if anything did."""
    with files.storage(self._folder):
      self._manager.check_for_errors()

  def close(self) -> None:
    """Waits, and removes what could not be written to its end."""
    try:
      with files.storage(self._folder):
        self._manager.close()
    finally:
      if jax.process_index() == 0:
        for path in self._folder.glob("*.orbax-checkpoint-tmp*"):
          shutil.rmtree(path, ignore_errors=True)


def _reshare(path: pathlib.Path, shares: list[dict], count: int) -> list[dict]:
  """States of the iterators over the data in `count` shares.

  Shares that read as many records each have together read the first so many of
  the one order, however it is shared. What else an iterator may keep belongs to
  whole batches and so is the same in all shares, of any number.
  """
  if len(shares) == count:
    return shares
  if all(share == shares[0] for share in shares):
    if shares[0].keys() != {"next_record"}:
      return [shares[0]] * count
    read = shares[0]["next_record"] * len(shares)
    if read % count == 0:
      return [{"next_record": read // count}] * count
  raise CheckpointError(
    f"{path}/data",
    f"{len(shares)} shares of the data that are not equally far, as when bad "
    "records were skipped",
    f"shares that can be read on as {count}",
    f"resume with as many hosts as wrote it, or {_START_FROM}",
  )


_WHAT = ("model", "prompt", "optimizer")


def _check_same(path: pathlib.Path, before: Config, config: Config) -> None:
  """What must not change between stopping and resuming."""
  saved, now = (json.loads(c.to_json()) for c in (before, config))
  keys = {
    "data": ["batching"],
    "training": ["distill_weight", "teacher", "loss_mean"],
  }
  if now["data"]["batching"] == "group_by_length":
    # The order depends on them.
    keys["data"] += ["batch_size", "micro_batch_size"]
  groups = {group: (saved[group], now[group]) for group in _WHAT}
  for group, own in keys.items():
    old, new = ({key: c[group][key] for key in own} for c in (saved, now))
    groups[group] = old, new
  for group, (old, new) in groups.items():
    for key, was, is_now in _differences(old, new, group):
      if key in [f"model.{name}" for name in HOW_COMPUTED]:
        continue  # may change when a run goes on
      raise CheckpointError(
        f"{path}: config.{key}",
        shorten(was),
        f"{shorten(is_now)}, which this run has",
        f"set it back, or {_START_FROM}",
      )


def _check_layout(where: pathlib.Path, remedy: str) -> None:
  """The layout must give the ids that the weights were trained on."""
  saved = read_json(where, "layout")
  name = files.get_field(saved, "name", str, f"{where}/layout", CheckpointError)
  now = prompt.LAYOUTS.get(name)
  if now is None or now.stamp() != saved:
    raise CheckpointError(
      f"{where}/layout",
      f"prompt layout {shorten(name)} version {shorten(saved.get('version'))}",
      f"version {now.version} of it, which this vocojax has"
      if now
      else "a layout that this vocojax has",
      remedy,
    )


def _differences(a, b, path):
  if isinstance(a, dict) and isinstance(b, dict):
    for key in sorted(a.keys() | b.keys()):
      yield from _differences(a.get(key), b.get(key), f"{path}.{key}")
  elif a != b:
    yield path, a, b


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A checkpoint read for its weights.

  Attributes:
    path: folder of the step.
    step: its number.
    config: as it was written, but for a prompt layout chosen by the reader.
    tokenizer: its own copy.
    chosen_layout: that prompt layout; '' is the checkpoint's own.
  """

  path: pathlib.Path
  step: int
  config: Config
  tokenizer: transformers.PreTrainedTokenizerFast
  chosen_layout: str = ""


def find(path: str) -> tuple[pathlib.Path, int]:
  """The folder of checkpoints and the step that `path` means.

  Args:
    path: a phase folder, its `checkpoints`, one step in it, or PHASE/best for
      that with the best validation.

  Raises:
    CheckpointError: there is no complete checkpoint, or no validation.
  """
  given = files.to_path(path, CheckpointError)
  best = False
  with files.listing(given, CheckpointError):
    if given.name.isdecimal() and given.is_dir():
      folder, step = given.parent, int(given.name)
    else:
      best = given.name == BEST and not given.is_dir()
      phase = given.parent if best or given.name == FOLDER else given
      folder, step = phase / FOLDER, None
    if not folder.is_dir():
      phases = sorted(p.parent.name for p in given.glob(f"*/{FOLDER}"))
      raise CheckpointError(
        path,
        f"the phases {', '.join(phases)}" if phases else f"no folder {FOLDER}",
        "the folder of one phase",
        f"name {given / phases[-1]}" if phases else "name a phase of a workdir",
      )
  complete = steps(folder)
  if step is None and complete:
    step = max(complete)
    if best:
      step = _best_step(folder / str(step))
  if step not in complete:
    raise CheckpointError(
      path,
      f"complete steps {complete}" if complete else "no complete step",
      "a complete checkpoint",
      "name another step"
      if complete
      else "wait: config.training.checkpoint_every says when one is written",
    )
  return folder, step


def _best_step(latest: pathlib.Path) -> int:
  """The step that was the best when the latest checkpoint was written."""
  found = read_progress(latest).get("best_step")
  if found is None:
    raise CheckpointError(
      latest.parent.parent / BEST,
      "a run without validation",
      "steps with a validation loss",
      "train with config.evaluation.every, or name a step",
    )
  return int(found)


def load(path: str, layout: str = "") -> Loaded:
  """Config and tokenizer of a checkpoint.

  Args:
    path: as for `find`.
    layout: name of the prompt layout to use; '' is the one that the checkpoint
      was written with, which must be the same in this version of vocojax.

  Raises:
    CheckpointError: there is none, a part of it cannot be read, or its prompt
      layout is another.
  """
  folder, step = find(path)
  where = folder / str(step)
  if layout and layout not in prompt.LAYOUTS:
    raise UserError(
      "layout", shorten(layout), " or ".join(prompt.LAYOUTS), "choose one"
    )
  with checked(where, step, ("config", "layout", "tokenizer")):
    config = _read_config(where, layout)
    if not layout:
      _check_layout(
        where, "use the vocojax that wrote it, or choose a layout with --layout"
      )
    tokenizer = _read_tokenizer(where)
  return Loaded(where, step, config, tokenizer, layout)


@contextlib.contextmanager
def checked(
  where: pathlib.Path, step: int, items: tuple[str, ...], together: bool = False
) -> Iterator[None]:
  """`checksums.checked` around what reads items; says if there are none."""
  with checksums.checked(where, step, items, together) as there:
    if not there:
      checksums.say_missing(where)
    yield


def _read_config(where: pathlib.Path, layout: str = "") -> Config:
  """The item `config`, with another prompt layout if one is given."""
  values, item = read_json(where, "config"), f"{where}/config"
  if layout:
    files.get_field(values, "prompt", dict, item, CheckpointError)
    values["prompt"]["layout"] = layout
  try:
    # A checkpoint of before a key was made has its default.
    return Config.from_saved(values, item)
  except ConfigError as e:
    raise CheckpointError(
      e.where, e.got, e.expected, "use the vocojax that wrote the checkpoint"
    ) from e


def _read_tokenizer(
  where: pathlib.Path,
) -> transformers.PreTrainedTokenizerFast:
  saved = read_json(where, "tokenizer")
  for name, content in saved.items():
    item = f"{where}/tokenizer: {shorten(name)}"
    if name not in _TOKENIZER_FILES:
      raise CheckpointError(
        item,
        "a file of this name",
        f"only {', '.join(_TOKENIZER_FILES)}",
        "do not use this checkpoint unless you know who made it",
      )
    files.check_kind(content, item, dict, CheckpointError)
  with tempfile.TemporaryDirectory() as temporary:
    for name, content in saved.items():
      pathlib.Path(temporary, name).write_text(json.dumps(content))
    try:
      return load_tokenizer(temporary)
    except DataError as e:
      raise CheckpointError(
        f"{where}/tokenizer",
        e.got.replace(f"{temporary}/", ""),
        e.expected,
        "use another step",
      ) from e


def read_shares(where: pathlib.Path) -> list[dict[str, Any]]:
  """How far each share of the data was read, from the item `data`.

  Raises:
    CheckpointError: it is missing or of another form.
  """
  item = f"{where}/data"
  shares = files.get_field(
    read_json(where, "data"), "shares", list, item, CheckpointError
  )
  for i, share in enumerate(shares):
    name = f"{item}: shares[{i}]"
    files.check_kind(share, name, dict, CheckpointError)
    files.get_field(share, "next_record", int, name, CheckpointError, 0)
  if not shares:
    raise CheckpointError(
      f"{item}: field shares", "none", "at least one", "use another step"
    )
  return shares


def read_progress(where: pathlib.Path) -> dict[str, float]:
  """Sums of metrics that were not logged yet, from the item `progress`.

  Raises:
    CheckpointError: it is missing or of another form.
  """
  sums = read_json(where, "progress")
  for key in sums:
    files.get_field(sums, key, float, f"{where}/progress", CheckpointError)
  return sums


@contextlib.contextmanager
def _readable(where: pathlib.Path):
  """For what Orbax reads; whatever it raises means that it cannot."""
  try:
    with orbax_call():
      yield
  except (UserError, MemoryError, jax.errors.JaxRuntimeError):
    raise  # these are not about the checkpoint
  except Exception as e:
    cause: BaseException = e
    while cause.__cause__:
      cause = cause.__cause__
    words = " ".join(str(cause).replace(f"{where}/", "").split())
    raise CheckpointError(
      where,
      f"items that Orbax cannot read ({words[:200]})",
      "items as they were written",
      "use another step, or copy this one again",
    ) from e


def load_params(
  path: str, abstract: state.Params, model: ModelConfig
) -> tuple[state.Params, list[str]]:
  """Parameters of a checkpoint that `abstract` asks for.

  Args:
    path: as for `find`.
    abstract: shapes, dtypes and shardings of the wanted parameters.
    model: what is being built, for the message when shapes differ.

  Returns:
    The parameters found, and the paths of those that the checkpoint lacks.

  Raises:
    CheckpointError: a parameter has another shape or cannot be read.
  """
  folder, step = find(path)
  where, wanted = folder / str(step), state.flatten(abstract)
  with (
    _readable(where),
    checked(where, step, ("params",), together=True),
    ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader,
  ):
    saved = _param_shapes(where, wanted, model)
    # Orbax restores whole items: what is not wanted is read and dropped.
    target = {
      name: wanted.get(name, jax.ShapeDtypeStruct(x.shape, x.dtype))
      for name, x in saved.items()
    }
    restored = reader.restore(
      where / "params", args=ocp.args.StandardRestore(state.unflatten(target))
    )
  found = {
    name: x for name, x in state.flatten(restored).items() if name in wanted
  }
  return state.unflatten(found), sorted(wanted.keys() - found.keys())


def missing_params(
  path: str, abstract: state.Params, model: ModelConfig
) -> list[str]:
  """Paths of those parameters that a checkpoint lacks; reads no array.

  Args and errors are those of `load_params`.
  """
  folder, step = find(path)
  where, wanted = folder / str(step), state.flatten(abstract)
  with _readable(where):
    return sorted(wanted.keys() - _param_shapes(where, wanted, model).keys())


def _param_shapes(
  where: pathlib.Path, wanted: dict[str, Any], model: ModelConfig
) -> dict[str, Any]:
  """Shapes and dtypes of the parameters of a step, by path.

  Raises:
    CheckpointError: one that is wanted has another shape.
  """
  # Not from a reader, which warns that a part is not a whole checkpoint.
  handler = ocp.StandardCheckpointHandler()
  saved = state.flatten(handler.metadata(epath.Path(where) / "params").tree)
  for name in wanted.keys() & saved.keys():
    if tuple(saved[name].shape) != wanted[name].shape:
      raise CheckpointError(
        f"{where}/params: {name}",
        f"shape {tuple(saved[name].shape)}",
        f"{wanted[name].shape}, which the model of this run needs "
        f"({model.llm.num_hidden_layers} layers, width "
        f"{model.llm.hidden_size})",
        "use a checkpoint of the same shape, or change config.model",
      )
  return saved


def tokenizer_files(tokenizer) -> dict[str, dict]:
  """What a tokenizer's files hold, by name, `tokenizer.json` first."""
  with tempfile.TemporaryDirectory() as temporary:
    tokenizer.save_pretrained(temporary)
    paths = [pathlib.Path(temporary, name) for name in _TOKENIZER_FILES]
    return {p.name: files.read_json(p) for p in paths if p.is_file()}


def write_settings(
  where: pathlib.Path,
  config: Config,
  tokenizer: transformers.PreTrainedTokenizerFast,
) -> None:
  """Writes `config`, `tokenizer` and `layout` of weights from elsewhere."""
  items = {
    "config": json.loads(config.to_json()),
    "tokenizer": tokenizer_files(tokenizer),
    "layout": prompt.LAYOUTS[config.prompt.layout].stamp(),
  }
  for item, content in items.items():
    write_json(where, item, content)


def write_json(folder: pathlib.Path, item: str, content: dict) -> None:
  """Writes one JSON item of a step."""
  with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as writer:
    writer.save(folder / item, args=ocp.args.JsonSave(content))
