"""Fields of a block as numbers: labels, dense features, times, and hashes of categories."""

import datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from puna.errors import DataError
from puna.recsys.layouts import DENSE, HOUR, LABEL, Layout
from puna.recsys.read import Block
from puna.sparse import hashing
from puna.sparse.compiled import exact_kernel

MINUS, PLUS, DOT, ZERO, NINE = map(ord, "-+.09")


def labels(block: Block, layout: Layout) -> npt.NDArray[np.uint8]:
    """(rows,) 0 or 1. Raises DataError for a label that is neither (file, line, column)."""
    (place,) = layout.of(LABEL)
    found = np.zeros(len(block), np.uint8)
    negative = np.frombuffer((layout.negative or " ").encode(), np.uint8)
    positive = np.frombuffer(layout.positive.encode(), np.uint8)
    bad = _labels(block.data, block.column(place), positive, negative, layout.negative is None, found)
    if bad >= 0:
        allowed = f"{layout.positive} or {layout.negative}" if layout.negative is not None else layout.positive
        raise DataError(
            f"{block.place(bad, layout.names[place])}: the label is {block.text(bad, place)!r}, not {allowed}",
            "Mend the line, or name the labels with --positive and --negative.",
        )
    return found


@exact_kernel
def _labels(data: Any, bounds: Any, positive: Any, negative: Any, any_negative: bool, out: Any) -> int:
    for row in range(bounds.shape[0]):
        start, size = bounds[row, 0], bounds[row, 1] - bounds[row, 0]
        is_positive, is_negative = size == positive.shape[0], size == negative.shape[0]
        for n in range(size):
            is_positive = is_positive and data[start + n] == positive[n]
            is_negative = is_negative and data[start + n] == negative[n]
        if not (is_positive or is_negative or any_negative):
            return row
        out[row] = 1 if is_positive else 0
    return -1


def dense(block: Block, layout: Layout, take_log: bool) -> npt.NDArray[np.float32]:
    """(rows, features); an empty field is 0. With take_log, log(1 + x), what is below 0 as 0 (DLRM's preparation).

    Raises DataError for a field that is no finite number (file, line, column).
    """
    places = layout.of(DENSE)
    found = np.zeros((len(block), len(layout.dense)), np.float32)
    for column, place in enumerate(places):
        numbers = np.zeros(len(block), np.float64)
        row = 0
        while (bad := _numbers(block.data, block.column(place), row, numbers)) >= 0:
            numbers[bad] = _number(block, bad, place, layout)
            row = bad + 1
        found[:, column] = np.log1p(np.maximum(numbers, 0)) if take_log else numbers
    if layout.of(HOUR):
        found[:, len(places) :] = _hours(block, layout)
    return found


@exact_kernel
def _numbers(data: Any, bounds: Any, first: int, out: Any) -> int:
    """Plain decimals up to 15 digits; the first field that is none, or -1."""
    for row in range(first, bounds.shape[0]):
        at, end = bounds[row, 0], bounds[row, 1]
        if at == end:
            continue
        sign = 1.0
        if data[at] == MINUS or data[at] == PLUS:
            sign = -1.0 if data[at] == MINUS else 1.0
            at += 1
        value, digits, scale, after = 0.0, 0, 1.0, False
        while at < end:
            byte = data[at]
            if byte == DOT and not after:
                after = True
            elif byte >= ZERO and byte <= NINE:
                value = value * 10.0 + (byte - ZERO)
                digits += 1
                if after:
                    scale *= 10.0
            else:
                return row
            at += 1
        if digits == 0 or digits > 15:
            return row
        out[row] = sign * value / scale
    return -1


def _number(block: Block, row: int, place: int, layout: Layout) -> float:
    text = block.text(row, place)
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not np.isfinite(np.float32(number)):
        raise DataError(
            f"{block.place(row, layout.names[place])}: {text!r} is not a finite number", "Mend or drop that line."
        )
    return number


def times(block: Block, layout: Layout) -> npt.NDArray[np.int64]:
    """(rows,) of the column of role hour, as YYMMDDHH. Raises DataError for a field that is none."""
    (place,) = layout.of(HOUR)
    numbers = np.zeros(len(block), np.float64)
    bad = _numbers(block.data, block.column(place), 0, numbers)
    whole = numbers.astype(np.int64)
    outside = (whole % 100 > 23) | (whole // 100 % 100 < 1) | (whole // 100 % 100 > 31) | (whole // 10_000 % 100 > 12)
    outside |= (whole // 10_000 % 100 < 1) | (whole != numbers) | (whole > 99_123_123)
    if bad < 0 and outside.any():
        bad = int(outside.argmax())
    if bad >= 0:
        raise DataError(
            f"{block.place(bad, layout.names[place])}: {block.text(bad, place)!r} is not a time such as 14102103",
            "Write year, month, day and hour with two digits each.",
        )
    return whole


def _hours(block: Block, layout: Layout) -> npt.NDArray[np.float32]:
    found = times(block, layout)
    days = {int(day): _weekday(int(day)) for day in np.unique(found // 100)}
    weekdays = np.array([days[int(day)] for day in found // 100], np.float32)
    return np.stack([(found % 100).astype(np.float32), weekdays], axis=1)


def _weekday(day: int) -> int:
    try:
        return datetime.date(2000 + day // 10_000, day // 100 % 100, day % 100).weekday()
    except ValueError:
        return 0


def hashes(block: Block, place: int) -> npt.NDArray[np.uint64]:
    """(rows, 2): 128 bits of each field of a column."""
    return hashing.hashes(block.data, block.bounds[:, place, 0], block.bounds[:, place, 1])


def whole(block: Block, place: int, name: str, limit: int) -> npt.NDArray[np.int32]:
    """(rows,) ids below `limit` (0: below 2^31). Raises DataError for what is none (file, line, column)."""
    numbers = np.zeros(len(block), np.float64)
    bad = _numbers(block.data, block.column(place), 0, numbers)
    if bad >= 0:
        raise DataError(
            f"{block.place(bad, name)}: {block.text(bad, place)!r} is no id", "Import with --values map or hash."
        )
    strange = (numbers < 0) | (numbers != np.floor(numbers)) | (numbers >= (limit or 2**31))
    if strange.any():
        row = int(strange.argmax())
        table = f"its table of {limit:,} rows" if limit else "every table"
        raise DataError(
            f"{block.place(row, name)}: the id {block.text(row, place)} is beyond {table}",
            "Raise --buckets, mend the line, or import with --values map or hash.",
        )
    return numbers.astype(np.int32)
