"""Versions of packages that are really installed, and of some that are not."""

import re
import sys

from tests import runs
from tests.health.setups import install, python

VERSIONS = """
from vocojax.health import versions
print(*versions.check(), sep="\\n")
"""


def test_packages_as_they_are():
  """Here everything is as setup.py says, or these tests would not run."""
  found = python("-c", VERSIONS).stdout.splitlines()
  assert found[0].startswith("Python: 3.")
  assert found[0].endswith(": OK")
  (packages,) = found[1:]
  assert re.fullmatch(
    r"packages: \d+ as vocojax and jax ask for them: OK", packages
  )
  # Those of setup.py are among them.
  assert int(packages.split()[1]) > len(requirements())


def requirements():
  text = (runs.ROOT / "setup.py").read_text()
  return re.findall(r'"([\w-]+)[>=]', text.split("EXTRAS")[0])


def test_wrong_versions(tmp_path):
  install(tmp_path, "jaxlib", "0.9.1")  # does not fit jax
  install(tmp_path, "grain", "0.1.0")  # too old
  install(tmp_path, "pytest", "8.0")  # of an extra
  process = python("-c", VERSIONS, PYTHONPATH=str(tmp_path))
  found = process.stdout.splitlines()
  pip = f"{sys.executable} -m pip install"
  wrong = {s.split()[1]: s for s in found if not s.endswith(": OK")}
  assert wrong.keys() == {"grain:", "jaxlib:", "pytest:"}
  assert wrong["grain:"] == (
    "package grain: found 0.1.0, vocojax needs <0.3,>=0.2.18: error: "
    f"{pip} 'grain<0.3,>=0.2.18'"
  )
  assert re.fullmatch(
    r"package jaxlib: found 0.9.1, jax needs \S*: error: \S+ -m pip install "
    r"'jaxlib\S+'",
    wrong["jaxlib:"],
  )
  assert wrong["pytest:"] == (
    "package pytest: found 8.0, vocojax needs <10,>=9: warning: "
    f"{pip} 'pytest<10,>=9'"
  )


def sources(folder):
  """A folder with the package alone; pip may leave more beside it."""
  (folder / "vocojax").symlink_to(runs.ROOT / "vocojax")
  return folder


def test_wrong_python_and_missing_package(tmp_path):
  install(
    tmp_path,
    "vocojax",
    "0.1.0",
    "Requires-Python: >=3.99",
    "Requires-Dist: no-such-package>=2",
    'Requires-Dist: neither-this; extra == "gpu"',
    'Requires-Dist: nor-this; python_version < "3"',
    "Provides-Extra: gpu",
  )
  process = python("-c", VERSIONS, cwd=sources(tmp_path))
  found = process.stdout.splitlines()
  assert found[0].endswith(
    "expected >=3.99: error: make an environment with such a Python; "
    "PYTHON=/path/to/it launch/quickstart.sh does"
  )
  assert found[1] == (
    "package no-such-package: found nothing, vocojax needs >=2: error: "
    f"{sys.executable} -m pip install 'no-such-package>=2'"
  )
  assert not re.search("neither-this|nor-this", "".join(found))


def test_not_installed(tmp_path):
  code = f"import sys; sys.path[:] = ['.'] + sys.path[1:]\n{VERSIONS}"
  site = [p for p in sys.path if "site-packages" in p]
  hide = f"import sys; site = {site!r}\nimport packaging.requirements\n"
  hide += "sys.path[:] = [p for p in sys.path if p not in site]\n"
  process = python("-c", hide + code, cwd=sources(tmp_path))
  found = process.stdout.splitlines()
  assert found == [
    f"package vocojax: not installed: error: {sys.executable} -m pip install "
    "-e . in its folder, or run launch/quickstart.sh"
  ]
