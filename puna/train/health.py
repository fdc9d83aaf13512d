"""The health monitor: looks at Adam's state before every step, through step hooks, and says when it turns bad.

It reads and never writes (unless it has an actor): weights are the same with and without it. A fault of its own
switches it off, with a word, on every rank; it never ends a run.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from puna.console import err
from puna.errors import DataError
from puna.train import mesh
from puna.train.adam_stats import STATISTICS, Watched
from puna.train.config import HealthConfig
from puna.train.controller import Controller
from puna.train.detector import Reading, Status
from puna.train.health_track import Arrived, Track, last_line, named_parameters
from puna.train.metrics import Events

DEFAULT = HealthConfig()
NUM_RECORDS = 256  # newest kept in memory
STATES = ("calm", "watch", "alarm")


class Actor(Protocol):
    """What acts on a reading (the controller). Every rank calls it with the same reading."""

    def before_update(self, reading: Reading, tensors: Sequence[Watched]) -> list[dict[str, Any]]:
        """In the pre-step hook, gradients as Adam will see them; may change g, m, v, groups. Returns action records."""

    def after_update(self, tensors: Sequence[Watched]) -> None:
        """In the post-step hook of the same step; may correct weights."""

    def numbers(self) -> dict[str, Any]:
        """What it remembers, as JSON."""

    def restore(self, numbers: dict[str, Any]) -> None:
        """From `numbers`."""

    def eps_of(self, name: str, eps: float) -> float:
        """The epsilon that a tensor is updated with, where its group has `eps`."""


class HealthMonitor:
    """Watches one or several optimisers of the Adam family; make it after sharding and after the optimisers.

    optimizer: one, or several by name. model: the module, or {name: module}. folder: where events.jsonl goes in a
    drop-in (rank 0 writes). emit: called with each record (Puna's loop). actor: acts before and after updates; with
    `config.act` a `Controller` unless another is given. Raises DataError where the folder cannot be written to.
    """

    def __init__(
        self,
        optimizer: Optimizer | Mapping[str, Optimizer],
        model: nn.Module | Mapping[str, nn.Module],
        config: HealthConfig = DEFAULT,
        *,
        folder: Path | str | None = None,
        emit: Callable[[dict[str, Any]], None] | None = None,
        actor: Actor | None = None,
    ) -> None:
        self.config = config
        self.actor = actor or (Controller(config) if config.act else None)
        self.records: deque[dict[str, Any]] = deque(maxlen=NUM_RECORDS)
        self.reading: Reading | None = None
        self.off_reason: str | None = None  # why it has switched itself off
        self._emit, self._events = emit, _opened(folder)
        parameters = named_parameters(model if isinstance(model, Mapping) else {"": model})
        optimizers = optimizer if isinstance(optimizer, Mapping) else {"": optimizer}
        self._tracks = {
            one: Track(name if len(optimizers) > 1 else "", one, parameters, config) for name, one in optimizers.items()
        }
        self._given: dict[str, Tensor | float] = {}
        self._histogram_at = -1
        self._fault: str | None = None  # of this rank, of which the others have not been told yet
        self._acting = False  # the actor has been called before the update and not yet after it
        self._handles = [
            handle
            for one in optimizers.values()
            for handle in (one.register_step_pre_hook(self._before), one.register_step_post_hook(self._after))
        ]

    @property
    def status(self) -> Status:
        """The newest verdict; of several optimisers the gravest."""
        return max((track.detector.status for track in self._tracks.values()), key=lambda s: STATES.index(s.state))

    @property
    def score(self) -> float:
        """How near the newest step is to an alarm, which is at 1."""
        return max(track.detector.status.score for track in self._tracks.values())

    @property
    def tensors(self) -> list[Watched]:
        """Every tensor under watch."""
        return [tensor for track in self._tracks.values() for tensor in track.tensors]

    @property
    def step(self) -> int:
        """The optimiser step that is being taken or was taken last; 1 is the first."""
        return max(track.step for track in self._tracks.values())

    def at(self, step: int) -> None:
        """The number of the step that comes next (else steps of the optimiser are counted)."""
        for track in self._tracks.values():
            track.step = step - 1

    def loss(self, value: Tensor | float) -> None:
        """This step's loss, the same on every rank, before optimizer.step(); a tensor is not waited for."""
        self.companion("loss", value)

    def grad_norm(self, value: Tensor | float) -> None:
        """This step's global gradient norm before clipping, where it is known."""
        self.companion("grad_norm", value)

    def companion(self, name: str, value: Tensor | float) -> None:
        """A figure of this step beside Adam's: "max_logit" (largest attention logit), "z" (mean log Z of the head)."""
        self._given[name] = value.detach() if isinstance(value, Tensor) else value

    def announce(self, reason: str) -> None:
        """The rate, the batch or the data are changed on purpose from the next step on."""
        for track in self._tracks.values():
            track.detector.announce(track.step + 1)
        self.emit([{"event": "health_announced", "step": self.step + 1, "reason": reason}])

    def reset(self, names: Iterable[str]) -> None:
        """The moments of these tensors were zeroed: their ages and running figures begin anew."""
        chosen = tuple(names)
        for track in self._tracks.values():
            track.reset(chosen)

    def numbers(self) -> dict[str, Any]:
        """What the monitor remembers, as JSON: for a manifest."""
        tracks = {track.name: track.numbers() for track in self._tracks.values()}
        return {"tracks": tracks, "actor": self.actor.numbers() if self.actor else None}

    def restore(self, numbers: dict[str, Any]) -> None:
        """From `numbers`."""
        for track in self._tracks.values():
            if track.name in numbers["tracks"]:
                track.restore(numbers["tracks"][track.name])
        if self.actor and numbers["actor"] is not None:
            self.actor.restore(numbers["actor"])

    def state_tensors(self) -> dict[str, Tensor]:
        """The last gradient of every sample by tensor, the same for any sharding; every rank calls it."""
        return {name: values for track in self._tracks.values() for name, values in track.last_gradients().items()}

    def restore_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """From `state_tensors`."""
        for track in self._tracks.values():
            track.restore_gradients(tensors)

    def state_dict(self) -> dict[str, Any]:
        """`numbers` and `state_tensors` in one, for torch.save; every rank calls it."""
        return {"numbers": self.numbers(), "tensors": self.state_tensors()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From `state_dict`."""
        self.restore(state["numbers"])
        self.restore_tensors(state["tensors"])

    def emit(self, records: Iterable[dict[str, Any]]) -> None:
        """Record what others have to tell, such as a loop's actions, among the monitor's own."""
        for record in records:
            self._guarded(partial(self._record, record))

    def close(self) -> None:
        """Take the hooks out; in a drop-in's folder, say that the run is done."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._events:
            self._events.write("stop", reason="done", step=self.step)
            self._events.close()
            self._events = None

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Look now; with a closure after it, which is what makes the gradients."""
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._guarded(lambda: self._look(self._tracks[optimizer]))
            return None

        def then_look() -> Any:
            loss = closure()
            if isinstance(loss, Tensor | float) and "loss" not in self._given:
                self.loss(loss)
            self._guarded(lambda: self._look(self._tracks[optimizer]))
            return loss

        return args[:1], kwargs | {"closure": then_look}

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.actor and self._acting:
            self._acting = False
            try:
                with torch.no_grad():
                    self.actor.after_update(self._tracks[optimizer].tensors)
            except Exception:
                self._fail(last_line())

    @torch.no_grad()
    def _guarded(self, work: Callable[[], None]) -> None:
        """Do what must not end the run. A fault is told where nobody waits for this rank, else with the next sums."""
        if self.off_reason is not None:
            return
        try:
            work()
        except Exception:
            self._fail(last_line())

    def _fail(self, reason: str) -> None:
        self._fault = self._fault or reason
        if self.off_reason is None and not any(track.shared for track in self._tracks.values()):
            self._switch_off(self._fault)

    def _look(self, track: Track) -> None:
        track.step += 1
        self._follow(track)
        given, self._given = self._given, {}
        arrived = track.exchange(given, self._fault is not None, self.actor)
        self._fault = self._fault or track.fault
        if arrived is None:
            return
        if arrived.failed:
            self._switch_off(self._fault or "the monitor of another rank has failed; that rank says why")
        elif self._fault is None and (reading := track.read(arrived)):
            before = track.detector.status
            self.reading = reading = replace(reading, status=track.detector.judge(reading))
            if self.actor:
                self._act(self.actor, track, reading)
            self._tell(track, reading, before, arrived)

    def _follow(self, track: Track) -> None:
        """What is watched; a fault here does not keep this rank from the exchange, for which others wait."""
        try:
            track.arrange()
            if track.news and not self._fault:
                self._introduce(track)
        except Exception:
            self._fault = self._fault or last_line()

    def _act(self, actor: Actor, track: Track, reading: Reading) -> None:
        self._acting = True
        records = actor.before_update(reading, track.tensors)
        self.reset(record["tensor"] for record in records if record["action"] == "reset")
        for record in records:
            self._record(record)

    def _introduce(self, track: Track) -> None:
        """Record what is watched and by which rules, and say what is not."""
        track.news = False
        group = track.optimizer.param_groups[0]
        self._record(
            {
                "event": "health_start",
                "step": track.step,
                **track.label,
                "optimizer": type(track.optimizer).__name__,
                "eps": float(group["eps"]) if track.tensors else None,
                "betas": [float(beta) for beta in group["betas"]] if track.tensors else None,
                "record_every": self.config.record_every,
                "tensors": {tensor.name: tensor.layer for tensor in track.tensors},
                "numel": {tensor.name: tensor.parameter.numel() for tensor in track.tensors},
                "left_out": track.left_out,
                "rules": [vars(rule) for rule in track.detector.rules],
            }
        )
        reasons: dict[str, list[str]] = {}
        for name, reason in track.left_out.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            _say(f"{', '.join(names[:3])}{more} not watched: {reason}")

    def _tell(self, track: Track, reading: Reading, before: Status, arrived: Arrived) -> None:
        """The records of a step that are due."""
        status, config = reading.status, self.config
        changed = status.state != before.state
        alarmed = changed and status.state == "alarm"
        if changed:
            evidence = [_plain(vars(evidence)) for evidence in status.evidence]
            change = {"state": status.state, "before": before.state, "evidence": evidence}
            self._record({"event": "health_change", "step": reading.step, **track.label, **change})
        if changed or reading.step % config.record_every == 0:
            self._record({"event": "health", "step": reading.step, **track.label, **_health(reading)})
        if alarmed:
            self._histogram_at = reading.step + config.record_every
        if alarmed or reading.step == self._histogram_at or reading.step % config.histogram_every == 0:
            counts = {layer: row.astype(int).tolist() for layer, row in track.histogram(arrived).items()}
            self._record({"event": "health_histogram", "step": reading.step, **track.label, "layers": counts})

    def _record(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        if self._emit:
            self._emit(record)
        if self._events:
            self._events.write(**record)

    def _switch_off(self, reason: str) -> None:
        self.off_reason = reason
        _say(f"switched off at step {self.step}, training goes on: {reason}")
        try:
            self._record({"event": "health_off", "step": self.step, "reason": reason})
        except Exception:
            _say(f"its last record could not be written: {last_line()}")


def _opened(folder: Path | str | None) -> Events | None:
    if folder is None or mesh.rank():
        return None
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        return Events(Path(folder))
    except OSError as error:
        raise DataError(
            f"the health monitor cannot write to {folder}: {error.strerror}", "Name a folder that can be written to."
        ) from error


def _health(reading: Reading) -> dict[str, Any]:
    """The figures of a health record: tensors that have something to tell, six digits."""
    told = reading.statistics["num_active"] + reading.statistics["num_nonfinite"] > 0
    columns = {key: [_figure(value) for value in reading.statistics[key]] for key in (*STATISTICS, "unseen")}
    tensors = {reading.names[i]: {key: column[i] for key, column in columns.items()} for i in np.flatnonzero(told)}
    run = _plain({"score": reading.status.score, "loss": reading.loss, "grad_norm": reading.grad_norm})
    return {"state": reading.status.state, **run, **_plain(reading.companions), "tensors": tensors}


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _figure(value) if isinstance(value, float) else value for key, value in fields.items()}


def _figure(value: float) -> float | None:
    return float(f"{value:.6g}") if np.isfinite(value) else None


def _say(text: str) -> None:
    err.print(f"health monitor: {text}", markup=False, soft_wrap=True)
