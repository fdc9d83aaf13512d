"""Triton kernels of the device's codec: ranges, rows into packed codes, packed codes into rows; and of the other wires.

They compute what the Numba kernels of `codec/quantise.py` and `codec/planes.py` do, operation for operation, so that
streams are equal byte for byte. Multiplications and additions must stay apart: launch with `enable_fp_fusion=False`.
`numbers` (5,) float32: 1 / step, step, base, low, limit, of a grid.
"""

from typing import Any

import triton
import triton.language as tl

CODES: Any = tl.constexpr(0)
THROUGH_ZERO: Any = tl.constexpr(1)
WITH_BASE: Any = tl.constexpr(2)
"""What a kernel reads or writes: whole numbers, or values of a grid."""


@triton.jit
def value_ranges(values, keys, count, BLOCK: tl.constexpr):
    """Smallest and largest finite value of values (count,) into keys (2,) int32, as `quantise._key` has them."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = place < count
    bits = tl.load(values + place, mask=there, other=0.0).to(tl.int32, bitcast=True)
    finite = there & ((bits & 0x7F800000) != 0x7F800000)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    tl.atomic_min(keys, tl.min(tl.where(finite, key, 0x7F800000), axis=0))
    tl.atomic_max(keys + 1, tl.max(tl.where(finite, key, -0x7F800001), axis=0))


@triton.jit
def encode_planes(
    source, numbers, out, broken, count, width, WIDTH: tl.constexpr, SOURCE: tl.constexpr, BLOCK: tl.constexpr
):
    """Source (count,): float32 on a grid, or codes as int64 -> out: their planes of WIDTH bits (`codec/planes.py`).

    Marks in broken (count // width,) each row with a value that would come back with more than the limit.
    """
    for plane in tl.static_range(WIDTH // 8):
        _write(source, numbers, out + plane * count, broken, count, width, 8 * plane, 8, SOURCE, BLOCK)
    at = (WIDTH // 8) * count
    if WIDTH & 4:
        _write(source, numbers, out + at, broken, count, width, WIDTH // 8 * 8, 4, SOURCE, BLOCK)
        at += (count + 1) // 2
    if WIDTH & 2:
        _write(source, numbers, out + at, broken, count, width, WIDTH // 4 * 4, 2, SOURCE, BLOCK)
        at += (count + 3) // 4
    if WIDTH & 1:
        _write(source, numbers, out + at, broken, count, width, WIDTH - 1, 1, SOURCE, BLOCK)


@triton.jit
def _write(
    source,
    numbers,
    out,
    broken,
    count,
    width,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    SOURCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One plane: byte j holds the bits of codes j, j + size, j + 2 size, ..."""
    size = (count * BITS + 7) // 8
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    packed = tl.zeros((BLOCK,), tl.int32)
    for segment in tl.static_range(8 // BITS):
        place = byte + segment * size
        there = (byte < size) & (place < count)
        if SOURCE == CODES:
            code = tl.load(source + place, mask=there, other=0).to(tl.int32)
        else:
            code, sound = _quantised(tl.load(source + place, mask=there, other=0.0), numbers, SOURCE)
            tl.store(broken + place // width, 1, mask=there & (sound == 0))
        packed |= tl.where(there, ((code >> SHIFT) & ((1 << BITS) - 1)) << (segment * BITS), 0)
    tl.store(out + byte, packed.to(tl.uint8), mask=byte < size)


@triton.jit
def _quantised(value, numbers, SOURCE: tl.constexpr):
    """The code of each value, and whether it comes back within the limit; other codes mean nothing."""
    finite = (value.to(tl.int32, bitcast=True) & 0x7F800000) != 0x7F800000
    value = tl.where(finite, value, 0.0)
    step, low, limit = tl.load(numbers + 1), tl.load(numbers + 3), tl.load(numbers + 4)
    if SOURCE == THROUGH_ZERO:
        product = value * tl.load(numbers)
        q = (product + 12582912.0) - 12582912.0  # 1.5 x 2**23: the nearest whole number, of two the even one
        back = q * step
    else:
        base = tl.load(numbers + 2).to(tl.float64)
        quotient = (value.to(tl.float64) - base) / step.to(tl.float64)
        q = ((quotient + 6755399441055744.0) - 6755399441055744.0).to(tl.float32)  # 1.5 x 2**52
        back = (base + q.to(tl.float64) * step.to(tl.float64)).to(tl.float32)
    sound = finite & (tl.abs(value - back) <= limit)
    return tl.where(sound, q - low, 0.0).to(tl.int32), sound


@triton.jit
def decode_planes(
    data, numbers, out, beyond, count, num_codes, WIDTH: tl.constexpr, TARGET: tl.constexpr, BLOCK: tl.constexpr
):
    """Planes of WIDTH bits -> out (count,): codes as int64, or their values on a grid as float32.

    Sets beyond (1,) where a code is not below num_codes.
    """
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = place < count
    code = tl.zeros((BLOCK,), tl.int32)
    for plane in tl.static_range(WIDTH // 8):
        code |= _read(data + plane * count, place, there, count, 8) << (8 * plane)
    at = (WIDTH // 8) * count
    if WIDTH & 4:
        code |= _read(data + at, place, there, count, 4) << (WIDTH // 8 * 8)
        at += (count + 1) // 2
    if WIDTH & 2:
        code |= _read(data + at, place, there, count, 2) << (WIDTH // 4 * 4)
        at += (count + 3) // 4
    if WIDTH & 1:
        code |= _read(data + at, place, there, count, 1) << (WIDTH - 1)
    tl.store(beyond + place * 0, 1, mask=there & (code >= num_codes))
    if TARGET == CODES:
        tl.store(out + place, code.to(tl.int64), mask=there)
    else:
        tl.store(out + place, _value(code, numbers, TARGET), mask=there)


@triton.jit
def _read(plane, place, there, count, BITS: tl.constexpr):
    size = (count * BITS + 7) // 8
    byte = tl.load(plane + place % size, mask=there, other=0).to(tl.int32)
    return (byte >> (place // size * BITS).to(tl.int32)) & ((1 << BITS) - 1)


@triton.jit
def _value(code, numbers, TARGET: tl.constexpr):
    whole = code.to(tl.float32) + tl.load(numbers + 3)
    step = tl.load(numbers + 1)
    if TARGET == THROUGH_ZERO:
        return whole * step
    else:
        base = tl.load(numbers + 2).to(tl.float64)
        return (base + whole.to(tl.float64) * step.to(tl.float64)).to(tl.float32)


@triton.jit
def add_noise(values, seed, error, out, count, BLOCK: tl.constexpr):
    """Out (count,): values and noise that is even over [-error, error); seed (1,) int64, error (1,) float64."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = place < count
    x = tl.load(seed).to(tl.uint64) + (place + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = (x ^ (x >> 31)) >> 11
    unit = x.to(tl.float64) * 1.1102230246251565e-16 * 2.0 - 1.0  # 2**-53
    value = tl.load(values + place, mask=there, other=0.0)
    tl.store(out + place, (value.to(tl.float64) + tl.load(error) * unit).to(tl.float32), mask=there)


@triton.jit
def to_half(values, out, count, BLOCK: tl.constexpr):
    """float32 (count,) -> float16, clamped to its range; NaN stays NaN."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(values + place, mask=place < count, other=0.0)
    value = tl.where(value > 65504.0, 65504.0, tl.where(value < -65504.0, -65504.0, value))
    tl.store(out + place, value.to(tl.float16), mask=place < count)


@triton.jit
def from_half(halves, out, count, BLOCK: tl.constexpr):
    """float16 (count,) -> float32."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + place, tl.load(halves + place, mask=place < count).to(tl.float32), mask=place < count)


@triton.jit
def to_int8(rows, out, width, BLOCK: tl.constexpr):
    """A program a row (width,), BLOCK >= width: its codes, then range / 255 and minimum as float32, into out."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    value = tl.load(rows + row * width + place, mask=place < width)
    low = tl.min(tl.where(place < width, value, float("inf")), axis=0)
    high = tl.max(tl.where(place < width, value, float("-inf")), axis=0)
    scale = tl.div_rn(255.0, high - low + 1e-8)
    stream = out + row * (width + 8)
    tl.store(stream + place, ((value - low) * scale + 0.5).to(tl.uint8), mask=place < width)
    four = tl.arange(0, 4)
    ends = tl.div_rn(high - low, 255.0).to(tl.int32, bitcast=True)
    tl.store(stream + width + four, ((ends >> (8 * four)) & 255).to(tl.uint8))
    tl.store(stream + width + 4 + four, ((low.to(tl.int32, bitcast=True) >> (8 * four)) & 255).to(tl.uint8))


@triton.jit
def from_int8(stream, out, width, BLOCK: tl.constexpr):
    """The inverse of `to_int8`."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    start = stream + row * (width + 8)
    four = tl.arange(0, 4)
    scale = tl.sum(tl.load(start + width + four).to(tl.int32) << (8 * four), axis=0).to(tl.float32, bitcast=True)
    low = tl.sum(tl.load(start + width + 4 + four).to(tl.int32) << (8 * four), axis=0).to(tl.float32, bitcast=True)
    code = tl.load(start + place, mask=place < width, other=0)
    tl.store(out + row * width + place, code.to(tl.float32) * scale + low, mask=place < width)
