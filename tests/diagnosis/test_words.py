"""What a diagnosis says, of real runs and of records that nobody would wish for."""

import random

import pytest

from puna.diagnosis.records import watched
from puna.diagnosis.words import FAMILIES, MEANING, REMEDIES, diagnose, loss_moves, require
from puna.errors import DataError
from puna.report import read_events

STALLED = {"embedding", "layer 0", "layer 1"}
START = {"event": "health_start", "step": 0, "tensors": {"embed": "embedding", "a": "layer 0", "b": "layer 1"}}


def read(folder):
    return watched(read_events(folder / "events.jsonl", []))


def change(step, state, before="calm", **evidence):
    one = {"tensor": "a", "layer": "layer 0", "rule": "burst", "statistic": "surprise", "value": 12.5, "threshold": 10}
    return {"event": "health_change", "step": step, "state": state, "before": before, "evidence": [one | evidence]}


def sample(step, **values):
    return {"event": "health", "step": step, "state": "calm", "tensors": {"a": values}}


def test_a_run_that_stalled_is_told_from_its_first_layer_on(stalled):
    diagnosis = diagnose(read(stalled))
    (before, stall), (turn, whole), (_, tensor) = diagnosis.evidence
    assert diagnosis.state == "alarm"
    assert (before.state, stall.statistic, turn.step, whole.tensor) == ("watch", "stall", 101, "")
    assert tensor.layer in STALLED
    assert "Alarm at step 101 of 150, first in " in diagnosis.headline
    assert {layer for layer, _ in diagnosis.layers} == STALLED
    assert diagnosis.meaning[:2] == [MEANING["stall"], MEANING["burst"]]
    assert diagnosis.remedies[0].startswith("Look: hold step 101 against the data")
    assert any("A larger ε makes it worse" in sentence for sentence in diagnosis.remedies)


def test_a_calm_run_needs_nothing():
    diagnosis = diagnose(watched([START, sample(1), sample(120)]))
    assert diagnosis.headline == "Calm over 120 steps: no rule was met."
    assert list(diagnosis.parts()) == []


def test_a_run_without_trouble_has_no_alarm(quiet):
    diagnosis = diagnose(read(quiet))
    assert diagnosis.state in ("calm", "watch")
    assert "alarm;" not in diagnosis.headline


def test_watch_is_no_alarm():
    stall = {"rule": "stall", "statistic": "stall", "value": 0.3, "threshold": 10}
    diagnosis = diagnose(watched([START, sample(1), change(50, "watch", **stall), change(90, "calm", "watch")]))
    assert diagnosis.headline == (
        "On watch at step 50 of 90, first in layer 0; once in all, calm now, and never an alarm."
    )
    assert diagnosis.spells == [("watch", 50, 90)]
    assert dict(diagnosis.parts())["What came first"] == [
        "Step 50, watch: layer 0 (a), stall ratio √v̂ ÷ ε 0.3, below 10 (rule stall)."
    ]
    assert diagnosis.meaning == [MEANING["stall"]]


def test_every_family_has_words_and_a_remedy():
    for statistic, family in FAMILIES.items():
        diagnosis = diagnose(watched([START, change(5, "alarm", statistic=statistic)]))
        assert diagnosis.meaning == [MEANING[family]]
        assert len(diagnosis.remedies) >= 2
    assert {family for causes, _ in REMEDIES for family in causes} == set(MEANING)


def test_evidence_of_the_whole_run_and_of_an_unknown_rule():
    whole = change(7, "alarm", tensor="", layer="", rule="loss", statistic="loss_z", value=None)
    diagnosis = diagnose(watched([START, whole]))
    assert dict(diagnosis.parts())["What came first"] == [
        "Step 7, alarm: the run, deviation of the loss not finite (rule loss)."
    ]
    assert diagnosis.layers == []
    assert "first in" not in diagnosis.headline
    unknown = diagnose(watched([START, change(7, "alarm", statistic="tea_leaves")]))
    assert unknown.meaning == []
    assert "tea_leaves 12.5, above 10" in dict(unknown.parts())["What came first"][0]


def test_a_resume_takes_back_what_came_after_it_and_a_roll_back_keeps_the_story():
    lived = [START, sample(90), change(100, "alarm"), sample(120, u_rms=1.0)]
    resumed = watched([*lived, {"event": "resume", "step": 95}, sample(120, u_rms=0.2)])
    assert resumed.changes == []
    assert resumed.worst("u_rms") == {"layer 0": [(120, 0.2)]}
    rolled = watched([*lived, {"event": "rollback", "step": 95}, sample(96, u_rms=0.2)])
    assert [change.step for change in rolled.changes] == [100]
    assert rolled.worst("u_rms") == {"layer 0": [(96, 0.2)]}


def test_actions_and_the_end_of_the_watch_are_told():
    act = {
        "event": "health_action", "step": 241, "level": 2, "action": "reset", "tensor": "embed", "before": 1.0,
        "after": 0.02, "reason": "surprise 5e+07 above 10",
    }  # fmt: skip
    off = {"event": "health_off", "step": 250, "reason": "ValueError: no such tensor"}
    diagnosis = diagnose(watched([{"event": "start"}, START, sample(1), change(241, "alarm"), act, off]))
    assert diagnosis.actions == ["Step 241, level 2: reset of embed from 1 to 0.02; surprise 5e+07 above 10."]
    assert diagnosis.notes[0] == (
        "The monitor switched itself off: ValueError: no such tensor. What came after was not watched."
    )
    assert "No end is recorded: it is going on, or was killed. Its newest record is of step 241." in diagnosis.notes
    ended = diagnose(watched([{"event": "start"}, START, sample(9), {"event": "stop", "reason": "a signal"}]))
    assert ended.notes == ["The run stopped: a signal."]


@pytest.mark.parametrize(
    "damaged",
    [
        {"event": "health_change", "step": 5, "state": "alarm", "evidence": None},
        {"event": "health_change", "step": 5, "state": "alarm", "evidence": [3, {}]},
        {"event": "health_change", "step": 5, "state": "panic"},
        {"event": "health_change", "step": "5", "state": "alarm"},
        {"event": "health", "step": 5, "tensors": [1]},
        {"event": "health", "step": 5, "tensors": {"a": 3, "b": {"u_rms": "NaN"}, "c": {"u_rms": 1.0}}},
        {"event": "health_action", "step": 5},
        {"event": "health_histogram", "step": 5, "layers": {"layer 0": [1, 2]}},
        {"event": "health_start", "step": 5, "tensors": 7, "rules": {"a": 1}},
    ],
)
def test_damaged_records_stop_nothing(damaged):
    assert diagnose(watched([START, sample(1), damaged])).figures()["state"] in ("calm", "alarm")


def losses(num_steps, spike_at=None, height=2.0, length=10):
    noise = random.Random(0)
    return [
        (step, 3.0 + noise.gauss(0, 0.05) + (height if spike_at and spike_at <= step < spike_at + length else 0.0))
        for step in range(1, num_steps + 1)
    ]


def test_a_spike_is_three_steps_out_of_range():
    assert loss_moves(losses(400)) == []
    assert loss_moves(losses(400, 200)) == [200]
    assert loss_moves(losses(400, 200, length=2)) == []
    assert loss_moves(losses(400, 200, height=0.1)) == []


@pytest.mark.parametrize(
    ("alarm", "words"),
    [(198, "2 steps after the alarm"), (200, "in the step of the alarm"), (230, "before any alarm")],
)
def test_the_loss_is_held_against_the_alarm(alarm, words):
    steps = [{"event": "step", "step": step, "loss": loss} for step, loss in losses(300, 200)]
    told = diagnose(watched([START, *steps, change(alarm, "alarm")])).loss
    assert told.startswith(f"It moved at step 200, {words}: from 3 to 5.051 at most.")


def test_a_folder_without_records_is_told(tmp_path):
    with pytest.raises(DataError, match=r"There are no records in here: no events\.jsonl, or an empty one"):
        require(watched([]), "here", False)
    with pytest.raises(DataError, match="here has no health records: it was made with the monitor off"):
        require(watched([{"event": "step", "step": 1, "loss": 2.0}]), "here", True)


def test_losses_of_few_steps_tell_nothing_of_a_spike():
    rows = [{"event": "step", "step": step, "loss": loss} for step, loss in losses(400, 200) if step % 5 == 0]
    assert diagnose(watched([START, *rows, change(198, "alarm")])).loss == ""
