"""TensorBoard has what the monitor saw."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from puna.diagnosis.records import STATES, watched
from puna.report import read_events
from puna.train.metrics import Recorder


@pytest.fixture(scope="module")
def board(stalled, tmp_path_factory):
    folder = tmp_path_factory.mktemp("board")
    with Recorder(folder, speaks=True) as recorder:
        recorder.begin(folder, 0, 0, None, tensorboard=True)
        for event in read_events(stalled / "events.jsonl", []):
            if event["event"].startswith("health"):
                recorder.health(event)
    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"histograms": 0, "scalars": 0})
    return board.Reload()


def test_each_layer_has_its_curves(board, stalled):
    found = watched(read_events(stalled / "events.jsonl", []))
    for key in ("u_rms", "surprise", "stall"):
        for layer, line in found.worst(key).items():
            points = [(point.step, point.value) for point in board.Scalars(f"health/{key}/{layer}")]
            assert points == [(step, pytest.approx(value)) for step, value in line]


def test_the_state_is_a_curve(board, stalled):
    changes = watched(read_events(stalled / "events.jsonl", [])).changes
    points = [(point.step, STATES[int(point.value)]) for point in board.Scalars("health/state")]
    assert points == [(change.step, change.state) for change in changes]


def test_histograms_keep_their_counts(board, stalled):
    records = watched(read_events(stalled / "events.jsonl", [])).histograms
    drawn = board.Histograms("health/updates/layer 0")
    assert [point.step for point in drawn] == [record["step"] for record in records]
    for point, record in zip(drawn, records, strict=True):
        counts = record["layers"]["layer 0"]
        assert point.histogram_value.bucket == counts
        assert point.histogram_value.num == sum(counts)
        assert point.histogram_value.bucket_limit[20] == pytest.approx(2 / 41)  # the middle bin is around 0


def test_two_optimizers_have_layers_of_their_own(tmp_path):
    with Recorder(tmp_path, speaks=True) as recorder:
        recorder.begin(tmp_path, 0, 0, None, tensorboard=True)
        for of, tensor in (("adamw", "head"), ("second", "layer 0")):
            recorder.health({"event": "health_start", "step": 1, "of": of, "tensors": {tensor: tensor}})
        for of, tensor in (("adamw", "head"), ("second", "layer 0")):
            values = {tensor: {"surprise": 2.0}}
            recorder.health({"event": "health", "step": 5, "of": of, "tensors": values})
            recorder.health({"event": "health_change", "step": 5, "of": of, "state": "watch", "before": "calm"})
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    names = {"health/surprise/head", "health/surprise/layer 0", "health/state adamw", "health/state second"}
    assert set(board.Tags()["scalars"]) == names
