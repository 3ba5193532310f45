"""Small files in the official formats, written by hand."""

import json
import pathlib

import pytest


class Folder:
  """A `--data` folder to be filled."""

  def __init__(self, path: pathlib.Path):
    self.path = path

  def text(self, name: str, content: str) -> pathlib.Path:
    path = self.path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path

  def json(self, name: str, content) -> pathlib.Path:
    return self.text(name, json.dumps(content))

  def jsonl(self, name: str, entries) -> pathlib.Path:
    return self.text(name, "".join(json.dumps(e) + "\n" for e in entries))

  def images(self, *names: str) -> None:
    for name in names:
      self.text(name, "an image")


@pytest.fixture
def folder(tmp_path) -> Folder:
  return Folder(tmp_path / "data")
