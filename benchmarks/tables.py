"""What the benchmarks print: Markdown tables, and where figures come from."""

import datetime

from vocojax import assemble


def markdown(head: list[str], rows: list[list]) -> str:
  """A table; the first column is left-aligned, the others right."""
  lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
  return "\n".join("| " + " | ".join(map(str, x)) + " |" for x in lines)


def print_provenance(module: str, **more: str) -> None:
  """Command, commit, versions, machine and date of what was measured."""
  found = assemble.provenance(assemble.command_line(module))
  found |= more | {"date": str(datetime.date.today())}
  for key, value in found.items():
    print(f"{key}: {value}")
