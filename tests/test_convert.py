"""`python -m vocojax.convert` as a user runs it, and what stops it.

Read next: `weights/published.py`.
"""

import json
import re
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
from vocojax.errors import WeightsError
from vocojax.training import checkpoint
from vocojax.weights import check, into
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

  # --check notices one value that is wrong.
  chunk = out / "checkpoints" / "0" / "params" / "llm.norm.scale" / "0"
  values = np.fromfile(chunk, np.uint8)
  values[1] ^= 0x80  # the sign of the first
  values.tofile(chunk)
  with pytest.raises(WeightsError, match="logits differ from those of"):
    check.compare(into.make_plan(Request(source=str(source))), str(out))


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
  "arguments, message",
  [
    ([], "--source, --llm: expected one of them"),
    (["--source=a", "--llm=b"], "--source, --llm: expected one of them"),
    (["--source=nowhere", "--out=x"], "nowhere: no such folder"),
    (["--source=MODELS/llava_hf"], "--out: missing"),
    (["--source=x", "--to=original", "--llm=y"], "--source, --llm"),
    (
      ["--source=x", "--to=original", "--out=y", "--vision=z"],
      "--vision: says nothing with --to",
    ),
    (
      [*_PARTS, "--out=x", "--check"],
      "--check: projector/linear_1/bias is drawn at random",
    ),
    (
      ["--source=MODELS/llava_hf", "--to=original", "--out=x"],
      "no folder 'checkpoints' in it",
    ),
    (["--source=MODELS/llava_hf", "--out=MODELS/taken"], "exists; choose"),
  ],
)
def test_mistakes(program, models, arguments, message):
  (models / "taken" / "checkpoints").mkdir(parents=True, exist_ok=True)
  arguments = [a.replace("MODELS", str(models)) for a in arguments]
  status, _, err = program.run(*arguments)
  assert status == 2
  assert message in one_line(err)


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


def wait_for_chunks(process, folder):
  """Until the conversion is in the middle of its work."""
  while not list(folder.glob("*.incomplete-*/params/llm.layers.mlp.*/0.*")):
    assert process.poll() is None, process.communicate()
    time.sleep(0.01)


def test_ctrl_c(big, tmp_path):
  with runs.interruptible():
    process = runs.start(
      "vocojax.convert", f"--source={big}", f"--out={tmp_path / 'out'}"
    )
  wait_for_chunks(process, tmp_path)
  process.send_signal(signal.SIGINT)
  _, err = process.communicate(timeout=60)
  assert process.returncode == 130
  assert "error: interrupted; nothing of " in one_line(err)
  assert left(tmp_path) == []


def test_killed(big, tmp_path):
  """What a kill leaves says that it is incomplete, and is no checkpoint."""
  process = runs.start(
    "vocojax.convert", f"--source={big}", f"--out={tmp_path / 'out'}"
  )
  wait_for_chunks(process, tmp_path)
  process.kill()
  process.communicate()
  (name,) = left(tmp_path)
  assert name == f"out.incomplete-{process.pid}"
  with pytest.raises(checkpoint.CheckpointError, match="no folder 'checkp"):
    checkpoint.find(str(tmp_path / name))


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
  assert "/out: cannot be written (File too large); nothing of " in one_line(
    done.stderr
  )
  assert left(tmp_path) == []
