"""Devices, memory and disks, some of them full."""

import os
import shutil
import subprocess
import sys

import pytest

from vocojax.health import machine
from vocojax.health.findings import size


def test_devices(tmp_path, monkeypatch):
  """JAX says what there is; a file of a device, that there is more."""
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  found, devices = machine.devices(tmp_path)
  assert str(found) == "devices: 1 x cpu (cpu): OK"
  assert devices == [machine.Device("cpu", "cpu", 0)]


@pytest.mark.parametrize(
  ("file", "name", "extra", "driver"),
  [
    ("nvidia0", "an NVIDIA GPU", "gpu", " and a driver 580 or newer"),
    ("accel0", "a TPU", "tpu", ""),
    ("vfio/0", "a TPU", "tpu", ""),
  ],
)
def test_accelerator_that_jax_misses(
  tmp_path, monkeypatch, file, name, extra, driver
):
  path = tmp_path / file
  path.parent.mkdir(exist_ok=True)
  path.touch()
  monkeypatch.setenv("JAX_PLATFORMS", "")
  found, _ = machine.devices(tmp_path)
  assert str(found) == (
    f"devices: 1 x cpu (cpu), but {path} says that there is {name}: error: "
    f"{sys.executable} -m pip install -e '.[{extra}]' in the folder of vocojax "
    f"installs JAX for it; it needs a user who may open {path}{driver}"
  )


def test_accelerator_that_the_user_hides(tmp_path, monkeypatch):
  (tmp_path / "nvidia0").touch()
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  found, _ = machine.devices(tmp_path)
  assert str(found) == (
    f"devices: 1 x cpu (cpu), but {tmp_path}/nvidia0 says that there is an "
    "NVIDIA GPU: warning: unset JAX_PLATFORMS, which is 'cpu'"
  )


def test_jax_does_not_start(monkeypatch):
  monkeypatch.setenv("JAX_PLATFORMS", "no_such")
  found, _ = machine.devices()
  assert found.status == "error"
  assert found.found.startswith("JAX does not start (RuntimeError: ")
  assert found.remedy.endswith("or unset JAX_PLATFORMS, which is 'no_such'")
  found, _ = machine.devices(timeout=0.01)
  assert str(found).startswith(
    "devices: JAX did not start in 0.01 s: error: end other programs"
  )


def test_disk(tmp_path):
  """A folder that is not there yet is measured, not made."""
  workdir = tmp_path / "not/there"
  free = shutil.disk_usage(tmp_path).free
  assert machine.disk(workdir).status == "OK"
  assert machine.disk(workdir, free // 2).status == "OK"
  found = machine.disk(workdir, 2 * free)
  assert found.status == "error"
  assert f"take up to {size(2 * free)}" in found.found
  assert list(tmp_path.iterdir()) == []
  (tmp_path / "file").touch()
  found = machine.disk(tmp_path / "file")
  assert str(found) == (
    f"disk of {tmp_path}/file: {tmp_path}/file cannot be written to: error: "
    "choose another --workdir, or make it a folder that can be written to"
  )


def test_full_disk(full_disk):
  found = machine.disk(full_disk / "run")
  assert str(found) == (
    f"disk of {full_disk}/run: 0.0 KiB free: error: free some space, choose "
    "another --workdir, or lower config.training.keep_checkpoints"
  )


@pytest.fixture
def full_disk(tmp_path):
  """A disk of 128 KiB, all of it used."""
  where = tmp_path / "full"
  where.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(where)]
  if shutil.which("mount") is None or os.geteuid():
    pytest.skip("only root can mount a small disk")
  process = subprocess.run(mount, capture_output=True, text=True)
  if process.returncode:
    pytest.skip(f"cannot mount a small disk: {process.stderr.strip()}")
  (where / "fill").write_bytes(bytes(128 * 1024))
  yield where
  subprocess.run(["umount", str(where)], check=True)
