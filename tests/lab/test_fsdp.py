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
    return counted["rows"][case]["measured"]


def traffic(found: dict[str, Any]) -> tuple[int, int, int]:
    return found["all_gathers"], found["reduce_scatters"], found["all_reduces"]


def test_every_formula_holds_on_every_rank(counted: dict[str, Any]) -> None:
    wrong = {name: found for name, found in counted["rows"].items() if not found["agrees"]}
    assert not wrong


def test_full_shard_gathers_2n_or_2n_minus_1_times_and_grad_op_n_times(counted: dict[str, Any]) -> None:
    assert traffic(row(counted, "full shard, last unit too")) == (2 * N, N, 0)
    assert traffic(row(counted, "full shard")) == (2 * N - 1, N, 0)
    assert traffic(row(counted, "grad-op")) == (N, N, 0)
    assert traffic(row(counted, "replicated")) == (0, 0, N)


def test_bytes_are_the_papers(counted: dict[str, Any]) -> None:
    ranks = counted["processes"]
    share = (ranks - 1) / ranks
    assert row(counted, "full shard, last unit too")["bytes"] == 3 * MODEL_BYTES * share
    assert row(counted, "full shard")["bytes"] == (3 * MODEL_BYTES - 4 * HEAD) * share
    assert row(counted, "grad-op")["bytes"] == 2 * MODEL_BYTES * share
    assert row(counted, "replicated")["bytes"] == 2 * MODEL_BYTES * share
    assert row(counted, "bf16 parameters and reduction")["bytes"] == row(counted, "full shard")["bytes"] / 2


def test_hybrid_adds_n_all_reduces_of_shards(counted: dict[str, Any]) -> None:
    if counted["processes"] < 4:
        pytest.skip("hybrid needs four processes")
    extra = 2 * (MODEL_BYTES / 2) * (4 - 2) / 4
    assert traffic(row(counted, "hybrid, last unit too")) == (2 * N, N, N)
    assert row(counted, "hybrid, last unit too")["bytes"] == 3 * MODEL_BYTES / 2 + extra
    assert traffic(row(counted, "hybrid")) == (2 * N - 1, N, N)
    assert traffic(row(counted, "hybrid grad-op")) == (N, N, N)
    assert row(counted, "hybrid grad-op")["bytes"] == 2 * MODEL_BYTES / 2 + extra


def test_micro_steps_that_are_not_synchronised_reduce_nothing(counted: dict[str, Any]) -> None:
    units = 4 + 1

    def by_step(case: str) -> list[tuple[int, int, int]]:
        return [traffic(part) for part in row(counted, case)["by_micro_step"]]

    once = (2 * units - 1, units, 0)
    assert by_step("3 micro-steps, each reduced") == [once] * 3
    assert by_step("3 micro-steps, last reduced") == [(2 * units - 1, 0, 0)] * 2 + [once]
    assert by_step("3 micro-steps, last reduced, grad-op kept") == [(units, 0, 0), (0, 0, 0), (0, units, 0)]


def test_gathered_at_most_are_the_two_largest_neighbours_or_the_largest(counted: dict[str, Any]) -> None:
    assert TABLE > BLOCK
    assert row(counted, "full shard")["peak_unsharded"] == BLOCK + HEAD
    assert row(counted, "full shard, prefetch in forward too")["peak_unsharded"] == BLOCK + HEAD
    assert row(counted, "full shard, no prefetch")["peak_unsharded"] == HEAD
    assert row(counted, "grad-op")["peak_unsharded"] == fsdp.MODEL.num_parameters
    assert row(counted, "root encloses the blocks")["peak_unsharded"] == TABLE + HEAD + 2 * BLOCK


def test_states_units_and_activations_are_within_a_tenth(counted: dict[str, Any]) -> None:
    ranks = counted["processes"]
    for name, found in counted["rows"].items():
        measured, predicted = found["measured"], found["predicted"]
        if name != "rows that do not divide":
            assert measured["state_bytes"] == 16 * fsdp.MODEL.num_parameters / found["shard"]
            assert found["shard"] in (1, 2, ranks)
        if found["param_dtype"] == "fp32":
            assert measured["kept_bytes"] == pytest.approx(predicted["kept_bytes"], rel=0.1), name
            assert measured["memory_bytes"] == pytest.approx(predicted["memory_bytes"], rel=0.1), name
            assert measured["allocator_peak"] > measured["kept_bytes"]


def test_every_strategy_trains_the_same(counted: dict[str, Any]) -> None:
    same = [found for found in counted["rows"].values() if found["param_dtype"] == "fp32" and found["num_micro"] == 1]
    losses = [found["measured"]["loss"] for found in same if found["case"] != "rows that do not divide"]
    assert len(losses) >= 8
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
