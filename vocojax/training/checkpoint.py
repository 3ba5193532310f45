"""Checkpoints: all that a run is, in one folder. Read next: `loop.py`.

PHASE/checkpoints/STEP holds `params`, `optimizer` (state and step), `data` (how
far each share of the data was read), `config`, `tokenizer` (its files),
`layout` (name and version of the prompt layout) and `progress` (metrics that
are summed but not logged yet). Orbax writes them in the background, all hosts
together, and the first host renames the folder when it is complete, so a
half-written one is never picked up. Whoever only wants weights needs `params`,
`config`, `tokenizer` and `layout`.
"""

import contextlib
import dataclasses
import json
import pathlib
import tempfile

import jax
import orbax.checkpoint as ocp
import transformers
from etils import epath

from vocojax.config import HOW_COMPUTED, Config, ModelConfig
from vocojax.data import prompt
from vocojax.data.tokenizer import load_tokenizer
from vocojax.errors import CheckpointError
from vocojax.training import state
from vocojax.training.state import TrainState

FOLDER = "checkpoints"


def _steps(folder: pathlib.Path) -> list[int]:
  """Steps whose checkpoint is complete, ascending."""
  return sorted(ocp.utils.checkpoint_steps(folder))


def read_json(folder: pathlib.Path, item: str) -> dict:
  with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
    return reader.restore(folder / item)


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
    self._tokenizer = _tokenizer_files(tokenizer)
    self._manager = ocp.CheckpointManager(
      self._folder.absolute(),
      options=ocp.CheckpointManagerOptions(
        max_to_keep=config.training.keep_checkpoints,
        # Otherwise each host lists the folder, and file systems that hosts
        # share may show a new checkpoint to some of them only.
        single_host_load_and_broadcast=True,
      ),
    )

  @property
  def latest(self) -> int | None:
    """Newest complete step, or None."""
    return self._manager.latest_step()

  def path(self, step: int) -> pathlib.Path:
    return self._folder / str(step)

  def save(
    self, train_state: TrainState, shares: list[dict], progress: dict
  ) -> None:
    """Starts writing; a step that is already there is left as it is.

    Args:
      train_state: parameters and optimiser state, after this step.
      shares: state of the iterator over each share of the data.
      progress: sums of metrics that are not logged yet.
    """
    step = int(train_state.step)
    if step in self._manager.all_steps():
      return
    optimizer = {"step": train_state.step, "state": train_state.opt_state}
    self._manager.save(
      step,
      args=ocp.args.Composite(
        params=ocp.args.StandardSave(train_state.params),
        optimizer=ocp.args.StandardSave(optimizer),
        data=ocp.args.JsonSave({"shares": shares}),
        config=ocp.args.JsonSave(json.loads(self._config.to_json())),
        tokenizer=ocp.args.JsonSave(self._tokenizer),
        layout=ocp.args.JsonSave(self._layout.stamp()),
        # A copy: it is written later, while the original counts on.
        progress=ocp.args.JsonSave(dict(progress)),
      ),
    )

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
        f"{where}: holds weights without a run to go on with; use another "
        "--workdir, and config.init_from to start from them"
      )
    with _readable(where):
      saved = {item: read_json(where, item) for item in ("config", "layout")}
    # A checkpoint of before a key was made has its default.
    config = Config.from_json(json.dumps(saved["config"]), str(where))
    _check_same(where, config, self._config)
    _check_layout(
      where,
      saved["layout"],
      "use another --workdir, or config.init_from to start from its weights",
    )
    optimizer = {"step": abstract.step, "state": abstract.opt_state}
    with _readable(where):
      restored = self._manager.restore(
        step,
        args=ocp.args.Composite(
          params=ocp.args.StandardRestore(abstract.params),
          optimizer=ocp.args.StandardRestore(optimizer),
          data=ocp.args.JsonRestore(),
          progress=ocp.args.JsonRestore(),
        ),
      )
    train_state = TrainState(
      restored["optimizer"]["step"],
      restored["params"],
      restored["optimizer"]["state"],
    )
    shares = _reshare(where, restored["data"]["shares"], shard_count)
    return train_state, shares, restored["progress"]

  def wait(self) -> None:
    """Until what was started is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    self._manager.close()


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
    f"{path}: its data was read in {len(shares)} shares that are not equally "
    f"far, as when bad records were skipped, and this run has {count}; go on "
    "with as many hosts as wrote it, or start a new --workdir with "
    "config.init_from"
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
        f"{path}: was written with config.{key}={was!r}, this run has "
        f"{is_now!r}; "
        "use another --workdir, or config.init_from to start from its weights"
      )


def _check_layout(path: pathlib.Path, saved: dict, remedy: str) -> None:
  """The layout must give the ids that the weights were trained on."""
  now = prompt.LAYOUTS.get(saved.get("name", ""))
  if now is None or now.stamp() != saved:
    name, version = saved.get("name"), saved.get("version")
    found = f"version {now.version} of it" if now else "no such layout"
    raise CheckpointError(
      f"{path}: was written with prompt layout {name!r} version {version}, "
      f"this vocojax has {found}; {remedy}"
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
    path: a phase folder, its `checkpoints`, or one step in it.

  Raises:
    CheckpointError: there is no complete checkpoint.
  """
  given = pathlib.Path(path).expanduser().absolute()  # Orbax wants it so
  if given.name.isdigit() and given.is_dir():
    folder, step = given.parent, int(given.name)
  else:
    folder = given if given.name == FOLDER else given / FOLDER
    step = None
  if not folder.is_dir():
    phases = sorted(p.parent.name for p in given.glob(f"*/{FOLDER}"))
    hint = f"; it has the phases {', '.join(phases)}" if phases else ""
    raise CheckpointError(
      f"{path}: no folder '{FOLDER}' in it{hint}; name the phase folder of a "
      "workdir"
    )
  steps = _steps(folder)
  if step is None and steps:
    step = max(steps)
  if step not in steps:
    raise CheckpointError(
      f"{path}: no complete checkpoint, found {steps or 'none'}; "
      "a run writes one every config.training.checkpoint_every steps"
    )
  return folder, step


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
  items = ("config", "tokenizer", *([] if layout else ["layout"]))
  with _readable(where):
    saved = {item: read_json(where, item) for item in items}
  if layout:
    saved["config"]["prompt"]["layout"] = layout
  else:
    _check_layout(
      where,
      saved["layout"],
      "use the vocojax that wrote it, or choose a layout with --layout",
    )
  with tempfile.TemporaryDirectory() as temporary:
    for name, content in saved["tokenizer"].items():
      (pathlib.Path(temporary) / name).write_text(json.dumps(content))
    tokenizer = load_tokenizer(temporary)
  config = Config.from_json(json.dumps(saved["config"]), str(where))
  return Loaded(where, step, config, tokenizer, layout)


@contextlib.contextmanager
def _readable(where: pathlib.Path):
  try:
    yield
  except Exception as e:
    # Orbax raises a KeyError for an item that is not there, and one of no other
    # type for arrays that are damaged.
    known = (OSError, ValueError, KeyError)
    if type(e) is not Exception and not isinstance(e, known):
      raise
    raise CheckpointError(
      f"{where}: cannot be read ({' '.join(str(e).split())[:200]}); use "
      "another step"
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
  where = folder / str(step)
  wanted = state.flatten(abstract)
  handler = ocp.StandardCheckpointHandler()
  with ocp.Checkpointer(handler) as reader, _readable(where):
    # Not from `reader`, which warns that a part is not a whole checkpoint.
    saved = state.flatten(handler.metadata(epath.Path(where) / "params").tree)
    for name in wanted.keys() & saved.keys():
      if tuple(saved[name].shape) != wanted[name].shape:
        raise CheckpointError(
          f"{where}: {name} has shape {tuple(saved[name].shape)}, the model of "
          f"this run ({model.llm.num_hidden_layers} layers, width "
          f"{model.llm.hidden_size}) needs {wanted[name].shape}; use a "
          "checkpoint of the same shape or change config.model"
        )
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


def _tokenizer_files(tokenizer) -> dict[str, dict]:
  with tempfile.TemporaryDirectory() as temporary:
    tokenizer.save_pretrained(temporary)
    return {
      p.name: json.loads(p.read_text())
      for p in pathlib.Path(temporary).glob("*.json")
    }


def write_settings(
  where: pathlib.Path,
  config: Config,
  tokenizer: transformers.PreTrainedTokenizerFast,
) -> None:
  """Writes `config`, `tokenizer` and `layout` of weights from elsewhere."""
  items = {
    "config": json.loads(config.to_json()),
    "tokenizer": _tokenizer_files(tokenizer),
    "layout": prompt.LAYOUTS[config.prompt.layout].stamp(),
  }
  for item, content in items.items():
    write_json(where, item, content)


def write_json(folder: pathlib.Path, item: str, content: dict) -> None:
  """Writes one JSON item of a step."""
  with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as writer:
    writer.save(folder / item, args=ocp.args.JsonSave(content))
