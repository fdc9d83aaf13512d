"""Runs of the laboratory: what a specification does to training, and that the monitor changes nothing."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from puna.errors import DataError
from puna.lab import adam_run, adam_text, adam_trial
from puna.lab.adam_arms import MITIGATIONS, Clip
from puna.lab.adam_draw import KINDS, draw
from puna.lab.adam_jobs import ARMS, do
from puna.lab.adam_rescue import rescue
from puna.lab.adam_spec import Job, RunSpec
from puna.lab.adam_store import complete
from puna.train.config import HealthConfig

ROOT = Path(__file__).parents[2]
EARLY = ("model.embed_tokens.weight", "model.layers.0.*")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of words."""
    words = ["ash", "bay", "cedar", "fir", "oak", "elm\n", "yew  ", "larch"]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(np.random.default_rng(0).choice(words, 8_000)))
    return str(path)


@pytest.fixture
def small(text: str) -> dict[str, Any]:
    """Settings of a run of a second."""
    return {"data": text, "dim": 16, "num_layers": 1, "steps": 12, "warmup": 4, "batch": 4}


def test_batches_are_a_function_of_seed_and_step(text: str) -> None:
    first = adam_text.batch(text, 1, 5, 4, 16)
    assert np.array_equal(first, adam_text.batch(text, 1, 5, 4, 16))
    assert not np.array_equal(first, adam_text.batch(text, 1, 6, 4, 16))
    assert not np.array_equal(first, adam_text.batch(text, 2, 5, 4, 16))
    assert b"  " not in adam_text.characters(text).tobytes()


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("few words")
    with pytest.raises(DataError, match=r"few.txt holds 9 bytes of text\. Give at least 10,000"):
        adam_text.characters(str(tmp_path / "few.txt"))


def test_the_monitor_changes_no_loss(small: dict[str, Any]) -> None:
    spec = RunSpec(**small)
    watched, alone = (adam_trial.train(spec, health=health) for health in (HealthConfig(), None))
    assert watched["columns"]["loss"] == alone["columns"]["loss"]
    assert watched["heldout"] == alone["heldout"]
    assert len(watched["columns"]["score"]) == 12
    assert "score" not in alone["columns"]


def test_a_stall_scales_gradients_for_its_length(small: dict[str, Any]) -> None:
    spec = RunSpec(**small, tensors=EARLY, start=3, length=4, depth=1e-6, release=2)
    factors = [adam_run.stall_factor(spec, step) for step in range(11)]
    assert factors == pytest.approx([1, 1, 1, 1e-6, 1e-6, 1e-6, 1e-6, 1e-4, 1e-2, 1, 1])
    model = adam_run.build(spec)
    norms = {}
    for step in (2, 3):
        adam_run.backward(spec, model, adam_run.stalling(spec, model), step)
        norms[step] = [p.grad.norm().item() for p in (model.model.embed_tokens.weight, model.lm_head.weight)]  # type: ignore[union-attr]
        model.zero_grad()
    assert norms[3][0] < 1e-4 * norms[2][0]
    assert norms[3][1] > 0.1 * norms[2][1]


def test_settings_change_for_the_length_and_return() -> None:
    spec = RunSpec(
        warmup=100, warmup_cut=True, rate=1.0, start=10, length=5, eps_after=1e-3, beta2_after=0.3, batch_after=3
    )
    rates = [adam_run.rate_at(spec, step) for step in (9, 10, 14, 15)]
    assert rates == pytest.approx([0.1, 1.0, 1.0, 0.16])
    optimizer = adam_run.make_optimizer(spec, torch.nn.Linear(2, 2))
    seen = []
    for step in (9, 10, 15):
        adam_run.set_step(optimizer, spec, step)
        seen.append((optimizer.param_groups[0]["eps"], optimizer.param_groups[0]["betas"]))
    assert seen == [(1e-8, (0.9, 0.95)), (1e-3, (0.9, 0.3)), (1e-8, (0.9, 0.95))]


def test_bursts_of_data(small: dict[str, Any]) -> None:
    spec = RunSpec(**small, burst="flood", start=3, length=2)
    assert set(adam_run.windows_at(spec, 3).ravel()) == {ord(" ")}
    assert np.array_equal(adam_run.windows_at(spec, 5), adam_run.windows_at(RunSpec(**small), 5))
    repeat = RunSpec(**small, burst="repeat", start=3, length=2)
    assert np.array_equal(adam_run.windows_at(repeat, 3), adam_run.windows_at(repeat, 4))
    assert np.array_equal(adam_run.windows_at(spec, 4, passed=1), adam_run.windows_at(RunSpec(**small), 5)), (
        "passed over"
    )


def test_moments_in_bf16(small: dict[str, Any]) -> None:
    model = adam_run.build(RunSpec(**small))
    optimizer = adam_run.make_optimizer(RunSpec(**small), model)
    adam_run.backward(RunSpec(**small), model, [], 0)
    optimizer.step()
    adam_run.round_states(optimizer)
    state = optimizer.state[model.lm_head.weight]
    assert torch.equal(state["exp_avg_sq"], state["exp_avg_sq"].bfloat16().float())


def test_models_of_the_decoys(small: dict[str, Any]) -> None:
    frozen = adam_run.build(RunSpec(**small, frozen=("model.layers.0.*",)))
    assert not frozen.get_parameter("model.layers.0.mlp.up_proj.weight").requires_grad
    dormant = RunSpec(**small, adapter="dormant")
    model = adam_run.build(dormant)
    adam_run.backward(dormant, model, [], 0)
    up = model.get_parameter("model.layers.0.self_attn.q_proj.adapter_up")
    assert up.grad is not None
    assert up.grad.abs().max() == 0
    assert "outer" in dict(adam_run.build(RunSpec(**small, rank=2)).named_parameters()).__str__()
    with pytest.raises(DataError, match=r"No parameter is named layer\.9\. The names are model\.embed_tokens"):
        adam_run.build(RunSpec(**small, frozen=("layer.9",)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_drawn_run_can_be_trained(kind: str, text: str) -> None:
    spec = draw(kind, 1).model_copy(update={"data": text, "steps": 2, "dim": 16})
    assert adam_trial.train(spec)["end"] == "done"


@pytest.mark.parametrize("arm", sorted({*MITIGATIONS, *ARMS}))
def test_every_remedy_trains_and_all_but_one_change_something(arm: str, small: dict[str, Any]) -> None:
    spec = RunSpec(**(small | {"steps": 9, "rate": 0.3}), beta2=0.999, tensors=EARLY, start=0, length=5, depth=1e-9)
    plain = adam_trial.train(spec)["columns"]["loss"]
    under = do(Job(spec, arm, watch=False))["columns"]["loss"]
    assert (plain == under) == (arm in ("nothing", "controller")), "in nine steps the controller has nothing to do yet"


def test_clipping_bounds_the_norm(small: dict[str, Any]) -> None:
    spec = RunSpec(**small)
    model = adam_run.build(spec)
    trial = adam_trial.Trial(spec, model, adam_run.make_optimizer(spec, model), [])
    adam_run.backward(spec, model, [], 0)
    for p in trial.trained:
        p.grad *= 1e3  # type: ignore[operator]
    Clip(trial).before(trial)
    assert torch.nn.utils.get_total_norm([p.grad for p in trial.trained if p.grad is not None]) == pytest.approx(
        1, rel=1e-3
    )


def test_what_was_done_is_not_done_again(small: dict[str, Any], tmp_path: Path) -> None:
    jobs = [Job(RunSpec(**small | {"steps": 2}, seed=seed), watch=False) for seed in (1, 2)]
    first = complete(jobs, tmp_path, 1, "runs")
    assert [result["spec"]["seed"] for result in first] == [1, 2]
    path = tmp_path / jobs[0].file()
    path.write_text(json.dumps(first[0] | {"end": "kept"}))
    assert [result["end"] for result in complete(jobs, tmp_path, 1, "runs")] == ["kept", "done"]
    assert (
        Job(RunSpec(**small, seed=1), watch=False).file() != Job(RunSpec(**small, seed=1), "clip", watch=False).file()
    )
    assert Job(RunSpec(**small)).file() != Job(RunSpec(**small), health={"surge": 3.0}).file()


def test_rescue_counts_ends_near_the_reference(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heldout = {"a": 2.03, "b": 2.05, "reference": 2.0}

    def told(jobs: list[Job], *_: object) -> list[dict[str, Any]]:
        return [{"heldout": heldout["reference" if "reference" in job.spec.title else job.spec.title]} for job in jobs]

    monkeypatch.setattr("puna.lab.adam_rescue.complete", told)
    found = rescue([RunSpec(name="a", cause="x"), RunSpec(name="b", cause="y")], tmp_path, 1)
    assert found["nothing"]["rescued_pct"] == 50.0
    assert found["controller"]["by_cause"]["x"]["rescued_pct"] == 100.0


def test_the_bench_runs_a_list_of_ones_own(small: dict[str, Any], tmp_path: Path) -> None:
    rows = [
        small | {"cause": "plain", "seed": 1},
        small | {"cause": "stall", "seed": 2, "tensors": list(EARLY), "length": 5},
    ]
    (tmp_path / "runs.json").write_text(json.dumps(rows))
    command = [sys.executable, str(ROOT / "bench" / "health.py"), "--runs", "runs.json", "--out", "results", "--json"]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    keys = {"detected_pct", "median_lead_steps", "false_alarm_pct", "auc_ours", "auc_gradnorm", "auc_loss_z"}
    assert keys | {"auc_update_rms", "auc_stall_only", "by_cause"} <= set(found)
    assert (found["num_healthy"], found["false_alarm_pct"], found["detected_pct"]) == (2, 0.0, None)
