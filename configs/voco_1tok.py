"""VoCo-LLaMA 7B, one VoCo token: the paper's fine-tuning recipe.

  python -m vocojax.train --config=configs/voco_1tok.py --workdir=DIR \
    --config.init_from=CHECKPOINT --config.data.path=llava_v1_5_mix665k.json \
    --config.data.image_folder=DIR --config.data.tokenizer=DIR

Hardware of the original: 8 A100-40G, about 7 hours an epoch. Score it reports:
GQA 57.0, MMBench 58.8, VQAv2 72.3. Nobody has published a run of this file.
"""

from configs import common


def get_config():
  c = common.get_config()
  c.prompt.strip_newlines = "original"
  c.model.mlp_chunks = 4
  c.training.epochs = 2.0
  return c
