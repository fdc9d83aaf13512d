"""Events and memory of a step: timelines worked out by hand, and what holds for every setting."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.plan.overlap import Policy, Work, simulate

EQUAL = [Work(forward=2.0, backward=4.0, gather=1.0, reduce=1.0)] * 3


def spans(units: list[Work], policy: Policy) -> dict[str, tuple[float, float]]:
    return {span.name: (span.start, span.end) for span in simulate(units, policy).spans}


def test_without_prefetch_reduction_and_gather_both_stand_in_the_way() -> None:
    """Backward i-1 waits for the reduction of i and then for its own gather (paper, section 3.3.2)."""
    found = spans(EQUAL, Policy(prefetch=False))
    assert [found[f"forward {i}"] for i in range(3)] == [(1, 3), (3, 5), (5, 7)]
    assert "gather 2" in found
    assert found["backward 2"] == (7, 11)
    assert found["reduce 2"] == (11, 12)
    assert found["gather 1"] == (12, 13)
    assert found["backward 1"] == (13, 17)
    assert found["backward 0"] == (19, 23)
    assert simulate(EQUAL, Policy(prefetch=False)).seconds == 24


def test_with_prefetch_only_the_first_gather_and_the_last_reduction_do() -> None:
    found = simulate(EQUAL, Policy())
    assert found.seconds == 1 + 3 * 2 + 3 * 4 + 1
    assert found.backward == 3 * 4 + 1
    assert [s.start for s in found.spans if s.name.startswith("backward")] == [7, 11, 15]


def test_the_last_unit_is_gathered_once() -> None:
    names = [span.name for span in simulate(EQUAL, Policy()).spans]
    assert names.count("gather 2") == 1
    assert names.count("gather 0") == names.count("gather 1") == 2


def test_the_limiter_holds_the_cpu_back_and_not_the_device() -> None:
    eager = [Work(4.0, 4.0, 1.0, 1.0)] * 4
    free, limited = simulate(eager, Policy(limit=None)), simulate(eager, Policy())
    assert free.in_flight == 4 + 3, "a CPU that takes no time issues the gathers of forward and backward at once"
    assert limited.in_flight == 2
    assert simulate(eager, Policy(limit=3)).in_flight == 3
    assert free.seconds == limited.seconds == 1 + 8 * 4 + 1


def test_a_slow_cpu_is_the_bound() -> None:
    found = simulate(EQUAL, Policy(issue=10.0))
    assert found.seconds == 6 * 10 + 1, "the last reduction is issued when the last backward is"


def test_memory_without_limiter_is_all_gathers_and_with_it_two() -> None:
    heavy = [Work(4.0, 8.0, 1.0, 1.0, param_bytes=10)] * 6
    assert simulate(heavy, Policy(limit=None)).peak_bytes > 60
    assert simulate(heavy, Policy()).peak_bytes == 20


def test_retries_come_without_the_limiter_and_go_with_it() -> None:
    heavy = [Work(4.0, 8.0, 1.0, 1.0, param_bytes=10, grad_bytes=10)] * 6
    tight = Policy(limit=None, capacity=50, retry=0.5)
    free, limited = simulate(heavy, tight), simulate(heavy, replace(tight, limit=2))
    assert free.num_retries > 0
    assert limited.num_retries == 0
    assert free.seconds > limited.seconds
    assert free.peak_bytes <= 50


def test_a_block_is_taken_again_only_when_it_was_read() -> None:
    """With the CPU ahead of the device, memory that the program has let go of is still in use."""
    units = [Work(4.0, 4.0, 1.0, 1.0, param_bytes=10)] * 3
    assert (
        simulate(units, Policy(limit=None)).peak_bytes
        > simulate(units, Policy(limit=None, issue=20.0)).peak_bytes
        == 20
    )


def test_a_unit_that_never_fits() -> None:
    with pytest.raises(ValueError, match=r"10 bytes do not fit: 10 of 15 are held"):
        simulate([Work(1.0, 1.0, 1.0, 1.0, param_bytes=10)] * 3, Policy(capacity=15))


def test_one_gather_in_flight_is_refused() -> None:
    with pytest.raises(ValueError, match="1 gathers in flight cannot overlap"):
        Policy(limit=1)


SECONDS = st.floats(0.01, 10)
UNITS = st.lists(
    st.builds(Work, SECONDS, SECONDS, SECONDS, SECONDS, st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=8
)


@given(UNITS, st.sampled_from([None, 2, 3]), st.booleans(), st.floats(0, 2))
def test_what_holds_for_every_step(units: list[Work], limit: int | None, prefetch: bool, issue: float) -> None:
    found = simulate(units, Policy(prefetch, limit, math.inf, issue))
    compute = sum(unit.forward + unit.backward for unit in units)
    wire = sum(2 * unit.gather + unit.reduce for unit in units) - units[-1].gather
    assert found.seconds >= max(compute, wire, 2 * issue * len(units)) * (1 - 1e-9)
    assert limit is None or found.in_flight <= limit
    for stream in ("compute", "communication"):
        own = [span for span in found.spans if span.stream == stream]
        assert all(a.end <= b.start + 1e-9 for a, b in pairwise(own)), "one thing at a time"
    order = {span.name: span for span in found.spans}
    for i in range(len(units)):
        assert order[f"reduce {i}"].start >= order[f"backward {i}"].end
        assert order[f"backward {i}"].start >= order[f"gather {i}"].end - 1e-9
