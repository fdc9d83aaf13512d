"""The parts of the main job that compute; the job itself is `make demo`."""

from pathlib import Path

import pytest

from puna.demo import _stages, main, resume_max_abs_loss_diff
from puna.errors import PunaError
from puna.recipe import load
from puna.train.metrics import append_event


def record(run: Path, *losses: tuple[int, float]) -> None:
    for step, loss in losses:
        append_event(run, {"event": "step", "step": step, "loss": loss})


def test_the_difference_is_that_of_steps_done_twice(tmp_path):
    record(tmp_path, (1, 3.0), (2, 2.5), (3, 2.25))
    assert resume_max_abs_loss_diff(tmp_path) is None
    append_event(tmp_path, {"event": "resume", "step": 1})
    record(tmp_path, (2, 2.5), (3, 2.25), (4, 2.0))
    assert resume_max_abs_loss_diff(tmp_path) == 0
    record(tmp_path, (3, 2.125))
    assert resume_max_abs_loss_diff(tmp_path) == 0.125


def test_stages_stretch_with_the_run():
    recipe = load("demo").recipe
    words = _stages(2 * recipe.train.tokens)
    overrides = ["--train.tokens", str(2 * recipe.train.tokens), *map(str, words)]
    stretched = load("demo", overrides).recipe.schedule
    assert stretched.seq_stages == tuple((2 * start, size) for start, size in recipe.schedule.seq_stages)
    assert stretched.batch_stages == tuple((2 * start, size) for start, size in recipe.schedule.batch_stages)


def test_a_step_that_fails_ends_the_job_with_its_command(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("puna.demo.VOCAB_SIZE", 10)
    with pytest.raises(PunaError, match=r"puna corpus tokenizer .* ended with status 2"):
        main(tmp_path / "demo", minutes=1)
    assert "error: " in capfd.readouterr().err
