"""The inference benchmarks compare equals, and run. Next: benchmarks/."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import decode, efficiency

TINY = efficiency.SIZES["small"] | {
  "model.llm.vocab_size": 512,
  "model.llm.hidden_size": 32,
  "model.llm.intermediate_size": 48,
  "model.llm.num_hidden_layers": 2,
  "model.llm.num_attention_heads": 4,
  "model.llm.num_key_value_heads": 2,
  "model.llm.head_dim": 8,
  "model.llm.initializer_range": 0.3,
  "model.vision.initializer_range": 0.3,
  "model.vision.image_size": 28,
  "model.vision.hidden_size": 16,
  "model.vision.intermediate_size": 24,
  "model.vision.num_hidden_layers": 3,
  "model.vision.num_attention_heads": 2,
  "model.compressor.num_voco_tokens": 2,
}


@pytest.fixture(scope="module")
def setting():
  return efficiency.Setting(TINY)


@pytest.fixture(autouse=True)
def one_thread():
  before = torch.get_num_threads()
  torch.set_num_threads(1)
  yield
  torch.set_num_threads(before)


def test_hugging_face_gives_the_same_tokens(setting):
  reference = decode.HuggingFace(setting)
  theirs = reference.run(decode.prompts(setting, 3), 12)
  ours = decode.Ours(setting, 3).run(3, 12)
  np.testing.assert_array_equal(ours, theirs)
  assert len(np.unique(ours)) > 6  # no constant answers
  # As the released code was patched: text sees all of the image.
  stream = reference._model.stream
  everything = tuple(range(stream.length))
  reference._model.stream = dataclasses.replace(stream, visible=everything)
  broken = reference.run(decode.prompts(setting, 3), 12)
  assert np.mean(broken == ours) < 0.5


def test_operations_of_one_question():
  """Counted by hand: 2 layers, width 32, 4 heads over 2 of 8, MLP of 48."""
  config = efficiency.make_config(TINY).model
  token = 2 * 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48)
  pair = 4 * 2 * 32
  text, new = 5, efficiency.ANSWER
  reads = text + new - 1  # the last new token is not read
  stream, cached = 7, 2
  vision = (
    2 * 4 * 588 * 16  # 4 patches of 14 x 14 x 3
    + 2 * (5 * 2 * (4 * 16 * 16 + 2 * 16 * 24) + 4 * 5 * 5 * 16)
    + 2 * 4 * (16 * 32 + 32 * 32)
  )
  image = vision + stream * token + 28 * pair
  question = reads * token + (reads * cached + 210) * pair + new * 2 * 32 * 512
  assert reads * (reads + 1) // 2 == 210

  def counted(way, questions):
    return efficiency.operations(config, way, text, questions, stream, cached)

  assert counted("voco", 1) == image + question
  assert counted("voco", 10) == image + 10 * question
  assert counted("none", 10) == 10 * (image + question)


def test_whole_run(monkeypatch, tmp_path):
  monkeypatch.setattr(efficiency, "TEXT_LENGTHS", (6,))
  measured = efficiency.measure("tiny", TINY, 1)
  assert measured.cached_tokens == {"none": 0, "full": 5, "voco": 2}
  # Keys and values: 2 layers of 2 heads of 8, in float32.
  assert measured.cached_bytes["voco"] == 2 * 2 * 2 * 2 * 8 * 4
  for row in measured.rows:
    times = [row.prefill, row.first, row.ten]
    assert all(t > 0 for t in times)
  row = dataclasses.replace(measured.row("voco", 6), ten=5.0)
  once = measured.vision + measured.compress["voco"]
  hundred = measured.seconds(row, 100)
  assert hundred == pytest.approx(once + 10 * (5.0 - once))
  no_cache = dataclasses.replace(measured.row("none", 6), ten=5.0)
  assert measured.seconds(no_cache, 100) == pytest.approx(50.0)
  assert "| 6 | VoCo cache |" in efficiency.report([measured])
  kept = {(r["size"], r["way"]): r for r in efficiency.json_rows([measured])}
  # Of a question alone where the image is kept, of both where it is not.
  voco, none = measured.row("voco", 6), measured.row("none", 6)
  decoded = (efficiency.ANSWER - 1) * voco.decode
  row = kept["tiny", "voco"]
  assert row["seconds"] == pytest.approx(voco.prefill + decoded)
  assert kept["tiny", "none"]["seconds"] == none.first
  assert (row["cached_tokens"], row["cached_bytes"]) == (2, 512)
  whole = efficiency.operations(measured.config.model, "none", 6, 1, 5, 5)
  assert kept["tiny", "none"]["operations"] == whole > row["operations"]
  # The paper's 0.525 MB, and 302 MB with <s>.
  assert kept["7B", "voco"]["cached_bytes"] == 524_288
  assert kept["7B", "full"]["cached_bytes"] == 577 * 524_288
  assert kept["7B", "full"]["seconds"] is None
  efficiency.plot([measured], str(tmp_path / "times.png"))
  with Image.open(tmp_path / "times.png") as picture:
    assert picture.width > 400
