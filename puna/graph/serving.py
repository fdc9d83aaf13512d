"""Rank 0 of a run on several processes: lock server, partition server, parameter server. It trains nothing.

A unit of the loop is the next bucket that any trainer has done. Everything that changes what a checkpoint holds happens
in `step`, in the thread of the loop: between two steps, vectors, buckets done and cursor are of one moment. A bucket
counts once both its partitions have come back; a trainer that is gone before that has changed nothing.
"""

import itertools
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from puna.console import err
from puna.errors import RankFailed
from puna.graph.buckets import Bucket
from puna.graph.door import END, Answer, Door, Event, Guest, wait_for
from puna.graph.links import Meeting
from puna.graph.locks import Locks
from puna.graph.parameters import LEASE_SECONDS, ParameterServer
from puna.graph.partitions import name_of
from puna.graph.task import GraphTask, Unit, require_finite
from puna.graph.worker import Part
from puna.train.task import Cursor, Json, State, StepReport, Tensors

LONELY_SECONDS = 600.0  # without any trainer, after which the run ends
FAREWELL_SECONDS = 10.0  # for trainers to leave, once the work is done


class GraphServer(GraphTask):
    """`GraphTask` whose buckets are trained by other processes; see `puna.graph.trainer`."""

    lease_s = LEASE_SECONDS
    lonely_s = LONELY_SECONDS

    def __init__(self, meeting: Meeting, facts: Mapping[str, Any], *job: Any, **options: Any) -> None:
        """meeting: where trainers are met. facts: in which they must agree. The rest is as `GraphTask` takes it."""
        super().__init__(*job, **options)
        self._meeting, self._facts = meeting, facts
        self._trained_here: list[list[int]] | None = None  # buckets of the round under way, as a checkpoint has them
        self._locks = Locks(())
        self._versions: dict[int, int] = {}
        self._guests: dict[int, Guest] = {}
        self._waiting: list[Guest] = []
        self._records: list[dict[str, Any]] = []

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Inside, trainers are let in; in the end they are told that the run is over."""
        keeps = self._meeting.keep()
        self._door = Door(self._meeting, self._facts, self._room, ParameterServer(shared_arrays(self), self.lease_s))
        try:
            yield
        finally:
            self._dismiss()
            del keeps

    def units(self, cursor: Cursor) -> Iterator[Any]:
        """Turns: which bucket a turn is, is known when it is over."""
        self._tokens, index = cursor.tokens, 0
        for epoch, chunk in itertools.product(range(self.config.epochs), range(self.config.num_chunks)):
            path = self._path(epoch, chunk)
            first, index = index, index + len(path)
            if index <= cursor.units:
                continue
            self._begin_round(epoch, chunk, first, max(0, cursor.units - first))
            for turn in range(max(first, cursor.units), index):
                if self.config.patience and self.best["waited"] >= self.config.patience:
                    return
                yield turn

    def step(self, unit: Any) -> StepReport:
        """Give buckets to trainers until one of them has done its own. Raises NonFinite, DiskFull, RankFailed."""
        self._give()
        while True:
            event = wait_for(self._door.events, self.lonely_s)
            if event is None and not self._guests:
                raise RankFailed(f"no trainer has come to {self._meeting} for {self.lonely_s:,.0f} s")
            report = self._take(event) if event else None
            self._give()
            if report:
                return report

    def state(self) -> State:
        """That of one process, and which buckets of the round under way are done."""
        return super().state() | {"done": Json(lambda: [list(bucket) for bucket in self._locks.done], self._set_done)}

    def describe(self) -> dict[str, Any]:
        """Of one process, but for swaps: where partitions travel depends on who is free when."""
        left_out = ("swaps_per_epoch", "read_bytes_per_epoch", "written_bytes_per_epoch", "held_partitions")
        return {key: value for key, value in super().describe().items() if key not in left_out}

    # --- rounds ---

    def _begin_round(self, epoch: int, chunk: int, first: int, num_done: int) -> None:
        path = self._path(epoch, chunk)
        done: list[Bucket] = path[:num_done]  # a run of one process goes along the path
        if self._trained_here is not None and len(self._trained_here) == num_done:
            done = [(i, j) for i, j in self._trained_here]
        self._trained_here = None
        everything = range(self.config.num_partitions)
        trained = everything if self.table.known else [p for p in everything if name_of(p) in self.table.vectors]
        self._round, self._locks = Unit(first, epoch, chunk, (0, 0), 0, 0), Locks(path, done, trained)

    def _set_done(self, done: list[list[int]]) -> None:
        self._trained_here = done

    # --- trainers ---

    def _take(self, event: Event) -> StepReport | None:
        """What follows from an event; a report where a bucket is done."""
        guest = event.guest
        if event.kind == "joined":
            self._guests[guest.number] = guest
            self._tell("trainer_joined", guest, f"trainer {guest.number} has come ({guest.name})")
        elif event.kind == "gone":
            self._miss(guest, event.words["why"])
        elif guest.gone:
            guest.answers.put(Answer({"unit": None, "lost": True}))
        else:
            report = self._finish(guest, event) if "bucket" in event.words else None
            self._waiting.insert(0, guest)  # before others: it holds partitions
            if event.words.get("leaves"):
                self._waiting.remove(guest)
                guest.answers.put(Answer(END))
            return report
        return None

    def _miss(self, guest: Guest, why: str) -> None:
        if guest.gone:
            return
        guest.gone = True
        del self._guests[guest.number]
        bucket = self._locks.drop(guest.number)
        if guest in self._waiting:
            self._waiting.remove(guest)
            guest.answers.put(Answer({"unit": None, "lost": True}))
        if why:
            goes = f"; its bucket {bucket} is given to another" if bucket else ""
            self._tell("trainer_gone", guest, f"trainer {guest.number} is gone ({why}){goes}", bucket=bucket, why=why)

    def _give(self) -> None:
        """Buckets for those that wait, as far as there are any that may begin."""
        for guest in list(self._waiting):
            held = [part for part, version in guest.held.items() if version == self._versions.get(part, 0)]
            tokens = self._tokens + sum(self._num_edges(bucket) for bucket in self._locks.active.values())
            bucket = self._locks.acquire(guest.number, held)
            if bucket:
                self._waiting.remove(guest)
                place, fetched = self._locks.places[bucket], sorted(set(bucket).difference(held))
                unit = vars(self._round) | {"bucket": bucket, "place": place, "tokens": tokens}
                unit["index"] += place
                parts = [self.table.fetch(partition) for partition in fetched]
                guest.answers.put(Answer({"unit": unit, "fetched": fetched}, parts))

    def _finish(self, guest: Guest, event: Event) -> StepReport:
        """Take a trained bucket back."""
        words, began = event.words, time.perf_counter()
        bucket = self._locks.active[guest.number]
        assert bucket == tuple(words["bucket"])
        place = self._locks.places[bucket]
        unit = Unit(self._round.index + place, self._round.epoch, self._round.chunk, bucket, place, words["tokens"])
        require_finite(unit, words["loss"])
        for partition, part in event.parts.items():
            self.table.replace(partition, part)
            self._versions[partition] = self._versions.get(partition, 0) + 1
        guest.held = {partition: self._versions[partition] for partition in event.parts}
        self._locks.finish(guest.number)
        weight = self._num_edges(bucket)
        self._tokens += weight
        metrics = {"lr": self.config.lr * self.schedule.learning_rate(unit.tokens), "epoch": float(unit.epoch + 1)}
        metrics |= {"swap_s": words["swap_s"] + time.perf_counter() - began, "swaps": float(words["swaps"])}
        metrics["trainers"] = float(len(self._guests))
        records, self._records = self._records, []
        return StepReport(words["loss"] / weight, weight, weight, metrics, records=records)

    def _dismiss(self) -> None:
        """Tell trainers that the run is over: those that wait at once, those at work when they next exchange."""
        self._door.close()
        for guest in self._waiting:
            guest.answers.put(Answer(END))
        deadline = time.monotonic() + FAREWELL_SECONDS
        while any(not guest.gone for guest in self._guests.values()) and time.monotonic() < deadline:
            event = wait_for(self._door.events, deadline - time.monotonic())
            if event and event.kind == "gone":
                event.guest.gone = True
            elif event and event.kind == "wants":
                event.guest.answers.put(Answer(END))
            elif event:
                self._guests[event.guest.number] = event.guest
        self._door.join(deadline)

    def _num_edges(self, bucket: Bucket) -> int:
        start, end = self._share(bucket, self._round.chunk)
        return end - start

    def _room(self, partition: int) -> Part:
        return Part.room(self.table.rows(partition), self.config.dim)

    def _tell(self, kind: str, guest: Guest, words: str, **more: Any) -> None:
        err.print(words, markup=False, soft_wrap=True)
        self._records.append({"event": kind, "trainer": guest.number, "name": guest.name, **more})


def shared_arrays(task: GraphTask) -> list[Any]:
    """What all buckets of a task share, as live arrays: its states that are tensors."""
    states = [item.get() for item in GraphTask.state(task).values() if isinstance(item, Tensors)]
    return [tensor.numpy() for tensors in states for tensor in tensors.values()]
