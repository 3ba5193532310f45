"""Checkpoints of training. Read next: __main__.py."""

import pathlib
import shutil
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from tests import runs
from tests.fuzz import documents, files
from tests.fuzz.documents import Document
from tests.fuzz.kinds import Case, Input, Kind, Parts, array
from tests.models import builders
from vocojax import assemble, config
from vocojax.data import tokenizer
from vocojax.training import checkpoint, loop, state

_STEP = "checkpoints/4"
_READ = ("params", "config", "tokenizer", "layout")  # items that are read


def _make(folder: pathlib.Path) -> Parts:
  """Two steps with other weights; the second is what is read."""
  with tempfile.TemporaryDirectory() as temporary:
    data = pathlib.Path(temporary)
    runs.write_data(data)
    runs.write_config(data, "one.py", runs.ONE_PHASE)
    (settings,) = config.phases(config.load_module(str(data / "one.py")))
    words = tokenizer.load_tokenizer(data / "tokenizer")
  model = assemble.make_model(settings, words)
  checkpoints = checkpoint.Checkpointer(folder, settings, words)
  for step in (3, 4):
    params = builders.init(model, step)
    train_state = state.TrainState(
      jnp.int32(step),
      jax.tree.map(jnp.asarray, params),
      {"moment": jnp.ones(2)},
    )
    checkpoints.save(train_state, [{"next_record": step}], {"loss": 0.5})
  checkpoints.close()
  return {
    "step": 4,
    "config": settings.to_json(),
    "words": words.get_vocab(),
    **{path: array(x) for path, x in state.flatten(params).items()},
  }


def _read(folder: pathlib.Path) -> Parts:
  loaded = checkpoint.load(str(folder / _STEP))
  model = assemble.make_model(loaded.config, loaded.tokenizer)
  abstract = loop.abstract_params(model, runs.mesh())
  params, missing = checkpoint.load_params(
    str(folder / _STEP), abstract, loaded.config.model
  )
  assert not missing, missing
  return {
    "step": loaded.step,
    "config": loaded.config.to_json(),
    "words": loaded.tokenizer.get_vocab(),
    **{path: array(np.asarray(x)) for path, x in state.flatten(params).items()},
  }


def _item(name: str) -> files.Pick:
  return files.one_of(f"{_STEP}/{name}/metadata")


def _forged(mutate: files.Change) -> files.Change:
  """By someone who leaves out what would tell: checksums are optional."""

  def mutate_and_forge(given: Input) -> None:
    mutate(given)
    for path in given.folder.glob(f"{_STEP}/*sums*"):
      path.unlink()

  return mutate_and_forge


def _tokenizer_file(name: str) -> files.Change:
  """A file of the tokenizer under a name that leads elsewhere."""

  def mutate(given: Input) -> None:
    document = Document(_item("tokenizer")(given))
    where = name.replace("ROOM", str(given.folder.parent))
    document.tree[where] = {"echo": "I was here"}
    document.write()

  return mutate


def _of_other_step(item: str) -> files.Change:
  def mutate(given: Input) -> None:
    shutil.rmtree(given.folder / _STEP / item)
    shutil.copytree(
      given.folder / "checkpoints/3" / item, given.folder / _STEP / item
    )

  return mutate


def _without(item: str) -> files.Change:
  return lambda given: shutil.rmtree(given.folder / _STEP / item)


_ANY = files.one_of(*(f"{_STEP}/{item}/**/*" for item in _READ))
_LARGE = files.one_of(f"{_STEP}/params/**/d/*")
_METADATA = files.one_of(f"{_STEP}/params/_METADATA")
_CASES: dict[str, Case] = {
  **{
    name: ("either", mutate) for name, (_, mutate) in files.cases(_ANY).items()
  },
  "cut": ("either", files.changes(_ANY, files.cut)),
  "extended": ("either", files.changes(_ANY, files.extend)),
  "bits_of_arrays": ("refuse", files.changes(_LARGE, files.flip_bits)),
  "no_checksums": ("read", _forged(lambda given: None)),
  **{
    f"{item}_{name}": (declared, _forged(mutate))
    for item in ("config", "tokenizer", "layout")
    for name, (declared, mutate) in documents.cases(_item(item)).items()
    if name not in files.TARGETS
  },
  **{
    f"arrays_{name}": ("either", _forged(documents.cases(_METADATA)[name][1]))
    for name in documents.DRAWN
  },
  **{
    f"no_{item}": ("refuse", _forged(_without(item)))
    for item in ("params", "config", "tokenizer", "layout")
  },
  **{
    f"{item}_of_other_step": ("refuse", _of_other_step(item))
    for item in ("params",)
  },
  **{
    f"writes_{name}": ("refuse", _forged(_tokenizer_file(path)))
    for name, path in (
      ("up", "../escaped.json"),
      ("home", "../../home/.profile"),
      ("absolute", "ROOM/escaped.json"),
      ("deep", "a/../../escaped.json"),
      ("nul", "a\0b.json"),
      ("nothing", ""),
      ("dot", ".."),
      ("code", "tokenization_evil.py"),
      ("long", "x" * 300),
    )
  },
}
KINDS = {
  "checkpoint": Kind(
    _make,
    _read,
    _CASES,
    ("bits", "bits_of_arrays", "config_wrong_type", "tokenizer_wrong_type"),
  )
}
