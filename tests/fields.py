"""Errors asserted by their fields."""

import contextlib
from collections.abc import Iterator

import pytest

from vocojax.errors import UserError


@contextlib.contextmanager
def raises(
  kind: type[UserError],
  where: str = "",
  got: str = "",
  expected: str = "",
  fix: str = "",
) -> Iterator[pytest.ExceptionInfo]:
  """Fails unless an error is raised whose fields hold these words.

  `where` is how the field ends. No field may be empty.
  """
  with pytest.raises(kind) as caught:
    yield caught
  error = caught.value
  assert error.where.endswith(where), error.where
  assert got in error.got, error.got
  assert expected in error.expected, error.expected
  assert fix in error.fix, error.fix
  assert all((error.where, error.got, error.expected, error.fix)), str(error)
