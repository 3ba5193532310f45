"""VoCo-LLaMA 7B, one VoCo token: the paper's fine-tuning recipe.

  python -m vocojax.train --config=configs/voco_1tok.py --workdir=DIR \
    --config.init_from=CHECKPOINT --config.data.path=llava_v1_5_mix665k.json \
    --config.data.image_folder=DIR

CHECKPOINT is a phase folder, or a model as it is published; shapes, tokenizer
and preprocessing are its own. Without one they are LLaVA-1.5-7B's.

Hardware of the original: 8 A100-40G, about 7 hours an epoch. Score it reports:
GQA 57.0, MMBench 58.8, VQAv2 72.3. Nobody has published a run of this file.
With `--config.model.compressor.name=voco_causal` it trains the upper bound.
docs/fidelity.md says what is the same as the original, and what is not.
"""

from vocojax import config


def get_config():
  c = config.default_config()
  # Not as in the first stage, which may be the start.
  c.model.compressor.update(name="voco", num_voco_tokens=1)
  c.prompt.update(layout="voco_v1", strip_newlines="original")
  c.data.pad_to_square = True
  c.model.mlp_chunks = 4
  # 2,048 positions in all, so 1,469 - k of text with an image.
  c.data.update(max_text_length=2048, on_long_text="truncate")
  # Which records meet in a step, and that each device's mean over 8 rows counts
  # the same: together they decide how much the few long texts are heard.
  c.data.batching = "group_by_length"
  c.training.loss_mean = "micro_batches"
  c.training.epochs = 2.0
  # Off, as in effect in the original: its DeepSpeed file does not hand on
  # max_grad_norm. 1.0 is the safer choice for anything but a comparison.
  c.optimizer.grad_clip = 0.0
  c.optimizer.schedule = "hf_cosine"
  return c
