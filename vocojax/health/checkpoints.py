"""Checkpoints on disk: whole, half-written, readable? Next: data.py.

Reads what `training/checkpoint.py` wrote; changes and deletes nothing.
"""

import itertools
import json
import pathlib
import re
import sys
from collections.abc import Iterator

import jax
import orbax.checkpoint as ocp
import tensorstore
import tqdm

from vocojax.config import Config
from vocojax.errors import UserError
from vocojax.health.findings import Finding, size
from vocojax.models.compressors import StreamTokens
from vocojax.models.vlm import VisionLanguageModel
from vocojax.training import checkpoint, step
from vocojax.training.optimizer import make_optimizer

# Items of a step: what every reader needs, and what a run needs to go on.
WEIGHTS = ("params", "config", "tokenizer", "layout")
RUN = ("optimizer", "data", "progress")
_ARRAYS = ("params", "optimizer")


def folders(workdir: pathlib.Path) -> list[pathlib.Path]:
  """The folder of checkpoints of each phase."""
  return sorted(workdir.expanduser().glob(f"*/{checkpoint.FOLDER}"))


def check(given: pathlib.Path, thorough: bool = False) -> Iterator[Finding]:
  """One line for each step, half-written ones included.

  Args:
    given: a phase folder, its `checkpoints`, or one step in it.
    thorough: reads the arrays of all steps; if not, those of the newest only,
      with which a run goes on.
  """
  given = given.expanduser()
  folder, only = given, None
  if given.name.isdigit() and given.parent.name == checkpoint.FOLDER:
    folder, only = given.parent, given.name
  elif given.name != checkpoint.FOLDER:
    folder = given / checkpoint.FOLDER
  if not folder.is_dir() or not given.is_dir():
    yield Finding(
      f"checkpoint {given}",
      f"no folder {given if folder.is_dir() else folder}",
      "error",
      "name the phase folder of a workdir, or use --workdir for all of them",
    )
    return
  complete = sorted(ocp.utils.checkpoint_steps(folder))
  if only and int(only) not in complete:
    yield _half_written(given)
    return
  broken = {}
  for number in [int(only)] if only else complete:
    where = folder / str(number)
    read = thorough or only or number == complete[-1]
    problem, found = _check_step(where, bool(read))
    broken[number] = (where, problem, found)
  good = [number for number, (_, problem, _) in broken.items() if not problem]
  for number, (where, problem, found) in broken.items():
    before = max((n for n in good if n < number), default=None)
    yield Finding(
      f"checkpoint {where}",
      problem or found,
      "error" if problem else "OK",
      f"move this folder away; {_instead(before)}" if problem else "",
    )
  if only:
    return
  names = {str(number) for number in complete}
  for path in sorted(folder.iterdir()):
    if path.name not in names and re.match(r"\d+(\.|$)", path.name):
      yield _half_written(path)
  if not complete:
    yield Finding(
      f"checkpoint {folder}",
      "no complete step",
      "warning",
      "the same command as before starts this phase anew",
    )


def _instead(before: int | None) -> str:
  if before is None:
    return "no good step is before it, so the phase starts anew"
  return f"the run then goes on from step {before}"


def _half_written(path: pathlib.Path) -> Finding:
  return Finding(
    f"checkpoint {path}",
    "half-written",
    "warning",
    "nothing ever picks it up; delete it unless a run is writing it now",
  )


def _check_step(where: pathlib.Path, read: bool) -> tuple[str, str]:
  """What is wrong with a step ('' if nothing), and what it is."""
  has = {item for item in (*WEIGHTS, *RUN) if (where / item).is_dir()}
  # Weights that were converted come without a run.
  expected = WEIGHTS + (RUN if has & set(RUN) else ())
  if missing := [item for item in expected if item not in has]:
    return f"lacks {', '.join(missing)}", ""
  try:
    loaded = checkpoint.load(str(where))
    if has & set(RUN):
      checkpoint.read_json(where, "progress")
      for part in (where / "data").iterdir():
        if part.name != "commit_success.txt":  # Orbax' own mark
          json.loads(part.read_text())
    arrays = [
      x for item in _ARRAYS if item in has for x in _arrays(where / item)
    ]
    if read:
      _read(arrays, where)
  except UserError as e:
    return str(e).removeprefix(f"{where}: ").partition("; use another")[0], ""
  except (OSError, ValueError, KeyError) as e:
    return f"cannot be read ({' '.join(str(e).split())[:300]})", ""
  kind = "a run to go on with" if has & set(RUN) else "weights without a run"
  much = size(sum(map(_nbytes, arrays)))
  how = "all of it read" if read else "arrays not read, --thorough does"
  compressor = loaded.config.model.compressor.name
  return "", f"{kind}, compressor {compressor}, {much}, {how}"


def _arrays(item: pathlib.Path) -> list[tensorstore.TensorStore]:
  """The arrays of an item, not read yet.

  Raises:
    ValueError: one cannot be opened.
    KeyError: Orbax' list of them is not one.
  """
  # Not with Orbax' reader: where one array cannot be opened, it leaves those
  # that it was opening to complain later.
  tree = json.loads((item / "_METADATA").read_text())["tree_metadata"]
  names = [
    ".".join(part["key"] for part in leaf["key_metadata"])
    for leaf in tree.values()
    if leaf["value_metadata"]["value_type"] in ("jax.Array", "np.ndarray")
  ]
  base = {"driver": "ocdbt", "base": f"file://{item.absolute()}/"}
  return [
    tensorstore.open(
      {
        "driver": "zarr",
        "kvstore": base | {"path": f"{name}/"},
        # What is not there would be read as zeros.
        "fill_missing_data_reads": False,
      },
      open=True,
      read=True,
    ).result()
    for name in names
  ]


def _nbytes(array: tensorstore.TensorStore) -> int:
  return array.size * array.dtype.numpy_dtype.itemsize


def _read(arrays: list[tensorstore.TensorStore], where: pathlib.Path) -> None:
  """Reads arrays chunk by chunk, so that a large one takes little memory.

  Raises:
    ValueError: a part is missing or damaged.
  """
  with tqdm.tqdm(
    total=sum(map(_nbytes, arrays)),
    desc=str(where),
    unit="B",
    unit_scale=True,
    mininterval=1 if sys.stderr.isatty() else 20,
    dynamic_ncols=True,
  ) as bar:
    for array in arrays:
      steps = [n or 1 for n in array.chunk_layout.read_chunk.shape or ()]
      corners = itertools.product(
        *(range(0, n, k) for n, k in zip(array.shape, steps, strict=True))
      )
      for corner in corners:
        box = tuple(
          slice(at, min(at + k, n))
          for at, k, n in zip(corner, steps, array.shape, strict=True)
        )
        bar.update(array[box].read().result().nbytes)


def sizes(config: Config) -> tuple[int, int]:
  """Number of parameters of a model, and bytes of a checkpoint of its run."""
  model = VisionLanguageModel(config.model, StreamTokens((0,), (), 0))
  optimizer = make_optimizer(config.optimizer, 1)

  def init(key):
    return step.init_state(model.init(key), optimizer, config.optimizer.freeze)

  shapes = jax.eval_shape(init, jax.random.key(0))
  nbytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
  return sum(x.size for x in jax.tree.leaves(shapes.params)), nbytes


def bytes_on_disk(workdir: pathlib.Path) -> int:
  """What the checkpoints of a workdir take already."""
  files = (p for folder in folders(workdir) for p in folder.rglob("*"))
  return sum(p.stat().st_size for p in files if p.is_file())
