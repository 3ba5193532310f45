"""A workdir that the doctor's tests copy and break."""

import pytest

from tests import runs
from tests.health.setups import config_of
from tests.training.test_checkpoint import save


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
  """Data, a config, and a workdir with two real checkpoints."""
  folder = tmp_path_factory.mktemp("doctor")
  runs.write_data(folder)
  runs.write_config(folder, "one.py", runs.ONE_PHASE)
  save(config_of(folder), folder / "run/voco", (3, 5))
  return folder
