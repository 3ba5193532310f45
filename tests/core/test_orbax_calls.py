"""Signals while Orbax reads: real processes, real signals, a real reader."""

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests import runs
from vocojax.core import orbax_calls
from vocojax.training import checksums

ARRAYS = 12

# Forks for each line that it reads; a fork reads the checkpoint for ever.
READS = """
import os, sys
import jax
import numpy as np
from vocojax import cli
from vocojax.training import checkpoint

folder, arrays = sys.argv[1], int(sys.argv[2])
del sys.argv[1:]

def main():
  to = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shape = jax.ShapeDtypeStruct((1024, 1024), np.float32, sharding=to)
  wanted = {f"x{i}": shape for i in range(arrays)}
  checkpoint.load_params(folder, wanted, None)
  print("reading", flush=True)
  while True:
    checkpoint.load_params(folder, wanted, None)

for line in sys.stdin:
  child = os.fork()
  if not child:
    os.dup2(os.open(line.strip(), os.O_WRONLY | os.O_CREAT), 2)
    cli.run(main, "Reads.")
  print(child, flush=True)
  print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def start(code, *arguments):
  with runs.interruptible():
    return subprocess.Popen(
      [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)],
      cwd=runs.ROOT,
      env=os.environ | {"JAX_PLATFORMS": "cpu"},
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )


def test_interrupted_reader(tmp_path):
  """Whenever it comes: one line, exit status 130, no word of damage."""
  where = tmp_path / "run/checkpoints/0"
  rng = np.random.default_rng(0)
  tree = {
    f"x{i}": rng.standard_normal((1024, 1024), np.float32)
    for i in range(ARRAYS)
  }
  with ocp.StandardCheckpointer() as writer:
    writer.save(where / "params", tree)
  checksums.write(where, 0)
  delays = random.Random(0)
  with start(READS, tmp_path / "run", ARRAYS) as forks:
    for number in range(8):
      err = tmp_path / f"err{number}"
      print(err, file=forks.stdin, flush=True)
      lines = {forks.stdout.readline().strip() for _ in range(2)}
      (child,) = lines - {"reading"}
      time.sleep(delays.random() * 0.5)
      os.kill(int(child), signal.SIGINT)
      status = int(forks.stdout.readline())
      assert (status, err.read_text()) == (130, "error: interrupted\n")
    forks.stdin.close()


WAITS = """
import time
from vocojax.core import orbax_calls

try:
  with orbax_calls.{call}():
    print("in", flush=True)
    time.sleep({seconds})
    print("out", flush=True)
except KeyboardInterrupt:
  print("interrupted")
"""


@pytest.mark.parametrize("call", ["signals_later", "orbax_call"])
def test_signal_waits_for_the_end(call):
  with start(WAITS.format(call=call, seconds=1)) as process:
    assert process.stdout.readline() == "in\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.read() == "out\ninterrupted\n"


def test_second_signal_ends_it_at_once():
  begun = time.monotonic()
  with start(WAITS.format(call="orbax_call", seconds=100)) as process:
    assert process.stdout.readline() == "in\n"
    while process.poll() is None and time.monotonic() < begun + 60:
      process.send_signal(signal.SIGINT)
      time.sleep(0.2)
    assert process.returncode == -signal.SIGINT
    assert process.stdout.read() == ""


def test_signals_are_as_before():
  before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
  with orbax_calls.orbax_call():
    pass
  after = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
  assert before == after
