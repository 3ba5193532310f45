"""Mutations of JSON and JSON lines. Read next: data_kinds.py.

Where a mutation leaves a document that is right but other, it says what the
same must be read of: the document written plainly by Python's own JSON, or
without the changed value if that is as good as absent.
"""

import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

from tests.fuzz import files
from tests.fuzz.kinds import Case, Input

_MARK = "\N{SNOWMAN}mark"


class Document:
  """The values in a file of JSON or of JSON lines."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    text = path.read_bytes().decode("utf-8-sig")
    try:
      self.lines, self.tree = False, json.loads(text)
    except json.JSONDecodeError:
      self.lines = True
      self.tree = [json.loads(x) for x in text.split("\n") if x.strip()]

  def text(self, **options: Any) -> str:
    if not self.lines:
      return json.dumps(self.tree, **options)
    options.pop("indent", None)
    return "".join(json.dumps(x, **options) + "\n" for x in self.tree)

  def write(self, **options: Any) -> None:
    self.path.write_text(self.text(**options))

  def places(self) -> list[tuple[Any, Any]]:
    """(container, key or index) of every value but the outermost."""
    found, pending = [], [self.tree]
    while pending:
      x = pending.pop()
      keys = x.keys() if isinstance(x, dict) else range(len(x))
      found += [(x, key) for key in keys]
      pending += [x[key] for key in keys if isinstance(x[key], (dict, list))]
    return [p for p in found if not (self.lines and p[0] is self.tree)]

  def write_raw(self, container: Any, key: Any, raw: str) -> None:
    """Writes the document with `raw` where a value was."""
    container[key] = _MARK
    self.path.write_text(self.text().replace(json.dumps(_MARK), raw))


def cases(pick: files.Pick, strict: bool = True) -> dict[str, Case]:
  """All mutations of documents.

  Args:
    pick: the file to change.
    strict: whether what only our own reader refuses must be refused: a key
      twice, NaN, text after the end.
  """
  refuse = "refuse" if strict else "either"
  text = functools.partial(_rewrites, pick)
  result: dict[str, Case] = {
    "byte_order_mark": (
      "read",
      files.changes(pick, lambda data, rng: b"\xef\xbb\xbf" + data),
    ),
    "crlf": ("read", text(_with_crlf)),
    "plain_characters": ("read", text(lambda d, r: d.text(ensure_ascii=False))),
    "keys_reversed": ("read", text(_with_keys_reversed)),
    "after_the_end": (refuse, text(_with_more)),
    "bits": ("either", _damaged(pick, files.flip_bits)),
    "bytes": ("either", _damaged(pick, files.set_bytes)),
    "cut": ("either", _damaged(pick, files.cut)),
    "utf16": ("refuse", text(lambda d, r: d.text(), encoding="utf-16")),
    "many_brackets": ("refuse", text(lambda d, r: "[" * 200_000)),
    "wrong_type": ("either", functools.partial(_wrong_type, pick)),
    "other_value": ("either", functools.partial(_other_value, pick)),
    "missing_key": ("either", functools.partial(_missing_key, pick)),
    "extra_key": ("either", functools.partial(_extra_key, pick)),
    "key_twice": (refuse, functools.partial(_key_twice, pick)),
    "lone_surrogate": (refuse, _raw(pick, '"a \\ud83d b"', str)),
    "bad_utf8": (refuse, _bad_utf8(pick)),
  }
  for name, raw in {
    "nan": "NaN",
    "infinity": "-Infinity",
    "beyond_float": "1e999",
    "long_number": "9" * 5000,
    "deep": "[" * 3000 + "]" * 3000,
    "deeper": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "trailing_comma": "[1,]",
    "single_quotes": "'a'",
    "comment": "/* a */ 1",
    "control_character": '"a\n\x01b"',
  }.items():
    result[name] = refuse, _raw(pick, raw)
  return files.cases(pick) | result


DRAWN = ("bits", "bytes", "cut", "wrong_type", "other_value", "missing_key")


def _rewrites(pick, rewrite, encoding="utf-8") -> Callable[[Input], None]:
  def mutate(given: Input) -> None:
    path = pick(given)
    text = rewrite(Document(path), given.rng)
    path.write_bytes(text.encode(encoding))

  return mutate


def _with_crlf(document: Document, rng) -> str:
  return document.text(indent=1).replace("\n", "\r\n")


def _with_keys_reversed(document: Document, rng) -> str:
  def turn(x):
    if isinstance(x, dict):
      return {key: turn(x[key]) for key in reversed(x)}
    return [turn(y) for y in x] if isinstance(x, list) else x

  document.tree = turn(document.tree)
  return document.text()


def _with_more(document: Document, rng) -> str:
  text = document.text()
  if document.lines:  # after the end of a line
    at = rng.choice([i for i, c in enumerate(text) if c == "\n"])
    return text[:at] + rng.choice((" x", "]", ' {"a": 1}', ",")) + text[at:]
  return text + rng.choice(("x", "]", " {}", ",", "\n[]", "\0", text))


def _damaged(pick: files.Pick, change) -> Callable[[Input], None]:
  """Bytes changed; what still is JSON must be read as Python reads it."""

  def mutate(given: Input) -> None:
    path = pick(given)
    path.write_bytes(change(path.read_bytes().rstrip(), given.rng))
    given.also.append(functools.partial(_write_plainly, path))

  return mutate


def _write_plainly(path: pathlib.Path) -> None:
  try:
    Document(path).write()
  except (ValueError, RecursionError):
    path.write_bytes(b"")


def _raw(pick: files.Pick, raw: str, kind: type = object):
  def mutate(given: Input) -> None:
    document = Document(pick(given))
    places = [
      (x, key) for x, key in document.places() if isinstance(x[key], kind)
    ]
    document.write_raw(*given.rng.choice(places or document.places()), raw)

  return mutate


def _bad_utf8(pick: files.Pick) -> Callable[[Input], None]:
  mark = _raw(pick, '"a BAD b"', str)

  def mutate(given: Input) -> None:
    mark(given)
    for path in given.folder.rglob("*"):
      if path.is_file():
        path.write_bytes(path.read_bytes().replace(b"a BAD b", b"a \xe9 b"))

  return mutate


_NUMBERS = (0, -1, 7, 1.5, 2**31, 2**64, -(10**30), 1e308, 5e-324)
_TEXTS = (
  *("", " ", "x", "7", "\0", "a\nb", "../x", "/dev/zero", "~nosuchuser/x"),
  *("<image>", "<voco>", "%s {} \\", "\u202e\u0301", "x" * 100_000),
)


def _wrong_type(pick: files.Pick, given: Input) -> None:
  """A value of another type: refused, or as if it were not there.

  A number for a text, and the other way round, may be taken as written.
  """
  document = Document(pick(given))
  container, key = given.rng.choice(document.places())
  old = container[key]
  values = (None, True, 7, 1.5, "7", "x", [], [old], {}, {"x": old})
  container[key] = new = given.rng.choice(
    [x for x in values if _kind(x) != _kind(old)]
  )
  document.write()
  if old is None:
    given.right = None
  elif new in (None, [], {}) and isinstance(container, dict):
    given.also.append(
      functools.partial(_write_without, document, container, key)
    )
  elif {_kind(old), _kind(new)} == {float, str}:
    given.also.append(functools.partial(_write_as, document, container, key))


def _kind(value: Any) -> type:
  return float if type(value) is int else type(value)


def _write_without(document: Document, container: dict, key: str) -> None:
  del container[key]
  document.write()


def _write_as(document: Document, container: Any, key: Any) -> None:
  """Text as a number or a number as text."""
  value = container[key]
  container[key] = json.loads(value) if isinstance(value, str) else str(value)
  document.write()


def _other_value(pick: files.Pick, given: Input) -> None:
  document = Document(pick(given))
  container, key = given.rng.choice(document.places())
  old, rng = container[key], given.rng
  if isinstance(old, bool | None):
    new = not old
  elif isinstance(old, int | float):
    new = rng.choice(_NUMBERS)
  elif isinstance(old, str):
    new = rng.choice(_TEXTS)
  elif isinstance(old, list):
    new = rng.choice((old + old, old[1:], old[::-1], old * 300))
  else:
    new = rng.choice(
      ({}, old | {"": old}, {f"{k}x": x for k, x in old.items()})
    )
  container[key] = new
  document.write()
  given.right = None


def _missing_key(pick: files.Pick, given: Input) -> None:
  document = Document(pick(given))
  container, key = given.rng.choice(document.places())
  del container[key]
  document.write()
  given.right = None


def _extra_key(pick: files.Pick, given: Input) -> None:
  document = Document(pick(given))
  objects = [x for x, _ in document.places() if isinstance(x, dict)]
  given.rng.choice(objects)["fuzz"] = "x"
  document.write()


def _key_twice(pick: files.Pick, given: Input) -> None:
  document = Document(pick(given))
  places = [(x, key) for x, key in document.places() if isinstance(x, dict)]
  container, key = given.rng.choice(places)
  old = json.dumps(container[key])
  other = given.rng.choice((old, "null", "[]", '"x"'))
  document.write_raw(container, key, f"{old}, {json.dumps(key)}: {other}")
