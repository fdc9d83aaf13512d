"""The loop around a task: when it evaluates and saves, what it records, how it ends."""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from pydantic import ValidationError

from puna.errors import CheckpointError, NonFinite, Unfinished
from puna.train import checkpoint
from puna.train.config import CheckpointConfig, EvalConfig, LoopConfig, RunConfig
from puna.train.loop import Run
from puna.train.metrics import MFU_FORMULA, read_events
from puna.train.task import Cursor, State, StepReport, Task


class Plain(Task):
    """Counts; waits a little for its data."""

    def __init__(self, num_units: int = 5, wait: float = 0.0) -> None:
        self.num_units, self.wait, self.draws = num_units, wait, []

    def units(self, cursor: Cursor) -> Iterator[int]:
        for unit in range(cursor.units, self.num_units):
            time.sleep(self.wait)
            yield unit

    def step(self, unit: int) -> StepReport:
        self.draws.append(float(torch.rand(())))
        return StepReport(1 / (unit + 1), 4, 8, {"lr": 0.5})

    def state(self) -> State:
        return {}

    def evaluate(self, split: str) -> dict[str, float]:
        return {"loss": 3.0}

    def describe(self) -> dict[str, Any]:
        return {"total_tokens": 8 * self.num_units, "flops_per_token": 100.0, "num_parameters": 7}


def run(task: Task, folder: Path, every: int = 2, eval_every: int = 0, eval_tokens: int = 1, **more: Any) -> Run:
    config = LoopConfig(
        run=RunConfig(tensorboard=False, device="cpu"),
        checkpoint=CheckpointConfig(every=every, **more),
        eval=EvalConfig(every=eval_every, tokens=eval_tokens),
    )
    made = Run(task, folder, config, facts={"mesh": "one"}, peak_flops=1e6)
    made.go()
    return made


def steps_of(folder: Path, kind: str) -> list[int]:
    return [event["step"] for event in read_events(folder) if event["event"] == kind]


def test_a_run_records_what_it_does(tmp_path: Path) -> None:
    done = run(Plain(), tmp_path, eval_every=2, initial=True)
    assert done.cursor == Cursor(5, 40)
    assert steps_of(tmp_path, "step") == [1, 2, 3, 4, 5]
    assert steps_of(tmp_path, "checkpoint") == [0, 2, 4, 5]
    assert steps_of(tmp_path, "eval") == [2, 4, 5]
    assert checkpoint.complete_steps(tmp_path) == [0, 4, 5]
    start, *_, stop = read_events(tmp_path)
    assert (start["mesh"], start["num_parameters"], start["world_size"]) == ("one", 7, 1)
    assert (start["mfu_formula"], start["peak_flops"]) == (MFU_FORMULA, 1e6)
    assert (stop["event"], stop["reason"], stop["step"]) == ("stop", "done", 5)


def test_a_step_record(tmp_path: Path) -> None:
    run(Plain(2, wait=0.05), tmp_path)
    record = next(event for event in read_events(tmp_path) if event["event"] == "step")
    assert (record["step"], record["tokens"], record["loss"], record["lr"]) == (1, 8, 1.0, 0.5)
    assert 0.05 <= record["data_wait_s"] < 1
    assert record["tokens_per_s"] == pytest.approx(8 / (record["step_s"] + record["data_wait_s"]))
    assert record["mfu"] == pytest.approx(record["tokens_per_s"] * 100 / 1e6)
    assert record["peak_memory_bytes"] > 2**20


def test_a_finished_run_has_nothing_left_to_do(tmp_path: Path) -> None:
    run(Plain(), tmp_path)
    assert run(Plain(), tmp_path).cursor == Cursor(5, 40)
    assert steps_of(tmp_path, "step") == [1, 2, 3, 4, 5]
    assert steps_of(tmp_path, "resume") == [5]
    assert run(Plain(7), tmp_path).cursor.units == 7, "more work was asked for"
    assert steps_of(tmp_path, "step") == [1, 2, 3, 4, 5, 6, 7]


def test_random_numbers_do_not_depend_on_where_a_run_was_resumed(tmp_path: Path) -> None:
    whole, first, second = Plain(4), Plain(2), Plain(4)
    run(whole, tmp_path / "whole")
    run(first, tmp_path / "parts")
    torch.rand(3)
    run(second, tmp_path / "parts")
    assert whole.draws == first.draws + second.draws


def test_without_held_out_tokens_there_is_no_evaluation(tmp_path: Path) -> None:
    run(Plain(), tmp_path, eval_tokens=0)
    assert not steps_of(tmp_path, "eval")


def test_an_incomplete_checkpoint_is_passed_over_with_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(Plain(), tmp_path)
    (tmp_path / "checkpoints" / "step-00000005" / "manifest.json").unlink()
    run(Plain(), tmp_path)
    skipped = [event["folder"] for event in read_events(tmp_path) if event["event"] == "checkpoint_skipped"]
    assert skipped == ["step-00000005"]
    assert steps_of(tmp_path, "resume") == [4]
    said = capsys.readouterr().err
    assert "step-00000005 is incomplete (a save was cut short) and is passed over" in said
    assert "resumed from step 4 (32 tokens)" in said
    assert checkpoint.complete_steps(tmp_path) == [4, 5]


class Diverging(toys.Regression):
    def loss_sum(self, batch: toys.Batch) -> torch.Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().loss_sum(batch) * (math.nan if self.calls == 6 else 1.0)


def test_a_run_that_is_not_finite_saves_nothing_more(tmp_path: Path) -> None:
    with pytest.raises(NonFinite, match="step 3 is not finite"):
        run(Diverging(5), tmp_path)
    assert checkpoint.complete_steps(tmp_path) == [2]
    stop = read_events(tmp_path)[-1]
    assert (stop["event"], stop["error"], stop["step"]) == ("stop", "NonFinite", 2)
    assert "step 3 is not finite" in stop["reason"]


def test_a_checkpoint_of_another_task_is_refused(tmp_path: Path) -> None:
    run(toys.TwoPhases(2), tmp_path)
    with pytest.raises(CheckpointError, match=r"do not both have average\.count"):
        run(toys.Regression(4), tmp_path)
    assert steps_of(tmp_path, "step") == [1, 2]


def test_the_loop_costs_little(tmp_path: Path) -> None:
    began = time.process_time()
    run(Plain(300), tmp_path, every=1000)
    assert time.process_time() - began < 300 * 2e-3 + 0.3


class Short(Plain):
    """Promises more than there is."""

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"total_tokens": 100}


def test_work_that_ends_before_its_tokens_is_unfinished(tmp_path: Path) -> None:
    words = "^the work ended at step 5 with 40 of 100 tokens done: there is no more data$"
    for _ in range(2):  # resumed, it is unfinished still
        with pytest.raises(Unfinished, match=words) as caught:
            run(Short(), tmp_path)
        assert caught.value.exit_code == 4
    assert steps_of(tmp_path, "step") == [1, 2, 3, 4, 5]
    assert checkpoint.complete_steps(tmp_path) == [4, 5], "what was done is saved"
    assert read_events(tmp_path)[-1]["error"] == "Unfinished"


class Judged(Plain):
    """Held-out losses as given, by evaluation."""

    LOSSES = (5.0, 2.0, math.nan, 3.0, 2.0, 4.0, 4.0)

    def evaluate(self, split: str) -> dict[str, float]:
        self.evaluations = getattr(self, "evaluations", 0) + 1
        return {"loss": self.LOSSES[self.evaluations - 1]}


def test_the_best_and_every_nth_checkpoint_are_kept(tmp_path: Path) -> None:
    run(Judged(14), tmp_path, every=2, eval_every=2, keep=1, keep_best=True, keep_every=6, initial=True)
    assert checkpoint.complete_steps(tmp_path) == [0, 4, 6, 12, 14]
    losses = {step: checkpoint.read_manifest(tmp_path, step).heldout_loss for step in (0, 4, 6, 12, 14)}
    assert losses == {0: None, 4: 2.0, 6: None, 12: 4.0, 14: 4.0}


def test_an_evaluation_of_another_step_says_nothing_of_a_checkpoint(tmp_path: Path) -> None:
    run(Judged(5), tmp_path, every=2, eval_every=3)
    assert checkpoint.read_manifest(tmp_path, 4).heldout_loss is None
    assert checkpoint.read_manifest(tmp_path, 5).heldout_loss == 2.0, "the end is always evaluated"


@pytest.mark.parametrize(
    ("retention", "evaluation", "words"),
    [
        (
            {"every": 4, "keep_every": 6},
            {},
            "keep_every is 6 .* every 4 steps .*make it a multiple, such as 8",
        ),
        (
            {"every": 4, "keep_best": True},
            {},
            "keep_best needs held-out .*eval.every is 0 .*set eval.every to 4",
        ),
        ({"every": 4, "keep_best": True}, {"every": 3}, "eval.every is 3 and checkpoint.every 4"),
    ],
)
def test_retention_that_cannot_be_is_refused(retention: Any, evaluation: Any, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        LoopConfig(checkpoint=CheckpointConfig(**retention), eval=EvalConfig(**evaluation))
