"""The entropy-coded payload: models, final states, words. Rows lie group by group, each group a block of `rans`."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from puna.recsys.codec import rans
from puna.recsys.codec.bits import get, put
from puna.recsys.codec.compiled import kernel
from puna.recsys.codec.frequencies import MAX_CODES, fit, get_model, put_model
from puna.recsys.codec.groups import NUM_BINS, group_rows
from puna.recsys.codec.scratch import Scratch

_GROUP_BITS: Any = np.int64(5)  # of a type: Numba compiles what is called with a literal anew
_ZERO: Any = np.int64(0)
_LONGEST_LEVEL = 5  # bytes
DAMAGED = -1


class Plan(NamedTuple):
    """What is known before the coder runs."""

    num_bytes: int  # of the payload, to a few bytes
    num_groups: int
    labels: npt.NDArray[np.uint8]
    sizes: npt.NDArray[np.int64]  # rows of each group
    frequencies: npt.NDArray[np.int64]  # of the groups, and then of the labels
    models: bytes


def plan(codes: npt.NDArray[np.uint8], num_codes: int, centre: int, scratch: Scratch) -> Plan:
    """Groups and models for codes (k, D), k and D at least 1."""
    labels = scratch.take("labels", len(codes), np.uint8)
    counts = scratch.take("counts", (NUM_BINS + 1) * MAX_CODES, np.int32).reshape(-1, MAX_CODES)
    frequencies = scratch.take("frequencies", counts.size, np.int64).reshape(counts.shape)
    sizes = scratch.take("sizes", NUM_BINS, np.int64)
    models = np.zeros((NUM_BINS + 1) * (_LONGEST_LEVEL * max(num_codes, NUM_BINS) + 8), np.uint8)
    num_groups, bits, length = _plan(codes, num_codes, centre, labels, counts, sizes, frequencies, models)
    num_bytes = length + 4 * rans.lanes_of(codes.size) + int(bits / 8) + 2
    return Plan(num_bytes, num_groups, labels, sizes[:num_groups], frequencies, models[:length].tobytes())


def encode(codes: npt.NDArray[np.uint8], num_codes: int, made: Plan, scratch: Scratch) -> bytes:
    """The payload of codes (k, D)."""
    ordered = codes
    if made.num_groups > 1:
        ordered = scratch.take("ordered", codes.size, np.uint8).reshape(codes.shape)
        np.take(codes, order_of(made.labels, made.sizes, scratch), axis=0, out=ordered, mode="clip")
    room = codes.size + len(codes) + 1
    words, table = scratch.take("words", room, np.uint16), np.empty(rans.ENCODER_SHAPE, np.int64)
    states = np.full(rans.lanes_of(codes.size), rans.LOW, np.int64)
    at = _encode(ordered.reshape(-1), codes.shape[1], num_codes, made.labels, made.sizes, made.frequencies,
                 table, states, words)  # fmt: skip
    return made.models + states.astype("<u4").tobytes() + words[at:].astype("<u2", copy=False).tobytes()


def decode(
    data: npt.NDArray[np.uint8], num_codes: int, ordered: npt.NDArray[np.uint8], scratch: Scratch
) -> npt.NDArray[np.int64] | None:
    """Fill codes (k, D), which lie group by group, from a payload; returns the place of each row among them.

    None: the payload is damaged.
    """
    num_rows, width = ordered.shape
    labels = scratch.take("labels", num_rows, np.uint8)
    frequencies = scratch.take("frequencies", (NUM_BINS + 1) * MAX_CODES, np.int64).reshape(-1, MAX_CODES)
    num_groups, length = _models(data, num_codes, scratch.take("levels", MAX_CODES, np.int64), frequencies)
    lanes = rans.lanes_of(ordered.size)
    num_words, odd = divmod(len(data) - length - 4 * lanes, 2)
    if num_groups < 1 or num_words < 0 or odd:
        return None
    states = data[length : length + 4 * lanes].view("<u4").astype(np.int64)
    words = scratch.take("words", num_words + rans.LANES, np.uint16)
    words[:num_words] = np.frombuffer(data[length + 4 * lanes :].tobytes(), "<u2")
    sizes = scratch.take("sizes", NUM_BINS, np.int64)[:num_groups]
    table = scratch.take("decoder", rans.DECODER_SIZE, np.uint32)
    if _decode(ordered.reshape(-1), width, num_codes, labels, sizes, frequencies, table, states, words) != num_words:
        return None
    if (states != rans.LOW).any():
        return None
    places = scratch.take("places", num_rows, np.int64)
    _places(labels, sizes, places)
    return places


def order_of(labels: npt.NDArray[np.uint8], sizes: npt.NDArray[np.int64], scratch: Scratch) -> npt.NDArray[np.int64]:
    """Rows (k,) group by group, each group in order."""
    places, order = (scratch.take(name, len(labels), np.int64) for name in ("places", "order"))
    _places(labels, sizes, places)
    order[places] = np.arange(len(labels))
    return order


@kernel
def _plan(
    codes: Any, num_codes: int, centre: int, labels: Any, counts: Any, sizes: Any, frequencies: Any, models: Any
) -> Any:
    num_groups = group_rows(codes, num_codes, centre, labels, counts, sizes)
    levels = np.empty(MAX_CODES, np.int64)
    at, total = put(models, _ZERO, _GROUP_BITS, num_groups), 0.0
    if num_groups > 1:
        for g in range(num_groups):
            counts[num_groups, g] = sizes[g]
        kind, first, last, bits = fit(counts[num_groups], num_groups, levels, frequencies[num_groups])
        at, total = put_model(models, at, _width(num_groups), kind, first, last, levels), bits
    for g in range(num_groups - 1, -1, -1):
        kind, first, last, bits = fit(counts[g], num_codes, levels, frequencies[g])
        at = put_model(models, at, _width(num_codes), kind, first, last, levels)
        total += bits
    return num_groups, total, (at + 7) >> 3


@kernel
def _width(num_codes: int) -> int:
    width = 0
    while 1 << width < num_codes:
        width += 1
    return width


@kernel
def _models(data: Any, num_codes: int, levels: Any, frequencies: Any) -> Any:
    num_groups, at = get(data, _ZERO, _GROUP_BITS), _GROUP_BITS
    if num_groups < 1 or num_groups > NUM_BINS:
        return DAMAGED, 0
    if num_groups > 1:
        at = get_model(data, at, _width(num_groups), num_groups, levels, frequencies[num_groups])
    for g in range(num_groups - 1, -1, -1):
        if at < 0:
            return DAMAGED, 0
        at = get_model(data, at, _width(num_codes), num_codes, levels, frequencies[g])
    return (num_groups, (at + 7) >> 3) if at >= 0 else (DAMAGED, 0)


@kernel
def _encode(
    codes: Any, width: int, num_codes: int, labels: Any, sizes: Any, frequencies: Any, table: Any, states: Any,
    words: Any,
) -> int:  # fmt: skip
    num_groups, at, end = sizes.shape[0], words.shape[0], codes.shape[0]
    for g in range(num_groups - 1, -1, -1):
        start = end - sizes[g] * width
        if rans.encoder_table(frequencies[g], num_codes, table) < 0:
            at = rans.encode(codes[start:end], table, states, words, at)
        end = start
    if num_groups > 1:
        rans.encoder_table(frequencies[num_groups], num_groups, table)
        at = rans.encode(labels, table, states, words, at)
    return at


@kernel
def _decode(
    codes: Any, width: int, num_codes: int, labels: Any, sizes: Any, frequencies: Any, table: Any, states: Any,
    words: Any,
) -> int:  # fmt: skip
    num_groups, at = sizes.shape[0], _ZERO
    if num_groups > 1:
        at = _block(labels, num_groups, frequencies[num_groups], table, states, words, at)
    else:
        labels[:] = 0
    if at < 0:
        return DAMAGED
    for g in range(num_groups):
        sizes[g] = 0
    for r in range(labels.shape[0]):
        sizes[labels[r]] += 1
    start = 0
    for g in range(num_groups):
        if at >= 0:
            end = start + sizes[g] * width
            at = _block(codes[start:end], num_codes, frequencies[g], table, states, words, at)
            start = end
    return at


@kernel
def _block(codes: Any, num_codes: int, frequencies: Any, table: Any, states: Any, words: Any, at: int) -> int:
    only = rans.decoder_table(frequencies, num_codes, table)
    if only < 0:
        return rans.decode(codes, table, states, words, at)
    codes[:] = only
    return at


@kernel
def _places(labels: Any, sizes: Any, places: Any) -> None:
    starts = np.empty(NUM_BINS, np.int64)
    start = 0
    for g in range(sizes.shape[0]):
        starts[g] = start
        start += sizes[g]
    for r in range(labels.shape[0]):
        places[r] = starts[labels[r]]
        starts[labels[r]] += 1
