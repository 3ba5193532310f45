"""One line of the doctor: what was looked at and what is wrong with it.

Read next: versions.py, machine.py, checkpoints.py, data.py.
"""

import dataclasses
from typing import Literal

from vocojax.errors import one_line


@dataclasses.dataclass(frozen=True)
class Finding:
  """A check and how it ended.

  Attributes:
    check: what was looked at, such as "package jax".
    found: what is there.
    status: an error is what keeps a program from running as it should.
    remedy: what to do; nothing if all is well.
  """

  check: str
  found: str
  status: Literal["OK", "warning", "error"] = "OK"
  remedy: str = ""

  def __str__(self) -> str:
    end = f"{self.status}: {self.remedy}" if self.remedy else self.status
    parts = (self.check, self.found, end)
    return one_line(": ".join(p for p in parts if p))


def count(number: int, what: str) -> str:
  """'1 image', '12,000 images'."""
  return f"{number:,} {what}" + ("" if number == 1 else "s")


def size(nbytes: int) -> str:
  """'0.5 KiB', '15.8 GiB'."""
  for power, unit in ((1, "KiB"), (2, "MiB")):
    if nbytes < 1000 * 1024**power:
      return f"{nbytes / 1024**power:.1f} {unit}"
  return f"{nbytes / 1024**3:,.1f} GiB"
