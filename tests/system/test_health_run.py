"""Every pretraining run is watched; the settings of the controller and of the clipping rules reach it."""

from pathlib import Path
from typing import Any

import pytest
from pretraining import losses, train

from puna.train import checkpoint
from puna.train.metrics import read_events

STEPS = ("--train.tokens", "8192", "--checkpoint.every", "4", "--eval.tokens", "0", "--health.record_every", "4")


def found(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(run) if event["event"] == kind]


@pytest.fixture(scope="module")
def watched(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps with the settings as they are."""
    run = tmp_path_factory.mktemp("watched") / "run"
    assert train(run, shards, *STEPS) == [0]
    return run


def test_a_run_is_watched_and_not_steered(watched: Path) -> None:
    (start,) = found(watched, "health_start")
    assert (start["optimizer"], start["step"]) == ("AdamW", 1)
    assert list(start["tensors"].items())[:2] == [
        ("model.embed_tokens.weight", "embedding"),
        ("model.layers.0.input_layernorm.weight", "layer 0"),
    ]
    assert [record["step"] for record in found(watched, "health")] == [4, 8]
    assert not found(watched, "health_off") + found(watched, "health_action")
    assert checkpoint.complete_steps(watched) == [4, 8]
    assert {"health"} < set(checkpoint.read_manifest(watched).states)


def test_watching_changes_no_weight(watched: Path, shards: Path, tmp_path: Path) -> None:
    assert train(tmp_path / "run", shards, *STEPS, "--health.enabled", "false") == [0]
    assert losses(tmp_path / "run") == losses(watched)
    assert not found(tmp_path / "run", "health_start")


def test_a_steered_run_keeps_its_beginning(watched: Path, shards: Path, tmp_path: Path) -> None:
    assert train(tmp_path / "run", shards, *STEPS, "--health.act", "true") == [0]
    assert losses(tmp_path / "run") == losses(watched), "nothing was wrong, so nothing was done"
    assert checkpoint.complete_steps(tmp_path / "run") == [0, 4, 8]


@pytest.mark.slow
def test_a_watched_run_goes_on_unwatched_and_back(watched: Path, shards: Path, tmp_path: Path) -> None:
    run, first = tmp_path / "run", (*STEPS[2:], "--train.tokens", "8192")
    assert train(run, shards, *first, "--health.enabled", "false") == [0]
    assert train(run, shards, *first, "--health.act", "true") == [0]
    assert train(run, shards, *first) == [0]
    assert [event["step"] for event in found(run, "resume")] == [8, 8]
    assert losses(run) == losses(watched)


@pytest.mark.parametrize(("rule", "state"), [("zclip", "zclip"), ("spam", "spam")])
def test_clipping_rules_are_settings(rule: str, state: str, shards: Path, tmp_path: Path) -> None:
    assert train(tmp_path / "run", shards, *STEPS, "--train.clip_rule", rule) == [0]
    assert state in checkpoint.read_manifest(tmp_path / "run").json


def test_stable_adamw_is_a_setting(shards: Path, tmp_path: Path) -> None:
    assert train(tmp_path / "run", shards, *STEPS, "--train.optimizer", "stable_adamw", "--train.clip", "0") == [0]
    assert found(tmp_path / "run", "health_start")[0]["optimizer"] == "StableAdamW"
    assert "optim" in checkpoint.read_manifest(tmp_path / "run").states
