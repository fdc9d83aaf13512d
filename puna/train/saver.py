"""When checkpoints are written: at once, or in the background while training goes on; and when they cannot be."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from puna.errors import DiskFull
from puna.train import checkpoint, disk, mesh
from puna.train.config import CheckpointConfig
from puna.train.manifest import Manifest
from puna.train.metrics import Recorder
from puna.train.task import Cursor, State


@dataclass(frozen=True)
class _Pending:
    step: int
    began: float
    held_s: float
    written: Future[tuple[Manifest, float]]


class Saver:
    """Saves the checkpoints of a run, one at a time. Every rank makes one, and calls every method at the same time.

    In the background the state is copied to host memory first; a thread writes the copy over a process group of its
    own, so that its collectives and those of training never meet. A save that finds no room is told and left out,
    unless it is the last one; any other failure ends the run, on all ranks: at once, or at the first step after it.
    """

    def __init__(self, run: Path, config: CheckpointConfig, record: Recorder) -> None:
        self.run, self.config, self._record = run, config, record
        self.step = -1  # of the newest checkpoint
        self._group = dist.new_group(backend="gloo") if config.asynchronous else None
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: _Pending | None = None

    def save(
        self,
        state: State,
        cursor: Cursor,
        heldout_loss: float | None = None,
        *,
        stays: frozenset[int] = frozenset(),
        last: bool = False,
    ) -> None:
        """Save the state after a step, once the save before it is written; `last`: it is on disk when this returns.

        stays: steps of checkpoints that are kept beside those that the settings keep.
        Raises CheckpointError (a rank could not write, now or in the save before) and, for the last one, DiskFull.
        """
        self.wait()
        if self.step == cursor.units:
            return
        try:
            self._begin(state, cursor, heldout_loss, stays, aside=self.config.asynchronous and not last)
        except DiskFull as error:
            if last:
                raise
            self._leave_out(cursor.units, error)

    @property
    def failed(self) -> bool:
        """Whether the save under way is over on this rank, and failed. Ranks that agree on it call `wait`."""
        return self._pending is not None and self._pending.written.done() and bool(self._pending.written.exception())

    def collect(self) -> None:
        """Tell of the save under way, if it is over and did not fail."""
        if self._pending and self._pending.written.done() and not self._pending.written.exception():
            self.wait()

    def wait(self) -> None:
        """Until the save under way is written. Raises CheckpointError on all ranks where one could not write."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            manifest, end = pending.written.result()
        except DiskFull as error:
            self._leave_out(pending.step, error)
        else:
            self._tell(manifest, end - pending.began, pending.held_s)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except Exception as failure:
            if error is None:
                raise
            self._record.say(f"the save under way failed too: {failure}")
        finally:
            self._thread.shutdown()

    def _begin(
        self, state: State, cursor: Cursor, heldout_loss: float | None, stays: frozenset[int], *, aside: bool
    ) -> None:
        began = time.perf_counter()
        free = mesh.from_rank_0(disk.free_bytes(self.run))
        disk.require_room(self.run, cursor.units, checkpoint.needed_bytes(state), free)
        snapshot = checkpoint.take_snapshot(state, cursor, heldout_loss, copied=aside)
        if aside:
            held_s = time.perf_counter() - began
            self._pending = _Pending(cursor.units, began, held_s, self._thread.submit(self._write, snapshot, stays))
        else:
            manifest, end = self._write(snapshot, stays)
            self._tell(manifest, end - began, end - began)

    def _write(self, snapshot: checkpoint.Snapshot, stays: frozenset[int]) -> tuple[Manifest, float]:
        manifest = checkpoint.write(self.run, snapshot, self.config, self._group, stays)
        return manifest, time.perf_counter()

    def _tell(self, manifest: Manifest, seconds: float, held_s: float) -> None:
        """seconds: from the end of the step until the checkpoint existed; held_s: those that training waited."""
        self.step = manifest.cursor.units
        figures = {"seconds": seconds, "held_s": held_s, "bytes": manifest.num_bytes}
        self._record.event("checkpoint", step=self.step, **figures)

    def _leave_out(self, step: int, error: DiskFull) -> None:
        self._record.event("checkpoint_left_out", step=step, reason=str(error))
        self._record.say(f"WARNING: {error} Training goes on; the next checkpoint is tried when it is due.")
