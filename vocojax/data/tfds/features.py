"""What an example of our TFDS data sets holds: an image and its questions."""

import numpy as np
import tensorflow_datasets as tfds


def image_with_questions(size: int) -> tfds.features.FeaturesDict:
  """An image of `size` pixels a side, its number in the split, questions."""
  return tfds.features.FeaturesDict(
    {
      "image_id": np.int64,
      "image": tfds.features.Image(
        shape=(size, size, 3), encoding_format="png"
      ),
      "questions": tfds.features.Sequence(
        {
          "question": tfds.features.Text(),
          "answer": tfds.features.Text(),
        }
      ),
    }
  )
