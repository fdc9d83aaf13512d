"""The wires of `wires.py` for tensors on a GPU, by Triton kernels.

Bounded streams and fp16 are, byte for byte, what the host sends (with codec `fixed`); int8 may differ by a code, as
the host's kernel is free to multiply and add in one step. Rows have no dither here.
"""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from puna.recsys import gpu_kernels as kernels
from puna.recsys.gpu_codec import DeviceSlice, decode_many, encode_many, launch, ranges
from puna.recsys.wires import Block, DeviceWire


class DeviceHalf(DeviceWire):
    """float16."""

    name = "fp16"

    def size(self, block: Block) -> int:
        return 2 * block.count

    def encode(self, blocks: Sequence[Block], rows: Sequence[Tensor], unbiased: bool) -> list[Tensor]:
        halves = [torch.empty(part.numel(), dtype=torch.float16, device=part.device) for part in rows]
        for part, half in zip(rows, halves, strict=True):
            launch(kernels.to_half, part.numel(), part, half, part.numel())
        return [half.view(torch.uint8) for half in halves]

    def decode(self, blocks: Sequence[Block], streams: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
        for stream, out in zip(streams, outs, strict=True):
            launch(kernels.from_half, out.numel(), stream.clone().view(torch.float16), out, out.numel())


class DeviceInt8(DeviceWire):
    """Row-wise, as `wires.Int8`."""

    name = "int8"

    def size(self, block: Block) -> int:
        return block.rows * (block.width + 8)

    def encode(self, blocks: Sequence[Block], rows: Sequence[Tensor], unbiased: bool) -> list[Tensor]:
        streams = [part.new_empty(part.numel() + 8 * len(part), dtype=torch.uint8) for part in rows]
        for block, part, stream in zip(blocks, rows, streams, strict=True):
            _by_row(kernels.to_int8, block, part, stream)
        return streams

    def decode(self, blocks: Sequence[Block], streams: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
        for block, stream, out in zip(blocks, streams, outs, strict=True):
            _by_row(kernels.from_int8, block, stream, out)


def _by_row(kernel: object, block: Block, source: Tensor, out: Tensor) -> None:
    room = triton.next_power_of_2(block.width)
    launch(kernel, block.rows * room, source, out, block.width, block=room)


class DeviceBounded(DeviceWire):
    """As `wires.Bounded` with codec `fixed`."""

    name = "bounded"

    def size(self, block: Block) -> None:
        return None

    def encode(self, blocks: Sequence[Block], rows: Sequence[Tensor], unbiased: bool) -> list[Tensor]:
        _refuse_dither(blocks)
        slices = [DeviceSlice(part, _ids(b, part), b.bound) for b, part in zip(blocks, rows, strict=True)]
        if unbiased:
            noisy = [n for n, block in enumerate(blocks) if block.bound and block.seed]
            for n, part in zip(
                noisy, with_noise([slices[n] for n in noisy], [blocks[n].seed for n in noisy]), strict=True
            ):
                slices[n] = part
        return encode_many(slices)

    def decode(self, blocks: Sequence[Block], streams: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
        _refuse_dither(blocks)
        ids = [_ids(block, out) for block, out in zip(blocks, outs, strict=True)]
        for out, rows in zip(outs, decode_many(streams, ids), strict=True):
            out.copy_(rows)


def _refuse_dither(blocks: Sequence[Block]) -> None:
    if any(block.dither for block in blocks):
        raise ValueError("rows on a GPU have no dither: give blocks without one, at both ends")


def _ids(block: Block, part: Tensor) -> Tensor | None:
    return None if block.ids is None else torch.as_tensor(block.ids, dtype=torch.int64, device=part.device)


def with_noise(slices: Sequence[DeviceSlice], seeds: Sequence[int]) -> list[DeviceSlice]:
    """As `wires.with_noise`, of each slice."""
    found, errors = list(slices), [0.0] * len(slices)
    for n, (low, high) in enumerate(ranges([part.rows for part in slices])):
        error = slices[n].bound * (high - low)
        if error > 0:
            errors[n] = error
            found[n] = slices[n]._replace(rows=_noisy(slices[n].rows, seeds[n], error))
    for n, (low, high) in enumerate(ranges([part.rows for part in found])):
        if errors[n]:
            found[n] = found[n]._replace(bound=min(0.5, errors[n] / (high - low)))
    return found


def _noisy(rows: Tensor, seed: int, error: float) -> Tensor:
    out = torch.empty_like(rows)
    seed_ = torch.tensor([seed - (seed >> 63 << 64)], dtype=torch.int64, device=rows.device)
    error_ = torch.tensor([error], dtype=torch.float64, device=rows.device)
    launch(kernels.add_noise, rows.numel(), rows, seed_, error_, out, rows.numel())
    return out


def device_wire(name: str) -> DeviceWire:
    """The wire for tensors on a device that does what the host's of this name does."""
    wires: dict[str, type[DeviceWire]] = {"fp16": DeviceHalf, "int8": DeviceInt8, "bounded": DeviceBounded}
    return wires[name]()
