"""A `RunSpec` trained to its end, alone, under the health monitor or steered by it, and what its steps left behind."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from puna.lab import adam_run
from puna.lab.adam_spec import RunSpec
from puna.llama.model import Llama
from puna.train.actions import Recovery, Verdict
from puna.train.config import HealthConfig
from puna.train.controller import Controller
from puna.train.health import STATES, HealthMonitor
from puna.train.levers import zero_moments

LAST = 30  # steps whose mean loss is the last loss of a run
KEEP_EVERY = 10  # steps between states that a steered run can return to
MAX_FACTOR = 3  # a steered run takes at most so many times its steps, those done again included
KEPT = ("health", "health_change", "health_action", "health_histogram", "health_off")


class Arm(Protocol):
    """A remedy: what is done between backward and the optimiser's step, and after it."""

    def before(self, trial: "Trial") -> bool:
        """Whether the step is to be taken; may change gradients, moments and groups."""

    def after(self, trial: "Trial") -> None:
        """After the step."""


@dataclass
class Trial:
    """A run under way. `step` counts from 0; `passed` batches were passed over by returns to earlier states."""

    spec: RunSpec
    model: Llama
    optimizer: Optimizer
    stalled: list[nn.Parameter]
    step: int = 0
    passed: int = 0
    columns: dict[str, list[float]] = field(default_factory=dict)

    @property
    def trained(self) -> list[nn.Parameter]:
        """Parameters that have a gradient."""
        return [p for p in self.model.parameters() if p.grad is not None]

    def note(self, **figures: float) -> None:
        """Figures of this step."""
        for key, value in figures.items():
            self.columns.setdefault(key, []).append(value)


def train(
    spec: RunSpec,
    *,
    health: HealthConfig | None = None,
    arm: Callable[[Trial], Arm] | None = None,
    optimizer: Callable[[RunSpec, nn.Module], Optimizer] = adam_run.make_optimizer,
) -> dict[str, Any]:
    """Train a run to its end; its figures, as JSON.

    columns, a figure a step: loss, grad_norm (before any arm), update_rms and stall_share (largest over tensors, from
    Adam's state after the step; what never had a gradient is left out), with `health` the score and state of the
    monitor. With health.act the controller steers, as in Puna's loop: it may leave batches out and return to states of
    earlier steps. heldout: loss on held-out text at the end; last_loss: mean of the last 30 steps. A loss that is not
    finite ends a run that is not steered.
    """
    model = adam_run.build(spec)
    trial = Trial(spec, model, optimizer(spec, model), adam_run.stalling(spec, model))
    if spec.state_dtype == "bf16":
        trial.optimizer.register_step_post_hook(lambda optimizer, args, kwargs: adam_run.round_states(optimizer))
    records: list[dict[str, Any]] = []
    actor = Controller(health) if health and health.act else None
    monitor = HealthMonitor(trial.optimizer, model, health, emit=records.append, actor=actor) if health else None
    began = time.perf_counter()
    end = _steer(trial, monitor, actor) if monitor and actor else _run(trial, monitor, arm(trial) if arm else None)
    if monitor:
        monitor.close()
    return {
        "spec": spec.model_dump(mode="json"),
        "end": end,
        "heldout": _finite(adam_run.heldout_loss(spec, model)),
        "last_loss": _finite(float(np.mean(trial.columns["loss"][-LAST:]))),
        "seconds": round(time.perf_counter() - began, 2),
        "columns": {key: [_finite(value) for value in values] for key, values in trial.columns.items()},
        "records": [record for record in records if record["event"] in KEPT],
    }


# --- alone, or watched ------------------------------------------------------------------------------------------------


def _run(trial: Trial, monitor: HealthMonitor | None, arm: Arm | None) -> str:
    """Every step once; what ended the run."""
    for step in range(trial.spec.steps):
        trial.step = step
        adam_run.set_step(trial.optimizer, trial.spec, trial.step)
        loss = _gradients(trial)
        if monitor:
            monitor.loss(loss)
        if arm is None or arm.before(trial):
            trial.optimizer.step()
        if arm:
            arm.after(trial)
        _note_state(trial, monitor)
        trial.optimizer.zero_grad()
        if not np.isfinite(loss):
            return "not finite"
    return "done"


def _gradients(trial: Trial) -> float:
    loss = adam_run.backward(trial.spec, trial.model, trial.stalled, trial.step, trial.passed)
    norm = nn.utils.get_total_norm([p.grad for p in trial.trained if p.grad is not None]).item()
    trial.note(loss=loss, grad_norm=norm)
    if trial.spec.clip:
        nn.utils.clip_grad_norm_(trial.trained, trial.spec.clip)
    return loss


def _note_state(trial: Trial, monitor: HealthMonitor | None) -> None:
    trial.note(**_state_figures(trial.optimizer))
    if monitor:
        trial.note(score=monitor.status.score, state=STATES.index(monitor.status.state))


def _state_figures(optimizer: Optimizer) -> dict[str, float]:
    """Largest RMS of r of a tensor, and largest share of a tensor's coordinates with sqrt(v^) < eps."""
    parts = [part for group in optimizer.param_groups if (part := _of_group(optimizer, group))]
    update, stall = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return {"update_rms": float(update.max()), "stall_share": float(stall.max())}


def _of_group(optimizer: Optimizer, group: dict[str, Any]) -> tuple[np.ndarray, np.ndarray] | None:
    states = [state for p in group["params"] if (state := optimizer.state.get(p))]
    if not states:
        return None
    starts = np.cumsum([0] + [state["exp_avg"].numel() for state in states])[:-1]
    m, v = (torch.cat([state[key].flatten() for state in states]) for key in ("exp_avg", "exp_avg_sq"))
    beta1, beta2 = group["betas"]
    count = max(1.0, float(states[0]["step"]))
    root = v.div_(1 - beta2**count).sqrt_().numpy()
    ratio = m.div_(1 - beta1**count).numpy() / (root + group["eps"] + np.float32(1e-30))
    seen = root > 0
    active = np.maximum(np.add.reduceat(seen.astype(np.float32), starts), 1)
    update = np.sqrt(np.add.reduceat(ratio * ratio, starts) / active)
    return update, np.add.reduceat((seen & (root < group["eps"])).astype(np.float32), starts) / active


def _finite(value: float) -> float | None:
    """Five figures; None for what is not finite."""
    return float(f"{value:.5g}") if np.isfinite(value) else None


# --- steered ----------------------------------------------------------------------------------------------------------


def _steer(trial: Trial, monitor: HealthMonitor, controller: Controller) -> str:
    """As Puna's loop does it, with states in memory in the place of checkpoints; what ended the run."""
    states: dict[int, dict[str, Any]] = {}
    for _ in range(MAX_FACTOR * trial.spec.steps):
        if trial.step == trial.spec.steps:
            return "done"
        if trial.step % KEEP_EVERY == 0:
            states[trial.step] = _state(trial, monitor)
        verdict = _steered_step(trial, monitor, controller)
        if verdict.kind in ("go", "skip"):
            trial.step += 1
            continue
        target = controller.target(sorted(states), verdict.onset, trial.step + 1)
        if verdict.kind == "stop" or target is None:
            return "stopped"
        _return(trial, monitor, controller, states, target.step, verdict)
    return "stopped"


def _steered_step(trial: Trial, monitor: HealthMonitor, controller: Controller) -> Verdict:
    number = trial.step + 1
    adam_run.set_step(trial.optimizer, trial.spec, trial.step)
    _recover(trial, monitor, controller.recovery(number))
    loss = _gradients(trial)
    verdict = controller.judge(number, loss, trial.columns["grad_norm"][-1])
    monitor.at(number)
    monitor.loss(loss)
    if verdict.kind == "go":
        trial.optimizer.step()
    _note_state(trial, monitor)
    trial.optimizer.zero_grad()
    return verdict


def _recover(trial: Trial, monitor: HealthMonitor, recovery: Recovery) -> None:
    """What returns have left behind for a step."""
    for group in trial.optimizer.param_groups:
        beta1, beta2 = group["betas"]
        group.update(lr=group["lr"] * recovery.rate, betas=(beta1, min(beta2, recovery.beta2)))
    if recovery.first:
        monitor.announce("the run came back to an earlier state")
    if recovery.reset:
        zero_moments(trial.optimizer, trial.model.parameters())
        monitor.reset([tensor.name for tensor in monitor.tensors])


def _state(trial: Trial, monitor: HealthMonitor) -> dict[str, Any]:
    kept = {
        "model": trial.model.state_dict(),
        "optimizer": trial.optimizer.state_dict(),
        "monitor": monitor.state_dict(),
    }
    return copy.deepcopy(kept)


def _return(
    trial: Trial,
    monitor: HealthMonitor,
    controller: Controller,
    states: dict[int, dict[str, Any]],
    to: int,
    verdict: Verdict,
) -> None:
    """To the state of step `to`; the batches since are passed over, and as many again as the controller says."""
    now = trial.step + 1
    state = copy.deepcopy(states[to])
    trial.model.load_state_dict(state["model"])
    trial.optimizer.load_state_dict(state["optimizer"])
    monitor.load_state_dict(state["monitor"])
    controller.restore(controller.returned(state["monitor"]["numbers"]["actor"], to, verdict.onset, now))
    for step in [step for step in states if step > to]:
        del states[step]
    trial.passed += now - to + controller.passes(verdict.onset, now)
    trial.step = to
    for values in trial.columns.values():
        del values[to:]
