"""Keys of the paper's recipes, and what cannot be trained."""

import pytest

from configs import align, voco_1tok
from vocojax import config as config_lib
from vocojax.errors import ConfigError


def phase_of(module, **keys):
  c = module.get_config()
  c.update_from_flattened_dict(keys)
  [phase] = config_lib.phases(c)
  return phase


@pytest.mark.parametrize(
  ("module", "batching", "sizes"),
  [(voco_1tok, "group_by_length", (128, 8)), (align, "shuffle", (256, 32))],
)
def test_recipe(module, batching, sizes):
  phase = phase_of(module)
  data, optimizer, training = phase.data, phase.optimizer, phase.training
  assert (data.batching, data.batch_size, data.micro_batch_size) == (
    batching,
    *sizes,
  )
  assert training.loss_mean == "micro_batches"
  assert (optimizer.grad_clip, optimizer.schedule) == (0, "hf_cosine")
  assert (optimizer.name, optimizer.weight_decay) == ("adamw", 0)
  assert (optimizer.b1, optimizer.b2, optimizer.eps) == (0.9, 0.999, 1e-8)
  assert phase.model.llm.rope.round_positions == "none"


@pytest.mark.parametrize(
  ("keys", "where", "got"),
  [
    ({"data.micro_batch_size": 12}, "config.data.micro_batch_size", "12"),
    ({"data.micro_batch_size": 0}, "config.data.micro_batch_size", "0"),
    ({"model.dtype": "float16"}, "config.model.dtype", "'float16'"),
  ],
)
def test_refused(keys, where, got):
  with pytest.raises(ConfigError) as e:
    phase_of(voco_1tok, **keys)
  assert (e.value.where, e.value.got) == (where, got)


def test_a_run_by_tokens_needs_no_divisor():
  keys = {"data.batching": "shuffle", "training.loss_mean": "tokens"}
  phase = phase_of(voco_1tok, **keys | {"data.micro_batch_size": 12})
  assert phase.data.batch_size % phase.data.micro_batch_size
