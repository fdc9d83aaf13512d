"""The parts of the main job that compute; the job itself is `make demo`."""

from pathlib import Path

import pytest

from puna.demo import _planned_tokens, _stages, main, resume_max_abs_loss_diff
from puna.errors import PunaError, UserError
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


def test_a_job_goes_on_with_the_tokens_it_was_started_with(tmp_path):
    (tmp_path / "demo.json").write_text('{"minutes": 9.0, "tokens": 123}')
    assert _planned_tokens(tmp_path, tmp_path / "shards", 9.0, 1.0) == 123
    with pytest.raises(UserError, match="holds a demo of 9 minutes, not 30"):
        _planned_tokens(tmp_path, tmp_path / "shards", 30.0, 1.0)


def test_another_run_is_left_alone(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="holds a run that is no demo"):
        _planned_tokens(tmp_path, tmp_path / "shards", 9.0, 1.0)
