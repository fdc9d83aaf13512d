"""One step of FSDP as events: a CPU that issues, a stream that computes, a stream that communicates, an allocator.

PyTorch FSDP (Zhao et al. 2023, arXiv 2304.11277), sections 3.3 and 3.4. Work is issued in the order of the program;
each stream does its work in the order in which it was issued; gathers and reductions share the communication stream. So
the time of everything is known when it is issued, and one pass over the program gives the step. No torch here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Stream = Literal["compute", "communication"]


@dataclass(frozen=True)
class Work:
    """What one unit asks of a device: seconds, and bytes while it is gathered."""

    forward: float
    backward: float  # recomputation included
    gather: float
    reduce: float
    param_bytes: int = 0
    grad_bytes: int = 0


@dataclass(frozen=True)
class Policy:
    """How a step is run.

    prefetch: in backward, gather the next unit before the gradients of this one are reduced (section 3.3.2). limit:
    gathers in flight at most, at least 2 (section 3.4.2); None: no limiter. capacity: bytes for gathered parameters and
    unreduced gradients. issue: CPU seconds to issue a unit's forward or backward. retry: CPU seconds of the allocator's
    free-and-retry, beside its wait for the device.
    """

    prefetch: bool = True
    limit: int | None = 2
    capacity: float = math.inf
    issue: float = 0.0
    retry: float = 0.0

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 2:
            raise ValueError(f"{self.limit} gathers in flight cannot overlap with anything; take 2 or more")


@dataclass(frozen=True)
class Span:
    """Something a stream did."""

    stream: Stream
    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A step: seconds of all of it and of its backward, and what happened on the way.

    in_flight: most gathers that were issued and not yet consumed at one time. num_retries: free-and-retry rounds of the
    allocator. peak_bytes: most that it held, reusable or not.
    """

    seconds: float
    backward: float
    in_flight: int
    num_retries: int
    peak_bytes: int
    spans: tuple[Span, ...]


def simulate(units: Sequence[Work], policy: Policy) -> Timeline:
    """A forward and a backward over `units` in full shard; the last unit is kept between them (section 3.3.1).

    Raises ValueError where a unit does not fit into the capacity even when everything else is freed.
    """
    step = _Step(units, policy)
    for index in range(len(units)):
        step.forward(index)
    turn = step.ends["compute"]
    for index in reversed(range(len(units))):
        step.backward(index)
    end = max(step.now, *step.ends.values())
    return Timeline(
        end, end - turn, step.in_flight(), step.allocator.num_retries, step.allocator.peak, tuple(step.spans)
    )


@dataclass
class _Block:
    """Memory of one stream; it may be taken again by that stream once the other one has read it, at `free_at`."""

    size: int
    free_at: float | None = None  # None: held by the program


@dataclass
class _Allocator:
    """A caching allocator on the CPU's timeline (section 3.4.1): a block belongs to the stream it was made for."""

    capacity: float
    retry_seconds: float
    blocks: dict[Stream, list[_Block]] = field(default_factory=lambda: {"compute": [], "communication": []})
    reserved: int = 0
    peak: int = 0
    num_retries: int = 0

    def take(self, stream: Stream, size: int, now: float) -> tuple[_Block, float]:
        """A block and the time at which the CPU goes on."""
        ready = [b for b in self.blocks[stream] if b.free_at is not None and b.free_at <= now and b.size >= size]
        if ready:
            block = min(ready, key=lambda b: b.size)
            block.free_at = None
            return block, now
        if self.reserved + size > self.capacity:
            now = self._free_all(now)
        if self.reserved + size > self.capacity:
            raise ValueError(f"{size:,} bytes do not fit: {self.reserved:,} of {self.capacity:,.0f} are held")
        block = _Block(size)
        self.blocks[stream].append(block)
        self.reserved += size
        self.peak = max(self.peak, self.reserved)
        return block, now

    def _free_all(self, now: float) -> float:
        """Wait for every block that the program has let go of, and give all of them back to the device."""
        self.num_retries += 1
        freed = [block.free_at for blocks in self.blocks.values() for block in blocks if block.free_at is not None]
        self.blocks = {stream: [b for b in blocks if b.free_at is None] for stream, blocks in self.blocks.items()}
        self.reserved = sum(block.size for blocks in self.blocks.values() for block in blocks)
        return max([now, *freed]) + self.retry_seconds


@dataclass
class _Gather:
    block: _Block
    issued: float
    arrives: float
    consumed: float = math.inf  # end of the last work that reads it


class _Step:
    def __init__(self, units: Sequence[Work], policy: Policy) -> None:
        self.units, self.policy = units, policy
        self.allocator = _Allocator(policy.capacity, policy.retry)
        self.now = 0.0
        self.ends: dict[Stream, float] = {"compute": 0.0, "communication": 0.0}
        self.spans: list[Span] = []
        self.gathers: list[_Gather] = []
        self.gathered: dict[int, _Gather] = {}

    def forward(self, index: int) -> None:
        gather = self._gather(index)
        end = self._compute(f"forward {index}", self.units[index].forward, gather.arrives)
        if index < len(self.units) - 1:
            self._free(index, end)

    def backward(self, index: int) -> None:
        unit, gather = self.units[index], self._gather(index)
        if self.policy.prefetch and index:
            self._gather(index - 1)
        gradient, self.now = self.allocator.take("compute", unit.grad_bytes, self.now)
        end = self._compute(f"backward {index}", unit.backward, gather.arrives)
        self._free(index, end)
        gradient.free_at = self._run("communication", f"reduce {index}", unit.reduce, end)

    def in_flight(self) -> int:
        """Most gathers between issue and consumption at one time."""
        changes = sorted([(g.consumed, -1) for g in self.gathers] + [(g.issued, 1) for g in self.gathers])
        most = count = 0
        for _, change in changes:
            count += change
            most = max(most, count)
        return most

    def _gather(self, index: int) -> _Gather:
        if index not in self.gathered:
            self._wait_for_limit()
            block, self.now = self.allocator.take("communication", self.units[index].param_bytes, self.now)
            issued = self.now
            arrives = self._run("communication", f"gather {index}", self.units[index].gather, issued)
            self.gathered[index] = _Gather(block, issued, arrives)
            self.gathers.append(self.gathered[index])
        return self.gathered[index]

    def _wait_for_limit(self) -> None:
        if self.policy.limit is None:
            return
        open_until = sorted(gather.consumed for gather in self.gathers if gather.consumed > self.now)
        if len(open_until) >= self.policy.limit:
            self.now = open_until[len(open_until) - self.policy.limit]

    def _free(self, index: int, consumed: float) -> None:
        gather = self.gathered.pop(index)
        gather.consumed = gather.block.free_at = consumed

    def _compute(self, name: str, seconds: float, after: float) -> float:
        """Work of many kernels: it begins when the first is issued and does not end before the last one is."""
        start = max(self.now, self.ends["compute"], after)
        self.now += self.policy.issue
        return self._run("compute", name, max(seconds, self.now - start), start)

    def _run(self, stream: Stream, name: str, seconds: float, after: float) -> float:
        start = max(self.ends[stream], after)
        self.ends[stream] = start + seconds
        self.spans.append(Span(stream, name, start, start + seconds))
        return start + seconds
