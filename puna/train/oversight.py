"""The health monitor of a gradient task and its controller, where it may act: what happens around one step."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from puna.train.actions import Limits, Recovery, Verdict
from puna.train.config import HealthConfig
from puna.train.controller import Controller
from puna.train.health import HealthMonitor
from puna.train.levers import zero_moments
from puna.train.optim import make_state


class Oversight:
    """Makes the optimisers' state at once, so that the monitor's hooks see real steps only; make it after sharding."""

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        optimizers: Mapping[str, Optimizer],
        config: HealthConfig,
        limits: Limits | None = None,
    ) -> None:
        for optimizer in optimizers.values():
            make_state(optimizer)
        self._optimizers, self._tokens, self._logits_every = dict(optimizers), 0, config.logits_every
        self._records: list[dict[str, Any]] = []
        self.controller = Controller(config, limits) if config.act else None
        self.monitor = HealthMonitor(optimizers, modules, config, emit=self._records.append, actor=self.controller)

    def begin(self, step: int, tokens: int) -> Recovery:
        """Before step `step` (1: the first) of so many tokens: tell the monitor of changes; what roll-backs leave."""
        if tokens != self._tokens and self._tokens:
            self.monitor.announce(f"the batch goes from {self._tokens} to {tokens} tokens")
        self._tokens = tokens
        recovery = self.controller.recovery(step) if self.controller else Recovery()
        if recovery.first:
            self.monitor.announce("the run came back to a checkpoint")
        if recovery.reset:
            self._begin_anew()
        return recovery

    def looks_beside(self, step: int) -> bool:
        """Whether attention logits and log Z are looked at before this step."""
        return bool(self._logits_every) and step % self._logits_every == 0

    def beside(self, companions: Mapping[str, Tensor]) -> None:
        """Figures of this step beside Adam's."""
        for name, value in companions.items():
            self.monitor.companion(name, value)

    def judge(self, step: int, loss: float, norm: float, blame: str = "") -> Verdict:
        """Whether a step is taken, once its gradients are there. blame: what is not finite and where, in words."""
        verdict = self.controller.judge(step, loss, norm, blame) if self.controller else Verdict()
        self.monitor.at(step)
        self.monitor.loss(loss)
        if math.isfinite(norm):
            self.monitor.grad_norm(norm)
        return verdict

    def take_records(self) -> list[dict[str, Any]]:
        """The monitor's records since the last call."""
        taken = self._records.copy()
        self._records.clear()
        return taken

    def numbers(self) -> dict[str, Any]:
        """For the manifest; the controller has a state of its own."""
        return {"tokens": self._tokens, "monitor": self.monitor.numbers() | {"actor": None}}

    def restore(self, numbers: dict[str, Any]) -> None:
        """From the manifest."""
        self._tokens = numbers["tokens"]
        self.monitor.restore(numbers["monitor"])

    def _begin_anew(self) -> None:
        for optimizer in self._optimizers.values():
            zero_moments(optimizer, [p for group in optimizer.param_groups for p in group["params"]])
        self.monitor.reset([tensor.name for tensor in self.monitor.tensors])
