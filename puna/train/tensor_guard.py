"""Levels 0 to 2 of the controller: the size of one tensor's update, its epsilon, its moments."""

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


class TensorGuard:
    """Decides from symptoms alone, so it decides the same on every rank."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._tensors: dict[str, _Tensor] = {}
        self._skipped = -1  # step that was left out as a bad batch

    def tune(self, step: int, symptoms: Mapping[str, Symptoms], alarmed: Collection[str] = ()) -> Plan:
        """What to do with each tensor in step `step` (1: the first), before it is taken.

        alarmed: tensors whose coming update looks wrong for another reason than surprise; their rate is taken back.
        """
        bursting = self._bursting(symptoms)
        everywhere = len(symptoms) > 1 and len(bursting) > self.limits.bad_batch_share * len(symptoms)
        if everywhere and self._skipped != step - 1:
            self._skipped = step
            return Plan(skip=True, records=(self._bad_batch(step, len(bursting), len(symptoms)),))
        resets = list(symptoms) if everywhere else bursting[: self._most_resets(len(symptoms))]
        others = {name: symptom for name, symptom in symptoms.items() if name not in resets}
        records = [self._reset(step, name, symptoms[name]) for name in resets]
        records += self._stalls(step, others)
        records += [self._ramp(step, name) for name in alarmed if name in others and self._may_ramp(step, name)]
        clips = {name: self._clip_rate(symptom) for name, symptom in others.items() if self._is_clipped(symptom)}
        records += [self._clip(step, name, others[name], rate) for name, rate in clips.items()]
        knobs = {name: self._knobs(step, name, clips.get(name, 1.0)) for name in {**self._tensors, **clips}}
        self._forget(step)
        changed = {name: knob for name, knob in knobs.items() if knob != Knobs()}
        return Plan(resets=tuple(resets), knobs=changed, records=tuple(records))

    def eps_of(self, name: str, eps: float) -> float:
        """The epsilon that a tensor is updated with, where its group has `eps`."""
        own = self._tensors[name].eps if name in self._tensors else None
        return eps if own is None else own

    def state(self) -> dict[str, Any]:
        """For the manifest."""
        return {"skipped": self._skipped, "tensors": {name: asdict(tensor) for name, tensor in self._tensors.items()}}

    def restore(self, state: dict[str, Any]) -> None:
        """From the manifest."""
        self._skipped = state["skipped"]
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

    def _most_resets(self, num_tensors: int) -> int:
        return max(self.limits.min_resets, ceil(self.limits.reset_share * num_tensors))

    def _bad_batch(self, step: int, num_bursting: int, num_tensors: int) -> dict[str, Any]:
        return action(
            step,
            2,
            "skip",
            f"{num_bursting} of {num_tensors} tensors burst at once: the batch is left out, once",
            statistic="bursting",
            value=num_bursting / num_tensors,
            threshold=self.limits.bad_batch_share,
        )

    def _reset(self, step: int, name: str, symptom: Symptoms) -> dict[str, Any]:
        tensor = self._tensor(name)
        tensor.ramp_from, tensor.stalled = step, 0
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

    # --- level 1: stalls, and updates that look wrong ---

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

    def _may_ramp(self, step: int, name: str) -> bool:
        return name not in self._tensors or self._tensors[name].ramp_from is None

    def _ramp(self, step: int, name: str) -> dict[str, Any]:
        self._tensor(name).ramp_from = step
        return action(
            step,
            1,
            "ramp",
            f"its coming update raised the alarm: the rate begins anew and rises over {self.limits.ramp_steps} steps",
            tensor=name,
            statistic="alarm",
            value=1.0,
            threshold=1.0,
            before=1.0,
            after=ramp(0, self.limits.ramp_steps),
        )

    # --- level 0: a large update is made smaller ---

    def _is_clipped(self, symptom: Symptoms) -> bool:
        return symptom.surprise > self.limits.clipped and symptom.age > self.limits.min_age

    def _clip_rate(self, symptom: Symptoms) -> float:
        return max(1 / symptom.surprise, 1 / self.limits.ramp_steps)

    def _clip(self, step: int, name: str, symptom: Symptoms, rate: float) -> dict[str, Any]:
        return action(
            step,
            0,
            "clip",
            "its update is divided by its surprise",
            tensor=name,
            statistic="surprise",
            value=symptom.surprise,
            threshold=self.limits.clipped,
            before=1.0,
            after=rate,
        )

    # --- what follows for a step ---

    def _knobs(self, step: int, name: str, clip_rate: float) -> Knobs:
        tensor = self._tensors.get(name, _Tensor())
        rate = 1.0 if tensor.ramp_from is None else ramp(step - tensor.ramp_from, self.limits.ramp_steps)
        slow = self.limits.slow if step < tensor.slow_until else 1.0
        return Knobs(rate * slow * clip_rate, tensor.eps)

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
