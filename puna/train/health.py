"""The health monitor: looks at Adam's state before every step, through step hooks, and says when it turns bad."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from puna.train.adam_stats import Watched
from puna.train.config import HealthConfig
from puna.train.detector import Detector, Reading, Status


class Actor(Protocol):
    """What acts on a reading (the controller). Every rank calls it with the same reading."""

    def before_update(self, reading: Reading, tensors: Sequence[Watched]) -> list[dict[str, Any]]:
        """In the pre-step hook, gradients as Adam will see them; may change g, m, v, groups. Returns action records."""

    def after_update(self, tensors: Sequence[Watched]) -> None:
        """In the post-step hook of the same step; may correct weights."""


class HealthMonitor:
    """Watches one or several optimisers of the Adam family; make it after sharding and after the optimisers.

    optimizer: one, or several by name. model: the module, or {name: module}. folder: where events.jsonl goes in a
    drop-in (rank 0 writes). emit: called with each record instead (Puna's loop). actor: acts before and after updates.
    """

    def __init__(
        self,
        optimizer: Optimizer | Mapping[str, Optimizer],
        model: nn.Module | Mapping[str, nn.Module],
        config: HealthConfig = HealthConfig(),
        *,
        folder: Path | str | None = None,
        emit: Callable[[dict[str, Any]], None] | None = None,
        actor: Actor | None = None,
    ) -> None:
        self.config, self.actor = config, actor
        self.detector = Detector(config)
        self.records: deque[dict[str, Any]] = deque(maxlen=256)
        self.reading: Reading | None = None
        self.tensors: list[Watched] = []
        self.step = 0  # the optimiser step that is being taken or was taken last; 1 is the first

    @property
    def status(self) -> Status:
        """The newest verdict."""
        return self.detector.status

    def at(self, step: int) -> None:
        """The number of the step that comes next (else steps of the optimiser are counted)."""
        self.step = step - 1

    def loss(self, value: Tensor | float) -> None:
        """This step's loss, the same on every rank, before optimizer.step(); a tensor is not waited for."""

    def grad_norm(self, value: Tensor | float) -> None:
        """This step's global gradient norm before clipping, where it is known."""

    def companion(self, name: str, value: Tensor | float) -> None:
        """A companion's newest value: "max_logit" (largest attention logit) or "z" (mean log Z of the output)."""

    def announce(self, reason: str) -> None:
        """The rate, the batch or the data are changed on purpose from the next step on."""

    def reset(self, names: Sequence[str]) -> None:
        """The moments of these tensors were zeroed: their ages and running figures begin anew."""

    def numbers(self) -> dict[str, Any]:
        """What the monitor remembers, as JSON: for a manifest."""
        return {"step": self.step, "detector": self.detector.numbers()}

    def restore(self, numbers: dict[str, Any]) -> None:
        """From `numbers`."""
        self.step = numbers["step"]
        self.detector.restore(numbers["detector"])

    def state_tensors(self) -> dict[str, Tensor]:
        """What the monitor remembers as tensors, equal on every rank and for any sharding: for a checkpoint."""
        return {}

    def restore_tensors(self, tensors: dict[str, Tensor]) -> None:
        """From `state_tensors`."""

    def state_dict(self) -> dict[str, Any]:
        """`numbers` and `state_tensors` in one, for torch.save."""
        return {"numbers": self.numbers(), "tensors": self.state_tensors()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From `state_dict`."""
        self.restore(state["numbers"])
        self.restore_tensors(state["tensors"])

    def close(self) -> None:
        """Takes the hooks out and ends the file."""

    @torch.no_grad()
    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.step += 1
