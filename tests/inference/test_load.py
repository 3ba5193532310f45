"""From a checkpoint to an engine: what may be asked for, and what not."""

import os
import subprocess
import sys

import orbax.checkpoint as ocp
import pytest

import vocojax
from tests import runs
from tests.inference import engines
from vocojax.errors import CheckpointError, UserError
from vocojax.training import checkpoint, checksums


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A checkpoint in `voco`, with 3 VoCo tokens."""
  folder = tmp_path_factory.mktemp("load")
  config, _, params, words = engines.setup(folder)
  where = folder / "voco" / checkpoint.FOLDER / "0"
  checkpoint.write_settings(where, config, words)
  with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as writer:
    writer.save(where / "params", args=ocp.args.StandardSave(params))
  checksums.write(where, 0)
  return folder


def load(folder, **options):
  return vocojax.load(folder / "voco", **options)


def test_load_compress_ask(folder):
  with runs.quick_compile():
    loaded = load(folder, slots=2, max_images=2, max_text_length=16)
    cache = loaded.compress(folder / "0.png")
    answer = loaded.ask("what color is this ?", cache)
    engine = engines.engine(folder)
    assert (
      answer
      == engine.ask("what color is this ?", folder / "0.png")[: len(answer)]
    )
  assert len(answer) > 10
  assert loaded.origin == engine.origin
  sizes = (loaded.slots, loaded.max_images, loaded.max_text_length)
  assert sizes == (2, 2, 16)


HALF_WAY = """
import sys
import vocojax
from vocojax.inference.requests import Request

engine = vocojax.load(sys.argv[1], slots=2)
running = engine.generate(
  Request([("what color is this ?", None)], max_new_tokens=n) for n in (1, 9)
)
print(next(running)[0])
"""


def test_an_abandoned_generate_says_nothing_at_the_end(folder):
  process = subprocess.run(
    [sys.executable, "-c", HALF_WAY, str(folder / "voco")],
    cwd=runs.ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"} | runs.cached(folder),
    capture_output=True,
    text=True,
    timeout=200,
  )
  assert process.returncode == 0
  assert (process.stdout, process.stderr) == ("0\n", "")


def test_other_compressors(folder):
  assert load(folder).num_image_tokens == 3
  assert load(folder, num_voco_tokens=2).num_image_tokens == 2
  assert load(folder, compressor="full").num_image_tokens == 17
  assert load(folder, compressor="full").num_patches == 16
  # A cache of fewer tokens is of the same model; one of patches is not.
  origins = [
    load(folder, **options).origin
    for options in ({}, {"num_voco_tokens": 2}, {"compressor": "full"})
  ]
  assert origins[0] == origins[1] != origins[2]


@pytest.mark.parametrize(
  "options, where, got",
  [
    ({"num_voco_tokens": 4}, "num_voco_tokens", "4"),
    ({"num_voco_tokens": 0}, "num_voco_tokens", "0"),
    (
      {"num_voco_tokens": 2, "compressor": "full"},
      "num_voco_tokens",
      "2 with compressor 'full', whose tokens cannot be cut",
    ),
    (
      {"compressor": "avgpool"},
      "{step}",
      "weights trained with compressor 'voco', to be used as 'avgpool'",
    ),
    ({"layout": "vicuna"}, "layout", "'vicuna'"),
    ({"slots": 0}, "slots", "0"),
  ],
)
def test_errors(folder, options, where, got):
  with pytest.raises(UserError) as e:
    load(folder, **options)
  assert e.value.where == where.format(step=folder / "voco/checkpoints/0")
  assert e.value.got == got
  assert e.value.expected and e.value.fix


def test_no_checkpoint(tmp_path):
  with pytest.raises(CheckpointError) as e:
    vocojax.load(tmp_path)
  assert (e.value.where, e.value.got) == (
    str(tmp_path),
    "no folder checkpoints",
  )
