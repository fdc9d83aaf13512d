"""How blocks of rows become bytes on their way to another rank, and rows again.

raw       float32                                                       4 D a row
fp16      half precision, clamped to its range                          2 D
int8      row-wise: D codes, float32 scale and minimum (of the row)     D + 8
bounded   the error-bounded codec; sizes are known once it is done
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from puna.recsys.codec.quantise import finite_range
from puna.sparse.compiled import exact_kernel, kernel
from puna.sparse.hashing import mix

HALF_MAX = 65_504.0
Rows = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Block:
    """Rows of one table, or of a piece of it, for one rank (or from it).

    bound, back: largest error over the range of the block, forward and backward; 0: as float32. seed: of rounding
    without bias, backward; 0: to the nearest. dither: seed of noise that both ends know, forward; 0: none. ids,
    back_ids: (rows,) that both ends know; rows of one id are equal, and sent once; None: repeats are looked for.
    """

    rows: int
    width: int
    bound: float = 0.0
    back: float = 0.0
    seed: int = 0
    dither: int = 0
    ids: Any = field(default=None, compare=False)
    back_ids: Any = field(default=None, compare=False)

    @property
    def count(self) -> int:
        """Numbers in it."""
        return self.rows * self.width

    def turned(self) -> "Block":
        """The block of its gradients, on the way back."""
        return replace(self, bound=self.back, back=self.bound, dither=0, ids=self.back_ids, back_ids=self.ids)


class Wire(Protocol):
    """A way to send blocks; the same on every rank."""

    name: str

    def size(self, block: Block) -> int | None:
        """Bytes of a block, or None where they depend on its numbers."""

    def encode(self, blocks: Sequence[Block], rows: Sequence[Rows], unbiased: bool) -> list[Any]:
        """The bytes of each block. unbiased: round without bias."""

    def decode(self, blocks: Sequence[Block], streams: Sequence[Bytes], outs: Sequence[Rows]) -> None:
        """Fill each of `outs`, (rows, width)."""


class DeviceWire(ABC):
    """A `Wire` whose rows and bytes are tensors on one device."""

    name: str

    @abstractmethod
    def size(self, block: Block) -> int | None:
        """As `Wire.size`."""

    @abstractmethod
    def encode(self, blocks: Sequence[Block], rows: Sequence[Tensor], unbiased: bool) -> list[Tensor]:
        """As `Wire.encode`."""

    @abstractmethod
    def decode(self, blocks: Sequence[Block], streams: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
        """As `Wire.decode`."""


class Raw:
    """float32."""

    name = "raw"

    def size(self, block: Block) -> int:
        return 4 * block.count

    def encode(self, blocks: Sequence[Block], rows: Sequence[Rows], unbiased: bool) -> list[Any]:
        return [part.view(np.uint8).reshape(-1) for part in rows]

    def decode(self, blocks: Sequence[Block], streams: Sequence[Bytes], outs: Sequence[Rows]) -> None:
        for stream, out in zip(streams, outs, strict=True):
            out.view(np.uint8).reshape(-1)[:] = stream


class Half:
    """float16."""

    name = "fp16"

    def size(self, block: Block) -> int:
        return 2 * block.count

    def encode(self, blocks: Sequence[Block], rows: Sequence[Rows], unbiased: bool) -> list[Any]:
        halves = (torch.from_numpy(part).clamp(-HALF_MAX, HALF_MAX).to(torch.float16).numpy() for part in rows)
        return [half.reshape(-1).view(np.uint8) for half in halves]

    def decode(self, blocks: Sequence[Block], streams: Sequence[Bytes], outs: Sequence[Rows]) -> None:
        for stream, out in zip(streams, outs, strict=True):
            halves = np.array(stream).view(np.float16).reshape(out.shape)
            torch.from_numpy(out).copy_(torch.from_numpy(halves))


class Int8:
    """Row-wise: code = round((x - min) x 255 / (range + 1e-8)), value = code x range / 255 + min."""

    name = "int8"

    def size(self, block: Block) -> int:
        return block.rows * (block.width + 8)

    def encode(self, blocks: Sequence[Block], rows: Sequence[Rows], unbiased: bool) -> list[Any]:
        out = [np.empty((len(part), part.shape[1] + 8), np.uint8) for part in rows]
        for part, stream in zip(rows, out, strict=True):
            ends = np.empty((len(part), 2), np.float32)
            _to_int8(part, ends, stream)
            stream[:, -8:] = ends.view(np.uint8)
        return [stream.reshape(-1) for stream in out]

    def decode(self, blocks: Sequence[Block], streams: Sequence[Bytes], outs: Sequence[Rows]) -> None:
        for stream, out in zip(streams, outs, strict=True):
            table = np.asarray(stream).reshape(len(out), out.shape[1] + 8)
            ends = np.ascontiguousarray(table[:, -8:]).view(np.float32)
            _from_int8(np.ascontiguousarray(table), ends, out)


@kernel
def _to_int8(rows: Any, ends: Any, out: Any) -> None:
    for i in range(rows.shape[0]):
        low, high = rows[i, 0], rows[i, 0]
        for k in range(rows.shape[1]):
            low, high = min(low, rows[i, k]), max(high, rows[i, k])
        ends[i, 0], ends[i, 1] = (high - low) / np.float32(255), low
        scale = np.float32(255) / (high - low + np.float32(1e-8))
        for k in range(rows.shape[1]):
            out[i, k] = np.uint8((rows[i, k] - low) * scale + np.float32(0.5))


@kernel
def _from_int8(codes: Any, ends: Any, out: Any) -> None:
    for i in range(out.shape[0]):
        for k in range(out.shape[1]):
            out[i, k] = np.float32(codes[i, k]) * ends[i, 0] + ends[i, 1]


class Bounded:
    """The error-bounded codec on blocks with a bound, float32 on those without.

    Gradients are rounded without bias: noise that is even over one step of the quantiser is added first, so that the
    expectation of what arrives is what was sent (Schuchman 1964); the error is then at most twice the bound. Of rows
    with a `dither` the receiver takes the noise off again: the error keeps the bound, and does not depend on the row.
    """

    name = "bounded"

    def __init__(self, codec: str = "auto", num_threads: int = 1) -> None:
        from puna.recsys.codec.api import Codec

        self.codec, self._coder = codec, Codec(num_threads=num_threads, check_ids=False)

    def size(self, block: Block) -> None:
        return None

    def encode(self, blocks: Sequence[Block], rows: Sequence[Rows], unbiased: bool) -> list[Any]:
        """A stream ends with the noise's size, float32, where its block has a dither."""
        from puna.recsys.codec.api import Slice

        slices, tails = [], []
        for block, part in zip(blocks, rows, strict=True):
            bound, tail = block.bound, b""
            if unbiased and bound and block.seed:
                part, bound = with_noise(part, bound, block.seed)
            if bound and block.dither:
                part, bound, error = dithering(part, bound, block)
                tail = error.tobytes()
            slices.append(Slice(part, block.ids, bound or 0.5, self.codec if bound else "raw"))
            tails.append(tail)
        streams = self._coder.encode_many(slices)
        return [np.frombuffer(stream + tail, np.uint8) for stream, tail in zip(streams, tails, strict=True)]

    def decode(self, blocks: Sequence[Block], streams: Sequence[Bytes], outs: Sequence[Rows]) -> None:
        noisy = [block.dither and block.bound for block in blocks]
        whole = [stream[:-4] if noise else stream for stream, noise in zip(streams, noisy, strict=True)]
        self._coder.decode_many(whole, [block.ids for block in blocks], list(outs))
        for block, stream, out, noise in zip(blocks, streams, outs, noisy, strict=True):
            if noise:
                error = np.frombuffer(stream[-4:].tobytes(), "<f4")[0]
                _add_dither(out, *_keyed(block), -error, out)


_MARGIN = 0.999
"""Of the bound is the quantiser's; the rest is for sums in float32."""
_LEAST = 2.0**-12
"""Of the largest number: noise that is smaller would be lost in those sums."""


def dithering(rows: Rows, bound: float, block: Block) -> tuple[Rows, float, np.float32]:
    """Rows with their noise, the bound that makes the same error of them, and the size of the noise."""
    low, high = finite_range(rows.reshape(-1))
    error = np.float32(bound * (high - low) * _MARGIN)
    if not _LEAST * max(abs(low), abs(high)) < error < np.inf:
        return rows, bound, np.float32(0)
    noisy = np.empty_like(rows)
    _add_dither(rows, *_keyed(block), error, noisy)
    low, high = finite_range(noisy.reshape(-1))
    return noisy, min(0.5, float(error) / (high - low)), error


def _keyed(block: Block) -> tuple[Any, Any]:
    """By what the noise of a block's rows is drawn: equal ids have equal noise."""
    ids = np.arange(block.rows, dtype=np.int32) if block.ids is None else block.ids
    return np.uint64(block.dither), ids


@exact_kernel
def _add_dither(rows: Any, seed: Any, ids: Any, error: Any, out: Any) -> None:
    """out = rows + error x noise, even over -1 .. 1: of a row, a random number and random steps from it (with the same
    steps, the noises of two rows would go together, and so into their product)."""
    for i in range(rows.shape[0]):
        bits = mix(seed + np.uint64(ids[i]))
        phase, step = np.uint32(bits >> np.uint64(32)), np.uint32(bits) | np.uint32(1)
        for k in range(rows.shape[1]):
            place = phase + np.uint32(k) * step
            out[i, k] = rows[i, k] + error * (np.float32(np.int32(place)) * np.float32(2.0**-31))


def with_noise(rows: Rows, bound: float, seed: int) -> tuple[Rows, float]:
    """Rows with noise over one step 2 E of the quantiser, E = bound x range, and the bound that makes E of them."""
    low, high = finite_range(rows.reshape(-1))
    error = bound * (high - low)
    if not error > 0 or not np.isfinite(error):
        return rows, bound
    noisy = np.empty_like(rows)
    low, high = _add_noise(rows, error, np.uint64(seed), noisy)
    return noisy, min(0.5, error / (float(high) - float(low)))


@exact_kernel
def _add_noise(rows: Any, error: float, seed: Any, out: Any) -> Any:
    low, high = np.float32(np.inf), np.float32(-np.inf)
    for i in range(rows.shape[0]):
        for k in range(rows.shape[1]):
            bits = mix(seed + np.uint64(i * rows.shape[1] + k + 1) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(11)
            unit = float(bits) * 2.0**-53 * 2.0 - 1.0
            value = np.float32(rows[i, k] + error * unit)
            out[i, k] = value
            if np.isfinite(value):
                low, high = min(low, value), max(high, value)
    return low, high


def make_wire(name: str, codec: str = "auto", num_threads: int = 1) -> Wire:
    """The wire of this name."""
    if name == "bounded":
        return Bounded(codec, num_threads)
    plain: dict[str, type[Wire]] = {"raw": Raw, "fp16": Half, "int8": Int8}
    return plain[name]()
