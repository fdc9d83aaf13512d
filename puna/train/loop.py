"""The only loop: units of work from a cursor, with signals, checkpoints, evaluation and metrics around them."""

import math
import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from puna.errors import PunaError, Unfinished
from puna.train import checkpoint, mesh
from puna.train.config import LoopConfig
from puna.train.divergence import FirstSteps
from puna.train.metrics import MFU_FORMULA, Recorder, peak_memory_bytes
from puna.train.phase import begin_unit, during, enter
from puna.train.saver import Saver
from puna.train.task import Cursor, StepReport, Task, seed_step


class Run:
    """A task in a run directory. Every rank makes one and calls `go`.

    facts: more fields for the start record (mesh, dtype and its reason). peak_flops: matrix rate of one rank in FLOP/s,
    for the MFU, which is left out without it or without the task's `flops_per_token`. prediction: what the run should
    take, recorded as an event of its own; see puna/predicted.py.
    """

    def __init__(
        self,
        task: Task,
        run: Path | str,
        config: LoopConfig,
        *,
        facts: Mapping[str, Any] | None = None,
        peak_flops: float = 0,
        prediction: Mapping[str, Any] | None = None,
    ) -> None:
        self.task, self.run, self.config = task, Path(run), config
        self.prediction = prediction
        self.described = task.describe()
        self.facts = {**(facts or {}), **self.described, "world_size": mesh.world_size(), "mfu_formula": MFU_FORMULA}
        self.facts |= {"peak_flops": peak_flops}
        self._mfu_per_rate = self.described.get("flops_per_token", 0) / (mesh.world_size() * peak_flops or math.inf)
        self.cursor, self._evaluated = Cursor(), -1
        self._heldout_loss: float | None = None

    def go(self) -> Cursor:
        """Work from the newest checkpoint (or the start) to the end of the work.

        Raises Unfinished when stopped by SIGTERM or SIGINT, or where the work ends before `total_tokens`, after saving;
        RunLocked; CheckpointError where the newest checkpoint does not fit, or one could not be written; and what the
        task raises, without saving.
        """
        with (
            checkpoint.hold_lock(self.run),
            Recorder(self.run, speaks=mesh.rank() == 0) as self._record,
            _Signals() as self._signals,
        ):
            try:
                with Saver(self.run, self.config.checkpoint, self._record) as self._saver:
                    self._begin()
                    self._work()
                    self._evaluate()
                    self._save(last=True)
                self._require_end()
            except PunaError as error:
                self._record.event("stop", reason=str(error), error=type(error).__name__, step=self.cursor.units)
                raise
            self._record.event("stop", reason="done", step=self.cursor.units)
        return self.cursor

    def _begin(self) -> None:
        self._record.event("start", **self.facts, config=self.config.model_dump())
        if self.prediction:
            self._record.event("prediction", **self.prediction)
        for folder in checkpoint.incomplete(self.run):
            self._record.event("checkpoint_skipped", folder=folder.name)
            self._record.say(f"{folder.name} is incomplete (a save was cut short) and is passed over")
        manifest = checkpoint.latest(self.run)
        if manifest:
            checkpoint.load(self.run, self.task.state(), manifest.cursor.units)
            self.cursor, self._saver.step = manifest.cursor, manifest.cursor.units
            ranks = {"world_size": mesh.world_size(), "saved_world_size": manifest.world_size}
            self._record.event("resume", step=self.cursor.units, tokens=self.cursor.tokens, **ranks)
            self._record.say(
                f"resumed from step {self.cursor.units:,} ({self.cursor.tokens:,} tokens): "
                f"{', '.join(self.task.state())}, saved by {manifest.world_size} processes, now {mesh.world_size()}"
            )
        elif self.config.checkpoint.initial:
            self._save()
        self._record.begin(
            self.run,
            self.cursor.units,
            self.cursor.tokens,
            self.described.get("total_tokens"),
            tensorboard=self.config.run.tensorboard,
        )

    def _work(self) -> None:
        first_steps = FirstSteps(self.run, self.task)
        for unit, data_wait_s in _timed(self.task.units(self.cursor)):
            began = time.perf_counter()
            begin_unit(self.cursor.units, self.task.samples(unit))
            first_steps.check(self.cursor, unit)
            seed_step(self.config.run.seed, self.cursor.units, mesh.rank())
            report = self.task.step(unit)
            self.cursor = self.cursor.after(report.tokens)
            stop = self._after_step(report, time.perf_counter() - began, data_wait_s)
            if self._due(self.config.eval.every) and not stop:
                self._evaluate()
            if self._due(self.config.checkpoint.every) or stop:
                self._save(last=stop)
            if stop:
                raise Unfinished(
                    f"stopped by a signal at step {self.cursor.units}; the same command resumes from there"
                )

    def _due(self, every: int) -> bool:
        return every > 0 and self.cursor.units % every == 0

    def _after_step(self, report: StepReport, step_s: float, data_wait_s: float) -> bool:
        """Record the step (slowest rank's times, largest memory); whether any rank was asked to stop."""
        mine = [float(self._signals.received), float(self._saver.failed)]
        mine += [step_s, data_wait_s, float(peak_memory_bytes())]
        stop, save_failed, step_s, data_wait_s, memory = mesh.agree(mine, "max")
        tokens_per_s = report.tokens / (step_s + data_wait_s)
        mfu = {"mfu": tokens_per_s * self._mfu_per_rate} if self._mfu_per_rate else {}
        self._record.step(
            {
                "step": self.cursor.units,
                "tokens": self.cursor.tokens,
                "loss": report.loss,
                **report.metrics,
                "tokens_per_s": tokens_per_s,
                **mfu,
                "peak_memory_bytes": int(memory),
                "data_wait_s": data_wait_s,
                "step_s": step_s,
            }
        )
        if save_failed:
            self._saver.wait()
        self._saver.collect()
        return bool(stop)

    @during("evaluation")
    def _evaluate(self) -> None:
        if not self.config.eval.tokens or self._evaluated == self.cursor.units:
            return
        self._evaluated, self._heldout_loss = self.cursor.units, None
        if figures := self.task.evaluate("heldout"):
            self._heldout_loss = figures.get("loss")
            self._record.evaluation(self.cursor.units, "heldout", figures)

    @during("checkpoint")
    def _save(self, *, last: bool = False) -> None:
        loss = self._heldout_loss if self._evaluated == self.cursor.units else None
        self._saver.save(self.task.state(), self.cursor, loss, last=last)

    def _require_end(self) -> None:
        total = self.described.get("total_tokens", 0)
        if self.cursor.tokens < total:
            raise Unfinished(
                f"the work ended at step {self.cursor.units} with {self.cursor.tokens:,} of {total:,} tokens done: "
                "there is no more data"
            )


def _timed(units: Iterator[Any]) -> Iterator[tuple[Any, float]]:
    """Each unit with the seconds it was waited for."""
    began = time.perf_counter()
    enter("data wait")
    for unit in units:
        yield unit, time.perf_counter() - began
        began = time.perf_counter()
        enter("data wait")


class _Signals:
    """Inside, the first SIGTERM or SIGINT is noted, so that the step ends and state is saved; a second one kills."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> "_Signals":
        self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            os._exit(128 + number)
        self.received = True
