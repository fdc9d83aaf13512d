"""The error-bounded quantiser: x becomes a whole number q on a grid, and x' = step q (+ base) comes back.

The bound is relative to the slice (Feng et al., SC24): E = bound (max - min) over its finite values. The grid's step is
a little less than 2 E, so that rounding in float32 does not break the bound; every value is checked as the receiver
will compute it, and rows that break it are left to the caller.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from puna.recsys.codec.compiled import kernel

MAX_CODES = 1 << 16
_ONE = np.float32(1)
_INFINITE = 0x7F800000  # the bits of infinity, and so the first number of `_key` that is not finite
NO_GRID = -1.0
_SMALLEST, _LARGEST = 2.0**-100, 2.0**126  # errors outside make denormal or infinite steps
_MARGIN = 2.0**-14  # of the step, besides what rounding of values and codes takes
_FAR = 65536.0  # a grid through 0 has whole numbers up to this; beyond it begins at the smallest value
SLACK = 1 - 2.0**-21
"""Share of the largest error that a difference in float32 may come to."""


class Grid(NamedTuple):
    """x' = step (code + low) in float32; where base is not 0: base + step (code + low) in float64, and then rounded."""

    step: float
    base: float
    low: int
    num_codes: int

    @property
    def code_type(self) -> type:
        """What holds a code."""
        return np.uint8 if self.num_codes <= 256 else np.int64

    @property
    def centre(self) -> int:
        """The code around which rows spread: that of 0, or the middle where 0 is not on the grid."""
        return -self.low if self.base == 0 and 0 <= -self.low < self.num_codes else self.num_codes // 2


def finite_range(values: npt.NDArray[np.float32]) -> tuple[float, float]:
    """Smallest and largest finite value of values (m,); (inf, -inf) where there is none."""
    low, high = _range(values.view(np.int32))
    return float(low), float(high)


def grid_of(low: float, high: float, bound: float) -> Grid | None:
    """The grid of a slice whose finite values lie in [low, high]; None where floats have no such grid."""
    return as_grid(_grid(low, high, bound))


def as_grid(found: tuple[float, float, int, int]) -> Grid | None:
    """What `quantised` found."""
    return None if found[0] == NO_GRID else Grid(*found)


def quantise_wide(values: npt.NDArray[np.float32], grid: Grid, error: float, codes: npt.NDArray[np.int64]) -> int:
    """Codes of values (m,) of a grid that has more than `quantised` fills; returns how many break the bound."""
    limit = np.float32(_limit(error))
    return _quantise(values, np.float32(grid.step), grid.base, np.float32(grid.low), limit, codes)


def broken_rows(rows: npt.NDArray[np.float32], grid: Grid, error: float) -> npt.NDArray[np.bool_]:
    """Which of rows (k, D) hold a value that would come back with more than `error`."""
    broken = np.empty(len(rows), np.bool_)
    if grid.step == 0:
        return (rows != np.float32(grid.base)).any(axis=1)
    _broken(rows, np.float32(grid.step), grid.base, np.float32(_limit(error)), broken)
    return broken


def restore(codes: npt.NDArray[Any], grid: Grid, values: npt.NDArray[np.float32]) -> None:
    """Values (m,) that codes (m,) stand for."""
    if grid.step == 0:
        values[:] = np.float32(grid.base)
    else:
        _restore(codes, np.float32(grid.step), grid.base, np.float32(grid.low), values)


@kernel
def _limit(error: float) -> Any:
    """What a difference that float32 rounds may come to, such that it is below `error`, and below that in float32."""
    return np.float32(error * SLACK)


@kernel
def _key(bits: int) -> int:
    """Numbers in the order of the floats whose bits they are; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@kernel
def _range(bits: Any) -> Any:
    """Smallest and largest finite float32 of their bits as int32 (m,)."""
    low, high = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
    for i in range(bits.shape[0]):
        key = np.int32(_key(bits[i]))
        low, high = np.int32(min(low, key)), np.int32(max(high, key))
    if high >= _INFINITE or low <= _key(_INFINITE - 0x80000000):
        low, high = _finite_range(bits)
    ends = np.empty(2, np.int32)
    ends[0], ends[1] = _key(low), _key(high)
    return ends.view(np.float32)[0], ends.view(np.float32)[1]


@kernel
def _finite_range(bits: Any) -> Any:
    low, high = np.int32(_INFINITE), np.int32(_key(_INFINITE - 0x80000000))
    for i in range(bits.shape[0]):
        if (bits[i] & _INFINITE) != _INFINITE:
            key = np.int32(_key(bits[i]))
            low, high = np.int32(min(low, key)), np.int32(max(high, key))
    return low, high


@kernel
def _grid(low: float, high: float, bound: float) -> Any:
    """Step (NO_GRID: none), base, smallest code, number of codes."""
    if low == high:
        return 0.0, low, 0, 1
    error = bound * (high - low)
    if not _SMALLEST <= error <= _LARGEST:
        return NO_GRID, 0.0, 0, 0
    largest = np.float32(max(abs(low), abs(high)))
    far = largest / (2 * error)
    base = 0.0 if far < _FAR else low
    margin = _MARGIN + (np.nextafter(largest, np.float32(np.inf)) - largest) / (2 * error)
    if base == 0.0:
        margin += far * 2.0**-22
    if not margin <= 0.5:
        return NO_GRID, 0.0, 0, 0
    step = np.float32(2 * error * (1 - margin))
    first, last = _code(np.float32(low), step, base), _code(np.float32(high), step, base)
    if last - first >= MAX_CODES:
        return NO_GRID, 0.0, 0, 0
    return np.float64(step), base, np.int64(first), np.int64(last - first) + 1


@kernel
def quantised(values: Any, bits: Any, bound: float, codes: Any) -> Any:
    """Values (m,), their bits as int32 -> what `as_grid` takes, the largest error E, how many values break it.

    Fills codes (m,) uint8 where they fit; codes of values that come back with more than E mean nothing.
    """
    low, high = _range(bits)
    low, high = np.float64(low), np.float64(high)
    grid, error, num_broken = _grid(low, high, bound), bound * (high - low), 0
    step, base, first, num_codes = grid
    if step == 0.0:
        for i in range(values.shape[0]):
            num_broken += values[i] != np.float32(base)
            codes[i] = 0
    elif 0 < num_codes <= 256:
        num_broken = _quantise(values, np.float32(step), base, np.float32(first), _limit(error), codes)
    return grid, error, num_broken


@kernel
def _code(value: Any, step: Any, base: float) -> Any:
    if base == 0.0:
        return np.rint(value * (_ONE / step))
    return np.float32(np.rint((np.float64(value) - base) / np.float64(step)))


@kernel
def _value(code: Any, step: Any, base: float) -> Any:
    if base == 0.0:
        return code * step
    return np.float32(base + np.float64(code) * np.float64(step))


@kernel
def _quantise(values: Any, step: Any, base: float, low: Any, limit: Any, codes: Any) -> Any:
    num_broken = np.int32(0)
    if base == 0.0:
        inverse = _ONE / step
        for i in range(values.shape[0]):
            q = np.rint(values[i] * inverse)
            num_broken = np.int32(num_broken + np.int32(not abs(values[i] - q * step) <= limit))
            codes[i] = np.int32(q - low)
    else:
        for i in range(values.shape[0]):
            q = _code(values[i], step, base)
            num_broken = np.int32(num_broken + np.int32(not abs(values[i] - _value(q, step, base)) <= limit))
            codes[i] = np.int32(q - low)
    return num_broken


@kernel
def _broken(rows: Any, step: Any, base: float, limit: Any, broken: Any) -> None:
    for i in range(rows.shape[0]):
        worst = False
        for j in range(rows.shape[1]):
            q = _code(rows[i, j], step, base)
            worst |= not abs(rows[i, j] - _value(q, step, base)) <= limit
        broken[i] = worst


@kernel
def _restore(codes: Any, step: Any, base: float, low: Any, values: Any) -> None:
    if base == 0.0:
        for i in range(codes.shape[0]):
            values[i] = (np.float32(codes[i]) + low) * step
    else:
        for i in range(codes.shape[0]):
            values[i] = _value(np.float32(codes[i]) + low, step, base)
