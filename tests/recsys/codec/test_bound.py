"""No number comes back wrong by more than the bound, and equal input gives equal bytes."""

import gzip

import numpy as np
import pytest

from puna.errors import DataError
from puna.recsys.codec import quantise
from puna.recsys.codec.api import Codec, bound_of, decode, encode
from puna.recsys.codec.encoder import CODECS

CODEC_OF = {0: "auto", 1: "rans", 2: "fixed", 3: "raw", 4: "huffman", 5: "vector_lz", 6: "published", 7: "copy"}


def sweep(case_of, check_bound, seeds):
    codec, other = Codec(), Codec()
    for seed in seeds:
        case, name = case_of(seed), CODEC_OF[seed // 7 % len(CODEC_OF)]
        stream = codec.encode(case.rows, case.ids, case.bound, name)
        again = codec.decode(stream, case.ids)
        check_bound(case.rows, again, case.bound)
        if name in ("raw", "copy"):
            assert (again.view(np.uint32) == case.rows.view(np.uint32)).all()
        assert other.encode(case.rows.copy(), case.ids, case.bound, name) == stream


def test_slices_of_every_kind_keep_the_bound(case_of, check_bound):
    sweep(case_of, check_bound, range(1600))


@pytest.mark.slow
def test_a_hundred_thousand_slices_keep_the_bound(case_of, check_bound):
    sweep(case_of, check_bound, range(100_000))


@pytest.mark.parametrize("width", [16, 32, 64])
@pytest.mark.parametrize("bound", [0.01, 0.05])
def test_lookups_keep_the_bound(lookups, check_bound, width, bound):
    for num_rows in (3, 305, 20_000):
        rows, ids = lookups(num_rows, width)
        for codec in CODECS:
            check_bound(rows, decode(encode(rows, None, bound, codec)), bound)
            check_bound(rows, decode(encode(rows, ids, bound, codec), ids), bound)


def test_real_columns_keep_the_bound(data_dir, check_bound):
    with gzip.open(data_dir / "ctr-criteo" / "kaggle_train.tsv.gz", "rt") as file:
        lines = file.read().splitlines()
    counts = np.array([[float(field or 0) for field in line.split("\t")[1:14]] for line in lines])
    rows = np.log1p(np.maximum(counts, 0)).astype(np.float32)
    for bound in (0.001, 0.01, 0.05):
        for part in (rows, counts.astype(np.float32)):
            check_bound(part, decode(encode(part, bound=bound)), bound)


def test_a_row_that_breaks_the_bound_is_sent_as_it_is():
    rows = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)
    rows[7, 3] = np.nan
    rows[20] = np.inf
    stream = encode(rows, bound=0.01, codec="rans")
    again = decode(stream)
    assert (again[[7, 20]].view(np.uint32) == rows[[7, 20]].view(np.uint32)).all()
    assert (np.delete(again, [7, 20], 0) != np.delete(rows, [7, 20], 0)).any()
    assert len(stream) < rows.nbytes // 2


def test_a_value_on_the_edge_of_two_codes_keeps_the_bound(check_bound):
    """Steps of exactly 2 E would put these half-way between codes, where rounding breaks the bound."""
    rows = (np.arange(-50, 51, dtype=np.float32) / 100).reshape(1, -1)
    check_bound(rows, decode(encode(rows, bound=0.01)), 0.01)
    grid = quantise.grid_of(-0.5, 0.5, 0.01)
    assert 0.9998 * 0.02 < grid.step < 0.02


def test_values_far_from_zero_are_coded_and_not_sent_as_they_are(check_bound):
    rows = (1e6 + np.random.default_rng(0).random((500, 16))).astype(np.float32)
    for codec in ("rans", "fixed"):
        stream = encode(rows, bound=0.1, codec=codec)
        check_bound(rows, decode(stream), 0.1)
        assert len(stream) < rows.nbytes / 8


def test_a_bound_that_needs_more_than_a_byte_a_code(check_bound):
    rows = np.random.default_rng(0).standard_normal((300, 16)).astype(np.float32)
    for bound in (0.0019, 0.0005, 1e-4, 1e-5, 1e-7):
        stream = encode(rows, bound=bound)
        check_bound(rows, decode(stream), bound)
        assert len(stream) <= rows.nbytes + 32
    assert len(encode(rows, bound=0.0005)) < 0.36 * rows.nbytes


def test_empty_and_single():
    empty = np.zeros((0, 16), np.float32)
    assert decode(encode(empty)).shape == (0, 16)
    assert decode(encode(empty, np.zeros(0, np.int64)), np.zeros(0, np.int64)).shape == (0, 16)
    one = np.array([[1.5]], np.float32)
    assert decode(encode(one)) == one


def test_bound_of():
    rows = np.array([[1, np.nan], [-np.inf, 3]], np.float32)
    assert bound_of(rows, 0.25) == 0.5
    assert bound_of(np.full((2, 2), np.nan, np.float32), 0.25) == 0
    with pytest.raises(DataError, match=r"rows are float64. They must be float32"):
        bound_of(np.zeros((2, 2)), 0.1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((np.zeros((2, 3)),), r"rows are float64 of shape \(2, 3\). They must be float32"),
        ((np.zeros(3, np.float32),), r"rows are float32 of shape \(3,\)"),
        ((np.zeros((2, 0), np.float32),), r"shape \(2, 0\)"),
        ((np.zeros((2, 3), np.float32), np.zeros(3, int)), r"ids are int64 of shape \(3,\).*whole numbers, \(2,\)"),
        ((np.zeros((2, 3), np.float32), np.zeros(2)), r"ids are float64"),
        ((np.zeros((2, 3), np.float32), None, 0.0), r"the bound is 0.0. It is a share of max - min: above 0"),
        ((np.zeros((2, 3), np.float32), None, 0.6), r"at most 0.5"),
        ((np.zeros((2, 3), np.float32), None, float("nan")), r"the bound is nan"),
        ((np.zeros((2, 3), np.float32), None, 0.1, "zip"), r"no codec 'zip'. Choose one of auto, rans"),
        ((np.array([[0], [1], [2]], np.float32), np.array([5, 6, 5])), r"rows 0 and 2 have the same id 5 and are not"),
    ],
)
def test_wrong_arguments(arguments, words):
    with pytest.raises(DataError, match=words):
        encode(*arguments)
