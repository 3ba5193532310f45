"""The fuzz program on few inputs, and on readers with every kind of fault."""

import json
import subprocess
import sys

from tests import runs

# A reader for each fault, by its name; the sound ones come last.
_FAULTY = """
import json, os, pathlib, pickle, sys, tempfile, time
from tests.fuzz import child
from tests.fuzz.kinds import Kind
from vocojax.errors import DataError

child.MAX_BYTES = 2**28


def refuse(folder):
  raise DataError("x", "a", "b", "c")


READERS = {
  "trace": ("either", lambda folder: 1 / 0),
  "hang": ("either", lambda folder: time.sleep(60)),
  "memory": ("either", lambda folder: bytearray(2**29) and time.sleep(60)),
  "memory at once": ("either", lambda folder: {"n": len(bytearray(2**29))}),
  "crash": ("either", lambda folder: os.abort()),
  "wrote": ("either", lambda folder: (folder / "../x").write_text("") or {}),
  "wrong": ("either", lambda folder: {"a": 2}),
  "taken": ("refuse", lambda folder: {"a": 1}),
  "rejected": ("read", refuse),
  "message": ("refuse", lambda folder: {"a": DataError("x", "", "b", "c")}),
  "read": ("either", lambda folder: {"a": 1}),
  "refused": ("either", refuse),
}
found = {}
folder = pathlib.Path(tempfile.mkdtemp())
(folder / "sound").mkdir()
(folder / "sound.pickle").write_bytes(pickle.dumps({"a": 1}))
for i, (name, (declared, read)) in enumerate(READERS.items()):
  (folder / str(i)).mkdir()
  child.MAX_SECONDS = 2 if name == "hang" else 60
  kind = Kind(None, read, {"case": (declared, lambda given: None)})
  sound = folder / "sound"
  found[name] = child.run(kind, "case", 0, sound, folder / str(i)).name
print(json.dumps(found))
"""


def _run(*arguments: str) -> subprocess.CompletedProcess:
  command = [sys.executable, "-W", "ignore", *arguments]
  return subprocess.run(
    command, cwd=runs.ROOT, capture_output=True, text=True, timeout=600
  )


def test_every_fault_is_seen():
  done = _run("-c", _FAULTY)
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  assert found == {name: name.removesuffix(" at once") for name in found}
