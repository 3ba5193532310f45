"""Markdown tables. Read next: report.py and tables.py, which write them."""

from collections.abc import Sequence
from typing import Any


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  """A table; integers get thousands separators, bars are escaped."""
  lines = [header, ["---"] * len(header), *rows]
  return "\n".join(
    f"| {' | '.join(_cell(value) for value in line)} |" for line in lines
  )


def _cell(value: Any) -> str:
  text = f"{value:,}" if isinstance(value, int) else str(value)
  return text.replace("|", "\\|").replace("\n", " ")
