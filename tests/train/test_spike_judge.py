"""Levels 3 and 4: batches that are left out, spikes that are confirmed, what roll-backs leave behind."""

import json
import math
import random
from dataclasses import replace

import pytest

from puna.train.actions import Limits, Recovery, Verdict
from puna.train.spike_judge import SpikeJudge

GO = Verdict()


def usual(judge: SpikeJudge, steps: range, loss: float = 3.0) -> None:
    """Steps with losses and norms that waver a little; none of them is of note."""
    draw = random.Random(steps.start)
    for step in steps:
        assert judge.judge(step, loss + draw.gauss(0, 0.02), 1 + draw.gauss(0, 0.1)) == GO


def kinds(judge: SpikeJudge, start: int, losses: list[float], norm: float = 1.0) -> list[str]:
    return [judge.judge(start + i, loss, norm).kind for i, loss in enumerate(losses)]


def test_a_norm_far_above_the_usual_leaves_the_batch_out() -> None:
    judge = SpikeJudge(Limits())
    usual(judge, range(1, 101))
    verdict = judge.judge(101, 3.0, 5.0)
    assert verdict.kind == "skip"
    (record,) = verdict.records
    assert (record["level"], record["action"], record["statistic"], record["threshold"]) == (3, "skip", "norm_z", 6.0)
    assert record["value"] > 20
    assert judge.judge(102, 3.0, 5.0) == GO, "the norm before it was not usual: it is the run, not the batch"
    usual(judge, range(103, 113))
    assert judge.judge(113, 3.0, 5.0).kind == "skip"


def test_a_norm_that_was_steady_is_not_bad_when_it_moves_a_little() -> None:
    judge = SpikeJudge(Limits())
    for step in range(1, 101):
        assert judge.judge(step, 3.0, 1.0) == GO
    assert judge.judge(101, 3.0, 1.4) == GO


def test_nothing_is_skipped_before_the_norm_is_known() -> None:
    judge = SpikeJudge(Limits())
    usual(judge, range(1, 25))
    assert judge.judge(25, 3.0, 50.0) == GO


def test_too_many_skips_roll_back() -> None:
    judge = SpikeJudge(Limits())
    usual(judge, range(1, 101))
    found = []
    for i in range(4):
        found.append(judge.judge(101 + 15 * i, 3.0, 5.0))
        usual(judge, range(102 + 15 * i, 116 + 15 * i))
    assert [verdict.kind for verdict in found] == ["skip", "skip", "skip", "roll_back"]
    assert found[-1].onset == 101
    assert [record["level"] for record in found[-1].records] == [3, 4]


@pytest.mark.parametrize(("loss", "norm", "name"), [(math.nan, 1.0, "loss"), (3.0, math.inf, "grad_norm")])
def test_a_step_that_is_not_finite_rolls_back(loss: float, norm: float, name: str) -> None:
    judge = SpikeJudge(Limits())
    verdict = judge.judge(1, loss, norm, "rank 2: the loss, samples 7")
    assert (verdict.kind, verdict.onset) == ("roll_back", 1)
    skip, back = verdict.records
    assert (skip["level"], skip["action"], skip["statistic"], skip["value"]) == (3, "skip", name, None)
    assert skip["reason"] == "rank 2: the loss, samples 7"
    assert (back["level"], back["action"]) == (4, "roll back")
    json.dumps(verdict.records, allow_nan=False)


def test_a_spike_that_stays_is_left_after_its_slope_is_known() -> None:
    judge = SpikeJudge(Limits())
    usual(judge, range(1, 101))
    verdicts = [judge.judge(101 + i, 4.5 + 0.001 * i, 1.0) for i in range(23)]
    assert [verdict.kind for verdict in verdicts] == ["go"] * 22 + ["roll_back"]
    assert verdicts[-1].onset == 101
    assert "loss_z is" in verdicts[-1].reason
    assert "since step 101" in verdicts[-1].reason


def test_two_high_losses_are_no_spike() -> None:
    judge = SpikeJudge(Limits())
    usual(judge, range(1, 101))
    for start in range(101, 200, 3):
        assert kinds(judge, start, [4.5, 4.5, 3.0]) == ["go"] * 3
    assert judge.good([0], 300) == [0]


def test_a_spike_that_falls_is_waited_for() -> None:
    judge = SpikeJudge(Limits())
    usual(judge, range(1, 101))
    falling = [3.0 + 2.0 * 0.97**i for i in range(90)]
    assert set(kinds(judge, 101, falling)) == {"go"}
    slowly = SpikeJudge(replace(Limits(), wait=60))
    usual(slowly, range(1, 101))
    slow = [5.0 - 0.001 * i for i in range(90)]
    assert kinds(slowly, 101, slow).index("roll_back") == 62, "60 steps after it was confirmed"


def test_a_loss_far_above_recent_ones_is_lost_for_a_while() -> None:
    """Also where a hundred steps ago the loss was so high that this is no spike."""
    judge = SpikeJudge(Limits())
    for step in range(1, 101):
        judge.judge(step, max(3.0, 5.0 - 0.03 * step) + 0.01 * (step % 3), 1.0)
        assert not judge.lost
    found = []
    for step in range(101, 151):
        assert judge.judge(step, 4.0, 1.0) == GO
        found.append(judge.lost)
    assert found == [True] * 40 + [False] + [True] * 9
    judge.judge(151, 3.0, 1.0)
    assert not judge.lost


def test_a_loss_that_rises_by_less_than_noise_counts_is_no_spike() -> None:
    judge = SpikeJudge(Limits())
    for step in range(1, 101):
        judge.judge(step, 3.0, 1.0)
    assert set(kinds(judge, 101, [3.08] * 60)) == {"go"}


def test_good_checkpoints_were_followed_by_calm() -> None:
    judge = SpikeJudge(Limits())
    usual(judge, range(1, 101))
    assert judge.judge(101, 3.0, 5.0).kind == "skip"
    usual(judge, range(102, 500))
    steps = [0, 50, 100, 101, 150, 250, 300, 350, 450]
    assert judge.good(steps, 499) == [101, 150, 250]
    assert judge.undecided(steps, 499) == [300, 350, 450]
    assert judge.good(steps, 100) == []
    for step in (510, 700, 901):
        judge.note(step)
    assert judge.good([309, 310, 509, 700, 701, 901], 2000) == [309, 700, 901]


def returned(judge: SpikeJudge, to: int, onset: int, now: int) -> SpikeJudge:
    other = SpikeJudge(judge.limits)
    state = judge.returned(SpikeJudge(judge.limits).state(), to, onset, now)
    other.restore(json.loads(json.dumps(state)))
    return other


def test_the_rate_after_roll_backs() -> None:
    judge = SpikeJudge(Limits())
    assert judge.recovery(301) == Recovery()
    once = returned(judge, 300, 450, 460)
    assert once.recovery(301) == Recovery(0.7, first=True)
    assert once.recovery(302) == Recovery(0.7)
    assert once.recovery(1300) == Recovery(0.7)
    assert once.recovery(1301).rate == pytest.approx(0.7 + 0.3 / 50)
    assert once.recovery(1350) == Recovery()
    twice = returned(once, 400, 520, 530)
    assert twice.recovery(401) == Recovery(0.7 * 0.5 / 50, 0.95, reset=True, first=True)
    assert twice.recovery(450) == Recovery(0.7 * 0.5, 0.95)
    assert twice.recovery(9000) == Recovery(0.5, 0.95)


def test_a_return_to_before_an_earlier_one_remembers_it() -> None:
    twice = returned(returned(SpikeJudge(Limits()), 300, 450, 460), 200, 310, 320)
    assert [back["to"] for back in twice.state()["returns"]] == [200, 200]
    assert twice.recovery(201).reset
    assert twice.judge(210, math.nan, 1.0).kind == "stop"


def test_the_third_spike_in_a_short_time_stops() -> None:
    judge = SpikeJudge(Limits())
    once = returned(judge, 300, 450, 460)
    assert once.judge(460, math.nan, 1.0).kind == "roll_back"
    assert "it is the 2. time within 2000 steps" in once.judge(460, math.nan, 1.0).reason
    twice = returned(once, 300, 450, 460)
    stop = twice.judge(460, math.nan, 1.0)
    assert (stop.kind, stop.records[-1]["action"]) == ("stop", "stop")
    assert twice.judge(2301, math.nan, 1.0).kind == "roll_back", "long after the last one"


def test_a_state_in_the_middle_of_a_spike_goes_on_the_same() -> None:
    judge, other = SpikeJudge(Limits()), SpikeJudge(Limits())
    usual(judge, range(1, 101))
    kinds(judge, 101, [4.6] * 12)
    judge.note(112)
    other.restore(json.loads(json.dumps(judge.state())))
    found = [[one.judge(113 + i, loss, 1.0) for one in (judge, other)] for i, loss in enumerate([4.0] + [4.5] * 20)]
    assert all(one == same for one, same in found)
    kinds_found = [one.kind for one, _ in found]
    assert kinds_found.index("roll_back") == 15, "it fell against the losses before the state was taken, and then not"
    assert judge.state() == other.state()
