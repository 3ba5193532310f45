"""Published weights and model folders. Read next: pickle_kinds.py."""

import functools
import pathlib
import shutil

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from tests.fuzz import documents, files
from tests.fuzz.documents import Document
from tests.fuzz.kinds import Case, Input, Kind, Mutation, Parts, array
from vocojax.data import tokenizer
from vocojax.weights import files as weight_files
from vocojax.weights import into, source

_DTYPES = {
  **{"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16},
  **{"F64": np.float64, "I64": np.int64, "I32": np.int32},
  **{"U8": np.uint8, "BOOL": np.bool_},
}
_FILE = files.one_of("model.safetensors")


def make_state() -> dict[str, np.ndarray]:
  """Tensors of several dtypes."""
  rng = np.random.default_rng(0)
  return {
    name: rng.normal(0, 9, shape).astype(dtype)
    for name, shape, dtype in (
      ("a.weight", (5, 3), np.float32),
      ("b.weight", (4,), ml_dtypes.bfloat16),
      ("c.weight", (2, 3, 4), np.float16),
      ("d.position_ids", (1, 7), np.int64),
    )
  }


def read_tensors(folder: pathlib.Path) -> Parts:
  found = weight_files.open_folder(folder)
  # Of a scalar there are no rows.
  return {
    name: array(x.rows()) if x.shape else (str(x.dtype), (), b"")
    for name, x in found.items()
  }


def _make_safetensors(folder: pathlib.Path) -> Parts:
  path = folder / "model.safetensors"
  safetensors.numpy.save_file(make_state(), path, {"format": "pt"})
  return {name: array(x) for name, x in make_state().items()}


def _compared(mutate: Mutation) -> Mutation:
  """What is read must be the original, or what the library reads."""

  def mutate_and_compare(given: Input) -> None:
    mutate(given)
    path = given.folder / "model.safetensors"
    given.also = functools.partial(_write_by_library, path)

  return mutate_and_compare


def _write_by_library(path: pathlib.Path) -> None:
  """The file as the library of the format reads it; empty if it does not."""
  try:
    state = {
      name: np.frombuffer(x["data"], _DTYPES[x["dtype"]]).reshape(x["shape"])
      for name, x in safetensors.deserialize(path.read_bytes())
    }
    safetensors.numpy.save_file(state, path)
  except (safetensors.SafetensorError, KeyError, ValueError):
    path.write_bytes(b"")


def _in_header(mutate: Mutation) -> Mutation:
  """A mutation of the file `header`, which is the header of the tensors."""

  def mutate_header(given: Input) -> None:
    path, header = given.folder / "model.safetensors", given.folder / "header"
    data = path.read_bytes()
    stop = 8 + int.from_bytes(data[:8], "little")
    header.write_bytes(data[8:stop].rstrip())
    mutate(given)
    new = header.read_bytes()
    header.unlink()
    new += b" " * (-len(new) % 8)
    path.write_bytes(len(new).to_bytes(8, "little") + new + data[stop:])

  return mutate_header


_HEADER = files.one_of("header")
_C = "c.weight"


def _entries(edit) -> Mutation:
  """Changes the header's entries, which `edit` gets by name."""

  def change(document, rng) -> None:
    edit(document.tree)

  return _in_header(documents.edits(_HEADER, change))


def _sets(key: str, value) -> Mutation:
  return _entries(lambda header: header[_C].update({key: value}))


def _moves(by: int) -> Mutation:
  """A tensor that begins and ends elsewhere."""

  def edit(header):
    offsets = header[_C]["data_offsets"]
    header[_C]["data_offsets"] = [x + by for x in offsets]

  return _entries(edit)


def _length(value: int) -> Mutation:
  new = value.to_bytes(8, "little")
  return files.changes(_FILE, lambda data, rng: new + data[8:])


_REFUSED = {
  **{
    f"dtype_{name}": _sets("dtype", name)
    for name in ("F8_E4M3", "F8_E5M2", "F4", "U16", "C64", "F128", "")
  },
  **{
    f"shape_{i}": _sets("shape", shape)
    for i, shape in enumerate(
      (
        *([-2, -3, 4], [2.0, 3, 4], [True, 24], [2**33, 2**31, 24]),
        *([2**62, 2**62, 0], 24, None, "24", [[24]], ["24"]),
      )
    )
  },
  **{f"length_{x}": _length(x) for x in (0, 1, 10_000, 2**63 - 1, 2**64 - 1)},
  "overlapping": _moves(-4),
  "gap": _moves(2),
  "before_the_file": _moves(-(2**20)),
  "after_the_file": _moves(2**40),
  "span_twice": _entries(lambda x: x.update(e=dict(x[_C]))),
  "span_turned": _sets("data_offsets", [116, 68]),
  "span_of_three": _sets("data_offsets", [0, 4, 8]),
}
_SAFETENSORS: dict[str, Case] = {
  **files.cases(_FILE),
  **{name: ("refuse", mutate) for name, mutate in _REFUSED.items()},
  **{
    f"header_{name}": ("either", _compared(_in_header(mutate)))
    for name, (_, mutate) in documents.cases(_HEADER).items()
    if name not in files.TARGETS
  },
  **{
    name: ("either", _compared(files.cases(_FILE)[name][1]))
    for name in ("bits", "bytes", "cut", "extended")
  },
  "shape_deep": ("either", _compared(_sets("shape", [1] * 200 + [24]))),
  "dtype_as_large": ("either", _compared(_sets("dtype", "BF16"))),
  "entries_reversed": (
    "read",
    _in_header(documents.cases(_HEADER)["keys_reversed"][1]),
  ),
  "no_metadata": ("read", _entries(lambda x: x.pop("__metadata__"))),
}


def _make_model(folder: pathlib.Path) -> Parts:
  from tests.weights import published  # torch, which the inputs do not need

  published.original(folder / "model")
  return _read_model(folder)


def _read_model(folder: pathlib.Path) -> Parts:
  plan = into.make_plan(source.Request(source=str(folder / "model")))
  leaves = [(x.path, x.shape, str(x.dtype), x.names) for x in plan.leaves]
  words = sorted(plan.tokenizer.get_vocab().items())
  return {"config": plan.config.to_json(), "leaves": leaves, "words": words}


_CONFIG = files.one_of("model/config.json")
_INDEX = files.one_of("model/model.safetensors.index.json")


def _config(key: str, value) -> Case:
  edit = documents.edits(_CONFIG, lambda x, rng: x.tree.update({key: value}))
  return "refuse", edit


def _shard(name: str) -> Case:
  """An index that names a file elsewhere, which is there and sound."""

  def mutate(given: Input) -> None:
    path = _INDEX(given)
    document = Document(path.read_bytes())
    old = min(document.tree["weight_map"].values())
    shutil.copy(path.with_name(old), given.folder / "elsewhere.safetensors")
    new = name.replace("FOLDER", str(given.folder))
    for tensor, file in document.tree["weight_map"].items():
      if file == old:
        document.tree["weight_map"][tensor] = new
    path.write_text(document.text())

  return "refuse", mutate


def _make_tokenizer(folder: pathlib.Path) -> Parts:
  texts = ("What is it ?", "a m\u00fcsli")
  tokenizer.build_word_level(texts).save_pretrained(folder)
  words = ["<unk>", "<s>", "</s>", "<voco>"]
  words += ["?", "What", "a", "is", "it", "m\u00fcsli"]
  numbers = {word: i for i, word in enumerate(words)}
  return {"words": numbers, "ids": [5, 6, 0, 4], "special": [1, 2, 0]}


def _read_tokenizer(folder: pathlib.Path) -> Parts:
  words = tokenizer.load_tokenizer(folder)
  ids = words.encode("What a dog ?", add_special_tokens=False)
  special = [words.bos_token_id, words.eos_token_id, words.pad_token_id]
  return {"words": words.get_vocab(), "ids": ids, "special": special}


_TOKENIZER = documents.cases(files.one_of("*.json"))
for _name in (
  "byte_order_mark",
  "key_twice",
  "beyond_float",
  "lone_surrogate",
):
  # The libraries that read these files may do either.
  _TOKENIZER[_name] = "either", _TOKENIZER[_name][1]
KINDS = {
  "safetensors": Kind(
    _make_safetensors,
    read_tensors,
    _SAFETENSORS,
    ("bits", "bytes", "cut", "header_bits", "header_wrong_type"),
  ),
  "model_config": Kind(
    _make_model,
    _read_model,
    {
      **documents.cases(_CONFIG),
      "anyres": _config("image_aspect_ratio", "anyres"),
      "quantized": _config("quantization_config", {"bits": 4}),
      "other_model": _config("model_type", "mistral"),
      "theta_0": _config("rope_theta", 0),
      "epsilon_infinite": _config("rms_norm_eps", 1e39),
      "layers_huge": _config("num_hidden_layers", 10**9),
      "width_huge": _config("hidden_size", 2**40),
      "heads_0": _config("num_attention_heads", 0),
      "tower_elsewhere": _config("mm_vision_tower", "../../../etc"),
    },
    documents.DRAWN,
  ),
  "model_index": Kind(
    _make_model,
    _read_model,
    {
      **documents.cases(_INDEX),
      "shard_up": _shard("../elsewhere.safetensors"),
      "shard_absolute": _shard("FOLDER/elsewhere.safetensors"),
      "shard_nul": _shard("a\0.safetensors"),
      "shard_device": _shard("/dev/zero"),
      "shard_folder": _shard("."),
    },
    ("wrong_type",),
  ),
  "tokenizer": Kind(
    _make_tokenizer, _read_tokenizer, _TOKENIZER, documents.DRAWN
  ),
}
