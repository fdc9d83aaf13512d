"""The error-bounded quantiser: x becomes a whole number q on a grid, and x' = step q (+ base) comes back.

The bound is relative to the slice (Feng et al., SC24, section on error-bounded quantisation): E = bound (max - min) over
its finite values. The grid's step is a little less than 2 E, so that rounding in float32 does not break the bound;
every value is checked as the receiver will compute it, and rows that break it are left to the caller.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from puna.recsys.codec.compiled import kernel

MAX_CODES = 1 << 16
_LANES = 128
_ZERO, _ONE = np.float32(0), np.float32(1)
_SMALLEST, _LARGEST = 2.0**-100, 2.0**126  # errors outside make denormal or infinite steps
_MARGIN = 2.0**-14  # of the step, besides what rounding of values and codes takes
_FAR = 65536.0  # a grid through 0 has whole numbers up to this; beyond it begins at the smallest value
_SLACK = 1 - 2.0**-22  # of the check, so that E rounded to float32 by others is kept too


class Grid(NamedTuple):
    """x' = step (code + low) in float32, or base + step (code + low) in float64 and then rounded, where base is not 0."""

    step: float
    base: float
    low: int
    num_codes: int

    @property
    def code_type(self) -> type:
        """What holds a code."""
        return np.uint8 if self.num_codes <= 256 else np.uint16

    @property
    def centre(self) -> int:
        """The code around which rows spread: that of 0, or the middle where 0 is not on the grid."""
        return -self.low if self.base == 0 and 0 <= -self.low < self.num_codes else self.num_codes // 2


def finite_range(values: npt.NDArray[np.float32]) -> tuple[float, float]:
    """Smallest and largest finite value of values (m,); (inf, -inf) where there is none."""
    low, high, sound = _range(values)
    return (low, high) if sound else _careful_range(values)


def grid_of(low: float, high: float, bound: float) -> Grid | None:
    """The grid of a slice whose finite values lie in [low, high]; None where floats have no such grid."""
    if low == high:
        return Grid(0.0, low, 0, 1)
    error = bound * (high - low)
    if not _SMALLEST <= error <= _LARGEST:
        return None
    largest = max(abs(low), abs(high))
    far = largest / (2 * error)
    base = 0.0 if far < _FAR else low
    margin = _MARGIN + float(np.spacing(np.float32(largest))) / (2 * error) + (0.0 if base else far * 2.0**-22)
    if margin > 0.5:
        return None
    step = np.float32(2 * error * (1 - margin))
    first, last = _code(np.float32(low), step, base), _code(np.float32(high), step, base)
    if last - first >= MAX_CODES:
        return None
    return Grid(float(step), base, int(first), int(last - first) + 1)


def quantise(values: npt.NDArray[np.float32], grid: Grid, error: float, codes: npt.NDArray[Any]) -> int:
    """Codes of values (m,), each in [0, num_codes); returns how many values come back with more than `error`.

    The codes of those mean nothing; `broken_rows` names their rows.
    """
    if grid.step == 0:
        codes[:] = 0
        return int(len(values) - np.count_nonzero(values == np.float32(grid.base)))
    return _quantise(values, np.float32(grid.step), grid.base, np.float32(grid.low), _limit(error), codes)


def broken_rows(rows: npt.NDArray[np.float32], grid: Grid, error: float) -> npt.NDArray[np.bool_]:
    """Which of rows (k, D) hold a value that would come back with more than `error`."""
    broken = np.empty(len(rows), np.bool_)
    if grid.step == 0:
        return (rows != np.float32(grid.base)).any(axis=1)
    _broken(rows, np.float32(grid.step), grid.base, _limit(error), broken)
    return broken


def restore(codes: npt.NDArray[Any], grid: Grid, values: npt.NDArray[np.float32]) -> None:
    """Values (m,) that codes (m,) stand for."""
    if grid.step == 0:
        values[:] = np.float32(grid.base)
    else:
        _restore(codes, np.float32(grid.step), grid.base, np.float32(grid.low), values)


def _limit(error: float) -> np.float32:
    """Largest float32 such that a rounded difference up to it is a true one up to `error`."""
    limit = np.float32(error * _SLACK)
    return limit if float(limit) < error * _SLACK else np.nextafter(limit, _ZERO)


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
def _range(values: Any) -> Any:
    """Of 128 lanes, so that it becomes vector code; a value that is not finite makes the third answer False."""
    lows, highs, sums = np.empty(_LANES, np.float32), np.empty(_LANES, np.float32), np.empty(_LANES, np.float32)
    for j in range(_LANES):
        lows[j], highs[j], sums[j] = np.inf, -np.inf, 0
    full = values.shape[0] // _LANES * _LANES
    for start in range(0, full, _LANES):
        for j in range(_LANES):
            v = values[start + j]
            lows[j] = v if v < lows[j] else lows[j]
            highs[j] = v if v > highs[j] else highs[j]
            sums[j] += v * _ZERO
    for i in range(full, values.shape[0]):
        v = values[i]
        lows[0] = v if v < lows[0] else lows[0]
        highs[0] = v if v > highs[0] else highs[0]
        sums[0] += v * _ZERO
    low, high, total = np.inf, -np.inf, 0.0
    for j in range(_LANES):
        low, high = min(low, lows[j]), max(high, highs[j])
        total += sums[j]
    return low, high, total == 0.0


@kernel
def _careful_range(values: Any) -> Any:
    low, high = np.inf, -np.inf
    for i in range(values.shape[0]):
        if np.isfinite(values[i]):
            low, high = min(low, values[i]), max(high, values[i])
    return low, high


@kernel
def _quantise(values: Any, step: Any, base: float, low: Any, limit: Any, codes: Any) -> int:
    num_broken = 0
    if base == 0.0:
        inverse = _ONE / step
        for i in range(values.shape[0]):
            q = np.rint(values[i] * inverse)
            num_broken += not abs(values[i] - q * step) <= limit
            codes[i] = np.int32(q - low)
        return num_broken
    for i in range(values.shape[0]):
        q = _code(values[i], step, base)
        num_broken += not abs(values[i] - _value(q, step, base)) <= limit
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
