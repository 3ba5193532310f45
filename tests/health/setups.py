"""Set-ups for the doctor to look at. Read next: test_versions.py."""

import dataclasses
import os
import shutil
import subprocess
import sys

from tests import runs
from vocojax.config import load_module, phases


def config_of(folder, name="one.py", **changes):
  (config,) = phases(load_module(str(folder / name)))
  return dataclasses.replace(
    config, data=dataclasses.replace(config.data, **changes)
  )


def changed(config, **changes):
  """`optimizer__name="lion"` and the like."""
  for key, value in changes.items():
    group, _, name = key.rpartition("__")
    if group:
      name, value = group, changed(getattr(config, group), **{name: value})
    config = dataclasses.replace(config, **{name: value})
  return config


def python(*arguments, cwd=runs.ROOT, **env):
  return subprocess.run(
    [sys.executable, *arguments],
    cwd=cwd,
    env=os.environ | {"JAX_PLATFORMS": "cpu"} | env,
    capture_output=True,
    text=True,
  )


def install(folder, name, version, *extra):
  """What pip leaves of a package for others to read."""
  info = folder / f"{name}-{version}.dist-info"
  info.mkdir(parents=True)
  head = ("Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}")
  (info / "METADATA").write_text("\n".join((*head, *extra)) + "\n")


def copy(folder, tmp_path):
  shutil.copytree(folder / "run", tmp_path / "run")
  return tmp_path / "run/voco", tmp_path / "run/voco/checkpoints"


def lines(findings):
  return [str(f) for f in findings]
