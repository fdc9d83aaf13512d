"""Remedies side by side: what is done to a run that is about to diverge, or has."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from puna.lab.adam_trial import Arm, Trial
from puna.train.clipping import ZClip
from puna.train.levers import zero_moments

RAMP = 50
SKIPPED = 5


class Plain:
    """Does nothing."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial

    def before(self, trial: Trial) -> bool:
        """Take every step."""
        return True

    def after(self, trial: Trial) -> None:
        """Nothing."""


class Clip(Plain):
    """Global gradient norm of 1 at most."""

    def before(self, trial: Trial) -> bool:
        """Scale the gradients."""
        nn.utils.clip_grad_norm_(trial.trained, 1.0)
        return True


class ZClipped(Plain):
    """ZClip, then a global norm of 1 at most, as its authors use it."""

    def __init__(self, trial: Trial) -> None:
        super().__init__(trial)
        self.zclip = ZClip()

    def before(self, trial: Trial) -> bool:
        """Scale the gradients."""
        self.zclip(trial.trained, max_norm=1.0)
        return True


# --- at the release of a stall, by one who knows its step -----------------------------------------------------------


class AtRelease(Plain):
    """Acts on the stalled tensors, from the end of their stall on."""

    def __init__(self, trial: Trial) -> None:
        super().__init__(trial)
        self.release = trial.spec.start + trial.spec.length

    def since(self, trial: Trial) -> int:
        """Steps since the stall ended; 0 is the step that sees whole gradients first, below 0 before it."""
        return trial.step - self.release


class Skip(AtRelease):
    """The first 5 batches are left out."""

    def before(self, trial: Trial) -> bool:
        """No step for the first five."""
        return not 0 <= self.since(trial) < SKIPPED


class SlowRate(AtRelease):
    """A tenth of the rate, for good."""

    def before(self, trial: Trial) -> bool:
        """Lower the rate of every group."""
        if self.since(trial) >= 0:
            for group in trial.optimizer.param_groups:
                group["lr"] *= 0.1
        return True


class Reset(AtRelease):
    """Both moments and the step counter begin anew."""

    def before(self, trial: Trial) -> bool:
        """Zero the state, once."""
        if self.since(trial) == 0:
            zero_moments(trial.optimizer, trial.stalled)
        return True


class Seed(AtRelease):
    """The first moment is zeroed, the second becomes the square of the gradient."""

    def before(self, trial: Trial) -> bool:
        """Seed the state, once."""
        if self.since(trial) == 0:
            for p in trial.stalled:
                state = trial.optimizer.state[p]
                correction = 1 - trial.spec.beta2 ** float(state["step"] + 1)
                assert p.grad is not None
                state["exp_avg"].zero_()
                state["exp_avg_sq"].copy_(p.grad.square() * correction)
        return True


class Scaled(AtRelease):
    """Each tensor's update is multiplied by a factor of its own."""

    def factors(self, trial: Trial, tensors: list[nn.Parameter]) -> list[float]:
        """Of this step, by tensor: 1 where the update stays whole."""
        return [1.0] * len(tensors)

    def tensors(self, trial: Trial) -> list[nn.Parameter]:
        """Those that the factors are for."""
        return trial.trained

    def before(self, trial: Trial) -> bool:
        """Keep the weights and find the factors."""
        self._tensors = self.tensors(trial)
        self._factors = self.factors(trial, self._tensors)
        self._weights = [p.detach().clone() for p in self._tensors]
        return True

    @torch.no_grad()
    def after(self, trial: Trial) -> None:
        """From the kept weights, that share of the way."""
        for p, weight, factor in zip(self._tensors, self._weights, self._factors, strict=True):
            if factor != 1.0:
                p.copy_(weight + factor * (p - weight))


class RampedReset(Scaled):
    """A reset, and updates that rise from 1/50 to the whole over 50 steps."""

    def tensors(self, trial: Trial) -> list[nn.Parameter]:
        """The stalled ones."""
        return trial.stalled

    def before(self, trial: Trial) -> bool:
        """Zero the state, once."""
        if self.since(trial) == 0:
            zero_moments(trial.optimizer, trial.stalled)
        return super().before(trial)

    def factors(self, trial: Trial, tensors: list[nn.Parameter]) -> list[float]:
        """The ramp."""
        ramp = min(1.0, (self.since(trial) + 1) / RAMP) if self.since(trial) >= 0 else 1.0
        return [ramp] * len(tensors)


class StableClip(Scaled):
    """StableAdamW's update clip, d = 1: divided by max(1, sqrt(mean g^2 / max(v^, eps^2)))."""

    def factors(self, trial: Trial, tensors: list[nn.Parameter]) -> list[float]:
        """One a tensor."""
        return [1 / max(1.0, self._rms(trial, p)) for p in tensors]

    def _rms(self, trial: Trial, p: nn.Parameter) -> float:
        v, grad = corrected(trial, p)
        return float((grad.square() / v.clamp(min=trial.spec.eps**2)).mean().sqrt())


class Capped(Scaled):
    """The RMS of r is 0.3 at most."""

    def factors(self, trial: Trial, tensors: list[nn.Parameter]) -> list[float]:
        """One a tensor."""
        return [min(1.0, 0.3 / max(self._rms(trial, p), 1e-12)) for p in tensors]

    def _rms(self, trial: Trial, p: nn.Parameter) -> float:
        v, grad = corrected(trial, p)
        state = trial.optimizer.state[p]
        beta1 = trial.spec.beta1
        m = state["exp_avg"].lerp(grad, 1 - beta1) if state else grad * (1 - beta1)
        count = float(state["step"]) + 1 if state else 1.0
        return float((m / (1 - beta1**count) / (v.sqrt() + trial.spec.eps)).square().mean().sqrt())


def corrected(trial: Trial, p: nn.Parameter) -> tuple[Tensor, Tensor]:
    """v^ as the coming step will have it, and the gradient."""
    assert p.grad is not None
    state: dict[str, Any] = trial.optimizer.state[p]
    if not state:
        return p.grad.square(), p.grad
    beta2 = trial.spec.beta2
    v = state["exp_avg_sq"].lerp(p.grad.square(), 1 - beta2)
    return v / (1 - beta2 ** (float(state["step"]) + 1)), p.grad


@dataclass(frozen=True)
class Remedy:
    """An arm of the table of mitigations: settings of the whole run, and what is done."""

    settings: dict[str, Any]
    arm: Callable[[Trial], Arm] | None = None
    act: bool = False


MITIGATIONS = {
    "nothing": Remedy({}),
    "beta2 0.95": Remedy({"beta2": 0.95}),
    "eps 1e-4": Remedy({"eps": 1e-4}),
    "skip 5 batches": Remedy({}, Skip),
    "reset, no ramp": Remedy({}, Reset),
    "seed v with g^2, zero m": Remedy({}, Seed),
    "cap the RMS of r at 0.3": Remedy({}, Capped),
    "eps 1e-15": Remedy({"eps": 1e-15}),
    "rate / 10": Remedy({}, SlowRate),
    "reset, ramp of 50 steps": Remedy({}, RampedReset),
    "StableAdamW's clip": Remedy({}, StableClip),
    "controller": Remedy({}, act=True),
}
"""The first seven leave the spike, the others do not (the sheet's ordering)."""
