"""Event records survive kills; what is shown."""

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from puna.train.metrics import Display, Events, Recorder, append_event, last_steps, peak_memory_bytes, read_events

RECORD = {"step": 3, "tokens": 30, "loss": 1.5, "tokens_per_s": 10.0, "peak_memory_bytes": 2**21, "lr": 1e-3}


def test_records_come_back_in_order(tmp_path: Path) -> None:
    append_event(tmp_path, {"event": "start", "mesh": "1 x cpu"})
    append_event(tmp_path, {"event": "stop"})
    start, stop = read_events(tmp_path)
    assert (start["event"], start["mesh"], stop["event"]) == ("start", "1 x cpu", "stop")
    assert stop["time"] >= start["time"] > 1.7e9
    assert read_events(tmp_path / "absent") == []


@pytest.mark.parametrize("torn", ['{"event": "st', '{"event": "step"}'])
def test_a_torn_last_line_is_left_out_and_cut_at_the_next_record(torn: str, tmp_path: Path) -> None:
    append_event(tmp_path, {"event": "start"})
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write(torn)
    assert [event["event"] for event in read_events(tmp_path)] == ["start"]
    append_event(tmp_path, {"event": "stop"})
    assert [event["event"] for event in read_events(tmp_path)] == ["start", "stop"]


def test_a_file_that_is_one_torn_line_is_emptied(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text("{")
    assert read_events(tmp_path) == []
    append_event(tmp_path, {"event": "start"})
    assert len(read_events(tmp_path)) == 1


def test_every_record_is_on_disk_at_once(tmp_path: Path) -> None:
    events = Events(tmp_path)
    events.write("step", step=1)
    assert json.loads((tmp_path / "events.jsonl").read_text())["step"] == 1
    events.close()


def test_a_resume_takes_back_the_steps_after_it() -> None:
    lost = [{"event": "step", "step": s, "loss": 0.0} for s in (1, 2, 3)]
    again = [{"event": "resume", "step": 1}, {"event": "step", "step": 2, "loss": 9.0}]
    assert {step: record["loss"] for step, record in last_steps(lost + again).items()} == {1: 0.0, 2: 9.0}


def test_tensorboard_has_every_number(tmp_path: Path) -> None:
    with Recorder(tmp_path, speaks=True) as record:
        record.begin(tmp_path, 0, 0, 100, tensorboard=True)
        record.step(RECORD)
        record.evaluation(3, "heldout", {"loss": 2.5})
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert board.Scalars("train/loss")[0].value == 1.5
    assert board.Scalars("train/lr")[0].step == 3
    assert board.Scalars("heldout/loss")[0].value == 2.5
    step, evaluation = read_events(tmp_path)
    assert step["loss"] == 1.5
    assert (evaluation["event"], evaluation["step"], evaluation["split"], evaluation["loss"]) == (
        "eval",
        3,
        "heldout",
        2.5,
    )


def test_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Recorder(tmp_path, speaks=False) as record:
        record.begin(tmp_path, 0, 0, None, tensorboard=True)
        record.say("hello")
        record.step(RECORD)
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr() == ("", "")


def test_without_a_terminal_lines_are_few(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("puna.train.metrics.time.monotonic", lambda: now[0])
    display = Display(100, 0)
    for now[0] in (100.0, 101.0, 109.9, 110.0, 111.0):
        display.show(RECORD)
    display.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["step 3  tokens 30 of 100  loss 1.5000  10 tokens/s  lr 1.00e-03  2 MiB"] * 2


def test_peak_memory_is_of_this_process() -> None:
    assert 2**25 < peak_memory_bytes() < 2**40
