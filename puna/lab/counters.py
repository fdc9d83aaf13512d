"""Instruments on one rank: collectives with their bytes, gathered elements, what the allocator hands out."""

from collections.abc import Callable
from itertools import accumulate
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from puna.plan.fsdp import Traffic, ring_bytes

OPERATIONS = {
    "_allgather_base_": "all_gathers",
    "_reduce_scatter_base_": "reduce_scatters",
    "allreduce_": "all_reduces",
}
"""Collectives of FSDP: operator of the c10d library, name in a `Traffic`."""


class Collectives(TorchDispatchMode):
    """Counts the collectives of this rank, and the bytes it sends in them, while it is entered.

    Every collective is an operator of PyTorch's c10d library and passes through the dispatcher, where this mode sees
    the tensors and the process group it is given. The bytes are those of ring algorithms over the whole tensor in that
    group (`puna.plan.fsdp.ring_bytes`), whatever the back end does on the wire. Counts are kept by micro-step, which
    the owner begins. An operator that is not in `OPERATIONS` is an error: nothing passes uncounted.
    """

    def __init__(self) -> None:
        super().__init__()
        self._steps: list[dict[str, float]] = []

    def begin_micro_step(self) -> None:
        """What comes from now on belongs to the next micro-step."""
        self._steps.append({**dict.fromkeys(OPERATIONS.values(), 0), "bytes": 0})

    @property
    def micro_steps(self) -> list[Traffic]:
        """What was counted, by micro-step."""
        return [Traffic(**step) for step in self._steps]  # type: ignore[arg-type]

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if op.namespace == "c10d":
            self._count(op._opname, args)
        return op(*args, **(kwargs or {}))

    def _count(self, operator: str, args: tuple) -> None:
        step = self._steps[-1]
        step[OPERATIONS[operator]] += 1
        if operator == "_allgather_base_":
            output, _, group = args[:3]
            step["bytes"] += ring_bytes("gather", output.nbytes, _size(group))
        elif operator == "_reduce_scatter_base_":
            _, whole, group = args[:3]
            step["bytes"] += ring_bytes("reduce", whole.nbytes, _size(group))
        else:
            tensors, group = args[:2]
            step["bytes"] += sum(ring_bytes("all_reduce", tensor.nbytes, _size(group)) for tensor in tensors)


def _size(group: Any) -> int:
    return dist.ProcessGroup.unbox(group).size()


class Unsharded:
    """Ledger of the parameter elements that are gathered, or being gathered, on this rank; `peak` while entered.

    FSDP's parameter groups are asked after every gather, wait and reshard: a gather under way counts by the buffer it
    fills, a gathered unit by those of its parameters' storages that hold memory.
    """

    CHANGES = ("unshard", "wait_for_unshard", "_to_sharded")

    def __init__(self, model: nn.Module) -> None:
        states = [module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule)]
        self._groups = list(dict.fromkeys(group for state in states for group in state._fsdp_param_groups))
        self.live = self.peak = 0

    def __enter__(self) -> Self:
        self.live = self.peak = 0
        self._originals = {name: getattr(FSDPParamGroup, name) for name in self.CHANGES}
        for name, original in self._originals.items():
            setattr(FSDPParamGroup, name, self._watched(original))
        return self

    def __exit__(self, *error: object) -> None:
        for name, original in self._originals.items():
            setattr(FSDPParamGroup, name, original)

    def _watched(self, change: Callable[..., None]) -> Callable[..., None]:
        def watched(*args: Any, **kwargs: Any) -> None:
            change(*args, **kwargs)
            self.live = sum(map(_gathered, self._groups))
            self.peak = max(self.peak, self.live)

        return watched


def _gathered(group: FSDPParamGroup) -> int:
    if group._all_gather_result is not None:
        return group._all_gather_result.all_gather_output.numel()
    outputs: list[Tensor] = [tensor for parameter in group.fsdp_params for tensor in parameter.all_gather_outputs]
    return sum(tensor.numel() for tensor in outputs if tensor.untyped_storage().size())


class Allocations:
    """Balance of PyTorch's CPU allocator over what it was at the beginning, in bytes, after each change inside.

    The events are the allocator's own, by way of the profiler, so that every temporary is among them.
    """

    def __enter__(self) -> Self:
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._profile.__exit__(kind, error, trace)
        results: Any = self._profile.profiler
        self._events = results.kineto_results.events()
        changes = sorted((event.start_ns(), event.nbytes()) for event in self._events if event.name() == "[memory]")
        self._times = [time for time, _ in changes]
        self._balances = list(accumulate(size for _, size in changes))

    @property
    def peak(self) -> int:
        """Highest balance."""
        return max(self._balances)

    def kept_by(self, name: str) -> int:
        """Balance behind the last range that `torch.profiler.record_function(name)` marked, over that before it."""
        start, end = max((e.start_ns(), e.end_ns()) for e in self._events if e.name() == name)
        return self._at(end) - self._at(start)

    def _at(self, time: int) -> int:
        past = [balance for when, balance in zip(self._times, self._balances, strict=True) if when <= time]
        return past[-1] if past else 0
