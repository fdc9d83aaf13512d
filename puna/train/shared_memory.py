"""FSDP2's collectives among CPU processes of one machine, through memory they share instead of sockets.

A rank writes its part into memory that the others have mapped, all meet at a barrier, and each reads what it needs: a
gathered byte is copied twice, where a loopback socket copies it four times through the kernel.
"""

import os
import secrets
import sys
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from puna.errors import DeviceError

NAME = "puna-collectives"
TOKEN_BYTES = 16


class SharedMemory:
    """Memory of every rank of `group`, mapped in all of them; calls are made by all ranks in the same order.

    There are two slabs a rank, used in turn: who passes the barrier of one call has finished reading the call before,
    so what a call returns may be read until the call after the next writes over it.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, group.rank(), group.size()
        self._slabs: list[list[Tensor]] = [[], []]
        self._turn = 0

    def share(self, part: Tensor) -> list[Tensor]:
        """The parts of all ranks, by rank; `part` is flat and has the same length and dtype everywhere.

        Raises DeviceError where the memory for a longer part than before cannot be had.
        """
        self._turn = 1 - self._turn
        if not self._slabs[self._turn] or self._slabs[self._turn][0].numel() < part.nbytes:
            self._slabs[self._turn] = self._more(part.nbytes)
        parts = [slab[: part.nbytes].view(part.dtype) for slab in self._slabs[self._turn]]
        parts[self.rank].copy_(part)
        dist.barrier(self.group)
        return parts

    def _more(self, num_bytes: int) -> list[Tensor]:
        slabs = map_slabs(self.group, num_bytes)
        if slabs is None:
            raise DeviceError(
                f"{num_bytes:,} bytes of shared memory a rank cannot be had for the collectives",
                "Free memory, shard over more ranks, or set mesh.shared_memory to false.",
            )
        return slabs


def map_slabs(group: dist.ProcessGroup, num_bytes: int) -> list[Tensor] | None:
    """A new byte tensor of `num_bytes` from each rank, mapped by all; gone with the last process that maps it.

    None on every rank where one of them cannot make its own or map another's.
    """
    handle = os.memfd_create(NAME)
    try:
        paths: list[str] = [""] * group.size()
        dist.all_gather_object(paths, f"/proc/{os.getpid()}/fd/{handle}", group)
        try:
            os.posix_fallocate(handle, 0, num_bytes)
            slabs = [torch.from_file(path, shared=True, size=num_bytes, dtype=torch.uint8) for path in paths]
        except (OSError, RuntimeError):
            slabs = []
        return slabs if _all(group, bool(slabs)) else None
    finally:
        os.close(handle)


def shares_memory(group: dist.ProcessGroup) -> bool:
    """Whether there are several ranks and each can read what the others write: tried, and agreed on by all."""
    if group.size() == 1 or sys.platform != "linux":
        return False
    slabs = map_slabs(group, TOKEN_BYTES)
    if slabs is None:
        return False
    token = torch.tensor(list(secrets.token_bytes(TOKEN_BYTES)), dtype=torch.uint8)
    tokens = [torch.empty_like(token) for _ in slabs]
    slabs[group.rank()].copy_(token)
    dist.all_gather(tokens, token, group)
    return _all(group, all(map(torch.equal, slabs, tokens)))


def _all(group: dist.ProcessGroup, mine: bool) -> bool:
    verdict = torch.tensor([mine], dtype=torch.int64)
    dist.all_reduce(verdict, dist.ReduceOp.MIN, group)
    return bool(verdict)


class _Gather:
    """FSDP2's AllGather."""

    def __init__(self, memory: SharedMemory) -> None:
        self.memory = memory

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        parts = self.memory.share(input_tensor)
        for rank, place in enumerate(output_tensor.chunk(self.memory.size)):
            if rank != self.memory.rank:  # its own part is where FSDP2 made it: in its place
                place.copy_(parts[rank])


class _ReduceScatter:
    """FSDP2's ReduceScatter: parts are added in the order of ranks."""

    def __init__(self, memory: SharedMemory) -> None:
        self.memory = memory

    allocate = _Gather.allocate

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp,
        async_op: bool = False,
    ) -> None:
        first, *others = [part.chunk(self.memory.size)[self.memory.rank] for part in self.memory.share(input_tensor)]
        torch.add(first, others[0], out=output_tensor)
        for part in others[1:]:
            output_tensor.add_(part)
        if op == dist.ReduceOp.AVG:
            output_tensor.div_(self.memory.size)


def use_shared_memory(module: nn.Module, group: dist.ProcessGroup) -> None:
    """Give every FSDP2 unit of `module`, sharded over `group`, these collectives; see `shares_memory`."""
    memory = SharedMemory(group)
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            unit.set_custom_all_gather(cast(Any, _Gather(memory)))
            unit.set_custom_reduce_scatter(cast(Any, _ReduceScatter(memory)))
