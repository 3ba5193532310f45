"""The program that makes the tables: its arguments, and what it prints."""

import subprocess
import sys

import pytest

from tests.evals import results


def run(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "vocojax.report", *map(str, arguments)],
    capture_output=True,
    text=True,
    timeout=120,
  )


def test_writes_tables(tmp_path):
  results.bounds(tmp_path / "a", 0.5, 1.0)
  done = run(tmp_path)
  assert (done.returncode, done.stderr) == (0, "")
  assert done.stdout == f"tables: {tmp_path}/tables.md\n"
  assert "| upper bound | 1 |" in (tmp_path / "tables.md").read_text()
  assert (tmp_path / "tables" / "methods.png").stat().st_size > 1000


@pytest.mark.parametrize(
  ("words", "said"),
  [
    ((), "arguments: got none, expected one folder"),
    (("a", "b"), "arguments: got 'a b', expected one folder"),
    (("nowhere",), "nowhere: got no such folder, expected one that holds"),
    (("~nosuchuser/a",), "~nosuchuser/a: got a user that does not exist"),
  ],
)
def test_mistakes_are_one_line(words, said):
  done = run(*words)
  assert done.returncode == 2
  assert done.stderr.startswith(f"error: {said}")
  assert done.stderr.count("\n") == 1
