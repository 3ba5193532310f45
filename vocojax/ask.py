"""Asks a checkpoint about images: one question, a file of them, or a chat.

  python -m vocojax.ask --checkpoint=WORKDIR/voco --image=cat.png "What is it?"
  python -m vocojax.ask --checkpoint=WORKDIR/voco --jsonl=IN --out=OUT
  python -m vocojax.ask --checkpoint=WORKDIR/voco --image=cat.png

The answer goes to stdout; what the images became goes to stderr. Without a
question it is read from stdin, or from the keyboard in a chat. Lines of IN are
{"image": PATH or a list, "question": TEXT}, see inference/jobs.py. A line that
cannot be used gets an error in OUT, and the exit status is 1. Read next:
inference/lookup.py, batch.py, chat.py.
"""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags, logging

import vocojax
from vocojax import cli
from vocojax import config as config_lib
from vocojax.core import files, lock
from vocojax.data import prompt
from vocojax.errors import UserError, shorten
from vocojax.inference import jobs as jobs_lib
from vocojax.inference.batch import Batch
from vocojax.inference.cache import VocoCache
from vocojax.inference.chat import Chat
from vocojax.inference.engine import Engine
from vocojax.inference.lookup import Lookup, join
from vocojax.inference.requests import Request
from vocojax.inference.sampling import Sampling
from vocojax.inference.store import CacheStore
from vocojax.training import checkpoint

_CHAT_IMAGES = 4  # room for at least as many in a chat

_CHECKPOINT = flags.DEFINE_string(
  "checkpoint",
  None,
  "Phase folder of a workdir, or one step of it.",
  required=True,
)
_IMAGE = flags.DEFINE_multi_string(
  "image",
  [],
  "Image file. Several: a.png,b.png, or the flag again for each (and then a "
  "comma is part of the name).",
)
_STORE = flags.DEFINE_string(
  "store",
  None,
  "Folder or URL of compressed images; what is not in it is put there.",
)
_NUM_VOCO_TOKENS = flags.DEFINE_integer(
  "num_voco_tokens",
  None,
  "How many of an image's tokens to use, from the first; by default all.",
)
_COMPRESSOR = flags.DEFINE_enum(
  "compressor",
  None,
  ["voco", "full"],
  "What text sees of an image; by default what the checkpoint was trained "
  "with.",
)
_LAYOUT = flags.DEFINE_enum(
  "layout",
  None,
  list(prompt.LAYOUTS),
  "Prompt layout, on purpose another than the checkpoint was trained with.",
)
_MAX_TEXT_LENGTH = flags.DEFINE_integer(
  "max_text_length",
  512,
  "Room for the tokens of a conversation, the answer included.",
)
_JSONL = flags.DEFINE_string("jsonl", None, "File of questions, one a line.")
_IMAGE_FOLDER = flags.DEFINE_string(
  "image_folder",
  None,
  "Folder that the images of --jsonl are in; by default that of the file. "
  "With / a line may name any file.",
)
_OUT = flags.DEFINE_string(
  "out", None, "File of answers for --jsonl; what is answered there is kept."
)
_SLOTS = flags.DEFINE_integer(
  "slots", 8, "Questions of --jsonl that are answered at the same time."
)
_FIELDS = {
  "max_new_tokens": flags.DEFINE_integer(
    "max_new_tokens", 64, "An answer is cut after so many tokens."
  ),
  "temperature": flags.DEFINE_float(
    "temperature", 0.0, "0 takes the likeliest token; 1 samples as trained."
  ),
  "top_k": flags.DEFINE_integer(
    "top_k", 0, "Sample from so many of the likeliest tokens; 0 is all."
  ),
  "top_p": flags.DEFINE_float(
    "top_p", 1.0, "Sample from the likeliest tokens that add up to this."
  ),
  "seed": flags.DEFINE_integer("seed", 0, "Of sampling."),
  "stop": flags.DEFINE_multi_string(
    "stop", [], "Text that ends an answer and is left out; may be repeated."
  ),
  "stop_token": flags.DEFINE_multi_string(
    "stop_token",
    [],
    "Token of the vocabulary that ends an answer, as </s> does.",
  ),
}


def main(words: list[str]) -> int | None:
  logging.set_verbosity(logging.WARNING)
  if _JSONL.value is not None or _OUT.value is not None:
    return _answer_file(words)
  paths = image_paths(_IMAGE.value)
  question = _question(words)
  # A batch of one image makes no others in vain.
  room = max(len(paths), 1 if question else _CHAT_IMAGES)
  engine, lookup, make = _load(slots=1, max_images=room, compress_batch=1)
  if question is None:
    chat = Chat(engine, lookup, make)
    chat.show(paths)
    chat.run()
  else:
    _answer(engine, lookup, make, paths, question)
  return None


def image_paths(values: Sequence[str]) -> list[str]:
  """What `--image` names: several paths may be in one value."""
  if len(values) != 1 or os.path.exists(values[0]):
    return list(values)
  return [path for path in values[0].split(",") if path]


def _question(words: list[str]) -> str | None:
  """From the command line or stdin; None if there is to be a chat.

  Raises:
    UserError: the question is empty.
  """
  if not words and sys.stdin.isatty():
    return None
  question = " ".join(words) if words else sys.stdin.read()
  if not question.strip():
    raise UserError(
      "question",
      "an empty text" if words else "none, and nothing on stdin",
      "a question",
      "write it in quotes, after the flags",
    )
  return question.strip()


def _load(**sizes: int) -> tuple[Engine, Lookup, "Maker"]:
  path, layout = _CHECKPOINT.value, _LAYOUT.value or ""
  if _STORE.value is not None:
    CacheStore(_STORE.value).require()
  engine = vocojax.load(
    path,
    compressor=_COMPRESSOR.value,
    num_voco_tokens=_NUM_VOCO_TOKENS.value,
    layout=layout,
    max_text_length=_MAX_TEXT_LENGTH.value,
    **sizes,
  )
  make = Maker(engine, {name: flag.value for name, flag in _FIELDS.items()})
  if _STORE.value is None:
    return engine, Lookup(engine), make
  stored = None
  if _NUM_VOCO_TOKENS.value is not None:
    trained = checkpoint.load(path, layout).config.model.compressor
    stored = trained.num_voco_tokens
  return engine, Lookup(engine, CacheStore(_STORE.value), stored), make


class Maker:
  """Makes requests; what they do not say themselves is the same for all."""

  def __init__(self, engine: Engine, values: Mapping[str, Any]):
    """Checks the values.

    Args:
      engine: is to answer the requests.
      values: one for each of `jobs.FIELDS`.

    Raises:
      UserError: a value cannot be used.
    """
    self._engine = engine
    self._values = values
    self._vocabulary = engine.tokenizer.get_vocab()
    self([("?", None)])

  def __call__(
    self,
    turns: Sequence[tuple[str, str | None]],
    cache: VocoCache | None = None,
    fields: Mapping[str, Any] | None = None,
    on_text: Callable[[str], None] | None = None,
  ) -> Request:
    """A request that the engine can answer.

    Args:
      turns: the last answer is None.
      cache: of the images; None for text alone.
      fields: other values for some of `jobs.FIELDS`.
      on_text: called with the answer, piece by piece.

    Raises:
      UserError: the engine could not answer it.
    """
    values = {**self._values, **(fields or {})}
    request = Request(
      turns=turns,
      images=cache,
      max_new_tokens=values["max_new_tokens"],
      sampling=Sampling(
        temperature=float(values["temperature"]),  # JSON may have an int
        top_k=values["top_k"],
        top_p=float(values["top_p"]),
        seed=values["seed"],
      ),
      stop=_texts(values["stop"]),
      stop_token_ids=tuple(map(self._token, _texts(values["stop_token"]))),
      on_text=on_text,
    )
    self._engine.check(request)
    return request

  def _token(self, text: str) -> int:
    if text not in self._vocabulary:
      near = config_lib.nearest(text, self._vocabulary)
      raise UserError(
        "stop_token",
        shorten(text),
        f"one of the {len(self._vocabulary)} tokens of the checkpoint",
        (f"write {near!r}, or " if near else "") + "use stop, for any text",
      )
    return self._vocabulary[text]


def _texts(value: str | Sequence[str]) -> tuple[str, ...]:
  return (value,) if isinstance(value, str) else tuple(value)


def _answer(engine, lookup, make, paths: list[str], question: str) -> None:
  """Answers one question on stdout."""
  images = lookup.find(paths)
  request = make([(question, None)], join(images), on_text=_write)
  for image in images:
    print(image, file=sys.stderr)
  [result] = engine.run([request])
  print()
  if result.finish_reason == "length":
    print(
      f"cut after {len(result.token_ids)} tokens; --max_new_tokens and "
      "--max_text_length allow more",
      file=sys.stderr,
    )


def _write(text: str) -> None:
  with files.storage("stdout"):
    sys.stdout.write(text)
    sys.stdout.flush()


def _answer_file(words: list[str]) -> int:
  """Answers the lines of --jsonl; 1 if some could not be answered."""
  if not _JSONL.value or not _OUT.value:
    raise UserError(
      "--out" if _JSONL.value else "--jsonl",
      "nothing",
      "a file of questions and one for the answers",
      "give both, or none of the two",
    )
  if words or _IMAGE.value:
    raise UserError(
      "--jsonl",
      "--image" if _IMAGE.value else f"the question {shorten(words[0])}",
      "neither, as its lines have their own questions and images",
      "leave it out",
    )
  jobs = jobs_lib.read(_JSONL.value, _IMAGE_FOLDER.value)
  out = files.expand_user(_OUT.value)
  if not out.parent.is_dir():
    raise UserError(
      _OUT.value, "no such folder", "a file in a folder", "make the folder"
    )
  # Two at once would answer everything twice.
  with lock.held(out.parent, out.name):
    return _answer_jobs(jobs, _OUT.value)


def _answer_jobs(jobs: Sequence[jobs_lib.Job], out: str) -> int:
  most = max(len(job.images) for job in jobs)
  engine, lookup, make = _load(slots=_SLOTS.value, max_images=max(most, 1))
  settings: list[object] = [
    dataclasses.asdict(engine.origin),
    engine.num_image_tokens,
    {name: flag.value for name, flag in _FIELDS.items()},
  ]
  if _IMAGE_FOLDER.value is not None:
    settings.append(os.path.abspath(files.expand_user(_IMAGE_FOLDER.value)))
  answers = jobs_lib.Answers(out, jobs, settings)
  if answers.note:
    print(answers.note, file=sys.stderr)
  batch = Batch(engine, lookup, answers, make)
  with contextlib.closing(answers):
    batch.run(jobs)
  print(batch, file=sys.stderr)
  return 1 if batch.errors else 0


if __name__ == "__main__":
  cli.run(main, __doc__, arguments=True)
