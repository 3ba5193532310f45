"""What an installed package brings: nothing but vocojax, configs inside it."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from tests import runs


@pytest.fixture(scope="module")
def site(tmp_path_factory):
  """The wheel, unpacked where a folder of packages would be."""
  folder = tmp_path_factory.mktemp("install")
  source = folder / "source"  # building writes beside the sources
  source.mkdir()
  for name in ("setup.py", "pyproject.toml", "LICENSE"):
    shutil.copy(runs.ROOT / name, source)
  for name in ("vocojax", "configs"):
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(runs.ROOT / name, source / name, ignore=ignore)
  build = "wheel --no-deps --no-build-isolation --wheel-dir"
  subprocess.run(
    [sys.executable, "-m", "pip", *build.split(), folder, source],
    check=True,
    capture_output=True,
  )
  (wheel,) = folder.glob("*.whl")
  zipfile.ZipFile(wheel).extractall(folder / "site")
  return folder / "site"


def train(site, folder, config):
  return subprocess.run(
    [
      sys.executable,
      "-m",
      "vocojax.train",
      f"--config={config}",
      "--workdir=w",
    ],
    cwd=folder,
    env=os.environ | {"PYTHONPATH": str(site)},
    capture_output=True,
    text=True,
  )


def test_nothing_but_vocojax_is_installed(site):
  names = sorted(path.name for path in site.iterdir())
  assert names == ["vocojax", "vocojax-0.1.0.dist-info"]
  assert (site / "vocojax/configs/voco_1tok.py").is_file()


@pytest.mark.parametrize("own_configs", [False, True])
@pytest.mark.parametrize("name", ["voco_1tok", "configs/voco_1tok.py"])
def test_a_config_by_its_name(site, tmp_path, name, own_configs):
  """In an empty folder, and in a project that has configs of its own."""
  if own_configs:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/__init__.py").write_text("raise ValueError\n")
  done = train(site, tmp_path, name)
  assert done.returncode == 2
  error = runs.printed_error(done.stderr)
  assert (error.where, error.got) == ("config.data.path", "nothing")


def test_an_unknown_name(site, tmp_path):
  error = runs.printed_error(train(site, tmp_path, "voco_1tk").stderr)
  assert (error.where, error.got) == ("--config=voco_1tk", "no such file")
  assert error.fix == "write voco_1tok"
