import sys
from unittest import mock

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from kepo_jax.reporting import writers


def test_json_lines_hold_plain_values_in_order(tmp_path):
  file = writers.JsonLines(tmp_path / "run" / "metrics.jsonl")
  file.write(1, {"b": np.float32(0.5), "a": float("nan"), "nested": {"x": [np.int32(3), float("inf")]}})
  file.write(2, {"b": 0.1})
  text = (tmp_path / "run" / "metrics.jsonl").read_text()  # flushed line by line: readable while the run goes on
  assert text == '{"step": 1, "b": 0.5, "a": null, "nested": {"x": [3, null]}}\n{"step": 2, "b": 0.1}\n'
  file.close()


def test_a_file_that_is_cut_back_continues_as_if_nothing_had_been_interrupted(tmp_path):
  path = tmp_path / "metrics.jsonl"
  whole, cut = writers.JsonLines(tmp_path / "whole.jsonl"), writers.JsonLines(path)
  for step in range(1, 7):
    whole.write(step, {"x": step / 7, "name": "ü"})
  for step in range(1, 5):
    cut.write(step, {"x": step / 7, "name": "ü"})
    if step == 2:
      cut.flush()
      position = cut.position
  cut.close()
  with path.open("a") as file:
    file.write('{"step": 5, "x": 0.')  # a crash in the middle of a line
  resumed = writers.JsonLines(path, position=position)
  assert [record["step"] for record in resumed.records()] == [1, 2]
  for step in range(3, 7):
    resumed.write(step, {"x": step / 7, "name": "ü"})
  resumed.close()
  assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_file_that_lost_its_end_is_told(tmp_path, said):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "x"')
  file = writers.JsonLines(tmp_path / "metrics.jsonl", position=50)
  file.write(3, {})
  file.close()
  assert [record["step"] for record in writers.read_records(tmp_path / "metrics.jsonl")] == [1, 3]
  assert "has 27 of the 50 bytes that it had: its history has a gap" in said.text


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
  file = writers.JsonLines(tmp_path / "metrics.jsonl")

  def full(descriptor):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr("os.fsync", full)
  with pytest.raises(OSError, match=r"metrics.jsonl could not be written: No space left on device; make room"):
    file.flush()


def test_line_breaks_of_unicode_inside_a_text_are_no_ends_of_lines(tmp_path):
  path = tmp_path / "samples.jsonl"
  texts = ["next\x85line", "line\u2028separator", "paragraph\u2029separator", "form\x0cfeed", "return\r\nfeed"]
  file = writers.JsonLines(path)
  for step, text in enumerate(texts, 1):
    file.write(step, {"completion": text})
  file.close()
  assert path.read_bytes().count(b"\n") == len(texts)
  assert [record["completion"] for record in writers.read_records(path)] == texts
  path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
  with pytest.raises(ValueError, match=r"samples\.jsonl:2 is not JSON"):
    writers.read_records(path)


def events(directory):
  """Events of a TensorBoard folder: records of an 8-byte length, its checksum, the bytes, and theirs."""
  found = []
  for path in sorted(directory.glob("events*")):
    data = path.read_bytes()
    while data:
      size = int.from_bytes(data[:8], "little")
      found.append(event_pb2.Event.FromString(data[12 : 12 + size]))
      data = data[16 + size :]
  return found


def test_tensorboard_gets_every_figure_and_a_resumed_run_none_twice(tmp_path):
  first = writers.TensorBoardSink(tmp_path / "events")
  first.write(2, {"reward/mean": 0.25, "hint/accept_rate@5": 0.5})
  first.write(3, {"reward/mean": 0.5})
  first.close()
  history = [{"step": 2, "reward/mean": 0.25, "hint/accept_rate@5": 0.5, "loss": None}]
  resumed = writers.TensorBoardSink(tmp_path / "events", history=history)
  resumed.write(3, {"reward/mean": 0.75})
  resumed.close()
  points = [(e.step, v.tag, v.simple_value) for e in events(tmp_path / "events") for v in e.summary.value]
  assert points == [(2, "reward/mean", 0.25), (2, "hint/accept_rate_at_5", 0.5), (3, "reward/mean", 0.75)]


@pytest.mark.parametrize(("name", "sink"), [("wandb", writers.WandbSink), ("trackio", writers.TrackioSink)])
def test_optional_sinks_are_imported_only_when_asked_for(monkeypatch, tmp_path, name, sink):
  monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
  with pytest.raises(ValueError, match=f"pip install {name}"):
    sink("project", workdir=str(tmp_path), config={})

  module = mock.Mock()
  monkeypatch.setitem(sys.modules, name, module)
  made = sink("project", workdir=str(tmp_path), config={"seed": 1}, start_step=4)
  made.write(5, {"x": 1.0})
  made.close()
  settings = module.init.call_args.kwargs
  assert settings["project"] == "project" and tmp_path.name in settings["name"]
  assert settings["resume"] == "allow" and settings["config"] == {"seed": 1}
  assert module.init.return_value.method_calls == [mock.call.log({"x": 1.0}, step=5), mock.call.finish()]
