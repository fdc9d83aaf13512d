"""Rows to every rank and from every rank, with an autograd graph, over any `torch.distributed` group.

    exchange = Exchange(forward=Bounded(), backward=Bounded())
    rows = exchange(x, sent, received)            # x: float32, blocks for rank 0 first, then those for rank 1, ...

`sent[p]` are the blocks for rank p and `received[q]` those from rank q; both ends know their shapes, which may be zero
and differ. Two rounds: how many bytes each block has (left out where both ends know), then the bytes, as one tensor.
`start` sends before something else is computed; handing its result to the call waits for what arrives. Backward goes
the same way with the sides exchanged. Where x lives on CUDA, so does all that is sent: `gpu_wires`, which need Triton.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from puna.errors import RanksDiffer
from puna.recsys.wires import Block, DeviceWire, Raw, Wire

Blocks = Sequence[Sequence[Block]]
"""By rank, in order."""
AnyWire = Wire | DeviceWire


@dataclass
class Traffic:
    """Bytes that have left this rank for others; `blocks`: of each block of the last exchange, local ones as well."""

    plain: int = 0  # what they would be as float32
    metadata: int = 0
    payload: int = 0
    rounds: int = 0
    blocks: list[list[int]] = field(default_factory=list)

    @property
    def sent(self) -> int:
        """All of them."""
        return self.metadata + self.payload


class Pending:
    """An exchange that is under way."""

    def __init__(self, finish: Callable[[], Tensor]) -> None:
        self._finish = finish
        self._arrived: Tensor | None = None

    def wait(self) -> Tensor:
        """What has arrived: float32, blocks from rank 0 first."""
        if self._arrived is None:
            self._arrived = self._finish()
        return self._arrived


class Exchange:
    """Exchanges of one group. forward, backward: wires, the same on every rank; local: blocks for this rank take
    the wire too, as a rehearsal of what others would get."""

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        forward: AnyWire | None = None,
        backward: AnyWire | None = None,
        *,
        local: bool = False,
    ) -> None:
        self.group, self.local = group, local
        self.forward, self.backward = forward or Raw(), backward or Raw()
        self.size = dist.get_world_size(group) if dist.is_initialized() else 1
        self.rank = dist.get_rank(group) if dist.is_initialized() else 0
        self.sent, self.returned = Traffic(), Traffic()

    def __call__(
        self,
        x: Tensor,
        sent: Blocks,
        received: Blocks,
        *,
        terms: Mapping[str, Any] | None = None,
        pending: Pending | None = None,
        sink: Callable[[Pending], None] | None = None,
    ) -> Tensor:
        """What arrives, (numbers received,), with a graph to x, (numbers sent,).

        terms: what all ranks have to agree on (bounds, step), compared where sizes are exchanged. pending: what
        `start` gave for the same x. sink: takes the exchange of the gradients while it is under way; x gets none then.
        Raises RanksDiffer where terms are not the same.
        """
        pending = pending or self.start(x.detach(), sent, received, terms)
        turned = [[block.turned() for block in blocks] for blocks in received]
        back = [[block.turned() for block in blocks] for blocks in sent]

        def returns(gradient: Tensor) -> Pending:
            return self._start(gradient, turned, back, terms, self.backward, self.returned, unbiased=True)

        return _AllToAll.apply(x, pending, returns, sink)

    def start(self, x: Tensor, sent: Blocks, received: Blocks, terms: Mapping[str, Any] | None = None) -> Pending:
        """Encode and send; every rank calls it."""
        return self._start(x, sent, received, terms, self.forward, self.sent, unbiased=False)

    def _start(
        self,
        x: Tensor,
        sent: Blocks,
        received: Blocks,
        terms: Mapping[str, Any] | None,
        wire: AnyWire,
        traffic: Traffic,
        *,
        unbiased: bool,
    ) -> Pending:
        x = x.contiguous()
        traffic.rounds += 1
        traffic.plain += sum(4 * b.count for rank, blocks in enumerate(sent) for b in blocks if rank != self.rank)
        if wire.name == "raw":
            return self._start_plain(x, sent, received, traffic)
        wire = _for(wire, x)
        flat = _view(wire, x)
        starts = _starts(sent)
        blocks = [
            (rank, n) for rank in range(self.size) if rank != self.rank or self.local for n in range(len(sent[rank]))
        ]
        rows = [_rows(flat, starts[rank][n], sent[rank][n]) for rank, n in blocks]
        encoded = wire.encode([sent[rank][n] for rank, n in blocks], rows, unbiased)
        streams: list[list[Any]] = [[] for _ in range(self.size)]
        for (rank, _), stream in zip(blocks, encoded, strict=True):
            streams[rank].append(stream)
        traffic.blocks = [[len(stream) for stream in part] for part in streams]
        sizes = self._sizes(traffic.blocks, sent, received, terms, wire, traffic, x.device)
        kept, streams[self.rank] = streams[self.rank], []
        out_splits = [sum(part) if rank != self.rank else 0 for rank, part in enumerate(sizes)]
        in_splits = [sum(map(len, part)) for part in streams]
        traffic.payload += sum(in_splits)
        arrived = x.new_empty(sum(out_splits), dtype=torch.uint8)
        payload = _joined(wire, x, [stream for part in streams for stream in part])
        wait = _swap(arrived, payload, out_splits, in_splits, self.group) if self.size > 1 else lambda: None

        def finish(lives: Tensor = payload) -> Tensor:
            wait()
            return self._decode(arrived, sizes, received, wire, kept, x, sent)

        return Pending(finish)

    def _start_plain(self, x: Tensor, sent: Blocks, received: Blocks, traffic: Traffic) -> Pending:
        """float32 as it is, without a copy where there is one rank."""
        traffic.blocks = [[4 * block.count for block in blocks] for blocks in sent]
        if self.size == 1:
            return Pending(lambda: x)
        counts = [[sum(block.count for block in blocks) for blocks in side] for side in (received, sent)]
        traffic.payload += 4 * (sum(counts[1]) - counts[1][self.rank])
        arrived = x.new_empty(sum(counts[0]))
        wait = _swap(arrived, x, counts[0], counts[1], self.group)

        def finish(lives: Tensor = x) -> Tensor:
            wait()
            return arrived

        return Pending(finish)

    def _sizes(
        self,
        mine: Sequence[Sequence[int]],
        sent: Blocks,
        received: Blocks,
        terms: Mapping[str, Any] | None,
        wire: AnyWire,
        traffic: Traffic,
        device: torch.device,
    ) -> list[list[int]]:
        """Bytes of every block that arrives: known, or told in a round of their own, with a digest of the terms."""
        known = [[wire.size(block) for block in blocks] for blocks in received]
        if all(size is not None for sizes in known for size in sizes):
            return [[size or 0 for size in sizes] for sizes in known]
        if self.size == 1:
            return [list(part) for part in mine]
        digest = _digest(terms or {})
        told = [[digest, *(mine[rank] if rank != self.rank else [0] * len(sent[rank]))] for rank in range(self.size)]
        heard = torch.empty(sum(1 + len(blocks) for blocks in received), dtype=torch.int64, device=device)
        splits = [[1 + len(blocks) for blocks in side] for side in (received, sent)]
        outgoing = torch.tensor([n for part in told for n in part], device=device)
        _swap(heard, outgoing, splits[0], splits[1], self.group)()
        traffic.metadata += 8 * (sum(splits[1]) - splits[1][self.rank])
        parts = [part.tolist() for part in heard.split(splits[0])]
        if any(part[0] != digest for part in parts):
            self._refuse(terms or {})
        sizes = [part[1:] for part in parts]
        sizes[self.rank] = list(mine[self.rank])
        return sizes

    def _refuse(self, terms: Mapping[str, Any]) -> None:
        """Say which rank has other terms; every rank comes here, as all have heard all digests."""
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, dict(terms), group=self.group)
        told = []
        for key in sorted({key for theirs in everyone for key in theirs}):
            values = [theirs.get(key, "nothing") for theirs in everyone]
            if len(set(map(repr, values))) > 1:
                told.append(f"{key}: " + ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values)))
        raise RanksDiffer(
            f"the ranks do not agree on how rows are sent: {'; '.join(told[:4])}. Bounds are a function of the recipe "
            "and the global step: give every rank the same ones"
        )

    def _decode(
        self,
        arrived: Tensor,
        sizes: Sequence[Sequence[int]],
        received: Blocks,
        wire: AnyWire,
        kept: Sequence[Any],
        x: Tensor,
        sent: Blocks,
    ) -> Tensor:
        out = x.new_empty(sum(block.count for blocks in received for block in blocks))
        flat, bytes_, starts = _view(wire, out), _view(wire, arrived), _starts(received)
        blocks, streams, outs = [], [], []
        at = 0
        for rank, part in enumerate(received):
            if rank == self.rank and not self.local:
                first, begin = starts[rank][0] if part else 0, _starts(sent)[rank]
                count = sum(block.count for block in part)
                out[first : first + count] = x[begin[0] : begin[0] + count] if part else 0
                continue
            for n, block in enumerate(part):
                if rank == self.rank:
                    streams.append(kept[n])
                else:
                    streams.append(bytes_[at : at + sizes[rank][n]])
                    at += sizes[rank][n]
                blocks.append(block)
                outs.append(_rows(flat, starts[rank][n], block))
        wire.decode(blocks, streams, outs)
        return out


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pending: Pending, returns: Any, sink: Any) -> Tensor:
        ctx.returns, ctx.sink = returns, sink
        out = pending.wait()
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None]:  # type: ignore[override]
        pending = ctx.returns(gradient)
        if ctx.sink is None:
            return pending.wait(), None, None, None
        ctx.sink(pending)
        return None, None, None, None


def _starts(blocks: Blocks) -> list[list[int]]:
    """Where every block begins in the flat tensor."""
    starts: list[list[int]] = []
    at = 0
    for part in blocks:
        starts.append([])
        for block in part:
            starts[-1].append(at)
            at += block.count
    return starts


def _for(wire: AnyWire, x: Tensor) -> AnyWire:
    """The wire, or its like for x on CUDA."""
    if not x.is_cuda or isinstance(wire, DeviceWire):
        return wire
    from puna.recsys.gpu_wires import device_wire

    return device_wire(wire.name)


def _view(wire: AnyWire, x: Tensor) -> Any:
    """x as the wire takes it."""
    return x if isinstance(wire, DeviceWire) else x.numpy()


def _joined(wire: AnyWire, x: Tensor, streams: Sequence[Any]) -> Tensor:
    if isinstance(wire, DeviceWire):
        return torch.cat((x.new_empty(0, dtype=torch.uint8), *streams))
    return torch.from_numpy(np.concatenate([np.empty(0, np.uint8), *streams]))


def _rows(flat: Any, start: int, block: Block) -> Any:
    return flat[start : start + block.count].reshape(block.rows, block.width)


def _digest(terms: Mapping[str, Any]) -> int:
    digest = hashlib.blake2b(repr(sorted(terms.items())).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _swap(
    arrived: Tensor, sent: Tensor, out_splits: list[int], in_splits: list[int], group: dist.ProcessGroup | None
) -> Callable[[], None]:
    """An all-to-all that is under way: splits by rank of what arrives and what is sent; call what comes back to wait.

    Under gloo every piece is asked for before any is sent. Its own all-to-all sends first, and where the other end has
    already asked, the request for the way back then stands behind the data: one way at a time, half the link's rate.
    """
    if dist.get_backend(group) != "gloo":
        work = dist.all_to_all_single(arrived, sent, out_splits, in_splits, group=group, async_op=True)
        return lambda: _wait([work])
    rank = dist.get_rank(group)
    coming, going = arrived.split(out_splits), sent.split(in_splits)
    coming[rank].copy_(going[rank])
    others = [other for other in range(len(out_splits)) if other != rank]
    works = [dist.irecv(coming[other], group=group, group_src=other) for other in others if out_splits[other]]
    works += [dist.isend(going[other], group=group, group_dst=other) for other in others if in_splits[other]]
    return lambda: _wait(works)


def _wait(works: Sequence[Any]) -> None:
    for work in works:
        work.wait()
