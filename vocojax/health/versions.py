"""Installed packages against the ranges of setup.py. Next: machine.py.

There is no second list: an installed package knows what its setup.py asked
for, and so does jax, whose own parts (jaxlib, plugins) must fit together.
"""

import platform
import shlex
import sys
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from vocojax.health.findings import Finding


def check() -> Iterator[Finding]:
  """Python and the packages; those of extras only where they are installed."""
  try:
    python = metadata.metadata("vocojax")["Requires-Python"]
  except metadata.PackageNotFoundError:
    yield Finding(
      "package vocojax",
      "not installed",
      "error",
      f"{_pip()} -e . in its folder, or run launch/quickstart.sh",
    )
    return
  found = platform.python_version()
  good = SpecifierSet(python).contains(found)
  yield Finding(
    "Python",
    f"{found}, expected {python}",
    "OK" if good else "error",
    ""
    if good
    else "make an environment with such a Python; PYTHON=/path/to/it"
    " launch/quickstart.sh does",
  )
  checked = 0
  for owner in ("vocojax", "jax"):
    if owner != "vocojax" and _version(owner) is None:
      continue  # named above
    for requirement, extra in _requirements(owner):
      finding = _check_one(owner, requirement, extra)
      if finding is None:
        checked += 1
      else:
        yield finding
  yield Finding("packages", f"{checked} as vocojax and jax ask for them")


def _requirements(owner: str) -> Iterator[tuple[Requirement, bool]]:
  """What a package asks for here, and whether only one of its extras does."""
  extras = metadata.metadata(owner).get_all("Provides-Extra") or []
  needed, optional = {}, {}
  for text in metadata.requires(owner) or []:
    requirement = Requirement(text)
    marker = requirement.marker
    if marker is None or marker.evaluate({"extra": ""}):
      needed[requirement.name] = requirement
    elif any(marker.evaluate({"extra": e}) for e in extras):
      optional[requirement.name] = requirement
  for name, requirement in (optional | needed).items():
    yield requirement, name not in needed


def _check_one(
  owner: str, requirement: Requirement, extra: bool
) -> Finding | None:
  """What is wrong with one package, if anything."""
  version = _version(requirement.name)
  if version is None and extra:
    return None
  # A release candidate is what its user wanted.
  if version and requirement.specifier.contains(version, prereleases=True):
    return None
  wanted = f"{requirement.name}{requirement.specifier}"
  return Finding(
    f"package {requirement.name}",
    f"found {version or 'nothing'}, {owner} needs {requirement.specifier}",
    "warning" if extra else "error",
    f"{_pip()} {shlex.quote(wanted)}",
  )


def _version(name: str) -> str | None:
  try:
    return metadata.version(name)
  except metadata.PackageNotFoundError:
    return None


def _pip() -> str:
  return f"{shlex.quote(sys.executable)} -m pip install"
