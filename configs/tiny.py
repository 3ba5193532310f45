"""A small model from scratch on your own data, to see that all is well with it.

  python -m vocojax.train --config=configs/tiny.py --workdir=DIR \
    --config.data.path=FILE --config.data.image_folder=DIR

Hardware: 2 CPU cores, about a minute. It learns some dozen records by heart;
nothing as small can do more with photos. The words of the data are its
vocabulary. A tenth of the records is held out and asked about at the end.
"""

from vocojax import config


def get_config():
  c = config.default_config()
  m, llm, vision = c.model, c.model.llm, c.model.vision
  m.update(dtype="float32", remat="none", scan_layers=False)
  llm.update(vocab_multiple=32, hidden_size=96, head_dim=32)
  llm.update(num_hidden_layers=2, intermediate_size=256, initializer_range=0.1)
  llm.update(num_attention_heads=3, num_key_value_heads=3)
  vision.update(image_size=64, patch_size=8, feature_layer=-1, hidden_size=96)
  vision.update(num_hidden_layers=1, num_attention_heads=4)
  vision.update(intermediate_size=256, initializer_range=0.1)
  c.prompt.layout = "qa_v1"
  c.data.update(tokenizer="words", batching="pack", batch_size=4)
  c.data.update(max_text_length=256, max_images=4)
  c.optimizer.update(name="muon", learning_rate=0.02, adam_learning_rate=3e-3)
  c.optimizer.update(b2=0.99, warmup_ratio=0.05, freeze=())
  c.training.update(steps=150, evaluate=True, checkpoint_every=50)
  c.evaluation.update(holdout=0.1, max_new_tokens=32)
  return c
