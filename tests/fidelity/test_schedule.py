"""The rate of every step against transformers' own schedule."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import transformers

from configs import voco_1tok
from tests import runs
from tests.models import builders
from vocojax import config as config_lib
from vocojax.data import tokenizer
from vocojax.training import loop, optimizer

NUM_RECORDS = 665_298  # llava_v1_5_mix665k.json
PEAK = 2e-5


def expected(steps, warmup):
  parameter = torch.nn.Parameter(torch.zeros(1))
  sgd = torch.optim.SGD([parameter], lr=PEAK)
  schedule = transformers.get_cosine_schedule_with_warmup(sgd, warmup, steps)
  rates = []
  for _ in range(steps):
    rates.append(schedule.get_last_lr()[0])
    sgd.step()
    schedule.step()
  return np.array(rates)


@pytest.mark.parametrize(("steps", "warmup"), [(200, 6), (10_396, 312)])
def test_every_rate_is_that_of_transformers(steps, warmup):
  [phase] = config_lib.phases(voco_1tok.get_config())
  rate = optimizer.schedule(phase.optimizer, PEAK, steps)
  found = np.asarray(rate(np.arange(steps)), np.float64)
  assert math.ceil(phase.optimizer.warmup_ratio * steps) == warmup
  assert found[0] == 0 and found[1] > 0
  np.testing.assert_allclose(found, expected(steps, warmup), rtol=0, atol=1e-10)


def test_other_schedules_learn_in_the_first_step():
  [phase] = config_lib.phases(voco_1tok.get_config())
  for name in ("cosine", "linear", "constant"):
    config = dataclasses.replace(phase.optimizer, schedule=name)
    assert float(optimizer.schedule(config, PEAK, 200)(0)) > 0


class Records:
  """As many as the file has; how many steps they take needs none of them."""

  def __len__(self):
    return NUM_RECORDS

  def __getitem__(self, index):
    raise AssertionError(index)


def test_steps_of_the_paper(tmp_path):
  """Two epochs of 5,198 steps: the last one of an epoch is filled up."""
  [config] = config_lib.phases(voco_1tok.get_config())

  def steps(data):
    return loop.Phase(
      dataclasses.replace(config, data=data),
      tmp_path,
      builders.model(),
      tokenizer.build_word_level(["a"]),
      Records(),
      runs.mesh(),
    ).steps

  assert steps(config.data) == 10_396
  shuffled = dataclasses.replace(config.data, batching="shuffle")
  assert steps(shuffled) == round(2 * NUM_RECORDS / 128) == 10_395
