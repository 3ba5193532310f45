"""Errors a user can cause. Read next: `cli.py`, which prints them in one line.

An error has four fields: where (the file, key, flag or record), what was got
there, what was expected, and how to fix it. `str(error)` is the one place that
makes a line of them. Programs print it without a stack trace and exit with
status 2. Tests assert the fields.
"""

from typing import Any


class UserError(Exception):
  """A mistake outside the program: a bad key, file, checkpoint or setting.

  Example:
    >>> print(UserError("a.json", "a list", "an object", "write {...}"))
    a.json: got a list, expected an object. Fix: write {...}

  Attributes:
    where: the file, key, flag or record.
    got: what was found there.
    expected: what should have been found.
    fix: the remedy; left out inside `core.files.remedy`, which adds it.
  """

  def __init__(self, where: Any, got: str, expected: str, fix: str = ""):
    # These are also what the error is pickled by, on its way from a worker.
    super().__init__(str(where), got, expected, fix)
    self.where = one_line(where)
    self.got = one_line(got)
    self.expected = one_line(expected)
    self.fix = one_line(fix)

  def __str__(self) -> str:
    line = f"{self.where}: got {self.got}, expected {self.expected}."
    return f"{line} Fix: {self.fix}" if self.fix else line

  def within(self, where: Any) -> "UserError":
    """The same error with `where` put in front of its own."""
    return type(self)(
      f"{where}: {self.where}", self.got, self.expected, self.fix
    )


class ConfigError(UserError):
  """A configuration key is unknown, has a wrong type or a useless value."""


class DataError(UserError):
  """A data set, an image, a record or a tokenizer cannot be used."""


class OddRecord(DataError):
  """A record that LLaVA's code trains on and this package does not.

  Attributes:
    kind: a key of `data.sources.ODD`.
  """

  def __init__(
    self,
    where: Any,
    got: str = "",
    expected: str = "",
    fix: str = "",
    kind: str = "",
  ):
    super().__init__(where, got, expected, fix)
    self.kind = kind

  def within(self, where: Any) -> "OddRecord":
    error = super().within(where)
    assert isinstance(error, OddRecord)
    error.kind = self.kind
    return error


class CheckpointError(UserError):
  """A checkpoint is missing, incomplete or belongs to another model."""


class CacheError(UserError):
  """Compressed images are damaged or cannot be used with this model."""


class WeightsError(UserError):
  """Published weights are incomplete, damaged or of a model we cannot hold."""


def one_line(text: Any) -> str:
  r"""Text without line breaks or anything that a terminal would obey.

  Example:
    >>> print(one_line("two\nlines \x1b[31m"))
    two lines \x1b[31m
  """
  return "".join(
    c if c.isprintable() else c.encode("unicode_escape").decode()
    for c in " ".join(str(text).split())
  )


def shorten(value: Any, length: int = 60) -> str:
  """`repr(value)` in one line of at most `length` characters.

  Example:
    >>> shorten("a" * 100, 10)
    "'aaaaaa..."
  """
  # A slice before repr: a value read from a file can be of any size.
  if isinstance(value, str | bytes):
    value = value[: 2 * length]
  text = one_line(repr(value))
  return text if len(text) <= length else text[: length - 3] + "..."
