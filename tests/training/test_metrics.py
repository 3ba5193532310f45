"""Files of metrics: lines of JSON and TensorBoard's events; see metrics.py."""

import json
import math
import struct

import pytest
from tensorboardX.proto import event_pb2

from tests import disks
from vocojax.errors import DataError, UserError
from vocojax.training.metrics import MetricsWriter


def lines(folder) -> list[dict]:
  found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
  return [{k: v for k, v in line.items() if k != "time"} for line in found]


def events(folder) -> list:
  """What TensorBoard reads: records of a length, its sum, data and its sum."""
  found = []
  for path in sorted((folder / "tensorboard").iterdir()):
    data = path.read_bytes()
    while data:
      (size,) = struct.unpack("Q", data[:8])
      found.append(event_pb2.Event.FromString(data[12 : 12 + size]))
      data = data[16 + size :]
  return found


def test_lines_and_events(tmp_path):
  writer = MetricsWriter(tmp_path, 0)
  writer.write(2, {"loss": 2.5, "bad_records": 1})
  writer.write(4, {"loss": math.nan, "bad_records": 1})
  writer.close()
  assert lines(tmp_path) == [
    {"step": 2, "loss": 2.5, "bad_records": 1},
    {"step": 4, "loss": None, "bad_records": 1},
  ]
  version, start, *scalars = events(tmp_path)
  assert version.file_version == "brain.Event:2"
  assert start.session_log.status == start.session_log.START
  assert start.step == 1  # what an earlier run wrote from here on is hidden
  found = [
    (e.step, v.tag, v.simple_value) for e in scalars for v in e.summary.value
  ]
  assert found == [
    (2, "loss", 2.5),
    (2, "bad_records", 1),
    (4, "bad_records", 1),
  ]


def test_lines_after_the_checkpoint_and_half_a_line_are_dropped(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 2}\n{"step": 4}\n{"step": 6}\n{"st')
  writer = MetricsWriter(tmp_path, 4)
  writer.write(6, {"loss": 1.0})
  writer.close()
  assert lines(tmp_path) == [{"step": 2}, {"step": 4}, {"step": 6, "loss": 1}]
  assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
  ("text", "where", "got"),
  [
    ("{}\n", "line 1: field step", "nothing"),
    ('{"step": 1}\n{"step": "2"}\n', "line 2: field step", "'2'"),
    ('{"step": 1}\n[]\n', "line 2", "[]"),
    ("x\n", "line 1", "Expecting value at line 1, column 1"),
  ],
)
def test_lines_of_something_else(tmp_path, text, where, got):
  path = tmp_path / "metrics.jsonl"
  path.write_text(text)
  with pytest.raises(DataError) as e:
    MetricsWriter(tmp_path, 4)
  assert (e.value.where, e.value.got) == (f"{path} {where}", got)
  assert path.read_text() == text


def test_a_line_is_written_whole_or_not(tmp_path):
  with disks.mounted(tmp_path / "disk", "64k") as disk:
    writer = MetricsWriter(disk, 0)
    fill = disks.fill(disk, leave=4096)
    count = 0
    with pytest.raises(UserError) as e:
      for count in range(1, 200):
        writer.write(count, {"loss": 1.0, "x" * 100: 2.0})
    assert e.value.where == str(disk / "metrics.jsonl")
    assert e.value.got == "No space left on device"
    assert 1 < count < 199
    assert [x["step"] for x in lines(disk)] in (
      list(range(1, count)),
      list(range(1, count + 1)),  # the events were what did not fit
    )
    fill.unlink()
    writer.close()
