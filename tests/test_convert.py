"""`python -m vocojax.convert` as a user runs it, and what stops it.

Read next: `weights/published.py`.
"""

import json
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import transformers

from tests import runs
from tests.weights import published
from vocojax.errors import CheckpointError, WeightsError
from vocojax.training import checkpoint, checksums
from vocojax.weights import check, into, stream
from vocojax.weights.source import Request


@pytest.fixture(scope="module")
def program(tmp_path_factory):
  program = runs.Forks(tmp_path_factory.mktemp("forks"), "vocojax.convert")
  yield program
  program.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  folder = tmp_path_factory.mktemp("models")
  published.llava_hf(folder / "llava_hf")
  published.original(folder / "original", dtype=torch.bfloat16)
  published.parts(folder / "parts")
  return folder


def one_line(err: str) -> str:
  """The message of a failure, which must be one line."""
  assert re.fullmatch(r"error: [^\n]*\n", err), err
  print("\n" + err, end="")
  return err


def left(folder) -> list[str]:
  """What a conversion left in the folder it was to write to."""
  return sorted(p.name for p in folder.iterdir())


def test_there_and_back_with_check(program, models, tmp_path):
  source, out = models / "original", tmp_path / "out"
  status, text, err = program.run(
    f"--source={source}", f"--out={out}", "--num_voco_tokens=2", "--check"
  )
  assert (status, err) == (0, ""), err
  assert "80 tensors -> 39 parameters" in text
  assert re.search(r"differ by \d\.\de-0[5-9] of the largest", text), text
  loaded = checkpoint.load(str(out))
  assert loaded.step == 0
  config = loaded.config
  assert config.model.compressor.num_voco_tokens == 2
  assert (config.prompt.layout, config.data.pad_to_square) == ("voco_v1", True)
  assert (config.model.dtype, config.model.param_dtype) == ("bfloat16",) * 2

  back = tmp_path / "back"
  status, _, err = program.run(
    f"--source={out}", "--to=llava_hf", f"--out={back}"
  )
  assert (status, err) == (0, ""), err
  readme = (back / "README.md").read_text()
  assert "2 tokens `<voco>` (id 31)" in readme
  assert "not even `<s>`" in readme

  chunk = out / "checkpoints" / "0" / "params" / "llm.norm.scale" / "0"
  values = np.fromfile(chunk, np.uint8)
  values[1] ^= 0x80  # the sign of the first
  values.tofile(chunk)
  plan = into.make_plan(Request(source=str(source)))
  with pytest.raises(CheckpointError) as e:
    check.compare(plan, str(out))
  assert (e.value.where, e.value.got) == (str(chunk), "damaged content")
  # --check notices one value that was wrong from the start.
  checksums.write(out / "checkpoints" / "0", 0)
  with pytest.raises(WeightsError) as e:
    check.compare(plan, str(out))
  assert e.value.where == str(out)
  assert e.value.got.startswith(f"logits that differ from those of {source}")


def test_llava_hf(program, models, tmp_path):
  out = tmp_path / "out"
  status, _, err = program.run(
    f"--source={models / 'llava_hf'}", f"--out={out}"
  )
  assert (status, err) == (0, "")
  config = checkpoint.load(str(out)).config
  assert config.model.compressor.name == "full"
  assert config.prompt.layout == "vicuna_v1"
  assert not config.data.pad_to_square
  assert config.model.dtype == config.model.param_dtype == "float32"
  assert left(tmp_path) == ["out"]


def test_dry_run(program, models, tmp_path):
  parts = models / "parts"
  status, text, err = program.run(
    f"--llm={parts / 'llm'}", f"--vision={parts / 'clip'}", "--dry_run"
  )
  assert (status, err) == (0, "")
  assert re.search(
    r"^model\.layers\.\*\.mlp\.up_proj\.weight +x 2 +\(24, 16\) +float32 +-> "
    r"llm/layers/mlp/up_proj/kernel +\(2, 16, 24\) +float32$",
    text,
    re.MULTILINE,
  ), text
  assert re.search(
    r"^text_projection\.weight +joins CLIP's", text, re.MULTILINE
  )
  assert "llm/embed_tokens/embedding, the row of <voco>" in text
  assert "projector/linear_1/kernel" in text
  assert left(tmp_path) == []


_PARTS = ("--llm=MODELS/parts/llm", "--vision=MODELS/parts/clip")


@pytest.mark.parametrize(
  "arguments, where, got",
  [
    ([], "--source, --llm", "neither"),
    (["--source=a", "--llm=b"], "--source, --llm", "both"),
    (["--source=nowhere", "--out=x"], "--source=nowhere", "no such folder"),
    (["--source=~nosuchuser", "--out=x"], "~nosuchuser", "a user that does"),
    (
      ["--source=MODELS/llava_hf", "--out=~nosuchuser"],
      "~nosuchuser",
      "a user",
    ),
    (["--source=MODELS/llava_hf"], "--out", "nothing"),
    (["--source=x", "--to=original", "--llm=y"], "--source, --llm", "both"),
    (
      ["--source=x", "--to=original", "--out=y", "--vision=z"],
      "--vision",
      "'z' with --to",
    ),
    (
      [*_PARTS, "--out=x", "--check"],
      "--check",
      "projector/linear_1/bias, which is drawn at random",
    ),
    (
      ["--source=MODELS/llava_hf", "--out=MODELS/taken"],
      "MODELS/taken/checkpoints",
      "a path that exists",
    ),
    (
      ["--source=MODELS/llava_hf", "--out=/dev/null/x"],
      "/dev/null/x",
      "Not a d",
    ),
    (["--source=MODELS/llava_hf", "--out=/proc/x"], "/proc/x", "No such file"),
  ],
)
def test_mistakes(program, models, arguments, where, got):
  (models / "taken" / "checkpoints" / "0").mkdir(parents=True, exist_ok=True)
  arguments = [a.replace("MODELS", str(models)) for a in arguments]
  status, _, err = program.run(*arguments)
  assert status == 2
  where = where.replace("MODELS", str(models))
  assert one_line(err).startswith(f"error: {where}: got {got}")


def test_source_that_is_no_checkpoint(program, models):
  source = models / "llava_hf"
  status, _, err = program.run(f"--source={source}", "--to=original", "--out=x")
  assert status == 2
  assert str(source) in one_line(err) and "checkpoints" in err


def test_guess(program, models, tmp_path):
  """A spare row that is taken for <voco> is called a guess."""
  source = shutil.copytree(models / "original", tmp_path / "source")
  published.tokenizer().save_pretrained(source)
  status, text, err = program.run(f"--source={source}", f"--out={tmp_path}/out")
  assert (status, err) == (0, "")
  first, second = text.splitlines()
  assert first.startswith(f"{tmp_path}/out: 80 tensors")
  assert second.startswith("a guess: row 29 of the embedding")


@pytest.fixture(scope="module")
def big(tmp_path_factory):
  """A llava-hf model of 1 GB of zeros, which take no room on the disk."""
  folder = tmp_path_factory.mktemp("big")
  published.llava_hf(folder)
  config = transformers.LlavaConfig.from_pretrained(folder)
  config.text_config.intermediate_size = 2**22
  config.save_pretrained(folder)
  with torch.device("meta"):
    model = transformers.LlavaForConditionalGeneration(config)
  header, size = {}, 0
  for name, x in model.state_dict().items():
    nbytes = 4 * x.numel()
    header[published.older(name)] = {
      "dtype": "F32",
      "shape": list(x.shape),
      "data_offsets": [size, size + nbytes],
    }
    size += nbytes
  content = json.dumps(header).encode()
  content += b" " * (-len(content) % 8)
  with open(folder / "model.safetensors", "wb") as f:
    f.write(len(content).to_bytes(8, "little") + content)
    f.truncate(f.tell() + size)
  return folder


@pytest.fixture(scope="module")
def big_checkpoint(big, tmp_path_factory):
  """The same as a checkpoint; chunks that are not there are zeros, too."""
  folder = tmp_path_factory.mktemp("big_checkpoint")
  step = folder / "checkpoints" / "0"
  step.mkdir(parents=True)
  stream._write_metadata(into.make_plan(Request(source=str(big))), step)
  checksums.write(step, 0)
  return folder


@pytest.fixture(params=["in", "out"])
def way(request, big, big_checkpoint):
  """Arguments of a conversion, and files that are there in its middle."""
  if request.param == "in":
    return [f"--source={big}"], "params/llm.layers.mlp.*/0.*"
  flags = [f"--source={big_checkpoint}", "--to=llava_hf"]
  return flags, "model.safetensors"


def start(way, out):
  """A conversion that is in the middle of its work."""
  flags, files = way
  with runs.interruptible():
    process = runs.start("vocojax.convert", *flags, f"--out={out}")
  while not list(out.parent.glob(f"{out.name}.incomplete-*/{files}")):
    assert process.poll() is None, process.communicate()
    time.sleep(0.01)
  return process


@pytest.mark.parametrize(
  "number, status, why",
  [
    (signal.SIGINT, 130, "interrupted"),
    (signal.SIGTERM, 143, "stopped by SIGTERM"),
  ],
)
def test_signal(way, tmp_path, number, status, why):
  out = tmp_path / "out"
  process = start(way, out)
  process.send_signal(number)
  text, err = process.communicate(timeout=60)
  assert (process.returncode, text) == (status, "")
  assert one_line(err) == f"error: {why}; nothing of {out} is left\n"
  assert left(tmp_path) == []


def test_signal_while_metadata_are_written(big, tmp_path):
  """Orbax runs threads of its own then."""
  with runs.interruptible():
    process = runs.start(
      "vocojax.convert", f"--source={big}", f"--out={tmp_path / 'out'}"
    )
  while not list(tmp_path.glob("*.incomplete-*/params*")):
    assert process.poll() is None, process.communicate()
  process.terminate()
  _, err = process.communicate(timeout=60)
  assert process.returncode == 143
  assert "error: stopped by SIGTERM; nothing of" in one_line(err)
  assert left(tmp_path) == []


def test_killed(program, models, way, tmp_path):
  """What a kill leaves is no checkpoint, and the next run removes it."""
  out = tmp_path / "out"
  process = start(way, out)
  process.kill()
  process.communicate()
  (name,) = left(tmp_path)
  assert name == f"out.incomplete-{process.pid}"
  with pytest.raises(checkpoint.CheckpointError):
    checkpoint.find(str(tmp_path / name))

  status, _, err = program.run(
    f"--source={models / 'llava_hf'}", f"--out={out}"
  )
  assert status == 0
  assert err == (
    f"{tmp_path / name}: removed, as the process that wrote it is dead\n"
  )
  assert left(tmp_path) == ["out"]
  assert checkpoint.load(str(out)).step == 0


def test_what_others_may_still_write(program, models, big, tmp_path):
  """A process that lives, and one of another machine."""
  out = tmp_path / "out"
  process = start(([f"--source={big}"], "params/llm.layers.mlp.*/0.*"), out)
  process.send_signal(signal.SIGSTOP)
  mine = f"out.incomplete-{process.pid}"
  source = f"--source={models / 'llava_hf'}"
  status, _, err = program.run(source, f"--out={out}")
  assert status == 0
  assert err.startswith(f"{tmp_path / mine}: left as it is")
  assert left(tmp_path) == ["out", mine]
  process.kill()
  process.communicate()

  # It is dead; but one of the same number may live elsewhere.
  writer = tmp_path / mine / ".writer"
  host = writer.read_text()
  writer.write_text(f"not-{host}")
  shutil.rmtree(out)
  status, _, err = program.run(source, f"--out={out}")
  assert (status, left(tmp_path)) == (0, ["out", mine])
  assert err.startswith(f"{tmp_path / mine}: left as it is")

  writer.write_text(host)
  shutil.rmtree(out)
  status, _, err = program.run(source, f"--out={out}")
  assert (status, left(tmp_path)) == (0, ["out"])


def test_full_disk(big, tmp_path):
  """Stands in for it: no file may grow above 1 MB."""
  program = [sys.executable, "-m", "vocojax.convert"]
  flags = [f"--source={big}", f"--out={tmp_path / 'out'}"]
  done = subprocess.run(
    ["bash", "-c", 'ulimit -f 1024; exec "$@"', "bash", *program, *flags],
    cwd=runs.ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2
  assert one_line(done.stderr).startswith(
    f"error: {tmp_path / 'out'}: got File too large, expected room to write"
  )
  assert left(tmp_path) == []
