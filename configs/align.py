"""Alignment of the projector: LLaVA-1.5's first stage, 7B.

  python -m vocojax.train --config=configs/align.py --workdir=DIR \
    --config.init_from=CHECKPOINT --config.data.image_folder=DIR \
    --config.data.path=blip_laion_cc_sbu_558k.json

Hardware of the original: 8 A100-80G, 3.5 hours. Nobody has published a run of
this file. CHECKPOINT holds Vicuna and CLIP; go on from WORKDIR/full with
configs/voco_1tok.py.

Captions follow the patches directly, so their first token, which the last patch
would have to predict, is not trained on; LLaVA trains on it.
"""

from vocojax import config


def get_config():
  c = config.default_config()
  c.model.compressor.name = "full"
  c.prompt.layout = "plain"
  c.data.update(batch_size=256, max_text_length=256, pad_to_square=False)
  c.data.micro_batch_size = 32
  c.training.loss_mean = "micro_batches"
  c.optimizer.update(learning_rate=1e-3, freeze=("^vision/", "^llm/"))
  # Off, as in effect in the original: its DeepSpeed file does not hand on
  # max_grad_norm. 1.0 is the safer choice for anything but a comparison.
  c.optimizer.update(grad_clip=0.0, schedule="hf_cosine")
  c.training.epochs = 1.0
  return c
