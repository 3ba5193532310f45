"""easy-VQA with one VoCo token, from scratch: the default run.

  python -m vocojax.train --config=configs/easyvqa_1tok.py --workdir=DIR

Hardware: 2 CPU cores. Phase `full` teaches the vision tower and the language
model with all 64 patches visible, phase `voco` to squeeze them into one token.
"""

from configs import common


def get_config():
  c = common.get_config()
  c.phases = ("full", "voco")
  c.model.dtype, c.model.remat, c.model.scan_layers = "float32", "none", False
  c.model.llm.update(
    vocab_size=32, vocab_multiple=32, hidden_size=96, intermediate_size=256
  )
  c.model.llm.update(
    num_hidden_layers=4, num_attention_heads=3, num_key_value_heads=3
  )
  c.model.llm.update(head_dim=32, initializer_range=0.05)
  c.model.vision.update(
    image_size=64, patch_size=8, hidden_size=96, intermediate_size=384
  )
  c.model.vision.update(
    num_hidden_layers=3, num_attention_heads=4, feature_layer=-1
  )
  c.model.vision.initializer_range = 0.05
  c.prompt.layout = "qa_v1"
  c.data.update(source="easy_vqa", max_text_length=72, batch_size=48)
  c.data.update(conversations_per_record=6, flip_images=True)
  c.optimizer.update(name="muon", learning_rate=0.02, adam_learning_rate=3e-3)
  c.optimizer.update(b2=0.99, weight_decay=0.01, freeze=())
  c.training.update(evaluate=True, log_every=20, checkpoint_every=200)
  c.evaluation.update(max_new_tokens=4, bounds=True)
  c.phase.full = {
    "model": {"compressor": {"name": "full"}},
    "training": {"steps": 400},
  }
  c.phase.voco = {"training": {"steps": 400}}
  return c
