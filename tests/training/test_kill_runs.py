"""The short form of `tests/kill_runs.py`."""

import random

import pytest

from tests import kill_runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("kill_runs")
  kill_runs.prepare(folder)
  return folder


@pytest.mark.slow
def test_three_kills(folder):
  moments = kill_runs.run_chain(folder, "chain", 3, random.Random(0))
  assert moments.total() > 0


@pytest.mark.slow
def test_a_pair_in_one_workdir(folder):
  refused = kill_runs.run_pair(folder, "pair", random.Random(0))
  assert refused.returncode == 2
