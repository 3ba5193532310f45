"""Checkpoints of training. Read next: __main__.py."""

import pathlib
import shutil
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from tests import runs
from tests.fuzz import documents, files
from tests.fuzz.kinds import Case, Input, Kind, Mutation, Parts, array
from tests.models import builders
from vocojax import assemble, config
from vocojax.data import tokenizer
from vocojax.training import checkpoint, loop, state

_STEP = "checkpoints/4"


def _make(folder: pathlib.Path) -> Parts:
  """Two steps with other weights; the second is what is read."""
  with tempfile.TemporaryDirectory() as temporary:
    data = pathlib.Path(temporary)
    runs.write_data(data)
    path = runs.write_config(data, "one.py", runs.ONE_PHASE)
    (settings,) = config.phases(config.load_module(str(path)))
    words = tokenizer.load_tokenizer(data / "tokenizer")
  model = assemble.make_model(settings, words)
  checkpoints = checkpoint.Checkpointer(folder, settings, words)
  for step in (3, 4):
    params = jax.tree.map(jnp.asarray, builders.init(model, step))
    moments = {"moment": jnp.ones(2)}
    train_state = state.TrainState(jnp.int32(step), params, moments)
    checkpoints.save(train_state, [{"next_record": step}], {"loss": 0.5})
  checkpoints.close()
  return _parts(4, settings, words, params)


def _read(folder: pathlib.Path) -> Parts:
  loaded = checkpoint.load(str(folder / _STEP))
  model = assemble.make_model(loaded.config, loaded.tokenizer)
  params, missing = checkpoint.load_params(
    str(folder / _STEP),
    loop.abstract_params(model, runs.mesh()),
    loaded.config.model,
  )
  assert not missing, missing
  return _parts(loaded.step, loaded.config, loaded.tokenizer, params)


def _parts(step: int, settings: config.Config, words, params) -> Parts:
  arrays = {k: array(np.asarray(x)) for k, x in state.flatten(params).items()}
  settings = settings.to_json()
  return {"step": step, "config": settings, "words": words.get_vocab()} | arrays


def _forged(mutate: Mutation) -> Mutation:
  """By someone who leaves out what would tell: checksums are optional."""

  def mutate_and_forge(given: Input) -> None:
    mutate(given)
    for path in given.folder.glob(f"{_STEP}/*sums*"):
      path.unlink()

  return mutate_and_forge


def _item(name: str) -> files.Pick:
  return files.one_of(f"{_STEP}/{name}/metadata")


def _tokenizer_file(name: str) -> Case:
  """A file of the tokenizer under a name that leads elsewhere."""

  def mutate(given: Input) -> None:
    where = name.replace("ROOM", str(given.folder.parent))
    documents.edits(
      _item("tokenizer"), lambda x, rng: x.tree.update({where: {"a": "evil"}})
    )(given)

  return "refuse", _forged(mutate)


def _of_other_step(given: Input) -> None:
  shutil.rmtree(given.folder / _STEP / "params")
  other = given.folder / "checkpoints/3/params"
  shutil.copytree(other, given.folder / _STEP / "params")


def _without(item: str) -> Case:
  remove = lambda given: shutil.rmtree(given.folder / _STEP / item)  # noqa: E731
  return "refuse", _forged(remove)


_ITEMS = ("config", "tokenizer", "layout")
_ANY = files.one_of(*(f"{_STEP}/{x}/**/*" for x in ("params", *_ITEMS)))
_LARGE = files.one_of(f"{_STEP}/params/**/d/*")
_ARRAYS = documents.cases(files.one_of(f"{_STEP}/params/_METADATA"))
_CASES: dict[str, Case] = {
  **{x: ("either", mutate) for x, (_, mutate) in files.cases(_ANY).items()},
  **{
    f"{item}_{name}": (declared, _forged(mutate))
    for item in _ITEMS
    for name, (declared, mutate) in documents.cases(_item(item)).items()
    if name not in files.TARGETS
  },
  **{
    f"arrays_{x}": ("either", _forged(_ARRAYS[x][1])) for x in documents.DRAWN
  },
  **{f"no_{item}": _without(item) for item in ("params", *_ITEMS)},
  **{
    f"writes_{i}": _tokenizer_file(name)
    for i, name in enumerate(
      (
        *("../escaped.json", "../../escaped.json", "ROOM/escaped.json"),
        *("a/../../escaped.json", "a\0b.json", "", "..", "x" * 300),
        "tokenization_evil.py",
      )
    )
  },
  "bits_of_arrays": ("refuse", files.changes(_LARGE, files.flip_bits)),
  "no_checksums": ("read", _forged(lambda given: None)),
  "other_step": ("refuse", _of_other_step),
}
_DRAWN = ("bits", "bits_of_arrays", "config_wrong_type", "tokenizer_wrong_type")
KINDS = {"checkpoint": Kind(_make, _read, _CASES, _DRAWN)}
