"""Mutations of JSON and JSON lines. Read next: data_kinds.py.

Where a mutation leaves a document that is sound but other, the same must be
read of it as of another: the document as Python's own JSON writes it, or
without the changed value where that is as good as absent.
"""

import json
from collections.abc import Callable
from random import Random
from typing import Any

from tests.fuzz import files
from tests.fuzz.kinds import Case, Input, Mutation

DRAWN = ("bits", "bytes", "cut", "wrong_type", "other_value", "missing_key")
_MARK = "the mark"
# Instead of a value.
_RAW = {
  "nan": "NaN",
  "infinity": "-Infinity",
  "beyond_float": "1e999",
  "long_number": "9" * 5000,
  "deep": "[" * 3000 + "]" * 3000,
  "deeper": '{"a":' * 100_000 + "1" + "}" * 100_000,
  "trailing_comma": "[1,]",
  "single_quotes": "'a'",
  "comment": "/* a */ 1",
  "control_character": '"a\x01b"',
}
_NUMBERS = (0, -1, 7, 1.5, 2**31, 2**64, -(10**30), 1e308, 5e-324)
_TEXTS = (
  *("", " ", "x", "7", "\0", "a\nb", "../x", "/dev/zero", "~nosuchuser/x"),
  *("<image>", "<voco>", "%s {} \\", "\u202e\u0301", "x" * 100_000),
)


class Document:
  """The values of JSON or of JSON lines.

  Attributes:
    tree: of JSON lines, their list.
    also: a text of which the same may be read as of a changed one; None if
      that is only the original.
    known: whether what must be read of a changed text can be said.
  """

  def __init__(self, data: bytes):
    text = data.decode("utf-8-sig")
    self.also: str | None = None
    self.known = True
    try:
      self.lines, self.tree = False, json.loads(text)
    except json.JSONDecodeError:
      self.lines = True
      self.tree = [json.loads(x) for x in text.split("\n") if x.strip()]

  def text(self, ascii: bool = True, indent: int | None = None) -> str:
    if not self.lines:
      return json.dumps(self.tree, ensure_ascii=ascii, indent=indent)
    lines = [json.dumps(x, ensure_ascii=ascii) + "\n" for x in self.tree]
    return "".join(lines)

  def places(self, kind: Any = object) -> list[tuple[Any, Any]]:
    """(container, key or index) of every value of a type but the outermost."""
    found, pending = [], list(self.tree) if self.lines else [self.tree]
    while pending:
      if isinstance(x := pending.pop(), dict | list):
        found += [(x, k) for k in (x if isinstance(x, dict) else range(len(x)))]
        pending += x.values() if isinstance(x, dict) else x
    return [(x, k) for x, k in found if isinstance(x[k], kind)]

  def with_raw(self, container: Any, key: Any, raw: str) -> str:
    container[key] = _MARK
    return self.text().replace(json.dumps(_MARK), raw)


Edit = Callable[[Document, Random], str | bytes | None]


def edits(pick: files.Pick, edit: Edit, known: bool = True) -> Mutation:
  """A mutation of a document; `edit` changes it or returns its new content."""

  def mutate(given: Input) -> None:
    path = pick(given)
    document = Document(path.read_bytes())
    content = edit(document, given.rng)
    content = document.text() if content is None else content
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    if document.also is not None:
      given.also = lambda: path.write_text(document.also)
    if not (known and document.known):
      given.right = None

  return mutate


def cases(pick: files.Pick) -> dict[str, Case]:
  """All mutations of documents, of the file that is picked."""
  return files.cases(pick) | {
    name: (declared, edits(pick, edit, name not in _UNKNOWN))
    for name, (declared, edit) in _EDITS.items()
  }


def _damaged(change: Callable) -> Edit:
  def edit(document: Document, rng: Random) -> bytes:
    data = change(document.text().rstrip().encode(), rng)
    try:
      document.also = Document(data).text()
    except (ValueError, RecursionError):
      document.also = ""
      # A reader may leave out a line and number the others anew.
      document.known = not document.lines
    return data

  return edit


def _raw(raw: str, kind: Any = object) -> Edit:
  def edit(document: Document, rng: Random) -> str:
    places = document.places(kind) or document.places()
    return document.with_raw(*rng.choice(places), raw)

  return edit


def _keys_reversed(document: Document, rng: Random) -> None:
  def turn(x):
    if isinstance(x, dict):
      return {key: turn(x[key]) for key in reversed(x)}
    return [turn(y) for y in x] if isinstance(x, list) else x

  document.tree = turn(document.tree)


def _after_the_end(document: Document, rng: Random) -> str:
  if not document.lines:
    return document.text() + rng.choice(("x", "]", " {}", ",", "\n[]", "\0"))
  lines = document.text().splitlines()
  lines[rng.randrange(len(lines))] += rng.choice((" x", "]", ' {"a": 1}', ","))
  return "\n".join(lines)


def _type(value: Any) -> type:
  return float if type(value) is int else type(value)


def _wrong_type(document: Document, rng: Random) -> str:
  """A value of another type: refused, or as if it were not there.

  A number for a text, and the other way round, may be taken as written.
  """
  container, key = rng.choice(document.places(dict | list | str | int | float))
  old = container[key]
  values = (None, True, 7, 1.5, "7", "x", [], [old], {}, {"x": old})
  new = rng.choice([x for x in values if _type(x) is not _type(old)])
  container[key] = new
  text = document.text()
  if new in (None, [], {}) and isinstance(container, dict):
    del container[key]
    document.also = document.text()
  elif new == "x" and key == "id":  # a name may be a number or a text
    document.also = text
  elif new == "7" or (_type(new) is float and isinstance(old, str)):
    container[key] = 7 if new == "7" else str(new)
    document.also = document.text()
  return text


def _other_value(document: Document, rng: Random) -> None:
  container, key = rng.choice(document.places())
  old = container[key]
  if isinstance(old, bool | None):
    new = not old
  elif isinstance(old, int | float):
    new = rng.choice(_NUMBERS)
  elif isinstance(old, str):
    new = rng.choice(_TEXTS)
  elif isinstance(old, list):
    new = rng.choice((old + old, old[1:], old[::-1], old * 300))
  else:
    more = {f"{key}x": x for key, x in old.items()}
    new = rng.choice(({}, old | {"": old}, more))
  container[key] = new


def _missing_key(document: Document, rng: Random) -> None:
  container, key = rng.choice(document.places())
  del container[key]


def _extra_key(document: Document, rng: Random) -> None:
  objects = [x for x, _ in document.places() if isinstance(x, dict)]
  rng.choice(objects)["fuzz"] = "x"


def _key_twice(document: Document, rng: Random) -> str:
  places = [p for p in document.places() if isinstance(p[0], dict)]
  container, key = rng.choice(places)
  old = json.dumps(container[key])
  other = rng.choice((old, "null", "[]", '"x"'))
  return document.with_raw(container, key, f"{old}, {json.dumps(key)}: {other}")


def _bad_utf8(document: Document, rng: Random) -> bytes:
  text = _raw('"a BAD b"', str)(document, rng)
  return text.encode().replace(b"BAD", b"\xe9")


_UNKNOWN = ("other_value", "missing_key")  # what must be read
_EDITS: dict[str, tuple[Any, Edit]] = {
  "byte_order_mark": ("read", lambda x, rng: "\ufeff" + x.text()),
  "crlf": ("read", lambda x, rng: x.text(indent=1).replace("\n", "\r\n")),
  "plain_characters": ("read", lambda x, rng: x.text(ascii=False)),
  "keys_reversed": ("read", _keys_reversed),
  "after_the_end": ("refuse", _after_the_end),
  "bits": ("either", _damaged(files.flip_bits)),
  "bytes": ("either", _damaged(files.set_bytes)),
  "cut": ("either", _damaged(files.cut)),
  "extended": ("either", _damaged(files.extend)),
  "utf16": ("refuse", lambda x, rng: x.text().encode("utf-16")),
  "many_brackets": ("refuse", lambda x, rng: "[" * 200_000),
  "wrong_type": ("either", _wrong_type),
  "other_value": ("either", _other_value),
  "missing_key": ("either", _missing_key),
  "extra_key": ("either", _extra_key),
  "key_twice": ("refuse", _key_twice),
  "lone_surrogate": ("refuse", _raw('"a \\ud83d b"', str)),
  "bad_utf8": ("refuse", _bad_utf8),
  **{name: ("refuse", _raw(raw)) for name, raw in _RAW.items()},
}
