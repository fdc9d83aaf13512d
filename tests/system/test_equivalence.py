"""Settings that must not change what is computed: 50 steps, float32, 1e-5 relative."""

from pathlib import Path

import pytest
import torch
from pretraining import losses, train

from puna.train.metrics import read_events

STEPS = (
    "--train.tokens",
    "51200",
    "--schedule.warmup_tokens",
    "10240",
    "--checkpoint.every",
    "50",
    "--eval.tokens",
    "0",
)
SETTINGS = {
    "two processes, full shard": (2, []),
    "two processes, grad-op": (2, ["--mesh.reshard_after_forward", "false", "--health.logits_every", "7"]),
    "four processes, hybrid 2 x 2": (4, ["--mesh.dp_replicate", "2", "--train.micro_batch", "2"]),
    "accumulation 4": (1, ["--train.micro_batch", "2"]),
    "full recompute": (1, ["--train.recompute", "full"]),
    "selective recompute": (1, ["--train.recompute", "selective"]),
    "unpacked documents": (1, ["--data.packing", "unpacked"]),
}


@pytest.fixture(scope="module")
def reference(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """Losses of one process that takes the whole batch at once."""
    run = tmp_path_factory.mktemp("reference") / "run"
    assert train(run, shards, *STEPS, "--train.micro_batch", "8") == [0]
    return torch.tensor(losses(run), dtype=torch.float64)


@pytest.mark.parametrize("name", SETTINGS)
def test_same_losses(name: str, shards: Path, reference: torch.Tensor, tmp_path: Path) -> None:
    size, overrides = SETTINGS[name]
    assert train(tmp_path / "run", shards, *STEPS, *overrides, size=size) == [0] * size
    found = torch.tensor(losses(tmp_path / "run"), dtype=torch.float64)
    assert len(found) == 50
    assert ((found - reference) / reference).abs().max() <= 1e-5


def test_the_comparison_can_fail(shards: Path, reference: torch.Tensor, tmp_path: Path) -> None:
    assert train(tmp_path / "run", shards, *STEPS, "--train.eps", "1e-5") == [0]
    found = torch.tensor(losses(tmp_path / "run"), dtype=torch.float64)
    assert ((found - reference) / reference).abs().max() > 1e-5


@pytest.mark.parametrize("compiled", ["false", pytest.param("true", marks=pytest.mark.slow)])
def test_attention_logits_and_log_z_are_looked_at_now_and_then(compiled: str, shards: Path, tmp_path: Path) -> None:
    looked, plain = tmp_path / "looked", tmp_path / "plain"
    words = [
        "--train.tokens",
        "6144",
        "--schedule.warmup_tokens",
        "0",
        "--eval.tokens",
        "0",
        "--train.compile",
        compiled,
    ]
    assert train(looked, shards, *words, "--health.logits_every", "2", "--health.record_every", "1") == [0]
    records = [event for event in read_events(looked) if event["event"] == "health"]
    assert ["max_logit" in record for record in records] == [False, True] * 3
    assert records[1]["z"] == pytest.approx(torch.tensor(512.0).log().item(), rel=0.1), "even, so early"
    assert 0 < records[1]["max_logit"] < 100
    assert train(plain, shards, *words, "--health.logits_every", "0") == [0]
    assert losses(looked) == losses(plain)
