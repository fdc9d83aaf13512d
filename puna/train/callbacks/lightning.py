"""The health monitor under Lightning. Needs lightning."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer

from puna.train.config import HealthConfig
from puna.train.health import HealthMonitor


class HealthCallback(Callback):
    """Watches the optimisers of a LightningModule and writes FOLDER/events.jsonl, which `puna health FOLDER` reads.

        Trainer(callbacks=[HealthCallback("health")])

    With `HealthConfig(act=True)` it adjusts single tensors; it neither skips batches nor rolls back. The monitor's
    state lies in Lightning's checkpoints.
    """

    def __init__(self, folder: Path | str, config: HealthConfig | None = None) -> None:
        self.folder, self.config = Path(folder), config or HealthConfig()
        self.monitor: HealthMonitor | None = None
        self._losses: list[Tensor] = []
        self._restored: dict[str, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The optimisers are there: begin, or go on from the checkpoint."""
        optimizers = {str(place): optimizer for place, optimizer in enumerate(trainer.optimizers)}
        self.monitor = HealthMonitor(optimizers, pl_module, self.config, folder=self.folder)
        if self._restored is not None:
            self.monitor.load_state_dict(self._restored)
        self.monitor.at(trainer.global_step + 1)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """The loss of a micro-batch, as a share of the step's."""
        self._losses.append(loss.detach())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Gradients are whole."""
        assert self.monitor is not None
        if self._losses:
            self.monitor.loss(torch.stack(self._losses).sum())
            self._losses.clear()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last record."""
        if self.monitor is not None:
            self.monitor.close()

    def state_dict(self) -> dict[str, Any]:
        """For Lightning's checkpoint."""
        return self.monitor.state_dict() if self.monitor is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From Lightning's checkpoint, before the training begins."""
        self._restored = state_dict or None
