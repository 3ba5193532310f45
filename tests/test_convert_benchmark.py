"""The benchmark of the converter measures what it says. Next: benchmarks/."""

import pathlib

import numpy as np
import pytest
import safetensors
import torch
import transformers

from benchmarks import convert_7b, random_llava
from vocojax.data import tokenizer as tokenizer_lib

TINY = random_llava.SIZES["tiny"]


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("llava") / "model"
  random_llava.write(folder, TINY)
  return folder


def _tensors(folder):
  for path in sorted(folder.glob("*.safetensors")):
    with safetensors.safe_open(path, "torch") as file:
      for name in file.keys():
        yield name, file.get_tensor(name)


def test_transformers_reads_the_model(llava):
  model, info = transformers.LlavaForConditionalGeneration.from_pretrained(
    llava, output_loading_info=True
  )
  assert not any(info.values()), info
  assert len(list(llava.glob("*.safetensors"))) > 1
  assert model.dtype == torch.bfloat16
  assert model.get_input_embeddings().weight.shape == (464, 32)
  assert model.config.image_token_id == 400
  image = torch.zeros(1, 3, 28, 28, dtype=torch.bfloat16)
  ids = torch.tensor([[1, *[400] * 4, 10, 20]])
  logits = model(input_ids=ids, pixel_values=image).logits
  assert logits.shape == (1, 7, 464)
  assert logits.isfinite().all()


def test_values_are_normal_and_differ(llava):
  tensors = dict(_tensors(llava))
  values = torch.cat([x.flatten().float() for x in tensors.values()]).numpy()
  assert abs(values.mean()) < 1e-3
  np.testing.assert_allclose(values.std(), 0.02, rtol=0.02)
  assert abs(values).max() > 0.06
  matrices = [x.flatten(1) for x in tensors.values() if x.ndim > 1]
  rows = [tuple(row) for x in matrices for row in x.tolist()]
  assert len(set(rows)) == len(rows)


def test_tokens(llava):
  words = transformers.AutoTokenizer.from_pretrained(llava)
  assert words.convert_tokens_to_ids(["<image>", "<pad>"]) == [400, 401]
  ids = words("Hellö <image>\nYou</s>").input_ids
  assert ids[-1] == 2 and ids.count(400) == 1 and 0 not in ids
  assert words.decode(words("Hellö  there").input_ids) == "Hellö  there"
  # As the prompts need it.
  assert tokenizer_lib.load_tokenizer(llava).bos_token_id == 1


def test_a_whole_model_is_kept(tmp_path):
  def times():
    return {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.safetensors")}

  random_llava.write(tmp_path, TINY)
  before = times()
  random_llava.write(tmp_path, TINY)
  assert times() == before
  (tmp_path / random_llava.INDEX).unlink()  # of a run that was stopped
  random_llava.write(tmp_path, TINY)
  assert all(times()[path] > before[path] for path in before)


MEMORY = """
import mmap, sys, time
with open(sys.argv[1], "rb") as f:
  mapped = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)
touched = sum(mapped[::4096])
block = bytearray(b"1") * (200 << 20)
time.sleep(0.2)
del block
time.sleep(0.2)
print("a line", touched)
"""


def test_memory_counts_mapped_files(tmp_path):
  path = tmp_path / "file"
  path.write_bytes(bytes(100 << 20))
  usage = convert_7b.run("-c", MEMORY, str(path))
  assert usage.output == "a line 0\n"
  assert 300 << 20 < usage.peak_bytes < 340 << 20
  assert 200 << 20 < usage.anonymous_bytes < 240 << 20
  assert 0.4 < usage.seconds


def test_copy(llava, tmp_path):
  convert_7b.forget(llava)
  assert convert_7b.copy(llava, tmp_path / "copy") > 0
  for path in convert_7b.files(llava):
    assert (tmp_path / "copy" / path.name).read_bytes() == path.read_bytes()
  assert convert_7b.num_bytes(tmp_path / "copy") == sum(
    p.stat().st_size for p in llava.iterdir()
  )


def test_measure_and_report(llava, tmp_path):
  (tmp_path / "source").symlink_to(llava)
  (tmp_path / "scratch" / "checkpoint").mkdir(parents=True)  # of a stopped run
  result = convert_7b.measure(tmp_path, "tiny", None, repeats=1)
  assert [p.name for p in tmp_path.iterdir()] == ["source"]
  weights = sum(x.nbytes for _, x in _tensors(llava))
  assert weights <= result.source_bytes
  assert 0.9 * weights <= result.checkpoint_bytes
  assert result.conversions[0].seconds > 0
  lines = convert_7b.report(result).splitlines()
  print("\n" + "\n".join(lines))
  assert len(lines) == 9
  assert lines[2].count("|") == lines[3].count("|") == lines[0].count("|") == 7
  assert "89 tensors of layout llava_hf" in lines[-1]


def test_report_takes_medians():
  def usage(seconds, peak):
    return convert_7b.Usage(seconds, peak << 30, 1 << 30, "")

  result = convert_7b.Result(
    source_bytes=10**9,
    checkpoint_bytes=10**9,
    copy_seconds=[2.0, 1.0, 4.0],
    conversions=[usage(4.0, 3), usage(4.0, 2), usage(4.0, 4)],
    plan=usage(1.0, 1),
  )
  lines = convert_7b.report(result).splitlines()
  assert lines[2] == "| 1 | 500 | 250 | 0.50 | 3.00 | 1.00 |"
  assert lines[5] == "| median | 500 | 250 | 0.50 | 3.00 | 1.00 |"


def test_a_failure_is_not_a_figure(tmp_path):
  with pytest.raises(Exception, match="exit status 3"):
    convert_7b.run("-c", "raise SystemExit(3)")
