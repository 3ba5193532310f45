"""A checkpoint, or a model as it is published, fine-tuned on your own data.

  python -m vocojax.train --config=configs/finetune.py --workdir=DIR \
    --config.init_from=CHECKPOINT --config.data.path=FILE \
    --config.data.image_folder=DIR

Shapes, tokenizer, prompt, preprocessing and the number of VoCo tokens are the
checkpoint's. A twentieth of
the records is held out and asked about at the end. Conversations share rows;
what is longer than one is named. Hardware: that of the model; `python -m
vocojax.doctor` with these flags says whether it fits.
"""

from vocojax import config


def get_config():
  c = config.default_config()
  c.model.compressor.name = "voco"  # also of a LLaVA; as many as there are
  c.data.update(batching="pack", max_text_length=2048, max_images=8)
  c.data.batch_size = 8
  c.training.update(epochs=3.0, evaluate=True, checkpoint_every=100)
  c.evaluation.update(holdout=0.05, max_new_tokens=128)
  return c
