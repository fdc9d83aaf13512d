"""What a run tells while it works: event records, TensorBoard, the bar, peak memory."""

import json
import os
import resource
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.progress import Progress, TaskID

from puna.console import bar, err
from puna.diagnosis.records import REACH, STATES, STATISTICS, watched

MFU_FORMULA = "mfu = tokens_per_s * flops_per_token / (world_size * peak_flops)"
LINE_SECONDS = 10.0  # between lines where stderr is not a terminal


class Events:
    """RUN/events.jsonl: one typed record a line, flushed as it is written."""

    def __init__(self, run: Path) -> None:
        self.path = run / "events.jsonl"
        _cut_torn_line(self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, event: str, **fields: Any) -> None:
        """Append a record of the kind `event` with the time (seconds since 1970)."""
        self._file.write(json.dumps({"event": event, "time": round(time.time(), 3)} | fields) + "\n")
        self._file.flush()

    def close(self) -> None:
        """After the last record."""
        self._file.close()


def append_event(run: Path, record: Mapping[str, Any]) -> None:
    """Append one record ("event" and its fields) to a run that nobody is working on."""
    events = Events(run)
    events.write(**record)
    events.close()


def read_events(run: Path) -> list[dict[str, Any]]:
    """All records of a run in order; steps that were lost to a kill and done again appear twice (see `last_steps`).

    A last line that a kill has torn is left out; a run without records has none.
    """
    path = Path(run) / "events.jsonl"
    if not path.is_file():
        return []
    whole = path.read_bytes().rpartition(b"\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def last_steps(events: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The step records that count, by step: a resume or a roll-back takes back what came after the step it goes to."""
    steps: dict[int, dict[str, Any]] = {}
    for event in events:
        if event["event"] in ("resume", "rollback"):
            steps = {step: record for step, record in steps.items() if step <= event["step"]}
        elif event["event"] == "step":
            steps[event["step"]] = event
    return steps


def _cut_torn_line(path: Path) -> None:
    if not path.is_file():
        return
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        start = max(0, end - (1 << 20))
        file.seek(start)
        file.truncate(start + file.read().rfind(b"\n") + 1)


class Board:
    """TensorBoard files under RUN/tensorboard: a scalar for every number of a step or evaluation.

    One event a step rather than one a scalar, which is what SummaryWriter would make of it.
    """

    def __init__(self, run: Path, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import FileWriter

        self._summary = Summary
        self._starts: dict[str, dict[str, Any]] = {}  # of the health monitor, by optimiser
        self._writer = FileWriter(str(run / "tensorboard"))
        self._writer.add_event(Event(file_version="brain.Event:2"), step)
        self._start = Event(session_log=SessionLog(status=SessionLog.START))
        self.rewind(step)

    def rewind(self, step: int) -> None:
        """Have TensorBoard drop the points after this step, which a kill or a roll-back has taken back."""
        self._writer.add_event(self._start, step + 1)

    def write(self, prefix: str, step: int, numbers: Mapping[str, float]) -> None:
        """One point on each curve."""
        values = [self._summary.Value(tag=f"{prefix}/{name}", simple_value=value) for name, value in numbers.items()]
        self._writer.add_summary(self._summary(value=values), step)

    def health(self, record: Mapping[str, Any]) -> None:
        """A record of the health monitor: each layer's worst statistics, its histogram of updates, the state 0 to 2."""
        of = str(record.get("of", ""))
        if record["event"] == "health_start":
            self._starts[of] = dict(record)
        elif record["event"] == "health":
            seen = watched([*self._starts.values(), dict(record)])
            worst = {key: seen.worst(key) for key in STATISTICS}
            points = {f"{key}/{layer}": line[0][1] for key, lines in worst.items() for layer, line in lines.items()}
            self.write("health", record["step"], points)
        elif record["event"] == "health_change":
            self.write("health", record["step"], {f"state {of}".strip(): STATES.index(record["state"])})
        elif record["event"] == "health_histogram":
            values = [self._histogram(layer, counts) for layer, counts in record["layers"].items()]
            self._writer.add_summary(self._summary(value=values), record["step"])

    def _histogram(self, layer: str, counts: Sequence[float]) -> Any:
        pace = 2 * REACH / len(counts)
        limits = [-REACH + pace * (i + 1) for i in range(len(counts))]
        total = sum((limit - pace / 2) * count for limit, count in zip(limits, counts, strict=True))
        squares = sum((limit - pace / 2) ** 2 * count for limit, count in zip(limits, counts, strict=True))
        histogram = {"min": -REACH, "max": REACH, "num": sum(counts), "sum": total, "sum_squares": squares}
        return self._summary.Value(
            tag=f"health/updates/{layer}", histo={**histogram, "bucket_limit": limits, "bucket": counts}
        )

    def close(self) -> None:
        """Write what is buffered."""
        self._writer.close()


class Display:
    """The bar on a terminal; elsewhere a line every ten seconds, and for the first step."""

    def __init__(self, total_tokens: int | None, done_tokens: int) -> None:
        self._total, self._told = total_tokens, float("-inf")
        self._bar: Progress | None = bar("{task.fields[text]}") if err.is_terminal else None
        self._task: TaskID | None = None
        if self._bar:
            self._task = self._bar.add_task("tokens", total=total_tokens, completed=done_tokens, text="")
            self._bar.start()

    def show(self, record: Mapping[str, Any]) -> None:
        """After a step."""
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=record["tokens"], text=_figures(record))
        elif time.monotonic() - self._told >= LINE_SECONDS:
            self._told = time.monotonic()
            of = f" of {self._total:,}" if self._total else ""
            err.print(f"step {record['step']:,}  tokens {record['tokens']:,}{of}  {_figures(record)}", soft_wrap=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar:
            self._bar.stop()


def _figures(record: Mapping[str, Any]) -> str:
    figures = [f"loss {record['loss']:.4f}", f"{record['tokens_per_s']:,.0f} tokens/s"]
    if "lr" in record:
        figures.append(f"lr {record['lr']:.2e}")
    return "  ".join([*figures, f"{record['peak_memory_bytes'] / 2**20:,.0f} MiB"])


class Recorder:
    """Rank 0's events, TensorBoard and bar; silent on the other ranks."""

    def __init__(self, run: Path, *, speaks: bool) -> None:
        self._events = Events(run) if speaks else None
        self._board: Board | None = None
        self._display: Display | None = None

    def begin(self, run: Path, step: int, tokens: int, total_tokens: int | None, *, tensorboard: bool) -> None:
        """Before the first step, once it is known where the run stands."""
        if self._events:
            self._display = Display(total_tokens, tokens)
            self._board = Board(run, step) if tensorboard else None

    def say(self, text: str) -> None:
        """A line for the person who watches."""
        if self._events:
            err.print(text, markup=False, soft_wrap=True)

    def event(self, event: str, **fields: Any) -> None:
        """A record that is neither step nor evaluation."""
        if self._events:
            self._events.write(event, **fields)

    def health(self, record: Mapping[str, Any]) -> None:
        """A record of the health monitor or its controller, to events and TensorBoard."""
        self.event(**record)
        if self._board:
            self._board.health(record)

    def rewind(self, step: int) -> None:
        """The run has gone back to this step."""
        if self._board:
            self._board.rewind(step)

    def step(self, record: Mapping[str, Any]) -> None:
        """A step's record, to all three."""
        self.event("step", **record)
        if self._display:
            self._display.show(record)
        if self._board:
            self._board.write("train", record["step"], {k: v for k, v in record.items() if k != "step"})

    def evaluation(self, step: int, split: str, figures: Mapping[str, float]) -> None:
        """An evaluation's figures, to all three."""
        self.event("eval", step=step, split=split, **figures)
        self.say(f"step {step:,}  {split}: " + "  ".join(f"{name} {value:,.4f}" for name, value in figures.items()))
        if self._board:
            self._board.write(split, step, figures)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for part in (self._display, self._board, self._events):
            if part:
                part.close()


def peak_memory_bytes() -> int:
    """Most memory this process has held: of the CUDA allocator where CUDA is in use, else resident (Linux)."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
