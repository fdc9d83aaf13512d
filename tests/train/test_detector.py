"""The detector's rules, one by one, on readings made by hand; what is normal stays calm."""

import json
from collections import deque
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from puna.train.adam_stats import STATISTICS
from puna.train.config import HealthConfig
from puna.train.detector import Detector, Reading, Status, robust_z, rules

NAMES = ("embed.weight", "layers.0.weight", "layers.1.weight", "head.weight")
HEALTHY = {
    "g_rms": 1e-3, "stall": 1e5, "below_eps": 0.0, "u_rms": 0.25, "f9": 0.01, "bc": 0.4, "surprise": 1.0,
    "lag_cosine": 0.1, "descent_cosine": 0.4, "update_ratio": 1e-3, "stable_rms": 1.0, "num_active": 4096.0,
    "unseen": 0.0, "num_nonfinite": 0.0,
}  # fmt: skip


class Course:
    """A run of readings: healthy figures, but for what is said of some tensors."""

    def __init__(self, **settings: Any) -> None:
        self.detector = Detector(HealthConfig(**settings))
        self.step = 0

    def go(self, num_steps: int = 1, only: int = 1, *, everywhere: bool = False, **figures: Any) -> Status:
        """`figures` of the run by name (loss, grad_norm, settled, max_logit), the others of tensor `only`."""
        for _ in range(num_steps):
            self.step += 1
            status = self.detector.judge(self.reading(only, everywhere, figures))
        return status

    def reading(self, only: int, everywhere: bool, figures: dict[str, Any]) -> Reading:
        statistics = {key: np.full(len(NAMES), value) for key, value in HEALTHY.items()}
        for key in statistics.keys() & figures.keys():
            statistics[key][slice(None) if everywhere else only] = figures[key]
        reading = Reading(
            step=self.step,
            names=NAMES,
            layers=("embedding", "layer 0", "layer 1", "head"),
            statistics=statistics,
            ages=np.full(len(NAMES), self.step),
            settled=np.full(len(NAMES), figures.get("settled", self.step > 30)),
            companions={key: figures[key] for key in ("max_logit",) if key in figures},
        )
        return replace(reading, **{key: figures[key] for key in ("loss", "grad_norm") if key in figures})


def settled(**settings: Any) -> Course:
    course = Course(**settings)
    assert course.go(110, loss=2.0).state == "calm"
    return course


def test_a_healthy_run_is_calm_from_the_first_step() -> None:
    course = Course()
    first = {"u_rms": 1.0, "f9": 1.0, "bc": 1.0, "surprise": 30.0, "update_ratio": 0.5, "stable_rms": 4.0}
    status = course.go(30, everywhere=True, **first)
    assert (status.state, status.evidence, status.score) == ("calm", (), 0.0)
    generator = np.random.default_rng(0)
    for _ in range(200):
        status = course.go(
            loss=2 + 0.1 * generator.standard_normal(), grad_norm=np.exp(0.2 * generator.standard_normal())
        )
        assert status.state == "calm"
        assert status.score < 1


JUMP = {"u_rms": 0.9, "f9": 0.5, "bc": 0.8}


@pytest.mark.parametrize(
    ("figures", "rule", "state", "num_steps"),
    [
        ({"surprise": 11.0}, "burst", "watch", 1),
        (JUMP, "jump", "watch", 1),
        ({"stall": 3.0}, "stall", "watch", 10),
        ({"below_eps": 0.7}, "floor", "watch", 10),
        ({"lag_cosine": 0.9}, "correlated", "watch", 20),
        ({"descent_cosine": 0.05, "u_rms": 0.55}, "adrift", "watch", 3),
        ({"update_ratio": 0.02}, "stride", "watch", 1),
        ({"update_ratio": 0.12}, "stride", "alarm", 1),
        ({"stable_rms": 3.0}, "steep", "watch", 1),
        ({"num_nonfinite": 1.0}, "nonfinite", "alarm", 1),
    ],
)
def test_rules_on_tensors(figures: dict[str, float], rule: str, state: str, num_steps: int) -> None:
    course = settled()
    if num_steps > 1:
        assert course.go(num_steps - 1 - (rule == "correlated") * 10, 2, **figures).state == "calm"
        num_steps = 1 + (rule == "correlated") * 10
    status = course.go(num_steps, 2, **figures)
    assert status.state == state
    (evidence,) = status.evidence
    assert (evidence.tensor, evidence.layer, evidence.rule, evidence.level) == (NAMES[2], "layer 1", rule, state)
    assert evidence.value == pytest.approx(next(iter(figures.values())), rel=0.2)
    assert (evidence.value < evidence.threshold) == (rule in ("stall", "adrift"))
    assert (status.score >= 1) == (state == "alarm")


def test_a_stride_alarms_only_with_both_its_signs() -> None:
    assert settled().go(1, 2, update_ratio=0.09).state == "watch", "90 times the usual, but small"
    large = Course()
    large.go(60, 2, update_ratio=0.05)
    assert large.go(1, 2, update_ratio=0.15).state == "calm", "large, but it always was"


@pytest.mark.parametrize("left_out", JUMP)
def test_a_jump_needs_all_its_signs(left_out: str) -> None:
    course = settled()
    status = course.go(1, 2, **{key: value for key, value in JUMP.items() if key != left_out})
    assert status.state == "calm"
    assert status.score < 1


def test_two_peaks_that_were_always_there_are_no_jump() -> None:
    """A batch so large that gradients have no noise."""
    course = Course()
    assert course.go(100, everywhere=True, **JUMP).state == "calm"


@pytest.mark.parametrize(
    ("figures", "rules"),
    [
        ({"surprise": 8.0}, {"surge"}),
        ({"update_ratio": 9e-3}, {"leap"}),
        ({"u_rms": 0.8}, {"chorus"}),
    ],
)
def test_rules_on_half_of_the_tensors(figures: dict[str, float], rules: set[str]) -> None:
    course = settled()
    assert course.go(1, 2, **figures).state != "alarm"
    assert course.detector.status.score < 1
    status = course.go(everywhere=True, **figures)
    assert status.state == "alarm"
    assert status.score > 1
    alarms = [evidence for evidence in status.evidence if evidence.level == "alarm"]
    assert {evidence.rule for evidence in alarms} == rules
    assert alarms[0].tensor == ""
    assert {evidence.tensor for evidence in alarms[1:]} == {*NAMES}


def test_young_tensors_do_not_surge() -> None:
    """Gradients grow where a model leaves its first plateau."""
    young = Course()
    young.go(50)
    assert young.go(everywhere=True, surprise=30.0).state == "watch"
    assert young.detector.status.score < 1
    young.go(50)
    assert young.go(everywhere=True, surprise=30.0).state == "alarm"


def test_a_lurch_is_large_and_unusual() -> None:
    course = Course()
    course.go(60, everywhere=True, update_ratio=0.03)
    assert course.go(1, everywhere=True, update_ratio=0.1).score == pytest.approx(0.1 / 0.03 / 4, rel=0.01)
    status = course.go(1, everywhere=True, update_ratio=0.15)
    assert status.evidence[0].rule == "lurch"
    assert settled().go(1, everywhere=True, update_ratio=0.006).score == pytest.approx(6 / 8), "unusual, not large"


def test_a_stall_does_not_become_what_is_usual() -> None:
    """Updates that come back to three times what they were are no leap, however small they were meanwhile."""
    course = settled()
    course.go(150, everywhere=True, update_ratio=1e-6)
    assert course.go(1, everywhere=True, update_ratio=3e-3).state == "calm"
    assert course.go(1, everywhere=True, update_ratio=3e-2).state == "alarm"


def test_what_sinks_slowly_becomes_usual() -> None:
    """A rate that decays to a twentieth in 300 steps, and is back at once."""
    course = settled()
    for step in range(300):
        course.go(1, everywhere=True, update_ratio=1e-3 * 20 ** (-step / 300))
    assert course.go(1, everywhere=True, update_ratio=1e-3).state == "alarm"


def test_a_chorus_is_large_and_unusual() -> None:
    course = Course()
    course.go(60, everywhere=True, u_rms=0.5)
    assert course.go(1, everywhere=True, u_rms=1.0).state == "calm", "a large batch"
    assert settled().go(1, everywhere=True, u_rms=0.65).state == "calm"


def test_the_loss_alarms_after_three_steps_and_the_norm_is_watched() -> None:
    course = Course()
    for step in range(100):
        course.go(loss=2 + 0.01 * (step % 7), grad_norm=1 + 0.01 * (step % 5))
    assert [course.go(loss=3.0).state for _ in range(3)] == ["calm", "calm", "alarm"]
    assert course.detector.status.evidence[0].rule == "loss"
    other = Course()
    for step in range(100):
        other.go(loss=2.0, grad_norm=1 + 0.01 * (step % 5))
    assert other.go(loss=2.0, grad_norm=9.0).evidence[0].rule == "norm"
    assert other.detector.status.state == "watch"
    assert settled().go(3, loss=float("nan")).state == "alarm"


def test_attention_logits_are_watched() -> None:
    course = settled()
    assert course.go(max_logit=500.0).state == "calm"
    assert course.go(max_logit=2e3).evidence[0].rule == "logits"


def test_a_state_is_held_and_falls_back_in_steps() -> None:
    course = settled(hold=5)
    assert course.go(1, 2, update_ratio=0.5).state == "alarm"
    states = [course.go(1, 2, surprise=16.0 if step < 3 else 1.0).state for step in range(9)]
    assert states == ["alarm"] * 4 + ["watch"] * 3 + ["calm"] * 2


def test_evidence_begins_with_what_began_first() -> None:
    course = settled()
    course.go(4, 3, surprise=15.0)
    course.go(1, 0, everywhere=True, surprise=15.0)
    order = [evidence.tensor for evidence in course.detector.status.evidence if evidence.rule == "burst"]
    assert order[0] == NAMES[3]
    assert len(order) == 4


def test_a_dormant_tensor_is_normal() -> None:
    """No statistics at all, then a late start that is not settled yet."""
    course = settled()
    nothing = dict.fromkeys(STATISTICS, np.nan) | {"num_active": 0.0, "unseen": 1.0}
    assert course.go(100, 2, **nothing).state == "calm"
    course.step += 1
    reading = course.reading(2, False, {"surprise": 100.0, "u_rms": 3.0, "f9": 1.0, "bc": 1.0, "update_ratio": 9.0})
    reading.settled[2] = False
    assert course.detector.judge(reading).state == "calm"


def test_an_announced_change_widens_what_it_explains() -> None:
    for announced in (False, True):
        course = settled()
        if announced:
            course.detector.announce(111)
        status = course.go(everywhere=True, update_ratio=1e-2)
        assert status.state == ("calm" if announced else "alarm")
    assert course.go(everywhere=True, surprise=20.0).state == "alarm", "and nothing else"


def test_a_reset_tensor_begins_anew() -> None:
    course = settled()
    course.go(25, 2, lag_cosine=0.9, update_ratio=2e-3)
    course.detector.forget((NAMES[2],))
    assert course.go(1, 2, lag_cosine=0.9, update_ratio=1.0).state == "watch", "held"
    assert course.detector.status.evidence == ()


def test_its_memory_goes_through_json_and_changes_of_tensors() -> None:
    one = settled()
    one.go(12, 1, stall=2.0, loss=2.2, grad_norm=3.0)
    other = Course()
    other.step = one.step
    other.detector.restore(json.loads(json.dumps(one.detector.numbers())))
    for course in (one, other):
        course.go(3, 1, stall=2.0, loss=2.2)
    assert one.detector.numbers() == other.detector.numbers()
    assert one.detector.status == other.detector.status
    reading = one.reading(1, False, {"stall": 2.0})
    more = replace(
        reading,
        step=reading.step + 1,
        names=("new", *NAMES),
        layers=("new", *reading.layers),
        statistics={key: np.concatenate([values[:1], values]) for key, values in reading.statistics.items()},
        ages=np.arange(5),
        settled=np.array([False, True, True, True, True]),
    )
    (evidence,) = one.detector.judge(more).evidence
    assert (evidence.tensor, evidence.rule) == (NAMES[1], "stall")


def test_rules_are_told_with_their_thresholds() -> None:
    told = {rule.rule: rule for rule in rules(HealthConfig(surge=12.0, stall=5.0))}
    assert (told["surge"].alarm, told["surge"].watch, told["burst"].watch) == (12.0, None, 10.0)
    assert (told["stall"].watch, told["stall"].when, told["stall"].alarm) == (5.0, "below", None)


def test_robust_z() -> None:
    values = deque(np.random.default_rng(1).standard_normal(100).tolist())
    assert robust_z(6.0, values) == pytest.approx(6.0, rel=0.3)
    assert robust_z(6.0, deque([1.0] * 19)) == 0
    assert robust_z(1.0, deque([1.0] * 50)) == 0
    assert robust_z(float("inf"), values) == 1e6
