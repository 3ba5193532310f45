"""GridVQA: every method from the same start; see launch/reproduce_small.sh.

  python -m vocojax.train --config=configs/gridvqa.py --workdir=DIR/start \
    --config.phases=start
  python -m vocojax.train --config=configs/gridvqa.py --workdir=DIR/voco_1 \
    --config.init_from=DIR/start/start --config.model.compressor.name=voco

Hardware: one CPU core each. In phase `start` everything learns, and text sees
every patch. After it the vision tower is frozen, as in the paper's second
phase; `--config.data.grid_size` is that of the start.
"""

from vocojax import config


def get_config():
  c = config.default_config()
  m, llm, vision = c.model, c.model.llm, c.model.vision
  m.update(dtype="float32", remat="none", scan_layers=False)
  llm.update(vocab_size=57, vocab_multiple=64, hidden_size=64, head_dim=8)
  llm.update(num_hidden_layers=4, intermediate_size=192, initializer_range=0.1)
  # A head can look at one thing of one cell, and is let in or not by the
  # question: with 8 heads some seeds never learn where things are.
  llm.update(num_attention_heads=16, num_key_value_heads=16)
  vision.update(image_size=64, patch_size=8, feature_layer=-1, hidden_size=64)
  vision.update(num_hidden_layers=2, num_attention_heads=4)
  vision.update(intermediate_size=256, initializer_range=0.1)
  c.model.compressor.name = "voco"
  c.prompt.layout = "qa_v1"
  c.data.update(source="grid_vqa", max_text_length=112, batch_size=32)
  c.data.update(conversations_per_record=8, batching="slots")
  c.optimizer.update(name="muon", learning_rate=0.01, adam_learning_rate=3e-3)
  c.optimizer.update(b2=0.99, weight_decay=0.01, warmup_ratio=0.05)
  # At twice the rate some seeds learn what is there but not where, and leave
  # that late.
  c.training.update(steps=800, evaluate=True, log_every=20)
  c.training.update(checkpoint_every=200, keep_checkpoints=1)
  c.evaluation.max_new_tokens = 3
  c.phase.start = {
    "seed": 1000,  # a method must not see the first batches a second time
    "model": {"compressor": {"name": "full"}},
    "optimizer": {"freeze": (), "learning_rate": 0.02},
    "training": {"steps": 800, "evaluate": False},
  }
  return c
