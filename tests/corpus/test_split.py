"""The held-out share, whole groups on one side, and the check that finds a leak."""

import numpy as np
import pytest

from puna.corpus.dedup import NUM_HASHES
from puna.corpus.split import check_no_leak, choose_heldout
from puna.errors import PunaError

NAMES = [f"document-{i}" for i in range(1000)]
SIZES = [50 + (i * 7919) % 200 for i in range(1000)]


def share(heldout: np.ndarray) -> float:
    return np.array(SIZES)[heldout].sum() / sum(SIZES)


@pytest.mark.parametrize("wanted", [0.01, 0.05, 0.3])
@pytest.mark.parametrize("seed", [0, 1])
def test_share_is_nearly_what_was_asked(wanted, seed):
    assert 0.85 * wanted <= share(choose_heldout(NAMES, SIZES, wanted, seed)) <= wanted


def test_share_zero_holds_nothing_out():
    assert not choose_heldout(NAMES, SIZES, 0, 0).any()


def test_seed_and_order():
    one = choose_heldout(NAMES, SIZES, 0.05, 0)
    assert (one != choose_heldout(NAMES, SIZES, 0.05, 1)).any()
    assert choose_heldout(NAMES[::-1], SIZES[::-1], 0.05, 0)[::-1].tolist() == one.tolist()


def test_groups_stay_together():
    groups = [f"group-{i // 3}" for i in range(1000)]
    heldout = choose_heldout(groups, SIZES, 0.2, 0)
    assert heldout.any()
    for group in set(groups):
        sides = {bool(h) for h, g in zip(heldout, groups, strict=True) if g == group}
        assert len(sides) == 1


def test_small_documents_do_not_crowd_in():
    """With sizes as uneven as those of source files, held-out documents are as large and as few as those allowed."""
    sizes = np.random.default_rng(0).lognormal(9, 1.2, 1000).astype(int)
    largest = max(0.005 * sizes.sum(), 4 * sizes.mean())
    chosen = [sizes[choose_heldout(NAMES, sizes.tolist(), 0.05, seed)] for seed in range(40)]
    heldout = np.concatenate(chosen)
    assert heldout.max() <= largest
    assert heldout.mean() == pytest.approx(sizes[sizes <= largest].mean(), rel=0.05)
    assert 46 < np.mean([len(sizes) for sizes in chosen]) < 58


def test_one_is_held_out_where_none_fits():
    assert choose_heldout(["a", "b", "c"], [10, 5, 20], 0.05, 0).tolist() == [False, True, False]
    assert choose_heldout(["a"], [10], 0.5, 0).tolist() == [False]


def signatures(*rows: int) -> np.ndarray:
    return np.array(rows, np.uint32)[:, None] * np.ones(NUM_HASHES, np.uint32)


KEYS = [b"a", b"b", b"c"]
OUT = np.array([False, True, False])


def test_leaks_are_found():
    assert check_no_leak(KEYS, signatures(1, 2, 3), OUT, 0.8) == 1
    with pytest.raises(PunaError, match="A held-out document has a near copy in training: the split is wrong"):
        check_no_leak(KEYS, signatures(1, 2, 2), OUT, 0.8)
    with pytest.raises(PunaError, match="A held-out document has an exact copy in training: the split is wrong"):
        check_no_leak([b"a", b"a", b"c"], signatures(1, 2, 3), OUT, 0.8)


def test_leak_at_the_threshold():
    rows = signatures(1, 2, 3)
    rows[2, : int(0.8 * NUM_HASHES) - 1] = 2
    assert check_no_leak(KEYS, rows, OUT, 0.8) == 1
    rows[2, : int(0.8 * NUM_HASHES)] = 2
    with pytest.raises(PunaError, match="near copy"):
        check_no_leak(KEYS, rows, OUT, 0.8)


def test_keys_only():
    assert check_no_leak(KEYS, np.zeros((0, NUM_HASHES), np.uint32), OUT, 0) == 1
