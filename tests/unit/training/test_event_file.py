"""TensorBoard's files as TensorBoard's own reader has them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto import event_pb2

from raymix.errors import RecipeError
from raymix.training.run.event_file import EventFileWriter
from raymix.training.run.recorder import Recorder
from raymix.training.run.rundir import RunDirectory

FULL = Path("/dev/full")


def events(file: Path) -> Iterator[Any]:
    """Yield the events of a TFRecord file: length, its CRC, data, its CRC."""
    data = file.read_bytes()
    while data:
        (size,) = struct.unpack_from("<Q", data)
        yield event_pb2.Event.FromString(data[12 : 12 + size])
        data = data[16 + size :]


def test_scalars_are_read_back(tmp_path: Path) -> None:
    board = EventFileWriter(tmp_path, start_step=0)
    for step in (1, 2):
        board.scalar("train/loss", 1.5 * step, step)
    board.close()
    first, *rest = events(next(tmp_path.glob("events.out.tfevents.*")))
    assert first.file_version == "brain.Event:2"
    assert [(e.step, e.summary.value[0].tag) for e in rest] == [
        (1, "train/loss"),
        (2, "train/loss"),
    ]
    assert [e.summary.value[0].simple_value for e in rest] == [1.5, 3.0]


def test_a_run_that_goes_on_voids_what_it_will_repeat(tmp_path: Path) -> None:
    EventFileWriter(tmp_path, start_step=7).close()
    _, begun = events(next(tmp_path.glob("events.out.tfevents.*")))
    assert (begun.step, begun.session_log.status) == (8, event_pb2.SessionLog.START)


@pytest.mark.skipif(not FULL.exists(), reason="needs a device that is always full")
def test_a_full_disk_is_an_error_and_not_a_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = EventFileWriter(tmp_path / "tensorboard", start_step=0)
    recorder = Recorder(RunDirectory(tmp_path), trackers=[board])
    records = board._writer._py_recordio_writer
    monkeypatch.setattr(records, "_writer", FULL.open("wb", buffering=0))
    with pytest.raises(RecipeError, match="the disk is full"):
        recorder.probe(1, 0.5)
