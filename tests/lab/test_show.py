"""What `puna lab fsdp` prints."""

import json
import sys

import pytest

from puna import cli
from puna.lab import show
from puna.lab.overlap import overlap
from puna.plan.fsdp import Sharding

ROW = {
    "case": "full shard",
    "num_units": 6,
    "num_micro": 1,
    "accumulate": "local",
    "step_seconds": 0.0123,
    "shard": 4,
    "replicas": 1,
    "reshard": "inner",
    "prefetch": "backward",
    "encloses": False,
    "param_bytes": 4,
    "reduce_bytes": 4,
}
FIGURES = {
    "all_gathers": 11,
    "reduce_scatters": 6,
    "all_reduces": 0,
    "bytes": 1500.0,
    "peak_unsharded": 99,
    "memory_bytes": 2_000_000,
}
MODEL = {"num_layers": 4, "dim": 128, "vocab_size": 2048}


def result(**changes: float) -> dict:
    row = {**ROW, "measured": FIGURES | changes, "predicted": FIGURES}
    built = {"deferred_peak_bytes": 1e6, "bound_bytes": 2e6, "whole_first_peak_bytes": 5e6, "same_weights": True}
    runs = [{"processes": 4, "rows": [row], "deferred": built}]
    return {"model": MODEL, "num_parameters": 1_000_000, "batch": 2, "seq_len": 128, "runs": runs}


def test_a_figure_stands_beside_its_formula(capsys: pytest.CaptureFixture[str]) -> None:
    show.counted(result())
    out = " ".join(capsys.readouterr().out.split())
    for words in (
        "11 = 2N-1",
        "6 = N",
        "two neighbours",
        "4 processes",
        "+0.0%",
        "1,000,000 parameters",
        "the same weights",
    ):
        assert words in out


def test_a_wrong_figure_shows_both(capsys: pytest.CaptureFixture[str]) -> None:
    show.counted(result(all_gathers=12))
    assert "12, not 11" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("changes", "sent"),
    [
        ({"reshard": "all"}, "3M (F-1)/F"),
        ({}, "(3M-m) (F-1)/F"),
        ({"param_bytes": 2}, "(2M-m+G) (F-1)/F"),
        ({"reshard": "none"}, "2M (F-1)/F"),
        ({"reshard": "none", "replicas": 2}, "2M (F-1)/F + 2G/F (R-1)/R"),
        ({"shard": 1, "replicas": 4}, "2G/F (R-1)/R"),
        ({"num_micro": 3}, "(3(2M-m)+G) (F-1)/F"),
        ({"num_micro": 3, "accumulate": "reduced"}, "(3(3M-m)) (F-1)/F"),
        ({"num_micro": 3, "accumulate": "kept", "reshard": "none"}, "2M (F-1)/F"),
    ],
)
def test_formulas(changes: dict, sent: str) -> None:
    assert show.formulas(ROW | changes)["bytes"] == sent


def test_a_row_names_its_sharding() -> None:
    """The rows hold what the formulas are chosen by."""
    assert {"shard", "replicas", "reshard", "prefetch", "encloses"} <= set(Sharding.__dataclass_fields__) & set(ROW)


def puna(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["puna", *words])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 0


def test_simulate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    puna(monkeypatch, "lab", "fsdp", "--simulate", "--json")
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(overlap()))
    puna(monkeypatch, "lab", "fsdp", "--simulate")
    out = capsys.readouterr().out
    assert "GPT-175B, 128 GPUs, batch 1" in out
    assert "wire bound" in out


def test_counting_passes_processes_and_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []
    monkeypatch.setattr("puna.lab.fsdp.count", lambda *given: seen.append(given) or result())
    puna(monkeypatch, "lab", "fsdp", "--processes", "3", "--steps", "2", "--json")
    assert json.loads(capsys.readouterr().out)["num_parameters"] == 1_000_000
    puna(monkeypatch, "lab", "fsdp")
    assert seen == [((3,), 2), ((2, 4), 5)]
