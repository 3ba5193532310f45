"""The data of a run: slow and failing records and workers; see feed.py."""

import dataclasses
import logging
import multiprocessing
import re
import time

import pytest

from tests import runs
from vocojax.config import load_module, phases
from vocojax.errors import DataError
from vocojax.training import feed, loop


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("feed")
  runs.write_data(folder)
  runs.write_config(folder, "one.py", runs.ONE_PHASE)
  return folder


@dataclasses.dataclass
class Slow:
  """A source that takes its time once."""

  source: object
  seconds: float

  def __len__(self):
    return len(self.source)

  def __getitem__(self, index):
    seconds, self.seconds = self.seconds, 0
    time.sleep(seconds)
    return self.source[index]


def phase_of(folder, name, **data):
  (config,) = phases(load_module(str(folder / "one.py")))
  config = dataclasses.replace(
    config, data=dataclasses.replace(config.data, **data)
  )
  return runs.phase(config, folder / name)


@pytest.mark.parametrize("seconds", [0.0, 1.0])
def test_slow_data_is_named(folder, monkeypatch, caplog, seconds):
  monkeypatch.setattr(feed, "SLOW_SECONDS", 0.4)
  phase = phase_of(folder, f"slow_{seconds}")
  phase = dataclasses.replace(phase, source=Slow(phase.source, seconds))
  data = loop._feed(phase)
  with caplog.at_level(logging.WARNING):
    next(data)
    next(data)
  data.close()
  said = [r.getMessage() for r in caplog.records]
  expected = (
    "process 0 of 1 has waited 0.4 s for data, the batch after record 0 of its "
    "share; its data workers, disk or network are slow, and all hosts wait for "
    "it"
  )
  assert said == ([expected] if seconds else [])


def test_dead_data_worker_is_named(folder):
  data = loop._feed(phase_of(folder, "dead", num_workers=1))
  before = set(multiprocessing.active_children())
  next(data)
  (worker,) = set(multiprocessing.active_children()) - before
  worker.kill()
  expected = (
    r"process 0 of 1: a data worker died while the batch after "
    r"record \d+ of its share was read \(.*exit code -9.*\); if it was out of "
    r"memory, lower config.data.num_workers or "
    r"config.data.prefetch_batches"
  )
  with pytest.raises(DataError) as e:
    for _ in range(100):
      next(data)
  assert re.fullmatch(expected, str(e.value)), e.value
  data.close()
