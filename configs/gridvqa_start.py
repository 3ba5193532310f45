"""GridVQA, first phase: everything learns, text sees every patch.

  python -m vocojax.train --config=configs/gridvqa_start.py --workdir=DIR/start

Hardware: one CPU core. Read next: gridvqa.py.
"""

from configs import gridvqa


def get_config():
  c = gridvqa.get_config()
  c.seed = 1000  # a method must not see the first batches a second time
  c.model.compressor.name = "full"
  c.optimizer.update(freeze=(), learning_rate=0.02)
  c.training.update(steps=800, evaluate=False)
  return c
