"""The health monitor under Hugging Face's Trainer. Needs transformers and accelerate."""

from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from puna.console import err
from puna.train.config import HealthConfig
from puna.train.health import HealthMonitor

STATE_FILE = "puna_health.pt"  # in each of the Trainer's checkpoints


class HealthCallback(TrainerCallback):
    """Watches a Trainer's optimiser and writes FOLDER/events.jsonl, which `puna health FOLDER` reads.

        trainer.add_callback(HealthCallback(trainer, "health"))

    With `HealthConfig(act=True)` it also adjusts single tensors, skips a bad batch (its gradients become None, so that
    neither weights nor moments change), and where a roll-back is due it stops the training without taking the step and
    says which checkpoint to go on from: `stopped` is then that sentence. The monitor's state lies in the Trainer's
    checkpoints and is restored from there.

    trainer: where the loss of each optimiser step is taken from (what its `training_step` returns, summed over the
    micro-batches).
    """

    def __init__(self, trainer: Trainer, folder: Path | str, config: HealthConfig | None = None) -> None:
        self.trainer, self.folder, self.config = trainer, Path(folder), config or HealthConfig()
        self.monitor: HealthMonitor | None = None
        self.stopped = ""
        self._losses: list[Tensor] = []
        self._norm: Tensor | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The optimiser is there: begin, or go on from the checkpoint that the Trainer resumed from."""
        self._release()
        optimizer, self.stopped = kwargs["optimizer"], ""
        inner = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
        self.monitor = HealthMonitor(inner, kwargs["model"], self.config, folder=self.folder)
        kept = Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE_FILE
        if state.global_step and kept.is_file():
            self.monitor.load_state_dict(torch.load(kept, weights_only=True))
        self.monitor.at(state.global_step + 1)
        self._watch_losses()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gradients are whole and clipped, and no weight has changed."""
        assert self.monitor is not None
        loss = torch.stack(self._losses).sum()
        self._losses.clear()
        self.monitor.loss(loss)
        if self.monitor.actor is not None:
            self._act(args, state, control, kwargs["model"], float(loss))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the monitor's state beside the Trainer's own."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.monitor is not None and state.is_world_process_zero and folder.is_dir():
            aside = folder / f".{STATE_FILE}.tmp"
            torch.save(self.monitor.state_dict(), aside)
            aside.replace(folder / STATE_FILE)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The last record, and the Trainer as it was."""
        self._release()

    def _watch_losses(self) -> None:
        training_step = self.trainer.training_step

        def watched(*args: Any, **kwargs: Any) -> Tensor:
            loss = training_step(*args, **kwargs)
            self._losses.append(loss.detach())
            if self.config.act and self.trainer.accelerator.sync_gradients:
                self._norm = _norm(self.trainer.model)
            return loss

        self.trainer.training_step = watched  # type: ignore[method-assign]

    def _release(self) -> None:
        if self.monitor is not None:
            self.monitor.close()
            self.monitor = None
            del self.trainer.training_step  # the class's own is seen again
            self._losses.clear()

    def _act(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, loss: float
    ) -> None:
        assert self.monitor is not None
        assert self._norm is not None
        verdict = self.monitor.actor.judge(state.global_step + 1, loss, float(self._norm))
        self.monitor.emit(verdict.records)
        if verdict.kind == "go":
            return
        for parameter in model.parameters():
            parameter.grad = None
        if verdict.kind == "skip":
            return
        control.should_training_stop = True
        self.stopped = _sentence(verdict.reason, Path(args.output_dir), verdict.onset - self.config.margin)
        if state.is_world_process_zero:
            err.print(self.stopped, markup=False, soft_wrap=True)


def _norm(model: nn.Module) -> Tensor:
    """Global norm of the gradients before the Trainer clips them."""
    norm = get_total_norm([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _sentence(reason: str, output: Path, target: int) -> str:
    """Why training stopped and which checkpoint to go on from: the newest at or before the step `target`."""
    saved = {int(path.name.rpartition("-")[2]): path for path in output.glob("checkpoint-*") if path.is_dir()}
    older = [step for step in saved if step <= target]
    if older:
        place = f'trainer.train(resume_from_checkpoint="{saved[max(older)]}"), with the batches that follow it left out'
    else:
        place = f"an earlier state: there is no checkpoint at or before step {max(target, 0)} in {output}"
    return f"Training stopped before the step: {reason.rstrip('.')}. Go on from {place}."
