"""The folders and files that make up a published model. Next: `into.py`."""

import dataclasses
import pathlib

from vocojax.errors import WeightsError
from vocojax.weights import files, hf, hf_config
from vocojax.weights.stored import Stored


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
  """The folders and files that make up a model."""

  def __init__(self, request: Request):
    given = request.source or request.llm
    self.folder = pathlib.Path(given).expanduser()
    if not self.folder.is_dir():
      raise WeightsError(f"{given}: no such folder; name that of a model")
    self.values = hf_config.read(self.folder)
    self.layout = hf_config.layout_of(self.values)
    self.where = str(self.folder / "config.json")
    self.text_values = self.values.get("text_config", self.values)
    if request.source and self.layout is None:
      raise WeightsError(
        f"{self.where}: a language model alone, expected a LLaVA; name it with "
        "--llm, and a CLIP with --vision"
      )
    if request.llm and self.layout is not None:
      raise WeightsError(
        f"{self.where}: a LLaVA, expected a language model alone; name it with "
        "--source"
      )
    self.files = [(files.open_folder(self.folder), str(self.folder))]
    self.vision_values = hf_config.vision_values(self.values, self.folder)
    self._add_vision(request.vision)
    self._add_projector(request.projector)

  def _has(self, part: str) -> bool:
    return any(hf.find_part(part, tensors) for tensors, _ in self.files)

  def _add_vision(self, given: str) -> None:
    tower = self.folder / self.values.get("mm_vision_tower", "")
    if given:
      folder = pathlib.Path(given).expanduser()
    elif not self._has("vision") and tower != self.folder and tower.is_dir():
      folder = tower
    elif self._has("vision"):
      return
    else:
      raise WeightsError(
        f"{self.folder}: no vision tower in it; name a CLIP folder with "
        "--vision"
      )
    self.vision_values = hf_config.clip_values(folder)
    self.files.append((files.open_folder(folder), str(folder)))

  def _add_projector(self, given: str) -> None:
    beside = self.folder / "mm_projector.bin"
    if given:
      path = pathlib.Path(given).expanduser()
    elif not self._has("projector") and beside.is_file():
      path = beside
    else:
      return
    self.files.append((files.open_file(path), str(path)))

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
        f"{found[1].prefix}{found[1].part.probe}: in {found[0].where} and in "
        f"{found[1].where}, expected in one of them; leave out --{name}"
      )
    return found[0] if found else None

  def require(self, name: str) -> Found:
    found = self.find(name)
    if found is None:
      example = next(p for p in hf.PARTS if p.name == name)
      raise WeightsError(
        f"{self.folder}: no {name} in it, expected a tensor such as "
        f"{example.prefixes[0]}{example.probe}; use a complete model"
      )
    return found
