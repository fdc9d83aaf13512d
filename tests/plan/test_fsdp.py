"""The formulas of FSDP: the paper's closed forms, cases worked out by hand, padding."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.plan.fsdp import Sharding, Traffic, Unit, micro_step, peak_unsharded, ring_bytes, state_bytes


def chain(*sizes: int) -> list[Unit]:
    """Units of one parameter each."""
    return [Unit(f"unit {i}", ((size,),)) for i, size in enumerate(sizes)]


EVEN = st.lists(st.integers(1, 50).map(lambda size: 240 * size), min_size=2, max_size=6)


@given(EVEN, st.sampled_from([2, 3, 4, 5, 8]))
def test_full_shard_and_grad_op_are_the_papers_closed_forms(sizes: list[int], ranks: int) -> None:
    units, count, model = chain(*sizes), len(sizes), 4 * sum(sizes)
    share = (ranks - 1) / ranks
    whole = micro_step(units, Sharding(ranks, reshard="all"))
    assert whole == Traffic(2 * count, count, 0, pytest.approx(3 * model * share, rel=1e-12))
    kept_last = micro_step(units, Sharding(ranks))
    assert kept_last.all_gathers == 2 * count - 1
    assert kept_last.bytes == pytest.approx((3 * model - 4 * sizes[-1]) * share, rel=1e-12)
    grad_op = micro_step(units, Sharding(ranks, reshard="none"))
    assert grad_op == Traffic(count, count, 0, pytest.approx(2 * model * share, rel=1e-12))


@given(EVEN, st.sampled_from([(2, 2), (4, 2), (2, 4), (8, 3)]))
def test_hybrid_adds_an_all_reduce_of_shards(sizes: list[int], shape: tuple[int, int]) -> None:
    shard, replicas = shape
    world, units, model = shard * replicas, chain(*sizes), 4 * sum(sizes)
    hybrid = micro_step(units, Sharding(shard, replicas, reshard="all"))
    extra = 2 * (model / shard) * (world - shard) / world
    assert hybrid.all_reduces == len(sizes)
    assert hybrid.bytes == pytest.approx(3 * model * (shard - 1) / shard + extra, rel=1e-12)
    # Sharded over the 8 ranks of a host, this is the paper's 2M (W - G) / (G W) between hosts.
    replicated = micro_step(units, Sharding(1, world, reshard="none"))
    assert replicated == Traffic(0, 0, len(sizes), pytest.approx(2 * model * (world - 1) / world, rel=1e-12))


def test_a_micro_step_that_only_accumulates() -> None:
    units = chain(8, 16, 24)
    assert micro_step(units, Sharding(4), reduces=False) == Traffic(5, 0, 0, (2 * 48 - 24) * 4 * 3 / 4)
    gathered = {"all": 3, "inner": 2, "none": 0}
    for reshard, count in gathered.items():
        found = micro_step(units, Sharding(4, reshard=reshard), reduces=False, gathered=True)
        assert (found.all_gathers, found.reduce_scatters) == (count, 0)


def test_dtypes_count_apart() -> None:
    units = chain(8, 16)
    mixed = micro_step(units, Sharding(2, replicas=2, reshard="none", param_bytes=2, reduce_bytes=4))
    assert mixed.bytes == 24 * 2 / 2 + 24 * 4 / 2 + 2 * (12 * 4) / 2


def test_rows_are_padded_to_the_ranks() -> None:
    unit = Unit("odd", ((7, 3), (1,), (8, 2)))
    assert [unit.elements(ranks) for ranks in (1, 2, 4, 8)] == [38, 24 + 2 + 16, 24 + 4 + 16, 24 + 8 + 16]
    assert state_bytes([unit], Sharding(4)) == 16 * 44 // 4
    assert micro_step([unit], Sharding(4, reshard="none")).bytes == 2 * 44 * 4 * 3 / 4


def test_peak_is_the_two_largest_neighbours_or_the_largest() -> None:
    units = chain(40, 8, 16, 32, 24)
    usual = Sharding(4)
    assert peak_unsharded(units, usual) == 32 + 24
    assert peak_unsharded(units, replace(usual, reshard="all", prefetch="both")) == 32 + 24
    assert peak_unsharded(units, replace(usual, prefetch="none")) == 40
    assert peak_unsharded(units, replace(usual, reshard="none")) == 120
    assert peak_unsharded(units, replace(usual, encloses=True)) == 24 + 40 + 8
    assert peak_unsharded(units, replace(usual, encloses=True, prefetch="none")) == 24 + 40
    assert peak_unsharded(chain(8, 4), replace(usual, encloses=True)) == 12


def test_rings() -> None:
    assert [ring_bytes(how, 120, 4) for how in ("gather", "reduce", "all_reduce")] == [90, 90, 180]
    assert ring_bytes("gather", 120, 1) == 0


def test_traffic_adds_up() -> None:
    parts = [Traffic(3, 0, 0, 1.5), Traffic(2, 3, 1, 2.0)]
    assert Traffic.total(parts) == Traffic(5, 3, 1, 3.5)
