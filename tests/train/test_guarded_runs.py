"""Runs under the controller: what is done where, and that a kill anywhere leaves no trace in what comes of it."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import guarded
import processes
import pytest
import torch
from guarded import FAULTS, Guarded

from puna.errors import Diverged, NonFinite
from puna.train import checkpoint, manifest, rollback
from puna.train.clipping import ZClip
from puna.train.config import HealthConfig
from puna.train.controller import Controller, Target
from puna.train.metrics import last_steps, read_events
from puna.train.task import Cursor, Setback


class Killed(Exception):
    """Stands for a kill: nothing more is saved."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Guarded]]:
    """A run from beginning to end, made once for each kind of fault."""

    @cache
    def whole(kind: str) -> tuple[Path, Guarded]:
        folder = tmp_path_factory.mktemp(kind)
        return folder, guarded.run(folder, Guarded(**FAULTS[kind]))

    return whole


def actions(folder: Path) -> list[dict[str, Any]]:
    return [event for event in read_events(folder) if event["event"] == "health_action"]


def told(folder: Path, *keys: str) -> list[tuple[Any, ...]]:
    return [tuple(event[key] for key in keys) for event in actions(folder)]


def losses(folder: Path) -> dict[int, float]:
    return {step: record["loss"] for step, record in last_steps(read_events(folder)).items()}


def only(folder: Path, event: str) -> dict[str, Any]:
    (found,) = [record for record in read_events(folder) if record["event"] == event]
    return found


# --- what is done -----------------------------------------------------------------------------------------------------


def test_a_calm_run_is_the_same_to_the_bit_with_and_without_a_controller(
    undisturbed: Callable[[str], tuple[Path, Guarded]], tmp_path: Path
) -> None:
    folder, task = undisturbed("none")
    assert not actions(folder)
    assert guarded.weights(task) == guarded.weights(guarded.run(tmp_path, Guarded(act=False)))
    assert task.read == list(range(80))


def test_a_burst_after_a_stall_resets_its_tensors_in_the_very_step(
    undisturbed: Callable[[str], tuple[Path, Guarded]],
) -> None:
    folder, task = undisturbed("stall")
    assert told(folder, "step", "level", "action", "tensor") == [
        (31, 2, "reset", "0.weight"),
        (31, 2, "reset", "0.bias"),
    ]
    model, state = task.modules["model"], task.optimizers["adamw"].state
    assert [int(state[p]["step"]) for p in model.parameters()] == [50, 50, 80, 80]
    assert not any(event["event"] == "rollback" for event in read_events(folder))


def test_a_lasting_stall_lowers_epsilon(undisturbed: Callable[[str], tuple[Path, Guarded]]) -> None:
    folder, _ = undisturbed("frozen")
    first = [record for record in actions(folder) if record["level"] == 1]
    assert [(record["action"], record["tensor"], record["before"]) for record in first] == [
        ("eps", "0.weight", 1e-8),
        ("eps", "0.bias", 1e-8),
    ]
    assert first[0]["after"] == pytest.approx(1e-11)


@pytest.mark.parametrize(("kind", "onset", "end"), [("nan", 46, 46), ("wild", 46, 54)])
def test_a_step_that_is_not_finite_and_a_spike_go_back_to_a_good_checkpoint(
    kind: str, onset: int, end: int, undisturbed: Callable[[str], tuple[Path, Guarded]]
) -> None:
    folder, task = undisturbed(kind)
    back = only(folder, "rollback")
    skipped = end - 20 + max(end - onset, guarded.LIMITS.margin)
    assert (back["step"], back["from"], back["onset"], back["checkpoint"]) == (20, end, onset, "good")
    assert (back["tokens"], back["skipped"]) == (20 * 16, skipped * 16)
    assert task.read == [*range(end), *range(20 + skipped, 80 + skipped)], "the span is passed over"
    assert set(task.read).issuperset(FAULTS[kind][kind])
    final = losses(folder)
    assert sorted(final) == list(range(1, 81))
    assert max(list(final.values())[25:]) < 1
    record = next(record for record in actions(folder) if record["action"] == "roll back")
    assert (record["level"], record["step"], record["reason"]) == (4, end, back["reason"])
    rates = {step: event["lr"] for step, event in last_steps(read_events(folder)).items()}
    assert (rates[20], rates[21], rates[40]) == (1e-2, pytest.approx(7e-3), pytest.approx(7e-3))
    assert rates[60] == pytest.approx(1e-2)
    assert checkpoint.read_manifest(folder).cursor == Cursor(80, 80 * 16, skipped * 16)


def test_a_step_that_is_not_finite_is_left_out_and_blamed(undisturbed: Callable[[str], tuple[Path, Guarded]]) -> None:
    folder, _ = undisturbed("nan")
    skip = actions(folder)[0]
    assert (skip["step"], skip["level"], skip["action"], skip["statistic"]) == (46, 3, "skip", "loss")
    assert skip["reason"].startswith(
        "step 46 is not finite and was not taken; no weight changed. rank 0: the loss, samples"
    )
    assert all(
        json.loads(line, parse_constant=pytest.fail) for line in (folder / "events.jsonl").read_text().splitlines()
    )
    assert 46 in losses(folder), "the step with that number that was taken later"


def test_without_act_a_step_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(NonFinite, match="step 46 is not finite and was not taken"):
        guarded.run(tmp_path, Guarded(act=False, **FAULTS["nan"]))
    assert checkpoint.complete_steps(tmp_path) == [30, 40]


def test_the_third_time_it_is_given_up(tmp_path: Path) -> None:
    broken = Guarded(nan=tuple(range(45, 200)))
    with pytest.raises(
        Diverged, match=r"loss is nan.*3\. time within 200 steps; two returns .* did not help"
    ) as caught:
        guarded.run(tmp_path, broken)
    assert caught.value.exit_code == 10
    events = read_events(tmp_path)
    assert [event["step"] for event in events if event["event"] == "rollback"] == [20, 0]
    assert events[-1]["error"] == "Diverged"


def test_a_second_return_halves_the_rate_and_begins_the_moments_anew(tmp_path: Path) -> None:
    task = guarded.run(tmp_path, Guarded(60, nan=(45, 75)))
    assert [event["step"] for event in read_events(tmp_path) if event["event"] == "rollback"] == [20, 20]
    group = task.optimizers["adamw"].param_groups[0]
    assert (group["lr"], group["betas"]) == (pytest.approx(1e-2 * 0.5), (0.9, 0.95))
    assert {int(state["step"]) for state in task.optimizers["adamw"].state.values()} == {40}


def test_a_batch_that_is_left_out_does_not_count_as_trained(tmp_path: Path) -> None:
    task = guarded.run(tmp_path, Guarded(60, wild=(45,)))
    (skip,) = actions(tmp_path)
    assert (skip["step"], skip["level"], skip["action"]) == (46, 3, "skip")
    steps = last_steps(read_events(tmp_path))
    assert [(steps[step]["tokens"] // 16, steps[step].get("skipped")) for step in (45, 46, 47)] == [
        (45, None),
        (45, 1.0),
        (46, None),
    ]
    assert task.read == [*range(46), *range(46, 61)], "as many units are trained on as without it"
    assert checkpoint.read_manifest(tmp_path).cursor == Cursor(61, 60 * 16, 16)
    assert {int(state["step"]) for state in task.optimizers["adamw"].state.values()} == {60}


# --- which checkpoints stay -------------------------------------------------------------------------------------------


def test_the_newest_good_checkpoints_stay_and_those_not_judged_yet(
    undisturbed: Callable[[str], tuple[Path, Guarded]],
) -> None:
    folder, _ = undisturbed("none")
    assert checkpoint.complete_steps(folder) == [0, 40, 50, 60, 70, 80]
    folder, _ = undisturbed("stall")
    assert checkpoint.complete_steps(folder) == [0, 40, 50, 60, 70, 80], "20 and 30 were disturbed at 31"


def controller(*disturbed: int) -> Controller:
    made = Controller(HealthConfig(act=True), replace(guarded.LIMITS, margin=10))
    for step in disturbed:
        made._judge.note(step)
    return made


@pytest.mark.parametrize(
    ("steps", "onset", "target"),
    [
        ([0, 50, 60, 70, 80], 90, Target(70, good=True)),
        ([0, 50, 60, 70, 80], 79, Target(60, good=True)),
        ([75, 80], 90, Target(80, good=False)),
        ([85], 90, Target(85, good=False)),
        ([90, 95], 90, None),
        ([], 90, None),
    ],
)
def test_where_to_return_to(steps: list[int], onset: int, target: Target | None) -> None:
    assert controller().target(steps, onset, 94) == target


def test_a_disturbed_checkpoint_is_passed_over() -> None:
    assert controller(75).target([0, 50, 60, 70], 90, 94) == Target(50, good=True)


def test_a_run_without_an_earlier_checkpoint_cannot_return(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match="step 7: too high; there is no checkpoint from before step 5"):
        rollback.roll_back(tmp_path, controller(), Setback(5, "too high"), Cursor(7, 70), 10)


# --- a kill leaves no trace -------------------------------------------------------------------------------------------


def kill_at(task: Guarded, call: int) -> Guarded:
    """The task's step number `call`, counted in calls, does not return."""
    step, calls = task.step, 0

    def fatal(unit: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Killed
        return step(unit)

    task.step = fatal  # type: ignore[method-assign]
    return task


def assert_same_end(folder: Path, task: Guarded, whole: tuple[Path, Guarded]) -> None:
    assert guarded.weights(task) == guarded.weights(whole[1])
    assert losses(folder) == losses(whole[0])
    assert task.controller.numbers() == whole[1].controller.numbers()
    unique = {json.dumps(record | {"time": 0}) for record in actions(folder)}
    assert unique == {json.dumps(record | {"time": 0}) for record in actions(whole[0])}
    assert checkpoint.read_manifest(folder).json == checkpoint.read_manifest(whole[0]).json


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        pytest.param("stall", 35, id="while the rate rises after a reset, from before it", marks=pytest.mark.slow),
        pytest.param("stall", 42, id="while the rate rises after a reset, in the middle of it"),
        pytest.param("wild", 53, id="in a spike"),
        pytest.param("wild", 55, id="just after the return", marks=pytest.mark.slow),
        pytest.param("wild", 68, id="at the lower rate after it"),
        pytest.param("nan", 47, id="just after a step that was not finite", marks=pytest.mark.slow),
        pytest.param("frozen", 33, id="with a lower epsilon", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_killed_goes_on_to_the_same_end(
    kind: str, call: int, undisturbed: Callable[[str], tuple[Path, Guarded]], tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        guarded.run(tmp_path, kill_at(Guarded(**FAULTS[kind]), call))
    assert_same_end(tmp_path, guarded.run(tmp_path, Guarded(**FAULTS[kind])), undisturbed(kind))


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "where", ["write_manifest", pytest.param("remove", marks=SLOW), pytest.param("read_manifest", marks=SLOW)]
)
def test_a_kill_inside_a_return_leads_to_the_same_end(
    where: str, undisturbed: Callable[[str], tuple[Path, Guarded]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    acting, calls = getattr(rollback, where), 0

    def fatal(*words: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2 or where == "write_manifest":
            raise KeyboardInterrupt
        return acting(*words)

    with monkeypatch.context() as patch:
        patch.setattr(rollback, where, fatal)
        with pytest.raises(KeyboardInterrupt):
            guarded.run(tmp_path, Guarded(**FAULTS["wild"]))
    assert manifest.complete_steps(tmp_path)[-1] == {"remove": 40, "write_manifest": 20, "read_manifest": 20}[where]
    assert_same_end(tmp_path, guarded.run(tmp_path, Guarded(**FAULTS["wild"])), undisturbed("wild"))


# --- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "size"),
    [("stall", 2), *(pytest.param(kind, size, marks=SLOW) for kind, size in (("wild", 2), ("wild", 4), ("stall", 4)))],
)
def test_several_processes_do_the_same(
    kind: str, size: int, undisturbed: Callable[[str], tuple[Path, Guarded]], tmp_path: Path
) -> None:
    started = processes.start(guarded.train, str(tmp_path / "run"), "80", kind, str(size), size=size, folder=tmp_path)
    assert processes.finish(started) == [0] * size
    folder, _ = undisturbed(kind)
    keys = ("step", "level", "action", "tensor", "statistic", "before", "after")
    assert told(tmp_path / "run", *keys) == told(folder, *keys)
    for one, other in zip(actions(tmp_path / "run"), actions(folder), strict=True):
        assert one["value"] == pytest.approx(other["value"], rel=1e-3)
    wanted = losses(folder)
    assert losses(tmp_path / "run") == pytest.approx(wanted, rel=1e-3)
    if kind == "wild":
        assert only(tmp_path / "run", "rollback")["skipped"] == only(folder, "rollback")["skipped"]


# --- clipping rules in a task -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_zclip_limits_a_wild_step_of_a_task_and_is_in_the_checkpoint(tmp_path: Path) -> None:
    def wild(num_units: int, zclip: ZClip | None) -> Guarded:
        return Guarded(num_units, act=False, wild=(45,), clip=0.0, zclip=zclip)

    task = guarded.run(tmp_path, wild(60, ZClip()))
    assert checkpoint.read_manifest(tmp_path).json["zclip"] == task.zclip.state()
    plain = guarded.run(tmp_path / "plain", wild(60, None))
    assert sum(losses(tmp_path)[step] for step in range(47, 57)) < sum(
        losses(tmp_path / "plain")[step] for step in range(47, 57)
    )
    assert guarded.weights(task) != guarded.weights(plain)
    guarded.run(tmp_path / "halves", wild(30, ZClip()))
    resumed = guarded.run(tmp_path / "halves", wild(60, ZClip()))
    assert guarded.weights(resumed) == guarded.weights(task)


def test_the_rate_between_steps_is_the_schedules(undisturbed: Callable[[str], tuple[Path, Guarded]]) -> None:
    _, task = undisturbed("stall")
    assert torch.tensor([group["lr"] for group in task.optimizers["adamw"].param_groups]).tolist() == pytest.approx(
        [3e-2]
    )
