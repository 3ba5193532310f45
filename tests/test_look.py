"""The program that looks inside: its pictures, its figures, its complaints."""

import json
import shutil

import jax
import orbax.checkpoint as ocp
import pytest

from tests import disks, runs
from tests.evals.test_report import assert_drawn
from vocojax import assemble
from vocojax.config import load_module, phases
from vocojax.data import tokenizer
from vocojax.training import checkpoint, checksums

TAIL = """\
  c.model.compressor.num_voco_tokens = 2
  c.data.train_split, c.evaluation.split = "train[:40]", "train[40:]"
"""
NUM_RECORDS = 60


def write_checkpoint(folder, config, words):
  """Random weights, as a phase named after the compressor."""
  with runs.quick_compile():
    params = jax.jit(assemble.make_model(config, words).init)(jax.random.key(0))
  name = config.model.compressor.name
  where = folder / name / checkpoint.FOLDER / "0"
  checkpoint.write_settings(where, config, words)
  with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as writer:
    writer.save(where / "params", args=ocp.args.StandardSave(params))
  checksums.write(where, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Checkpoints in `voco` and `full`, with questions about colors."""
  folder = tmp_path_factory.mktemp("look")
  runs.write_data(folder)
  entries = []
  for i in range(NUM_RECORDS):
    entry = runs.entry(i % runs.NUM_RECORDS)
    entry["conversations"] = [
      {"from": "human", "value": "what color is the shape?"},
      {"from": "gpt", "value": list(runs.COLOURS)[i % 4]},
    ]
    entries.append(entry)
  (folder / "data.json").write_text(json.dumps(entries))
  path = runs.write_config(folder, "one.py", TAIL + runs.ONE_PHASE)
  (config,) = phases(load_module(str(path)))
  words = tokenizer.load_tokenizer(config.data.tokenizer)
  write_checkpoint(folder, config, words)
  full = assemble.with_compressor(config, "full", None)
  write_checkpoint(folder, full, words)
  return folder


@pytest.fixture(scope="module")
def look(folder):
  """Runs the program on a phase; returns status, stdout and stderr."""
  forks = runs.Forks(folder, "vocojax.look")
  yield lambda phase, *more: forks.run(f"--checkpoint={folder / phase}", *more)
  forks.close()


def test_evaluation_split(folder, look, tmp_path):
  status, out, err = look("voco", f"--out={tmp_path / 'new'}")
  assert status == 0, err
  assert (
    out.splitlines()[0] == f"reading: {tmp_path}/new, voco_1.png to voco_2.png"
  )
  for name in ("voco_1", "voco_2", "probe"):
    assert_drawn(tmp_path / "new" / f"{name}.png")
  one, two = ((tmp_path / "new" / f"voco_{i}.png").read_bytes() for i in (1, 2))
  assert one != two
  found = json.loads((tmp_path / "new" / "probe.json").read_text())
  assert (found["train_images"], found["test_images"]) == (40, 20)
  # Keys and values of 2 tokens in 2 layers of 2 heads of 8; a width of 16.
  assert found["numbers"] == {"voco": 128, "mean_patch": 16}
  score = found["scores"]["color"]
  # Images are of one color with black dots: random weights keep that.
  assert score["accuracy"]["voco"] > 0.9
  assert score["majority"] == 0.25
  assert f"color: {score['accuracy']['voco']:.1%} from VoCo tokens" in out
  assert found["provenance"]["command"].startswith("python -m vocojax.look")
  assert found["checkpoint"] == str(folder / "voco" / "checkpoints" / "0")


def test_images_of_a_folder(folder, look, tmp_path):
  images = tmp_path / "images"
  images.mkdir()
  for i in range(6):
    shutil.copy(folder / f"{i}.png", images)
  status, out, err = look(
    "voco", f"--out={tmp_path / 'out'}", f"--images={images}"
  )
  assert status == 0, err
  assert out.count("\n") == 1
  found = {path.name for path in (tmp_path / "out").iterdir()}
  assert found == {"voco_1.png", "voco_2.png"}


def test_full_disk(folder, look, tmp_path):
  with disks.mounted(tmp_path / "disk", "2M") as disk:
    fill = disks.fill(disk, 50_000)
    status, out, err = look("voco", f"--out={disk / 'out'}")
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert "No space left on device" in err
    assert not list((disk / "out").iterdir())
    fill.unlink()
    status, out, err = look("voco", f"--out={disk / 'out'}")
    assert status == 0, err


@pytest.mark.parametrize(
  ("phase", "flags", "said"),
  [
    ("full", (), "checkpoints/0: got compressor 'full', expected 'voco', "),
    ("voco", ("--images=/nowhere",), "/nowhere: got no such folder, expected"),
    ("voco", ("--out=~nosuchuser/a",), "~nosuchuser/a: got a user that does"),
    ("voco", ("--out=/dev/null/a",), "/dev/null/a: got Not a directory, "),
  ],
)
def test_mistakes_are_one_line(look, tmp_path, phase, flags, said):
  status, out, err = look(phase, f"--out={tmp_path / 'out'}", *flags)
  assert (status, out) == (2, "")
  assert said in err and err.count("\n") == 1
