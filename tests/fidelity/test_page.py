"""docs/fidelity.md names a test in each row, and each of them is there."""

import re

from tests import runs


def test_every_row_names_tests_that_exist():
  page = (runs.ROOT / "docs" / "fidelity.md").read_text()
  rows = [s for s in page.splitlines() if s.startswith("| ")]
  rows = [s for s in rows if not s.startswith("| what ")]
  assert len(rows) > 20
  for row in rows:
    path, found = "", re.findall(r"`([\w/.]*)::(\w+)`", row)
    assert found, row
    for file, name in found:
      path = file or path
      assert f"def {name}(" in (runs.ROOT / path).read_text(), (path, name)
