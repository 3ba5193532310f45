"""Checkpoints on disk: whole, half-written, readable? Next: data.py.

Reads what `training/checkpoint.py` wrote; changes and deletes nothing.
"""

import itertools
import pathlib
import re
import sys
from collections.abc import Iterator

import jax
import tensorstore
import tqdm

from vocojax.config import Config
from vocojax.core import files
from vocojax.errors import CheckpointError, UserError
from vocojax.health.findings import Finding, size
from vocojax.models.compressors import StreamTokens
from vocojax.models.vlm import VisionLanguageModel
from vocojax.training import checkpoint, checksums, step
from vocojax.training.optimizer import make_optimizer

# Items of a step: what every reader needs, and what a run needs to resume.
WEIGHTS = ("params", "config", "tokenizer", "layout")
RUN = ("optimizer", "data", "progress")
_ARRAYS = ("params", "optimizer")


def folders(workdir: pathlib.Path) -> list[pathlib.Path]:
  """The folder of checkpoints of each phase."""
  return sorted(files.expand_user(workdir).glob(f"*/{checkpoint.FOLDER}"))


def check(given: pathlib.Path, thorough: bool = False) -> Iterator[Finding]:
  """One line for each step, half-written ones included.

  Args:
    given: a phase folder, its `checkpoints`, or one step in it.
    thorough: reads the arrays of all steps; if not, those of the newest only,
      with which a run goes on.
  """
  given = files.expand_user(given, CheckpointError)
  folder, only = given, None
  if given.name.isdecimal() and given.parent.name == checkpoint.FOLDER:
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
  complete = checkpoint.steps(folder)
  if only and int(only) not in complete:
    yield _half_written(given)
    return
  before = None if only else "the phase starts anew"
  for number in [int(only)] if only else complete:
    where = folder / str(number)
    read = thorough or bool(only) or number == complete[-1]
    try:
      yield Finding(f"checkpoint {where}", _check_step(where, number, read))
    except UserError as e:
      inside = e.where.removeprefix(str(where)).strip("/: ")
      found = f"got {e.got}, expected {e.expected}"
      yield Finding(
        f"checkpoint {where}",
        f"{inside}: {found}" if inside else found,
        "error",
        e.fix + (f"; without this folder {before}" if before else ""),
      )
    else:
      before = before and f"the run resumes from step {number}"
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


def _half_written(path: pathlib.Path) -> Finding:
  return Finding(
    f"checkpoint {path}",
    "half-written",
    "warning",
    "nothing ever picks it up; delete it unless a run is writing it now",
  )


def _check_step(where: pathlib.Path, number: int, read: bool) -> str:
  """What a step is.

  Raises:
    UserError: something is wrong with it.
  """
  has = {item for item in (*WEIGHTS, *RUN) if (where / item).is_dir()}
  is_run = bool(has & set(RUN))  # converted weights come without one
  expected = WEIGHTS + (RUN if is_run else ())
  if missing := [item for item in expected if item not in has]:
    raise CheckpointError(
      where,
      f"no {' and no '.join(missing)}",
      "all items",
      "copy it again, or move it away",
    )
  config = checkpoint.load(str(where)).config
  items = [path.name for path in where.iterdir() if path.is_dir()]
  if not read:
    items = [item for item in items if item not in _ARRAYS]
  try:
    with checksums.checked(where, number, items) as summed:
      if is_run:
        checkpoint.read_progress(where)
        checkpoint.read_shares(where)
      arrays = [
        x for item in _ARRAYS if item in has for x in _arrays(where / item)
      ]
      if read:
        _read(arrays, where)
  except (OSError, ValueError) as e:  # TensorStore's
    words = " ".join(str(e).replace(f"{where}/", "").split())
    raise CheckpointError(
      where,
      f"arrays that cannot be read ({words[:200]})",
      "arrays as they were written",
      "copy it again",
    ) from e
  kind = "a run to resume" if is_run else "weights without a run"
  much = size(sum(map(_nbytes, arrays)))
  how = "all of it read" if read else "arrays not read, --thorough does"
  if not summed:
    how += f", no {checksums.FILE}"
  return f"{kind}, compressor {config.model.compressor.name}, {much}, {how}"


def _arrays(item: pathlib.Path) -> list[tensorstore.TensorStore]:
  """The arrays of an item, not read yet.

  Raises:
    CheckpointError: Orbax' list of them is not one.
    ValueError: one cannot be opened.
  """
  # Not with Orbax' reader: where one array cannot be opened, it leaves those
  # that it was opening to complain later.
  where = item / "_METADATA"
  content = files.read_json(where, dict, CheckpointError)
  try:
    names = [
      ".".join(part["key"] for part in leaf["key_metadata"])
      for leaf in content["tree_metadata"].values()
      if leaf["value_metadata"]["value_type"] in ("jax.Array", "np.ndarray")
    ]
  except (KeyError, TypeError, AttributeError) as e:
    raise CheckpointError(
      where, "no list of arrays", "what Orbax writes", "copy it again"
    ) from e
  arrays = []
  for name in names:
    path = files.path_inside(item.absolute(), name, where, CheckpointError)
    # Converted weights are one folder an array, others one store of all.
    folder = {"driver": "file", "path": f"{path}/"}
    if content.get("use_ocdbt", True):
      base = {"driver": "file", "path": f"{item.absolute()}/"}
      folder = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    spec = {
      "driver": "zarr",
      "kvstore": folder,
      # What is not there would be read as zeros.
      "fill_missing_data_reads": False,
    }
    arrays.append(tensorstore.open(spec, open=True, read=True).result())
  return arrays


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
