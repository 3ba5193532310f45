"""Published weights and model folders. Read next: pickle_kinds.py."""

import pathlib
import shutil

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from tests.fuzz import documents, files
from tests.fuzz.documents import Document
from tests.fuzz.kinds import Case, Input, Kind, Parts, array
from vocojax.data import tokenizer
from vocojax.weights import files as weight_files
from vocojax.weights import into, source

_DTYPES = {
  **{"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16},
  **{"F64": np.float64, "I64": np.int64, "I32": np.int32},
  **{"U8": np.uint8, "BOOL": np.bool_},
}


def make_state() -> dict[str, np.ndarray]:
  """Tensors of several dtypes, none of them all zeros."""
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
  assert all(x.nbytes < 2**30 for x in found.values())
  # Of a scalar there are no rows.
  return {
    name: array(x.rows()) if x.shape else (str(x.dtype), (), b"")
    for name, x in found.items()
  }


def _make_safetensors(folder: pathlib.Path) -> Parts:
  state = make_state()
  safetensors.numpy.save_file(
    state, folder / "model.safetensors", {"format": "pt"}
  )
  return {name: array(x) for name, x in state.items()}


def _write_by_library(path: pathlib.Path) -> None:
  """The file as the library of the format reads it; empty if it does not."""
  try:
    state = {
      name: np.frombuffer(x["data"], _DTYPES[x["dtype"]]).reshape(x["shape"])
      for name, x in safetensors.deserialize(path.read_bytes())
    }
    safetensors.numpy.save_file(state, path)
  except (safetensors.SafetensorError, KeyError):
    path.write_bytes(b"")


_FILE = files.one_of("model.safetensors")


def _compared(mutate: files.Change) -> files.Change:
  """What is read must be the original, or what the library reads."""

  def mutate_and_compare(given: Input) -> None:
    mutate(given)
    path = given.folder / "model.safetensors"
    given.also = [functools.partial(_write_by_library, path)]

  return mutate_and_compare


def _in_header(mutate: files.Change) -> files.Change:
  """A mutation of documents, of the header."""

  def mutate_header(given: Input) -> None:
    path, header = given.folder / "model.safetensors", given.folder / "header"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header.write_bytes(data[8 : 8 + length].rstrip())
    mutate(given)
    new = header.read_bytes()
    header.unlink()
    new += b" " * (-len(new) % 8)
    path.write_bytes(len(new).to_bytes(8, "little") + new + data[8 + length :])

  return mutate_header


def _entries(change) -> files.Change:
  """Changes the header's entries, which `change` gets by name."""

  def mutate(given: Input) -> None:
    document = Document(given.folder / "header")
    change(document.tree)
    document.write()

  return _in_header(mutate)


def _sets(key: str, value) -> files.Change:
  return _entries(lambda header: header["c.weight"].update({key: value}))


def _moves(by: int) -> files.Change:
  """A tensor that begins and ends elsewhere."""

  def change(header):
    offsets = header["c.weight"]["data_offsets"]
    header["c.weight"]["data_offsets"] = [x + by for x in offsets]

  return _entries(change)


def _shares(header) -> None:
  header["e.weight"] = dict(header["c.weight"])


def _length(value: int) -> files.Change:
  new = value.to_bytes(8, "little")
  return files.changes(_FILE, lambda data, rng: new + data[8:])


def _reversed(header) -> None:
  for name in reversed(list(header)):
    header[name] = header.pop(name)


_SAFETENSORS: dict[str, Case] = {
  **files.cases(_FILE),
  **{
    f"header_{name}": ("either", _compared(_in_header(mutate)))
    for name, (_, mutate) in documents.cases(files.one_of("header")).items()
    if name not in files.TARGETS
  },
  **{
    f"dtype_{name}": ("refuse", _sets("dtype", name))
    for name in ("F8_E4M3", "F8_E5M2", "F4", "U16", "C64", "F128", "")
  },
  **{
    name: ("either", _compared(files.changes(_FILE, change)))
    for name, change in (
      ("bits", files.flip_bits),
      ("bytes", files.set_bytes),
      ("cut", files.cut),
      ("extended", files.extend),
    )
  },
  "overlapping": ("refuse", _moves(-4)),
  "gap": ("refuse", _moves(2)),
  "before_the_file": ("refuse", _moves(-(2**20))),
  "after_the_file": ("refuse", _moves(2**40)),
  "span_twice": ("refuse", _entries(_shares)),
  "span_turned": ("refuse", _sets("data_offsets", [116, 68])),
  "span_of_three": ("refuse", _sets("data_offsets", [0, 4, 8])),
  "shape_negative": ("refuse", _sets("shape", [-2, -3, 4])),
  "shape_float": ("refuse", _sets("shape", [2.0, 3, 4])),
  "shape_bool": ("refuse", _sets("shape", [True, 24])),
  "shape_overflows": ("refuse", _sets("shape", [2**33, 2**31, 24])),
  "shape_large_and_empty": ("refuse", _sets("shape", [2**62, 2**62, 0])),
  "shape_deep": ("either", _compared(_sets("shape", [1] * 200 + [24]))),
  "dtype_as_large": ("either", _compared(_sets("dtype", "BF16"))),
  "length_0": ("refuse", _length(0)),
  "length_2_63": ("refuse", _length(2**63 - 1)),
  "length_2_64": ("refuse", _length(2**64 - 1)),
  "length_beyond": ("refuse", _length(10_000)),
  "entries_reversed": ("read", _entries(_reversed)),
  "no_metadata": ("read", _entries(lambda x: x.pop("__metadata__"))),
}


_CONFIG = files.one_of("model/config.json")
_INDEX = files.one_of("model/model.safetensors.index.json")


def _make_model(folder: pathlib.Path) -> Parts:
  from tests.weights import published  # torch, which the inputs do not need

  published.original(folder / "model")
  return _read_model(folder)


def _read_model(folder: pathlib.Path) -> Parts:
  plan = into.make_plan(source.Request(source=str(folder / "model")))
  leaves = [
    (leaf.path, leaf.shape, str(leaf.dtype), leaf.names) for leaf in plan.leaves
  ]
  words = sorted(plan.tokenizer.get_vocab().items())
  return {"config": plan.config.to_json(), "leaves": leaves, "words": words}


def _names_shard(name: str) -> files.Change:
  """An index that names a file elsewhere, which is there and sound."""

  def mutate(given: Input) -> None:
    document = Document(_INDEX(given))
    shard = sorted(set(document.tree["weight_map"].values()))[0]
    shutil.copy(
      given.folder / "model" / shard, given.folder / "elsewhere.safetensors"
    )
    new = name.replace("FOLDER", str(given.folder))
    document.tree["weight_map"] = {
      tensor: new if file == shard else file
      for tensor, file in document.tree["weight_map"].items()
    }
    document.write()

  return mutate


def _key(key: str, value) -> files.Change:
  def mutate(given: Input) -> None:
    document = Document(_CONFIG(given))
    document.tree[key] = value
    document.write()

  return mutate


_CONFIG_KEYS = {
  "anyres": ("image_aspect_ratio", "anyres"),
  "quantized": ("quantization_config", {"bits": 4}),
  "other_model": ("model_type", "mistral"),
  "theta_0": ("rope_theta", 0),
  "epsilon_infinite": ("rms_norm_eps", 1e39),
  "layers_huge": ("num_hidden_layers", 10**9),
  "width_huge": ("hidden_size", 2**40),
  "heads_0": ("num_attention_heads", 0),
  "tower_elsewhere": ("mm_vision_tower", "../../../etc"),
}


def _make_tokenizer(folder: pathlib.Path) -> Parts:
  texts = ("What is it ?", "a m\u00fcsli")
  tokenizer.build_word_level(texts).save_pretrained(folder)
  words = ["?", "What", "a", "is", "it", "m\u00fcsli"]
  words = ["<unk>", "<s>", "</s>", "<voco>", *words]
  return {
    "words": {word: i for i, word in enumerate(words)},
    "ids": [5, 6, 0, 4],
    "special": [1, 2, 0],
  }


def _read_tokenizer(folder: pathlib.Path) -> Parts:
  words = tokenizer.load_tokenizer(folder)
  ids = words.encode("What a dog ?", add_special_tokens=False)
  return {
    "words": words.get_vocab(),
    "ids": ids,
    "special": [words.bos_token_id, words.eos_token_id, words.pad_token_id],
  }


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
    documents.cases(_CONFIG)
    | {
      name: ("refuse", _key(key, value))
      for name, (key, value) in _CONFIG_KEYS.items()
    },
    documents.DRAWN,
  ),
  "model_index": Kind(
    _make_model,
    _read_model,
    documents.cases(_INDEX)
    | {
      "shard_up": ("refuse", _names_shard("../elsewhere.safetensors")),
      "shard_absolute": (
        "refuse",
        _names_shard("FOLDER/elsewhere.safetensors"),
      ),
      "shard_nul": ("refuse", _names_shard("a\0.safetensors")),
      "shard_device": ("refuse", _names_shard("/dev/zero")),
      "shard_folder": ("refuse", _names_shard(".")),
    },
    ("wrong_type",),
  ),
  "tokenizer": Kind(
    _make_tokenizer,
    _read_tokenizer,
    documents.cases(files.one_of("*.json")),
    documents.DRAWN,
  ),
}
