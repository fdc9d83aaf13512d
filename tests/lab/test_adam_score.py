"""From runs to figures: detection, leads, false alarms and areas, on results whose figures are plain."""

from typing import Any

import numpy as np
import pytest

from puna.lab.adam_score import burst_step, figures, outcome
from puna.lab.adam_spec import RunSpec

STEPS = 240
STALL = {"tensors": ["*"], "start": 1, "length": 150}


def result(cause: str = "none", onset: int | None = None, alarms: tuple[int, ...] = (), **spec: Any) -> dict[str, Any]:
    """A run whose loss moves at `onset` for good, and whose monitor alarms in some steps."""
    losses = 3 + np.random.default_rng(1).normal(0, 0.05, STEPS)
    if onset is not None:
        losses[onset:] += 2
    score = np.full(STEPS, 0.3)
    score[list(alarms)] = 1.5
    columns = {
        "loss": losses,
        "grad_norm": np.ones(STEPS),
        "update_rms": np.full(STEPS, 0.2),
        "stall_share": np.zeros(STEPS),
    }
    lists = {key: values.tolist() for key, values in columns.items()} | {"score": score.tolist()}
    return {"spec": {"cause": cause, "steps": STEPS, **spec}, "columns": lists}


def test_the_burst_is_the_end_of_a_stall_and_the_start_of_a_change() -> None:
    assert burst_step(RunSpec(tensors=("*",), start=1, length=150)) == 151
    assert burst_step(RunSpec(warmup_cut=True, start=140, length=20)) == 140
    assert burst_step(RunSpec(beta2_after=0.3, start=140)) == 140
    assert burst_step(RunSpec(burst="flood", start=140, length=20)) == 140
    assert burst_step(RunSpec(state_dtype="bf16")) is None


def test_lead_counts_from_the_burst_not_from_the_stall() -> None:
    early = outcome(result("stall", 153, (20, 60, 151, 152), **STALL))
    assert (early.onset, early.alarm, early.lead, early.early) == (153, 151, 2, True)


def test_an_alarm_with_the_onset_is_too_late() -> None:
    late = outcome(result("stall", 153, (153, 154), **STALL))
    assert (late.diverging, late.detected, late.lead) == (True, False, None)


def test_an_alarm_of_the_stall_alone_detects_nothing() -> None:
    assert not outcome(result("stall", 160, (20, 21), **STALL)).detected


def test_a_loss_that_moves_before_the_release_is_judged_from_any_step() -> None:
    assert outcome(result("stall", 120, (118,), **STALL)).lead == 2


def test_a_healthy_run_with_one_alarm_is_a_false_alarm() -> None:
    assert outcome(result(alarms=(50,))).false_alarm
    assert not outcome(result()).false_alarm
    assert not outcome(result("stall", 153, (20,), **STALL)).false_alarm


def test_figures_by_cause() -> None:
    runs = [
        result("stall", 153, (151,), seed=0, **STALL), result("stall", 153, (), seed=1, **STALL),
        result("flood", 150, (146,), seed=2, burst="flood", start=140, length=10),
        result(seed=3), result(alarms=(9,), seed=4),
    ]  # fmt: skip
    found = figures(map(outcome, runs))
    assert found["detected_pct"] == pytest.approx(66.67)
    assert (found["median_lead_steps"], found["false_alarm_pct"]) == (3.0, 50.0)
    assert found["by_cause"]["stall"]["detected_pct"] == 50.0
    assert found["by_cause"]["none"] == {
        "num_diverging": 0, "num_healthy": 2, "detected_pct": None, "median_lead_steps": None, "false_alarm_pct": 50.0,
    }  # fmt: skip
    assert found["auc_ours"] == pytest.approx((2 * 0.75 + 0.25) / 3)
    assert found["auc_update_rms"] == found["auc_stall_only"] == 0.5


def test_a_score_looks_at_no_step_from_the_onset_on() -> None:
    """The loss itself must not help to see the loss coming."""
    assert outcome(result("flood", 150, burst="flood", start=140, length=30)).scores["loss_z"] < 6
    assert outcome(result()).scores["loss_z"] < 6
