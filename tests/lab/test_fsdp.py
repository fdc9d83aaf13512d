"""FSDP, counted: the paper's collectives, bytes and memory, on 2 and 4 processes."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode

from puna.lab import fsdp
from puna.lab.counters import Allocations, Collectives, Unsharded
from puna.train import mesh
from puna.train.config import MeshConfig, RunConfig

MODEL_BYTES = 4 * fsdp.MODEL.num_parameters
BLOCK = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 192 + 2 * 64
TABLE = 1024 * 64
HEAD = TABLE + 64
N = 4 + 2


def row(counted: dict[str, Any], case: str) -> dict[str, Any]:
    if case not in counted["rows"]:
        pytest.skip(f"{case}: not among these cases")
    return counted["rows"][case]["measured"]


def traffic(found: dict[str, Any]) -> tuple[int, int, int]:
    return found["all_gathers"], found["reduce_scatters"], found["all_reduces"]


def test_every_formula_holds_on_every_rank(counted: dict[str, Any]) -> None:
    assert len(counted["rows"]) >= 5
    assert not {name: found for name, found in counted["rows"].items() if not found["agrees"]}


@pytest.mark.parametrize(
    ("case", "calls", "models"),
    [
        ("full shard, last unit too", (2 * N, N, 0), 3),
        ("full shard", (2 * N - 1, N, 0), 3 - 4 * HEAD / MODEL_BYTES),
        ("grad-op", (N, N, 0), 2),
        ("bf16 parameters and reduction", (2 * N - 1, N, 0), (3 - 4 * HEAD / MODEL_BYTES) / 2),
    ],
)
def test_collectives_and_bytes_are_the_papers(
    case: str, calls: tuple[int, int, int], models: float, counted: dict[str, Any]
) -> None:
    """2N, 2N-1 or N gathers; 3M (F-1)/F bytes, less the last unit where it is kept; 2M (F-1)/F in grad-op."""
    found, ranks = row(counted, case), counted["processes"]
    assert traffic(found) == calls
    assert found["bytes"] == models * MODEL_BYTES * (ranks - 1) / ranks


def test_replication_all_reduces_everything(counted: dict[str, Any]) -> None:
    found, ranks = row(counted, "replicated"), counted["processes"]
    assert traffic(found) == (0, 0, N)
    assert found["bytes"] == 2 * MODEL_BYTES * (ranks - 1) / ranks


@pytest.mark.parametrize(
    ("case", "gathers", "models"),
    [
        ("hybrid, last unit too", 2 * N, 3),
        ("hybrid", 2 * N - 1, 3 - 4 * HEAD / MODEL_BYTES),
        ("hybrid grad-op", N, 2),
    ],
)
def test_hybrid_adds_n_all_reduces_of_shards(case: str, gathers: int, models: float, counted: dict[str, Any]) -> None:
    """2 x 2 ranks: as on two, and 2 (M / F) (W - F) / W bytes more."""
    found = row(counted, case)
    assert traffic(found) == (gathers, N, N)
    assert found["bytes"] == models * MODEL_BYTES / 2 + 2 * (MODEL_BYTES / 2) * (4 - 2) / 4


@pytest.mark.parametrize(
    ("case", "steps"),
    [
        ("3 micro-steps, each reduced", [(9, 5, 0), (9, 5, 0), (9, 5, 0)]),
        ("3 micro-steps, last reduced", [(9, 0, 0), (9, 0, 0), (9, 5, 0)]),
        ("3 micro-steps, last reduced, grad-op kept", [(5, 0, 0), (0, 0, 0), (0, 5, 0)]),
    ],
)
def test_micro_steps_that_are_not_synchronised_reduce_nothing(
    case: str, steps: list[tuple[int, int, int]], counted: dict[str, Any]
) -> None:
    """The layout of training: five units, of which the root stays gathered."""
    assert [traffic(part) for part in row(counted, case)["by_micro_step"]] == steps


@pytest.mark.parametrize(
    ("case", "elements"),
    [
        ("full shard", BLOCK + HEAD),
        ("full shard, last unit too", BLOCK + HEAD),
        ("full shard, prefetch in forward too", BLOCK + HEAD),
        ("full shard, no prefetch", HEAD),
        ("grad-op", MODEL_BYTES // 4),
        ("root encloses the blocks", TABLE + HEAD + 2 * BLOCK),
    ],
)
def test_gathered_at_most_are_the_two_largest_neighbours_or_the_largest(
    case: str, elements: int, counted: dict[str, Any]
) -> None:
    assert HEAD > TABLE > BLOCK
    assert row(counted, case)["peak_unsharded"] == elements


def test_states_units_and_activations_are_within_a_tenth(counted: dict[str, Any]) -> None:
    for name, found in counted["rows"].items():
        measured, predicted = found["measured"], found["predicted"]
        if name != "rows that do not divide":
            assert measured["state_bytes"] == 4 * MODEL_BYTES / found["shard"]
        if found["param_dtype"] == "fp32":
            assert measured["kept_bytes"] == pytest.approx(predicted["kept_bytes"], rel=0.1), name
            assert measured["memory_bytes"] == pytest.approx(predicted["memory_bytes"], rel=0.1), name


def test_every_strategy_trains_the_same(counted: dict[str, Any]) -> None:
    odd = ("bf16", "rows that", "3 micro")
    losses = [found["measured"]["loss"] for name, found in counted["rows"].items() if not name.startswith(odd)]
    assert len(losses) >= 4
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-6)


def test_deferred_initialisation_needs_the_shards_and_one_parameter(counted: dict[str, Any]) -> None:
    built = counted["deferred"]
    assert built["deferred_peak_bytes"] == pytest.approx(built["bound_bytes"], abs=256), "a few scalars more"
    assert built["whole_first_peak_bytes"] >= MODEL_BYTES
    assert built["same_weights"]


# --- the instruments themselves


@pytest.fixture
def alone() -> Any:
    with mesh.open_mesh(RunConfig(device="cpu"), MeshConfig()) as place:
        yield place


def test_a_collective_that_is_not_fsdps_does_not_pass_uncounted(alone: Any) -> None:
    counter = Collectives()
    counter.begin_micro_step()
    with counter, pytest.raises(KeyError, match="broadcast_"):
        torch.distributed.broadcast(torch.zeros(1), 0)


def test_the_counter_agrees_with_torchs_own_and_sees_sizes(alone: Any) -> None:
    counter = Collectives()
    counter.begin_micro_step()
    with CommDebugMode() as theirs, counter:
        torch.distributed.all_gather_single(torch.zeros(4), torch.zeros(4))
        torch.distributed.all_reduce(torch.zeros(4))
    (found,) = counter.micro_steps
    assert theirs.get_total_counts() == found.all_gathers + found.all_reduces == 2
    assert found.bytes == 0, "a group of one sends nothing"


def test_the_ledger_leaves_fsdp_as_it_was(alone: Any) -> None:
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    before = [getattr(FSDPParamGroup, name) for name in Unsharded.CHANGES]
    model = fully_shard(nn.Linear(3, 5), mesh=init_device_mesh("cpu", (1,)))
    with Unsharded(model) as ledger:
        model(torch.ones(1, 3)).sum().backward()
    assert (ledger.peak, ledger.live) == (20, 0)
    assert [getattr(FSDPParamGroup, name) for name in Unsharded.CHANGES] == before


def test_the_allocators_balance() -> None:
    with Allocations() as watch:
        kept = torch.empty(1000)
        with torch.profiler.record_function("inside"):
            torch.empty(5000)
            inside = torch.empty(300)
    assert watch.peak >= 4 * 6000
    assert watch.kept_by("inside") == pytest.approx(4 * 300, abs=64)
    del kept, inside
