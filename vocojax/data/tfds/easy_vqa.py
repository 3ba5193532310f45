"""TFDS builder of easy-VQA: coloured shapes, 64 pixels a side, with questions.

Written from the files of the `easy-vqa` package to ArrayRecord; TensorFlow is
not needed. One example is one image with all its questions. Read next:
../sources.py, which reads it.
"""

import importlib.util
import json
import pathlib
from typing import ClassVar

import tensorflow_datasets as tfds

from vocojax.data.tfds.features import image_with_questions
from vocojax.errors import DataError


class EasyVqa(tfds.core.GeneratorBasedBuilder):
  """easy-VQA 1.0 (MIT), https://github.com/vzhou842/easy-VQA."""

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES: ClassVar = {"1.0.0": "easy-vqa 1.0, grouped by image."}
  # TFDS looks beside the code for checksums of downloads, of which there are
  # none; the search needs importlib_resources, which it does not install.
  code_path = None

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description="Questions about a coloured shape.",
      homepage="https://github.com/vzhou842/easy-VQA",
      features=image_with_questions(64),
      disable_shuffling=True,  # record i is image i
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing to download
    root = package_folder()
    return {
      split: self._generate_examples(root / split)
      for split in ("train", "test")
    }

  def _generate_examples(self, folder: pathlib.Path):
    questions: dict[int, list[dict[str, str]]] = {}
    for question, answer, image_id in json.loads(
      (folder / "questions.json").read_text()
    ):
      questions.setdefault(image_id, []).append(
        {"question": question, "answer": answer}
      )
    for image_id in sorted(questions):
      yield (
        image_id,
        {
          "image_id": image_id,
          "image": str(folder / "images" / f"{image_id}.png"),
          "questions": questions[image_id],
        },
      )


def package_folder() -> pathlib.Path:
  """The data folder of the installed `easy-vqa` package.

  Raises:
    DataError: the package is not installed.
  """
  spec = importlib.util.find_spec("easy_vqa")
  if spec is None or spec.origin is None:
    raise DataError(
      "the package easy-vqa",
      "nothing",
      "the images, which are in it",
      "pip install easy-vqa",
    )
  return pathlib.Path(spec.origin).parent / "data"
