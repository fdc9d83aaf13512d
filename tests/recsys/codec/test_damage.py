"""A damaged stream is refused with a DataError or decodes to what its own head says; nothing else happens."""

import binascii
import re
import struct
import tracemalloc

import numpy as np
import pytest

from puna.errors import DataError
from puna.recsys.codec import stream as streams
from puna.recsys.codec.api import Codec, decode, encode
from puna.recsys.codec.encoder import CODECS


def mutated(stream: bytes, rng: np.random.Generator) -> bytes:
    """Cut, with bits flipped, bytes replaced, put in or taken out; half with a head whose check is right again."""
    data = bytearray(stream)
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(len(data))) if data else 0
        head = min(at, int(rng.integers(24)))
        kind = rng.integers(6)
        if kind == 0:
            del data[at:]
        elif kind == 1 and data:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 2 and data:
            data[head] = int(rng.integers(256))
        elif kind == 3:
            data[at:at] = rng.bytes(int(rng.integers(1, 5)))
        elif kind == 4:
            del data[at : at + int(rng.integers(1, 5))]
        elif data:
            data[head] ^= 1 << int(rng.integers(8))
    return mended(bytes(data)) if rng.random() < 0.5 else bytes(data)


def mended(data: bytes) -> bytes:
    """The stream with the check that its head, as far as it can be read, should have."""
    if len(data) < 4:
        return data
    method, flags = data[1] & 15, data[2]
    reader = streams.Reader(memoryview(data), 3)
    try:
        for _ in range(2 + (flags & 3 in (1, 2)) + bool(flags & 8) + bool(flags & 16) + 2 * (method != streams.RAW)):
            reader.varint()
        reader.take(4 * (method != streams.RAW) * (1 + bool(flags & 4)))
    except DataError:
        return data
    check = struct.pack("<H", binascii.crc_hqx(data[: reader.at], 0xFFFF))
    return data[: reader.at] + check + data[reader.at + 2 :]


def attack(case_of, seeds, turns):
    codec, refused, decoded = Codec(), 0, 0
    for seed in seeds:
        case, rng = case_of(seed), np.random.default_rng(seed)
        name = CODECS[seed // 5 % len(CODECS)]
        stream = codec.encode(case.rows, case.ids, case.bound, name)
        for _ in range(turns):
            data = mutated(stream, rng)
            try:
                again = codec.decode(data, case.ids)
            except DataError as error:
                refused += bool(re.search("codec stream|ids are|the ids have", str(error)))
                continue
            decoded += 1
            head, _ = streams.read(memoryview(data))
            assert again.shape == (head.num_rows, head.width)
            assert again.size <= streams.FREE_VALUES + streams.VALUES_PER_BYTE * len(data)
            if head.grid and not head.num_exceptions and head.grid.base == 0:
                codes = head.grid.low + np.array([0, head.grid.num_codes - 1])
                with np.errstate(over="ignore"):
                    low, high = codes.astype(np.float32) * np.float32(head.grid.step)
                assert again.size == 0 or (low <= again.min() and again.max() <= high)
    return refused, decoded


def test_mutated_streams(case_of):
    refused, decoded = attack(case_of, range(400), 10)
    assert refused + decoded == 4000
    assert refused > 2000
    assert decoded > 200


@pytest.mark.slow
def test_a_hundred_thousand_mutated_streams(case_of):
    refused, decoded = attack(case_of, range(2000), 55)
    assert refused + decoded == 110_000


@pytest.mark.parametrize("codec", CODECS)
def test_every_cut_is_refused(lookups, codec):
    rows, _ = lookups(50, 8, num_lookups=64)
    stream = encode(rows, bound=0.02, codec=codec)
    for size in range(len(stream)):
        with pytest.raises(DataError, match="codec stream is damaged"):
            decode(stream[:size])


def test_a_head_cannot_ask_for_more_room_than_its_stream_allows():
    head = streams.Head(streams.FIXED, streams.ALL_ROWS, 1 << 27, 64, 1 << 27, quantise_grid())
    data = streams.write(head, 1 << 40)
    tracemalloc.start()
    with pytest.raises(DataError, match=r"bytes cannot hold 134217728 x 64 numbers"):
        decode(data)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


def quantise_grid():
    from puna.recsys.codec.quantise import Grid

    return Grid(0.5, 0.0, 0, 1)


def test_a_long_slice_of_one_value_is_padded_so_that_it_may_be_read():
    rows = np.full((100_000, 64), 2.5, np.float32)
    for codec in ("auto", "huffman"):
        stream = encode(rows, codec=codec)
        assert rows.size <= streams.FREE_VALUES + streams.VALUES_PER_BYTE * len(stream)
        assert len(stream) < rows.nbytes / 4000
        assert (decode(stream) == rows).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: b"", r"it has 0 bytes. Send or write it again"),
        (lambda s: b"x" + s[1:], r"begins with 0x78 instead of 0xc3"),
        (lambda s: s[:1] + b"\x22" + s[2:], r"of version 2. This Puna reads version 1"),
        (lambda s: s[:1] + b"\x1f" + s[2:], r"no such method or flags, 15"),
        (lambda s: s[:3] + bytes([s[3] ^ 1]) + s[4:], r"the checksum of its head"),
        (lambda s: s[:-1], r"bytes for 208 codes of 6 bits"),
    ],
)
def test_what_is_said(lookups, change, words):
    stream = encode(lookups(50, 8, num_lookups=64)[0])
    with pytest.raises(DataError, match=words):
        decode(change(stream))


def test_ids_that_are_missing_or_others(lookups):
    rows, ids = lookups(50, 8)
    stream = encode(rows, ids)
    with pytest.raises(DataError, match=r"made with ids that its receiver knows. Give the same ids"):
        decode(stream)
    with pytest.raises(DataError, match=r"ids are int64 of shape \(100,\)"):
        decode(stream, ids[:100])
    with pytest.raises(DataError, match=r"the ids have 2048 distinct values and the codec stream"):
        decode(stream, np.arange(2048))


def test_out_of_another_shape(lookups):
    rows, _ = lookups(50, 8)
    with pytest.raises(DataError, match=r"out is float32 of shape \(3, 8\).*float32 of shape \(2048, 8\)"):
        Codec().decode(encode(rows), out=np.empty((3, 8), np.float32))
