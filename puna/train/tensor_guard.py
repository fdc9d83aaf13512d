"""Levels 0 to 2 of the controller: the size of one tensor's update, its epsilon, its moments."""

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

from puna.train.actions import Knobs, Limits, Plan, Symptoms, action, ramp

Records = list[dict[str, Any]]


@dataclass
class _Tensor:
    """What is out of the ordinary about a tensor."""

    stalled: int = 0  # steps in a row
    eps: float | None = None  # in place of the group's
    ramp_from: int | None = None  # step at which its rate began to rise
    slow_until: int = 0
    held_from: int | None = None  # step since which its update is held to `held_size`
    held_size: float = 0.0  # of the update, over the weights
    calm: int = 0  # steps in a row in which nothing had to be held


class TensorGuard:
    """Decides from symptoms alone, so it decides the same on every rank."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._tensors: dict[str, _Tensor] = {}
        self._usual: dict[str, float] = {}  # mean logarithm of the updates over the weights, as they were applied
        self._skipped = -1  # step that was left out as a bad batch

    def tune(
        self, step: int, symptoms: Mapping[str, Symptoms], alarmed: Collection[str] = (), *, lost: bool = False
    ) -> Plan:
        """What to do with each tensor in step `step` (1: the first), before it is taken.

        alarmed: tensors whose coming update raises the alarm. lost: the loss of this step is far above usual ones, so
        that a burst everywhere comes from the data or from weights that are wrong already, not from Adam.
        """
        bursting = self._bursting(symptoms)
        everywhere = len(symptoms) > 1 and len(bursting) > self.limits.bad_batch_share * len(symptoms)
        if everywhere and (lost or self._skipped != step - 1):
            self._skipped = step
            return Plan(skip=True, records=(self._bad_batch(step, len(bursting), len(symptoms), lost),))
        resets = list(symptoms) if everywhere else self._to_reset(bursting, symptoms, alarmed)
        others = {name: symptom for name, symptom in symptoms.items() if name not in resets}
        records = [self._reset(step, name, symptoms[name]) for name in resets]
        records += self._stalls(step, others)
        rising = [name for name in alarmed if name in others and self._may_hold(name, others[name])]
        records += [self._hold(step, name, others[name]) for name in rising]
        clips = {name: self._clip_rate(others[name]) for name in bursting if name in others}
        records += [self._clip(step, name, others[name], rate) for name, rate in clips.items()]
        knobs = {name: self._knobs(step, name, symptom, clips) for name, symptom in symptoms.items()}
        self._learn(others, knobs)
        self._forget(step)
        changed = {name: knob for name, knob in knobs.items() if knob != Knobs()}
        return Plan(resets=tuple(resets), knobs=changed, records=tuple(records))

    def eps_of(self, name: str, eps: float) -> float:
        """The epsilon that a tensor is updated with, where its group has `eps`."""
        own = self._tensors[name].eps if name in self._tensors else None
        return eps if own is None else own

    def state(self) -> dict[str, Any]:
        """For the manifest."""
        tensors = {name: asdict(tensor) for name, tensor in self._tensors.items()}
        return {"skipped": self._skipped, "usual": self._usual, "tensors": tensors}

    def restore(self, state: dict[str, Any]) -> None:
        """From the manifest."""
        self._skipped, self._usual = state["skipped"], dict(state["usual"])
        self._tensors = {name: _Tensor(**tensor) for name, tensor in state["tensors"].items()}

    # --- level 2: bursts ---

    def _bursting(self, symptoms: Mapping[str, Symptoms]) -> list[str]:
        """Tensors about to make an update out of proportion, the most surprised first."""
        found = [
            (-symptom.surprise, name)
            for name, symptom in symptoms.items()
            if symptom.surprise > self.limits.burst and symptom.age > self.limits.min_age
        ]
        return [name for _, name in sorted(found)]

    def _to_reset(self, bursting: list[str], symptoms: Mapping[str, Symptoms], alarmed: Collection[str]) -> list[str]:
        """Of those that burst, not too many, where the alarm or the size of the burst leaves no doubt."""
        sure = [name for name in bursting if name in alarmed or symptoms[name].surprise > self.limits.dead]
        return sure[: max(self.limits.min_resets, ceil(self.limits.reset_share * len(symptoms)))]

    def _bad_batch(self, step: int, num_bursting: int, num_tensors: int, lost: bool) -> dict[str, Any]:
        why = "and the loss is high already: the batch is left out" if lost else "the batch is left out, once"
        return action(
            step,
            2,
            "skip",
            f"{num_bursting} of {num_tensors} tensors burst at once, {why}",
            statistic="bursting",
            value=num_bursting / num_tensors,
            threshold=self.limits.bad_batch_share,
        )

    def _reset(self, step: int, name: str, symptom: Symptoms) -> dict[str, Any]:
        self._tensors[name] = _Tensor(eps=self._tensor(name).eps, ramp_from=step)
        self._usual.pop(name, None)
        return action(
            step,
            2,
            "reset",
            f"its gradient is {symptom.surprise:.3g} times what its second moment expects: both moments begin anew, "
            f"and the rate rises over {self.limits.ramp_steps} steps",
            tensor=name,
            statistic="surprise",
            value=symptom.surprise,
            threshold=self.limits.burst,
            before=1.0,
            after=ramp(0, self.limits.ramp_steps),
        )

    # --- level 1: stalls ---

    def _stalls(self, step: int, symptoms: Mapping[str, Symptoms]) -> Records:
        """Count the steps that epsilon damps each tensor; lower the epsilon of those that it damps for long."""
        records = []
        for name, symptom in symptoms.items():
            if symptom.stall < self.limits.stall:
                tensor = self._tensor(name)
                tensor.stalled += 1
                if tensor.stalled >= self.limits.stall_steps:
                    records += self._lower_eps(step, name, symptom)
            elif name in self._tensors:
                self._tensors[name].stalled = 0
        return records

    def _lower_eps(self, step: int, name: str, symptom: Symptoms) -> Records:
        before = self.eps_of(name, symptom.eps)
        after = self._lowered(before, symptom)
        tensor = self._tensor(name)
        tensor.stalled = 0
        if after == before:
            return []
        tensor.eps, tensor.ramp_from = after, step
        if aligned := symptom.lag_cosine > self.limits.aligned:
            tensor.slow_until = step + self.limits.slow_steps
        slower = f", at {self.limits.slow:g} of it for {self.limits.slow_steps} steps" if aligned else ""
        record = action(
            step,
            1,
            "eps",
            f"for {self.limits.stall_steps} steps the root of its second moment was below {self.limits.stall:g} times "
            f"epsilon, which freezes it: epsilon is lowered, and the rate rises over {self.limits.ramp_steps} steps"
            + slower,
            tensor=name,
            statistic="stall",
            value=symptom.stall,
            threshold=self.limits.stall,
            before=before,
            after=after,
        )
        return [record]

    def _lowered(self, eps: float, symptom: Symptoms) -> float:
        floor, root_v = max(self.limits.eps_floor, symptom.eps_floor), symptom.stall * eps
        while root_v <= self.limits.free * eps and eps > floor:
            eps = max(floor, eps * self.limits.eps_factor)
        return eps

    # --- level 1: updates that raise the alarm ---

    def _may_hold(self, name: str, symptom: Symptoms) -> bool:
        held = name in self._tensors and self._tensors[name].held_from is not None
        usual = math.exp(self._usual.get(name, math.inf))
        return not held and symptom.ratio > self.limits.rise * usual

    def _hold(self, step: int, name: str, symptom: Symptoms) -> dict[str, Any]:
        tensor, size = self._tensor(name), math.exp(self._usual[name])
        tensor.held_from, tensor.held_size, tensor.calm = step, size, 0
        return action(
            step,
            1,
            "hold",
            f"its coming update raises the alarm: updates are held to their usual size of {size:.3g} of the weights, "
            f"which may double every {self.limits.ramp_steps} steps",
            tensor=name,
            statistic="update_ratio",
            value=symptom.ratio,
            threshold=size,
            before=1.0,
            after=min(1.0, size / symptom.ratio),
        )

    def _held_rate(self, step: int, name: str, symptom: Symptoms, rate: float) -> float:
        """Factor of an update that is to be made at `rate` times its own size; ends the hold where it is 1 for long."""
        tensor = self._tensors.get(name)
        if not tensor or tensor.held_from is None or math.isnan(symptom.ratio):
            return 1.0
        allowed = tensor.held_size * 2 ** ((step - tensor.held_from) / self.limits.ramp_steps)
        factor = min(1.0, allowed / (symptom.ratio * rate)) if symptom.ratio else 1.0
        tensor.calm = tensor.calm + 1 if factor == 1.0 else 0
        if tensor.calm >= self.limits.calm_steps:
            tensor.held_from, tensor.held_size, tensor.calm = None, 0.0, 0
        return factor

    def _learn(self, symptoms: Mapping[str, Symptoms], knobs: Mapping[str, Knobs]) -> None:
        """Move what is usual towards what is applied; innovations are cut at a factor 2."""
        for name, symptom in symptoms.items():
            if symptom.age > self.limits.min_age and symptom.ratio > 0:
                newest = math.log(symptom.ratio * knobs[name].rate)
                usual = self._usual.setdefault(name, newest)
                self._usual[name] = usual + self.limits.usual_rate * max(-math.log(2), min(math.log(2), newest - usual))

    # --- level 0: a large update is made smaller ---

    def _clip_rate(self, symptom: Symptoms) -> float:
        return max(1 / symptom.surprise, 1 / self.limits.ramp_steps)

    def _clip(self, step: int, name: str, symptom: Symptoms, rate: float) -> dict[str, Any]:
        return action(
            step,
            0,
            "clip",
            "its gradient is larger than its second moment expects: the update is divided by that",
            tensor=name,
            statistic="surprise",
            value=symptom.surprise,
            threshold=self.limits.burst,
            before=1.0,
            after=rate,
        )

    # --- what follows for a step ---

    def _knobs(self, step: int, name: str, symptom: Symptoms, clips: Mapping[str, float]) -> Knobs:
        tensor = self._tensors.get(name, _Tensor())
        rate = clips.get(name, 1.0)
        rate *= 1.0 if tensor.ramp_from is None else ramp(step - tensor.ramp_from, self.limits.ramp_steps)
        rate *= self.limits.slow if step < tensor.slow_until else 1.0
        return Knobs(rate * self._held_rate(step, name, symptom, rate), tensor.eps)

    def _tensor(self, name: str) -> _Tensor:
        return self._tensors.setdefault(name, _Tensor())

    def _forget(self, step: int) -> None:
        """Drop what is over, so that the state stays small."""
        for tensor in self._tensors.values():
            if tensor.ramp_from is not None and step - tensor.ramp_from >= self.limits.ramp_steps:
                tensor.ramp_from = None
            if tensor.slow_until <= step:
                tensor.slow_until = 0
        self._tensors = {name: tensor for name, tensor in self._tensors.items() if tensor != _Tensor()}
