"""The codec's fixed-width streams on the device where the rows are: no row crosses to the host.

Streams are those of `codec.encoder` with codec `fixed` or `raw`, byte for byte, and either end may be the other kind.
The host writes and reads heads, and is told of each slice how many rows are distinct, their range, and which of them
break the bound.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor

from puna.errors import DataError
from puna.recsys import gpu_kernels as kernels
from puna.recsys.codec import planes, quantise, stream
from puna.recsys.codec.encoder import MAX_BOUND
from puna.recsys.codec.quantise import Grid
from puna.recsys.codec.stream import ALL_ROWS, IN_ORDER, KNOWN_IDS, SENT_INDEX, Head, Reader, damaged

BLOCK = 1024
_HEAD_BYTES = 64  # holds every head and the size of an index
_NO_RANGE = (0x7F800000, -0x7F800001)  # keys of infinity and of its opposite
_PACKED = b"\0"  # the index is as `codec.index.pack` has it


class DeviceSlice(NamedTuple):
    """Rows (n, D) float32 of one table for one receiver; ids (n,) that it knows; bound 0: raw."""

    rows: Tensor
    ids: Tensor | None = None
    bound: float = 0.01


@dataclass
class _Opened:
    """A slice's distinct rows (k, D), the number of each lookup's row, and what becomes of them."""

    head: Head
    rows: Tensor
    inverse: Tensor | None
    error: float = 0.0
    payload: Tensor | None = None
    broken: Tensor | None = None
    exceptions: Tensor | None = None


def launch(kernel: Any, size: int, *arguments: Any, block: int = BLOCK, **constants: Any) -> None:
    """Run `kernel` over `size` places, `block` to a program, with multiplications and additions kept apart."""
    if size:
        grid = (triton.cdiv(size, block),)
        kernel[grid](*arguments, BLOCK=block, enable_fp_fusion=False, **constants)


def ranges(parts: Sequence[Tensor]) -> list[tuple[float, float]]:
    """Smallest and largest finite value of each tensor; (inf, -inf) where there is none."""
    if not parts:
        return []
    keys = torch.tensor([_NO_RANGE] * len(parts), dtype=torch.int32, device=parts[0].device)
    for part, ends in zip(parts, keys, strict=True):
        launch(kernels.value_ranges, part.numel(), part, ends, part.numel())
    found = keys.cpu().numpy()
    bits = found ^ ((found >> 31) & 0x7FFFFFFF)
    return [(float(low), float(high)) for low, high in bits.view(np.float32)]


def encode(rows: Tensor, ids: Tensor | None = None, bound: float = 0.01) -> Tensor:
    """The stream of rows (n, D), uint8, on their device: what `codec.api.encode` gives with codec `fixed`, or with
    `raw` for a bound of 0. Lookups of one id are taken to have equal rows."""
    return encode_many([DeviceSlice(rows, ids, bound)])[0]


def encode_many(slices: Sequence[DeviceSlice]) -> list[Tensor]:
    """The stream of each slice, all on one device."""
    found = [_open(part) for part in slices]
    coded = [n for n, part in enumerate(slices) if part.bound and len(part.rows)]
    for n, (low, high) in zip(coded, ranges([found[n].rows for n in coded]), strict=True):
        found[n].head.grid = quantise.grid_of(low, high, slices[n].bound)
        found[n].error = slices[n].bound * (high - low)
    coded = [n for n in coded if found[n].head.grid]
    for n in coded:
        _fill(found[n])
    if coded:
        has_broken = torch.stack([part.broken.any() for n in coded if (part := found[n]).broken is not None]).tolist()
        for n, broken in zip(coded, has_broken, strict=True):
            if broken:
                _set_aside(found[n])
    return [_joined(part) for part in found]


def _open(part: DeviceSlice) -> _Opened:
    rows = part.rows
    if rows.dtype != torch.float32 or rows.ndim != 2 or rows.shape[1] < 1:
        raise DataError(f"rows are {rows.dtype} of shape {tuple(rows.shape)}", "They must be float32 (n, D), D > 0.")
    if not 0 <= part.bound <= MAX_BOUND:
        raise DataError(f"the bound is {part.bound}", f"It is a share of max - min: 0 (raw) to {MAX_BOUND}.")
    if part.ids is not None and part.ids.shape != (len(rows),):
        raise DataError(f"ids have shape {tuple(part.ids.shape)}", f"They must have shape ({len(rows)},).")
    rows = rows.contiguous()
    head = Head(stream.RAW, ALL_ROWS, rows.shape[0], rows.shape[1], len(rows))
    if len(rows) == 0:
        return _Opened(head, rows, None)
    first, inverse = _distinct(rows.view(torch.int32) if part.ids is None else part.ids)
    head.num_distinct = len(first)
    if len(first) == len(rows):
        head.index = IN_ORDER
        return _Opened(head, rows, None)
    head.index = SENT_INDEX if part.ids is None else KNOWN_IDS
    return _Opened(head, rows[first], inverse)


def _distinct(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Of keys (n,) or (n, D): where each is first met, in that order, and the number of each (n,)."""
    if len(keys) == 0:
        return keys.new_empty(0, dtype=torch.int64), keys.new_empty(0, dtype=torch.int64)
    found, sorted_number = torch.unique(keys, dim=0, return_inverse=True)
    places = torch.arange(len(keys), device=keys.device)
    first = torch.full_like(places[: len(found)], len(keys)).scatter_reduce_(0, sorted_number, places, "amin")
    first, order = first.sort()
    number = torch.empty_like(order)
    number[order] = places[: len(found)]
    return first, number[sorted_number]


def numbers_of(grid: Grid, error: float, device: torch.device) -> Tensor:
    """The `numbers` of kernels; error: the largest that is allowed."""
    inverse = np.float32(1) / np.float32(grid.step) if grid.step else 0.0
    limit = np.float32(error * quantise.SLACK)
    return torch.tensor([inverse, grid.step, grid.base, grid.low, limit], dtype=torch.float32, device=device)


def packed(source: Tensor, width: int, kind: Any, numbers: Tensor, broken: Tensor, row: int = 1) -> Tensor:
    """The planes of source (m,), values on a grid or codes, as uint8; broken (m // row,) is marked."""
    count = source.numel()
    out = torch.empty(planes.packed_size(count, width), dtype=torch.uint8, device=source.device)
    largest = min(count, out.numel())  # no plane has more bytes
    constants = {"WIDTH": width, "SOURCE": kind.value}
    launch(kernels.encode_planes, largest, source, numbers, out, broken, count, row, **constants)
    return out


def _fill(part: _Opened) -> None:
    """Payload, and which rows break the bound."""
    grid, rows = part.head.grid, part.rows
    assert grid
    part.head.method = stream.FIXED
    if grid.step == 0:
        part.broken = (rows != grid.base).any(dim=1)
        part.payload = rows.new_empty(0, dtype=torch.uint8)
        return
    broken = torch.zeros(len(rows), dtype=torch.uint8, device=rows.device)
    numbers = numbers_of(grid, part.error, rows.device)
    part.payload = packed(rows, planes.width_of(grid.num_codes), kind_of(grid), numbers, broken, rows.shape[1])
    part.broken = broken.bool()


def kind_of(grid: Grid) -> Any:
    """Which arithmetic the grid's values have."""
    return kernels.WITH_BASE if grid.base else kernels.THROUGH_ZERO


def _set_aside(part: _Opened) -> None:
    """Rows that break the bound are sent as they are, and the others packed anew."""
    broken = part.broken
    assert broken is not None
    rows = broken.nonzero()[:, 0]
    gaps = b"".join(stream.varint(int(gap)) for gap in np.diff(rows.cpu().numpy(), prepend=-1) - 1)
    values = part.rows[rows].reshape(-1).view(torch.uint8)
    all_rows, part.rows = part.rows, part.rows[~broken]
    if len(part.rows):
        _fill(part)
    part.rows, part.broken = all_rows, broken
    part.payload = part.payload if len(rows) < len(all_rows) else values[:0]
    part.exceptions = torch.cat((_tensor(gaps, values.device), values))
    part.head.num_exceptions = len(rows)


def _joined(part: _Opened) -> Tensor:
    head, rows, device = part.head, part.rows, part.rows.device
    index, nothing = [], torch.empty(0, dtype=torch.uint8, device=device)
    if head.index == SENT_INDEX:
        assert part.inverse is not None
        numbers = packed(part.inverse, planes.width_of(head.num_distinct), kernels.CODES, nothing, nothing)
        index = [_tensor(stream.varint(1 + len(numbers)) + _PACKED, device), numbers]
    body = [nothing if tensor is None else tensor for tensor in (part.exceptions, part.payload)]
    if head.grid is None or sum(map(len, body)) >= 4 * rows.numel():
        head.method, head.num_exceptions, head.grid = stream.RAW, 0, None
        body = [rows.reshape(-1).view(torch.uint8)]
    parts = [*index, *body]
    text = _tensor(stream.write(head, sum(map(len, parts))), device)
    return torch.cat((text, *parts, torch.zeros(head.padding, dtype=torch.uint8, device=device)))


def _tensor(data: bytes, device: torch.device) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy()).to(device)


def decode(data: Tensor, ids: Tensor | None = None) -> Tensor:
    """Rows (n, D) float32, on the device of data (m,) uint8, a stream of method `fixed` or `raw`; ids as encoded.

    DataError: a stream that is damaged, of another version or method; ids that are not those.
    """
    return decode_many([data], [ids])[0]


def decode_many(data: Sequence[Tensor], ids: Sequence[Tensor | None]) -> list[Tensor]:
    """The rows of each stream, all on one device."""
    if not data:
        return []
    starts = torch.zeros(len(data), _HEAD_BYTES, dtype=torch.uint8, device=data[0].device)
    for start, part in zip(starts, data, strict=True):
        start[: len(part)] = part[:_HEAD_BYTES]
    beyond = torch.zeros(len(data), 1, dtype=torch.uint8, device=data[0].device)
    found = [_decoded(*one) for one in zip(data, ids, starts.cpu().numpy(), beyond, strict=True)]
    if beyond.any():
        raise damaged("a code beyond the last")
    return found


def _decoded(data: Tensor, ids: Tensor | None, start: Any, beyond: Tensor) -> Tensor:
    host = np.zeros(len(data), np.uint8)  # of the stream's length, by which its head is judged
    host[:_HEAD_BYTES] = start[: len(data)]
    head, at = stream.read(host.data)
    if head.method not in (stream.RAW, stream.FIXED):
        name = stream.METHODS[head.method]
        raise DataError(
            f"the codec stream is of method {name}", "The device reads fixed and raw; decode it on the host."
        )
    reader = Reader(host.data[: len(host) - head.padding], at)
    inverse = _inverse(head, reader, data, ids, beyond)
    rows = _rows(head, data[reader.at : len(data) - head.padding], beyond)
    return rows if inverse is None else rows[inverse]


def _inverse(head: Head, reader: Reader, data: Tensor, ids: Tensor | None, beyond: Tensor) -> Tensor | None:
    """The number of the distinct row of each lookup; None: they are the rows, in order."""
    if head.index == KNOWN_IDS:
        if ids is None:
            raise DataError("the codec stream was made with ids that its receiver knows", "Give the same ids.")
        first, inverse = _distinct(ids)
        if ids.shape != (head.num_rows,) or len(first) != head.num_distinct:
            raise DataError(
                f"these ids are not those of {head.num_distinct} rows", "Give the ids that it was made with."
            )
        return inverse
    if head.index != SENT_INDEX:
        return None
    size = reader.varint()
    part = data[reader.at : reader.at + size]
    if reader.take(size)[:1] != _PACKED:
        raise DataError(
            "the codec stream has a range-coded index", "The device reads packed ones; decode it on the host."
        )
    inverse = torch.empty(head.num_rows, dtype=torch.int64, device=data.device)
    _unpack(part[1:], head.num_distinct, inverse, kernels.CODES, beyond, beyond)
    return inverse.clamp_(max=head.num_distinct - 1)  # where it is damaged, until that is told


def _rows(head: Head, data: Tensor, beyond: Tensor) -> Tensor:
    """Rows (k, D) of what follows the index."""
    grid, shape = head.grid, (head.num_distinct, head.width)
    if grid is None:
        if len(data) != 4 * shape[0] * shape[1]:
            raise damaged(f"{len(data)} bytes instead of {4 * shape[0] * shape[1]}")
        return data.clone().view(torch.float32).reshape(shape)
    is_exception, values, data = _exceptions(head, data)
    coded = torch.empty((head.num_coded, head.width), dtype=torch.float32, device=data.device)
    numbers = numbers_of(grid, 0.0, data.device)
    _unpack(data, grid.num_codes, coded, kind_of(grid), numbers, beyond)
    if grid.step == 0:
        coded[:] = grid.base
    if is_exception is None:
        return coded
    rows = torch.empty(shape, dtype=torch.float32, device=data.device)
    rows[is_exception], rows[~is_exception] = values, coded
    return rows


def _exceptions(head: Head, data: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
    """Which rows were sent as they are, their values, and the data that follow."""
    if not head.num_exceptions:
        return None, data[:0], data
    reader = Reader(data[: 5 * head.num_exceptions].cpu().numpy().data)
    rows = np.cumsum([reader.varint() + 1 for _ in range(head.num_exceptions)]) - 1
    end = reader.at + 4 * head.num_exceptions * head.width
    if rows[-1] >= head.num_distinct or end > len(data):
        raise damaged("an exception beyond the last row, or its values are cut")
    is_exception = torch.zeros(head.num_distinct, dtype=torch.bool, device=data.device)
    is_exception[torch.from_numpy(rows).to(data.device)] = True
    values = data[reader.at : end].clone().view(torch.float32).reshape(-1, head.width)
    return is_exception, values, data[end:]


def _unpack(data: Tensor, num_codes: int, out: Tensor, target: Any, numbers: Tensor, beyond: Tensor) -> None:
    """Fill out, codes or values, from its planes."""
    width, count = planes.width_of(num_codes), out.numel()
    if len(data) != planes.packed_size(count, width):
        raise damaged(f"{len(data)} bytes for {count} codes of {width} bits")
    constants = {"WIDTH": width, "TARGET": target.value}
    launch(kernels.decode_planes, count, data, numbers, out, beyond, count, num_codes, **constants)
