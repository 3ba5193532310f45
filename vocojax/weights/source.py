"""The folders and files that make up a published model. Next: `into.py`."""

import dataclasses
import os
import pathlib

from vocojax.core.files import expand_user
from vocojax.errors import WeightsError
from vocojax.weights import files, hf, hf_config, preprocessor
from vocojax.weights.stored import Stored

_PARTS = {
  "llm": "language model",
  "head": "output head",
  "vision": "vision tower",
  "projector": "projector",
}


@dataclasses.dataclass(frozen=True)
class Request:
  """What to convert, as the command line says it; '' is not given.

  Attributes:
    source: folder of a whole model, or else:
    llm: folder of a LLaMA.
    vision: folder of a CLIP.
    projector: file; of a whole model only where the folder has none.
    compressor: of the checkpoint; '' is 'voco', but 'full' for a LLaVA.
    num_voco_tokens: k.
    layout: prompt layout; '' is that of VoCo-LLaMA, but LLaVA's for a LLaVA.
    dtype: of the weights; '' is that of the source.
    seed: of what the source lacks.
  """

  source: str = ""
  llm: str = ""
  vision: str = ""
  projector: str = ""
  compressor: str = ""
  num_voco_tokens: int = 1
  layout: str = ""
  dtype: str = ""
  seed: int = 0


@dataclasses.dataclass(frozen=True)
class Found:
  """A part of the model in the files of the source."""

  part: hf.Part
  prefix: str
  tensors: dict[str, Stored]
  where: str


class Source:
  """The folders and files that make up a model.

  Attributes:
    folder: of the model, or of its LLaMA.
    values: its config.json.
    where: that file.
    layout: of the model; None for a LLaMA.
    text_values: settings of the language model.
    text_where: where they are.
    vision_values: settings of the vision tower, if they are known.
    vision_where: where they are.
    files: the tensors of each folder or file, and its path.
  """

  def __init__(self, request: Request):
    flag = "--source" if request.source else "--llm"
    given = request.source or request.llm
    self.folder = _folder(given, flag)
    self.values = hf_config.read(self.folder)
    self.where = str(self.folder / "config.json")
    self.layout = hf_config.layout_of(self.values, self.where)
    if request.source and self.layout is None:
      raise WeightsError(
        f"--source={given}",
        "a language model alone",
        "a LLaVA",
        "name it with --llm, and a CLIP with --vision",
      )
    if request.llm and self.layout is not None:
      raise WeightsError(
        f"--llm={given}",
        "a LLaVA",
        "a language model alone",
        "name it with --source",
      )
    self.text_values, self.text_where = hf_config.text_values(
      self.values, self.layout, self.where
    )
    self.files = [(files.open_folder(self.folder), str(self.folder))]
    self.vision_values, self.vision_where = hf_config.vision_values(
      self.values, self.folder
    )
    self._vision_folder = self._add_vision(request.vision)
    self._add_projector(request.projector)

  def _has(self, part: str) -> bool:
    return any(hf.find_part(part, tensors) for tensors, _ in self.files)

  def _add_vision(self, given: str) -> pathlib.Path | None:
    """Adds the vision tower unless it is there; its own folder, if any."""
    inside = self._has("vision")
    if self.values.get("unfreeze_mm_vision_tower") and not inside:
      raise WeightsError(
        f"{self.where}: unfreeze_mm_vision_tower",
        "true, and no vision tower in the weights",
        "the tower that was trained with the model",
        "use its complete weights, or set the key to false if the tower was "
        "not trained",
      )
    folder = hf_config.tower_folder(self.values, self.folder)
    if given:
      folder = _folder(given, "--vision")
    elif inside:
      return folder
    elif folder is None:
      raise WeightsError(
        self.folder,
        "no vision tower",
        "one in the weights or in a folder that config.json names",
        "name a CLIP folder with --vision",
      )
    self.vision_values, self.vision_where = hf_config.clip_values(folder)
    self.files.append((files.open_folder(folder), str(folder)))
    return folder

  def _add_projector(self, given: str) -> None:
    beside = self.folder / "mm_projector.bin"
    if given:
      path = expand_user(given, WeightsError)
    elif not self._has("projector") and beside.exists():
      path = beside
    else:
      return
    tensors = files.open_file(path)
    found = hf.find_part("projector", tensors)
    if found is None:
      raise WeightsError(
        path,
        "no projector",
        f"a tensor such as {_example('projector')}",
        "name the file of a projector",
      )
    part, prefix = found
    own = {prefix + rule.name for rule in part.rules}
    for name in sorted(tensors.keys() - own):
      raise WeightsError(
        f"{path}: {name}",
        "a tensor that is none of the projector's",
        "a projector alone",
        "save its tensors without this one",
      )
    self.files.append((tensors, str(path)))

  def pads(self, image_size: int) -> bool:
    """Whether images are padded to squares, or else cropped.

    Raises:
      WeightsError: the model or its tower was trained on other pixels.
    """
    if self._vision_folder:
      preprocessor.check(self._vision_folder, image_size)
    if self.layout == "llava_hf":
      return preprocessor.check(self.folder, image_size)
    if self.layout == "original":  # LLaVA's default is to crop
      return self.values.get("image_aspect_ratio") == "pad"
    return True

  def find(self, name: str) -> Found | None:
    """A part, wherever it is.

    Raises:
      WeightsError: it is in two places.
    """
    found = []
    for tensors, where in self.files:
      if part := hf.find_part(name, tensors):
        found.append(Found(*part, tensors, where))
    if len(found) > 1:
      raise WeightsError(
        f"{found[1].where}: {found[1].prefix}{found[1].part.probe}",
        f"a {_PARTS[name]} that {found[0].where} has, too",
        "one",
        f"leave out --{name}",
      )
    return found[0] if found else None

  def require(self, name: str) -> Found:
    found = self.find(name)
    if found is None:
      raise WeightsError(
        self.folder,
        f"no {_PARTS[name]}",
        f"a tensor such as {_example(name)}",
        "use the complete model",
      )
    return found


def _example(name: str) -> str:
  """A tensor's name of a part."""
  part = next(p for p in hf.PARTS if p.name == name)
  return part.prefixes[0] + part.probe


def _folder(given: str, flag: str) -> pathlib.Path:
  """The folder that a flag names."""
  folder = expand_user(given, WeightsError)
  if not os.path.isdir(folder):
    raise WeightsError(
      f"{flag}={given}", "no such folder", "the folder of a model", "name one"
    )
  return folder
