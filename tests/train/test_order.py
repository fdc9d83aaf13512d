"""Data order: a permutation, a function of (seed, epoch) alone, and random enough."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.train.order import permute


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 5000), seed=st.integers(0, 2**64), epoch=st.integers(0, 2**32))
def test_every_sample_comes_once(n: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(permute(seed, epoch, n)(np.arange(n))), np.arange(n))


def test_any_piece_can_be_asked_for_alone() -> None:
    order = permute(3, 1, 1000)
    whole = order(np.arange(1000))
    assert np.array_equal(order(np.arange(400, 500)), whole[400:500])
    assert order(7) == whole[7]
    assert np.array_equal(order([[1, 2], [3, 4]]), whole[[[1, 2], [3, 4]]])
    assert whole.dtype == np.int64


def test_known_values() -> None:
    """Pinned: a resumed run must meet the same order in every later version."""
    assert permute(0, 0, 10)(np.arange(10)).tolist() == [0, 5, 3, 7, 6, 1, 9, 8, 4, 2]


def test_seed_and_epoch_change_the_order() -> None:
    orders = [permute(seed, epoch, 1000)(np.arange(1000)) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).sum() < 10


def test_samples_are_spread_evenly_and_independently() -> None:
    """Chi-square over 2,000 seeds: which sample stands first of 8, and which pairs stand first of 5."""
    firsts = np.bincount([int(permute(seed, 0, 8)(0)) for seed in range(2000)], minlength=8)
    assert ((firsts - 250) ** 2 / 250).sum() < 30  # 7 degrees of freedom, p = 1e-4
    pairs = np.array([permute(seed, 0, 5)([0, 1]) for seed in range(2000)])
    counts = np.bincount(pairs[:, 0] * 5 + pairs[:, 1], minlength=25).reshape(5, 5)[~np.eye(5, dtype=bool)]
    assert ((counts - 100) ** 2 / 100).sum() < 52  # 19 degrees of freedom, p = 1e-4


def test_neighbours_are_torn_apart() -> None:
    order = permute(0, 0, 10_000)(np.arange(10_000))
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.05


def test_a_large_table_needs_no_memory() -> None:
    last = permute(9, 9, 2**50)([0, 2**50 - 1])
    assert (last < 2**50).all()


def test_positions_outside_are_refused() -> None:
    with pytest.raises(IndexError, match="position 10 of 10"):
        permute(0, 0, 10)([3, 10])
    with pytest.raises(ValueError, match="0 samples"):
        permute(0, 0, 0)
