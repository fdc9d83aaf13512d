"""Levels 0 to 2: what is done to single tensors, from their symptoms."""

import json
import math
from dataclasses import replace

import pytest

from puna.train.actions import Knobs, Limits, Plan, Symptoms, ramp
from puna.train.tensor_guard import TensorGuard

CALM = Symptoms(surprise=1.0, stall=1e3, lag_cosine=0.1, ratio=1e-3, age=500, eps=1e-8)
NAMES = [f"layer {i}" for i in range(20)]


def calm(**others: Symptoms) -> dict[str, Symptoms]:
    return dict.fromkeys(NAMES, CALM) | {name.replace("_", " "): symptom for name, symptom in others.items()}


def burst(surprise: float, **more: float) -> Symptoms:
    return replace(CALM, surprise=surprise, **more)


def test_nothing_is_done_to_a_healthy_tensor() -> None:
    guard = TensorGuard(Limits())
    for step in range(1, 200):
        assert guard.tune(step, calm(layer_3=burst(9.9))) == Plan()
    assert guard.state()["tensors"] == {}
    assert guard.state()["usual"] == pytest.approx(dict.fromkeys(NAMES, math.log(1e-3)))


@pytest.mark.parametrize(("surprise", "alarmed"), [(101.0, []), (10.5, ["layer 3"])])
def test_a_burst_resets_its_tensor_and_the_rate_rises_again(surprise: float, alarmed: list[str]) -> None:
    """Where nothing else raises the alarm, only one that no living tensor has."""
    guard = TensorGuard(Limits())
    plan = guard.tune(100, calm(layer_3=burst(surprise)), alarmed)
    assert plan.resets == ("layer 3",)
    assert plan.knobs == {"layer 3": Knobs(1 / 50)}
    (record,) = plan.records
    assert {key: record[key] for key in ("step", "level", "action", "tensor", "statistic", "value", "threshold")} == {
        "step": 100,
        "level": 2,
        "action": "reset",
        "tensor": "layer 3",
        "statistic": "surprise",
        "value": surprise,
        "threshold": 10.0,
    }
    assert (record["before"], record["after"]) == (1.0, 1 / 50)
    assert f"{surprise:.3g} times what its second moment expects" in record["reason"]
    rates = [guard.tune(step, calm()).knobs.get("layer 3", Knobs()).rate for step in range(101, 152)]
    assert rates == [ramp(since, 50) for since in range(1, 52)]
    assert guard.state()["tensors"] == {}, "it is over and forgotten"


@pytest.mark.parametrize(("surprise", "rate"), [(10.5, 1 / 10.5), (99.0, 1 / 50)])
def test_a_smaller_burst_makes_one_update_smaller(surprise: float, rate: float) -> None:
    plan = TensorGuard(Limits()).tune(100, calm(layer_3=burst(surprise)))
    assert plan.resets == ()
    assert plan.knobs == {"layer 3": Knobs(rate)}
    assert [(record["action"], record["level"], record["after"]) for record in plan.records] == [("clip", 0, rate)]


def test_a_young_tensor_is_left_alone() -> None:
    assert TensorGuard(Limits()).tune(100, calm(layer_3=burst(1e6, age=20))) == Plan()
    assert TensorGuard(Limits()).tune(100, calm(layer_3=burst(1e6, age=21))).resets == ("layer 3",)


def test_resets_of_one_step_are_bounded_and_the_rest_is_clipped() -> None:
    many = {name: burst(200.0 + i) for i, name in enumerate(NAMES[:10])}
    plan = TensorGuard(Limits()).tune(100, calm() | many)
    assert plan.resets == tuple(f"layer {i}" for i in range(9, 1, -1)), "the most surprised first"
    assert plan.knobs["layer 0"] == Knobs(1 / 50)
    large = {f"x {i}": CALM for i in range(1000)} | {f"x {i}": burst(200.0) for i in range(90)}
    assert len(TensorGuard(Limits()).tune(100, large).resets) == 50


def test_a_burst_everywhere_is_a_bad_batch_once_and_then_resets_all() -> None:
    guard = TensorGuard(Limits())
    everywhere = {name: burst(11.0) if i < 11 else CALM for i, name in enumerate(NAMES)}
    first = guard.tune(100, everywhere)
    assert first.skip
    assert not first.resets
    assert [(record["action"], record["value"]) for record in first.records] == [("skip", 0.55)]
    second = guard.tune(101, everywhere)
    assert not second.skip
    assert set(second.resets) == set(NAMES)
    half = {name: burst(11.0) if i < 10 else CALM for i, name in enumerate(NAMES)}
    assert not TensorGuard(Limits()).tune(100, half).skip


def test_an_update_that_raises_the_alarm_is_held_to_its_usual_size() -> None:
    guard, large = TensorGuard(Limits()), replace(CALM, ratio=0.03)
    for step in range(1, 100):
        guard.tune(step, calm())
    plan = guard.tune(100, calm(layer_3=large), ["layer 3"])
    assert plan.knobs == {"layer 3": Knobs(pytest.approx(1 / 30))}
    (record,) = plan.records
    assert (record["level"], record["action"], record["statistic"], record["value"]) == (
        1,
        "hold",
        "update_ratio",
        0.03,
    )
    assert record["threshold"] == pytest.approx(1e-3)
    assert record["after"] == pytest.approx(1 / 30)
    later = {step: guard.tune(step, calm(layer_3=large), ["layer 3"]) for step in range(101, 151)}
    assert not any(plan.records for plan in later.values()), "it is held already"
    assert later[125].knobs["layer 3"].rate == pytest.approx(2**0.5 / 30)
    assert later[150].knobs["layer 3"].rate == pytest.approx(2 / 30), "what is allowed doubles in fifty steps"
    assert all(guard.tune(step, calm()) == Plan() for step in range(151, 171))
    assert guard.tune(171, calm(layer_3=large)) == Plan(), "after twenty calm steps it is over"


def test_what_is_usual_is_what_was_applied_and_moves_slowly() -> None:
    guard, large = TensorGuard(Limits()), replace(CALM, ratio=0.03)
    for step in range(1, 11):
        guard.tune(step, {"a": CALM})
    for step in range(11, 16):
        guard.tune(step, {"a": large})
    assert guard.state()["usual"]["a"] == pytest.approx(math.log(1e-3) + 5 * 0.05 * math.log(2))
    held = guard.tune(16, {"a": large}, ["a"])
    size = 1e-3 * 2**0.25
    assert held.knobs["a"].rate == pytest.approx(size / 0.03)
    assert guard.state()["usual"]["a"] == pytest.approx(math.log(size)), "the held update is no news"


def test_a_held_update_that_is_slowed_too_is_not_made_smaller_than_allowed() -> None:
    guard, stalled = TensorGuard(Limits()), replace(CALM, stall=0.5, lag_cosine=0.7)
    for step in range(1, 101):
        guard.tune(step, {"a": stalled if step <= 50 else CALM})
    usual = math.exp(guard.state()["usual"]["a"])
    plan = guard.tune(101, {"a": replace(CALM, ratio=0.03)}, ["a"])
    assert plan.knobs["a"].rate == pytest.approx(usual / 0.03), "half the rate alone would be more"
    assert plan.knobs["a"].rate < 0.5


def test_a_reset_forgets_what_is_usual_and_keeps_the_epsilon() -> None:
    guard = TensorGuard(Limits())
    for step in range(1, 52):
        guard.tune(step, {"a": replace(CALM, stall=0.5)})
    eps = guard.eps_of("a", 1e-8)
    assert eps < 1e-8
    guard.tune(52, {"a": burst(200.0)})
    assert guard.state()["usual"] == {}
    assert guard.eps_of("a", 1e-8) == eps


def test_an_update_of_usual_size_is_not_held() -> None:
    guard = TensorGuard(Limits())
    for step in range(1, 100):
        guard.tune(step, calm())
    assert guard.tune(100, calm(layer_3=replace(CALM, ratio=1.99e-3)), NAMES) == Plan()
    assert guard.tune(101, calm(layer_3=replace(CALM, ratio=2.1e-3)), NAMES).knobs.keys() == {"layer 3"}


def test_a_burst_everywhere_while_the_loss_is_high_comes_from_the_data() -> None:
    guard = TensorGuard(Limits())
    everywhere = {name: burst(11.0) for name in NAMES}
    plans = [guard.tune(step, everywhere, lost=True) for step in range(100, 110)]
    assert all(plan.skip for plan in plans)
    assert "the loss is high already" in plans[0].records[0]["reason"]
    assert set(guard.tune(110, everywhere).resets) == set(NAMES)


def test_a_tensor_whose_usual_size_is_not_known_is_not_held() -> None:
    unknown = replace(CALM, ratio=math.nan)
    guard = TensorGuard(Limits())
    assert guard.tune(100, {"a": unknown}, ["a"]) == Plan()
    assert guard.state()["usual"] == {}


def test_a_stall_lowers_epsilon_after_fifty_steps() -> None:
    guard = TensorGuard(Limits())
    stalled = replace(CALM, stall=0.5)  # sqrt(v) is 5e-9
    for step in range(1, 50):
        assert guard.tune(step, calm(layer_3=stalled)) == Plan()
    plan = guard.tune(50, calm(layer_3=stalled))
    eps = 1e-8 * 1e-3
    assert plan.knobs == {"layer 3": Knobs(1 / 50, eps)}
    assert not plan.resets, "the moments are right; only the rate begins anew"
    (record,) = plan.records
    assert (record["action"], record["before"], record["after"]) == ("eps", 1e-8, eps)
    assert guard.eps_of("layer 3", 1e-8) == eps
    assert guard.eps_of("layer 4", 1e-8) == 1e-8
    last = guard.tune(200, calm())
    assert last.knobs == {"layer 3": Knobs(1.0, eps)}, "the epsilon stays, the rate has risen"


def test_an_interrupted_stall_counts_anew() -> None:
    guard = TensorGuard(Limits())
    for step in range(1, 150):
        stall = 1e3 if step % 50 == 0 else 0.5
        assert guard.tune(step, calm(layer_3=replace(CALM, stall=stall))) == Plan()


@pytest.mark.parametrize(("root_v", "wanted"), [(5e-9, 1e-11), (1e-12, 1e-17), (2e-18, 1e-19)])
def test_epsilon_is_lowered_as_far_as_needed_and_not_below_its_floor(root_v: float, wanted: float) -> None:
    guard = TensorGuard(Limits())
    stalled = replace(CALM, stall=root_v / 1e-8, eps_floor=1e-19)
    for step in range(1, 51):
        plan = guard.tune(step, {"a": stalled})
    assert plan.knobs["a"].eps == pytest.approx(wanted)
    again = replace(stalled, stall=root_v / plan.knobs["a"].eps)
    later = [guard.tune(step, {"a": again}) for step in range(51, 300)]
    assert all(plan.knobs["a"].eps == pytest.approx(wanted) for plan in later), "lowered once"


def test_an_aligned_stall_is_slowed_for_a_while() -> None:
    guard = TensorGuard(Limits())
    stalled = replace(CALM, stall=0.5, lag_cosine=0.7)
    for step in range(1, 51):
        plan = guard.tune(step, calm(layer_3=stalled))
    assert plan.knobs["layer 3"].rate == 0.5 / 50
    rates = {step: guard.tune(step, calm()).knobs["layer 3"].rate for step in range(51, 260)}
    assert rates[249] == 0.5
    assert rates[250] == 1.0


def test_a_state_in_the_middle_goes_on_the_same() -> None:
    guard, other = TensorGuard(Limits()), TensorGuard(Limits())

    def symptoms(step: int) -> dict[str, Symptoms]:
        odd = {"layer 1": burst(300.0)} if step == 60 else {"layer 4": replace(CALM, ratio=0.5)} if step > 60 else {}
        return calm(layer_2=replace(CALM, stall=0.5, lag_cosine=0.9)) | odd

    def alarmed(step: int) -> list[str]:
        return ["layer 4"] if step == 65 else []

    for step in range(1, 75):
        guard.tune(step, symptoms(step), alarmed(step))
    assert all(guard.state()["tensors"][f"layer {i}"] for i in (1, 2, 4))
    other.restore(json.loads(json.dumps(guard.state())))
    for step in range(75, 300):
        assert guard.tune(step, symptoms(step)) == other.tune(step, symptoms(step))
    assert guard.state() == other.state()
