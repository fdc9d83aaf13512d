"""The parts of the codec, each against something slow and plain."""

import math
from collections import Counter

import numpy as np
import pytest

from puna.recsys.codec import distinct, frequencies, grouped, huffman, index, planes, rans, stream, vector_lz
from puna.recsys.codec.api import decode, encode
from puna.recsys.codec.encoder import HUFFMAN_SPEEDS, LINK, LZ_SPEEDS
from puna.recsys.codec.scratch import Scratch


def entropy_bits(symbols) -> float:
    counts = np.array(list(Counter(np.asarray(symbols).reshape(-1).tolist()).values()))
    return float(-(counts * np.log2(counts / counts.sum())).sum())


def test_distinct_rows_are_those_of_a_dictionary():
    rng = np.random.default_rng(0)
    for num_rows in (1, 2, 100, 3000):
        rows = rng.integers(0, 3, (num_rows, 4)).astype(np.uint32)
        ids = rng.integers(-(1 << 62), 1 << 62, 50)[rng.integers(0, 50, num_rows)]
        for found, keys in (
            (distinct.by_content(rows, Scratch()), [tuple(row) for row in rows]),
            (distinct.by_ids(ids, Scratch()), ids.tolist()),
        ):
            numbers: dict = {}
            wanted = [numbers.setdefault(key, len(numbers)) for key in keys]
            assert found.inverse.tolist() == wanted
            assert found.first.tolist() == [wanted.index(k) for k in range(len(numbers))]


def test_rows_of_equal_hash_are_told_apart():
    rows = np.array([[1, 0], [0, 1]], np.uint32)
    first, inverse, hashes = np.empty(2, np.int64), np.empty(2, np.int64), np.empty(2, np.int64)
    same = np.array([7, 7], np.uint32)
    assert distinct.number_rows(rows, same, hashes, np.empty(8, np.int32), first, inverse) == 2
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("num_codes", [2, 3, 7, 16, 51, 101, 256, 257, 4096, 5000, 65536])
@pytest.mark.parametrize("count", [1, 7, 8, 1000])
def test_fixed_width(num_codes, count):
    kind = np.uint8 if num_codes <= 256 else np.int64
    codes = np.random.default_rng(count).integers(0, num_codes, count).astype(kind)
    codes[-1] = num_codes - 1
    width = planes.width_of(num_codes)
    packed = planes.pack(codes, width)
    assert len(packed) == planes.packed_size(count, width) <= count * width / 8 + 4
    again = np.empty_like(codes)
    planes.unpack(np.frombuffer(packed, np.uint8), num_codes, again)
    assert (again == codes).all()


def test_frequencies_add_up_whatever_the_levels():
    rng = np.random.default_rng(0)
    for turn in range(300):
        num_codes = int(rng.integers(1, 257))
        levels = rng.integers(0, 38, 256) * (rng.random(256) < rng.random())
        levels[num_codes - 1] = max(levels[num_codes - 1], turn % 37 + 1)
        out = np.empty(256, np.int64)
        frequencies.spread(levels, num_codes, out)
        assert out[:num_codes].sum() == frequencies.TOTAL
        assert ((out[:num_codes] > 0) == (levels[:num_codes] > 0)).all()


@pytest.mark.parametrize("num_codes", [1, 2, 11, 51, 256])
def test_a_model_reads_as_it_was_written(num_codes):
    rng = np.random.default_rng(num_codes)
    for scale in (1, 30, 10_000):
        counts = (scale * rng.random(256) ** 4).astype(np.int32)
        counts[rng.integers(num_codes)] += 1
        levels, fitted, again = (np.zeros(256, np.int64) for _ in range(3))
        kind, first, last, bits = frequencies.fit(counts, num_codes, levels, fitted)
        buffer, width = np.zeros(2000, np.uint8), planes.width_of(num_codes)
        end = frequencies.put_model(buffer, 3, width, kind, first, last, levels)
        read = np.frombuffer(buffer.tobytes(), np.uint8)
        assert frequencies.get_model(read, 3, width, num_codes, levels, again) == end
        assert (fitted[:num_codes] == again[:num_codes]).all()
        total = counts[:num_codes]
        exact = sum(-c * math.log2(c / total.sum()) for c in total if c)
        assert exact <= bits + 1e-6 <= 1.02 * exact + 0.02 * total.sum() + 8 * num_codes


@pytest.mark.parametrize("count", [1, 9, 2047, 2049, 40_001])
@pytest.mark.parametrize("num_codes", [2, 51, 256])
def test_rans_comes_within_a_hair_of_the_models_bits(count, num_codes):
    rng = np.random.default_rng(count)
    codes = np.clip(rng.normal(num_codes / 2, num_codes / 8, count), 0, num_codes - 1).astype(np.uint8).reshape(-1, 1)
    scratch = Scratch()
    plan = grouped.plan(codes, num_codes, num_codes // 2, scratch)
    payload = grouped.encode(codes, num_codes, plan, scratch)
    assert abs(len(payload) - plan.num_bytes) <= 4 * rans.LANES + 0.002 * len(payload)
    ordered = np.empty_like(codes)
    places = grouped.decode(np.frombuffer(payload, np.uint8), num_codes, ordered, scratch)
    assert (ordered[places] == codes).all()


def test_rows_of_two_kinds_take_fewer_bits_than_their_common_entropy():
    rng = np.random.default_rng(0)
    codes = np.concatenate([np.full((600, 16), 25), rng.integers(0, 51, (200, 16))]).astype(np.uint8)
    rng.shuffle(codes)
    scratch = Scratch()
    plan = grouped.plan(codes, 51, 25, scratch)
    assert plan.num_groups == 2
    assert sorted(plan.sizes) == [200, 600]
    assert 8 * len(grouped.encode(codes, 51, plan, scratch)) < 0.75 * entropy_bits(codes)


@pytest.mark.parametrize("num_rows", [3, 300, 20_000])
@pytest.mark.parametrize("width", [16, 64])
def test_bytes_against_the_order_0_entropy_of_distinct_rows(lookups, num_rows, width):
    for bound in (0.01, 0.05):
        rows, ids = lookups(num_rows, width)
        kept = rows[np.unique(ids, return_index=True)[1]].astype(np.float64)
        entropy = entropy_bits(np.rint(kept / (2 * bound * (kept.max() - kept.min())))) / 8
        assert len(encode(rows, ids, bound)) <= 1.03 * entropy + 24 + 8 * (num_rows < 1000)
        assert len(encode(rows, None, bound)) <= 1.03 * (entropy + entropy_bits(ids) / 8) + 24 + 8 * (num_rows < 1000)


@pytest.mark.parametrize("num_distinct", [1, 2, 3, 100, 2000])
def test_the_index_comes_back_in_fewer_bits_than_its_entropy(num_distinct):
    rng = np.random.default_rng(num_distinct)
    weights = 1 / np.arange(1, num_distinct + 1) ** 1.05
    drawn = rng.choice(num_distinct, 3000, p=weights / weights.sum())
    inverse = distinct.by_ids(drawn, Scratch()).inverse
    count = int(inverse.max()) + 1
    data = index.encode(inverse, count, Scratch())
    again = np.empty_like(inverse)
    assert index.decode(np.frombuffer(data, np.uint8), count, again, Scratch())
    assert (again == inverse).all()
    assert 8 * len(data) <= entropy_bits(inverse) + 12 * count + 24
    if num_distinct >= 2000:
        assert 8 * len(data) < 0.95 * entropy_bits(inverse)


def test_the_index_of_runs_and_of_rows_all_new():
    for inverse in (np.repeat(np.arange(40), 50), np.arange(500), np.r_[np.arange(256), np.zeros(4000, int)]):
        count = int(inverse.max()) + 1
        data = index.encode(inverse, count, Scratch())
        again = np.empty_like(inverse)
        assert index.decode(np.frombuffer(data, np.uint8), count, again, Scratch())
        assert (again == inverse).all()


@pytest.mark.parametrize("shape", ["normal", "one", "two", "steep"])
def test_huffman_comes_back_and_is_as_short_as_it_can_be(shape):
    rng = np.random.default_rng(0)
    codes = {
        "normal": np.clip(rng.normal(25, 6, 20_000), 0, 50),
        "one": np.full(999, 7),
        "two": rng.integers(3, 5, 1001),
        "steep": np.repeat(np.arange(24), 1 << np.arange(24) // 2),
    }[shape].astype(np.uint8)
    data = huffman.encode(codes, 51, Scratch())
    again = np.empty_like(codes)
    assert huffman.decode(np.frombuffer(data, np.uint8), 51, again, Scratch())
    assert (again == codes).all()
    assert len(data) <= 1.01 * slow_huffman_bits(codes) / 8 + 26 + 4


def slow_huffman_bits(symbols) -> int:
    """Sum over the inner nodes of an optimal tree, found by looking for the two least each time."""
    weights, bits = list(Counter(np.asarray(symbols).reshape(-1).tolist()).values()), 0
    while len(weights) > 1:
        pair = weights.pop(weights.index(min(weights))) + weights.pop(weights.index(min(weights)))
        weights.append(pair)
        bits += pair
    return bits


def slow_lz_bytes(codes, window=32, block=2048) -> int:
    """As the sheet of the published encoder has it: a flag a token, two bytes a run, a row as its codes."""
    size = 0
    rows = [bytes(row) for row in codes]
    for start in range(0, len(rows), block):
        part, p, tokens = rows[start : start + block], 0, 0
        size += 6
        while p < len(part):
            best = 0
            for offset in range(1, min(window, p) + 1):
                run = 0
                while p + run < len(part) and run < 255 and part[p + run] == part[p + run - offset]:
                    run += 1
                best = max(best, run)
            size += 2 if best else codes.shape[1]
            tokens += 1
            p += best or 1
        size += (tokens + 7) // 8
    return size


@pytest.mark.parametrize("window", [1, 32, 255])
@pytest.mark.parametrize("num_rows", [1, 2047, 2048, 5000])
def test_vector_lz(window, num_rows):
    rng = np.random.default_rng(num_rows)
    codes = rng.integers(0, 51, (20, 7)).astype(np.uint8)[np.minimum(rng.zipf(1.3, num_rows) - 1, 19)]
    data = vector_lz.encode(codes, Scratch(), window)
    again = np.zeros_like(codes)
    assert vector_lz.decode(np.frombuffer(data, np.uint8), again)
    assert (again == codes).all()
    assert len(data) == slow_lz_bytes(codes, window)


def test_a_vector_lz_stream_made_by_hand():
    """One row, a run of two that overlaps itself, another row."""
    data = struct_of([1], [8]) + bytes([0b010]) + bytes([1, 2, 3, 2, 1, 4, 5, 6])
    codes = np.zeros((4, 3), np.uint8)
    assert vector_lz.decode(np.frombuffer(data, np.uint8), codes)
    assert codes.tolist() == [[1, 2, 3], [1, 2, 3], [1, 2, 3], [4, 5, 6]]


def struct_of(flag_bytes, data_bytes) -> bytes:
    return np.array(flag_bytes, "<u2").tobytes() + np.array(data_bytes, "<u4").tobytes()


def test_the_published_scheme_against_a_slow_encoder_of_it(lookups):
    """Within 3 per cent in all, each table with the coder that the formula takes."""
    ours, slow = 0, 0.0
    for number, num_rows in enumerate((3, 24, 305, 5683, 20_000)):
        for bound in (0.01, 0.03, 0.05):
            rows, _ = lookups(num_rows, 32, number)
            span = float(rows.max()) - float(rows.min())
            codes = np.rint(rows / (2 * bound * span))
            codes = (codes - codes.min()).astype(np.uint8)
            sizes = {
                LZ_SPEEDS: slow_lz_bytes(codes),
                HUFFMAN_SPEEDS: slow_huffman_bits(codes) / 8 + math.ceil((codes.max() + 1) / 2),
            }
            slow += min(sizes.items(), key=lambda item: item[1] / rows.nbytes + LINK * sum(1 / t for t in item[0]))[1]
            ours += len(encode(rows, None, bound, "published"))
    assert abs(ours / slow - 1) < 0.03


def test_a_stream_made_by_hand_from_the_format():
    """Three lookups of two rows of two codes each: 4 bits a code, an index that the ids give."""
    grid = np.float32(0.25)
    head = bytes([0xC3, 0x11, 1, 3, 2, 2]) + bytes([5, 15]) + grid.tobytes()
    check = streams_check(head)
    payload = bytes([0 | 3 << 4, 15 | 8 << 4])
    rows = decode(head + check + payload, np.array([9, 9, 4]))
    assert rows.tolist() == [[-0.75, 3.0], [-0.75, 3.0], [0.0, 1.25]]


def streams_check(head: bytes) -> bytes:
    crc = 0xFFFF
    for byte in head:
        crc ^= byte << 8
        for _ in range(8):
            crc = (crc << 1 ^ 0x1021 if crc & 0x8000 else crc << 1) & 0xFFFF
    return crc.to_bytes(2, "little")


def test_varints():
    for number in (0, 1, 127, 128, 16_383, 16_384, (1 << 35) - 1):
        assert stream.Reader(memoryview(stream.varint(number))).varint() == number
