"""The health monitor under Hugging Face's Trainer. Needs transformers and accelerate."""

from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from puna.console import err
from puna.train.actions import Recovery, Verdict
from puna.train.config import HealthConfig
from puna.train.controller import Controller
from puna.train.health import HealthMonitor
from puna.train.levers import zero_moments

STATE_FILE = "puna_health.pt"  # in each of the Trainer's checkpoints


class HealthCallback(TrainerCallback):
    """Watches a Trainer's optimiser and writes FOLDER/events.jsonl, which `puna health FOLDER` reads.

        trainer.add_callback(HealthCallback(trainer, "health"))

    With `HealthConfig(act=True)` it also adjusts single tensors, skips a bad batch (its gradients become None, so that
    neither weights nor moments change), and where a roll-back is due it stops the training without taking the step and
    says which checkpoint to go on from: `stopped` is then that sentence. The monitor's state lies in the Trainer's
    checkpoints and is restored from there; after a roll-back the run goes on slower, as in Puna's own loop.

    trainer: where the loss of each optimiser step is taken from (what its `training_step` returns, summed over the
    micro-batches).
    """

    def __init__(self, trainer: Trainer, folder: Path | str, config: HealthConfig | None = None) -> None:
        self.trainer, self.folder, self.config = trainer, Path(folder), config or HealthConfig()
        self.monitor: HealthMonitor | None = None
        self.controller = Controller(self.config) if self.config.act else None
        self.stopped = ""
        self._losses: list[Tensor] = []
        self._norm: Tensor | None = None
        self._settings: list[dict[str, Any]] = []  # of the parameter groups, where a step has others

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The optimiser is there: begin, or go on from the checkpoint that the Trainer resumed from."""
        self._release()
        self.stopped = ""
        optimizer = _inner(kwargs["optimizer"])
        self.monitor = HealthMonitor(optimizer, kwargs["model"], self.config, folder=self.folder, actor=self.controller)
        kept = _checkpoint(args, state.global_step) / STATE_FILE
        if state.global_step and kept.is_file():
            self.monitor.load_state_dict(torch.load(kept, weights_only=True))
        self.monitor.at(state.global_step + 1)
        self._watch_losses()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gradients are whole and clipped, and no weight has changed."""
        assert self.monitor is not None
        loss = self.trainer.accelerator.reduce(torch.stack(self._losses).sum(), reduction="mean")
        self._losses.clear()
        self.monitor.loss(loss)
        if self.controller is None or self._norm is None:
            return
        step = state.global_step + 1
        self._recover(self.controller.recovery(step), _inner(kwargs["optimizer"]))
        verdict = self.controller.judge(step, float(loss), float(self._norm))
        self.monitor.emit(verdict.records)
        if verdict.kind != "go":
            for parameter in kwargs["model"].parameters():
                parameter.grad = None
        if verdict.kind in ("roll_back", "stop"):
            self._stop(args, state, control, verdict)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The settings that were of this step alone are put back before a scheduler sees them."""
        for group, kept in zip(_inner(kwargs["optimizer"]).param_groups, self._settings, strict=False):
            group.update(kept)
        self._settings.clear()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the monitor's state beside the Trainer's own."""
        if self.monitor is not None:
            kept = self.monitor.state_dict()
            if state.is_world_process_zero:
                _save(kept, _checkpoint(args, state.global_step) / STATE_FILE)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The last record, and the Trainer as it was."""
        self._release()

    def _watch_losses(self) -> None:
        training_step = self.trainer.training_step

        def watched(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
            loss = training_step(model, *args, **kwargs)
            self._losses.append(loss.detach())
            if self.controller is not None and self.trainer.accelerator.sync_gradients:
                self._norm = _norm(model)
            return loss

        self.trainer.training_step = watched  # type: ignore[method-assign]

    def _release(self) -> None:
        if self.monitor is not None:
            self.monitor.close()
            self.monitor = None
            del self.trainer.training_step  # the class's own is seen again
            self._losses.clear()

    def _recover(self, recovery: Recovery, optimizer: Optimizer) -> None:
        """What a roll-back leaves behind for this step."""
        assert self.monitor is not None
        if recovery.first:
            self.monitor.announce("the run came back to a checkpoint")
        if recovery.reset:
            zero_moments(optimizer, [p for group in optimizer.param_groups for p in group["params"]])
            self.monitor.reset([tensor.name for tensor in self.monitor.tensors])
        self._settings = [{"lr": group["lr"], "betas": group["betas"]} for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            beta1, beta2 = group["betas"]
            group["lr"] *= recovery.rate
            group["betas"] = (beta1, beta2 if recovery.beta2 is None else min(beta2, recovery.beta2))

    def _stop(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, verdict: Verdict) -> None:
        """End the training; the checkpoint to go on from is told that the run comes back to it."""
        assert self.controller is not None
        control.should_training_stop = True
        now = state.global_step + 1
        saved = [int(path.name.rpartition("-")[2]) for path in _checkpoint(args, 0).parent.glob("checkpoint-*")]
        target = self.controller.target(saved, verdict.onset, now) if verdict.kind == "roll_back" else None
        self.stopped = f"Training stopped before step {now}: {verdict.reason.rstrip('.')}."
        if target is not None:
            folder = _checkpoint(args, target.step)
            self.stopped += (
                f' Go on with trainer.train(resume_from_checkpoint="{folder}"); with '
                "TrainingArguments(ignore_data_skip=True) other batches follow than those that led here."
            )
            kept = folder / STATE_FILE
            if state.is_world_process_zero and kept.is_file():
                known = torch.load(kept, weights_only=True)
                numbers = known["numbers"]
                numbers["actor"] = self.controller.returned(numbers["actor"], target.step, verdict.onset, now)
                _save(known, kept)
        elif verdict.kind == "roll_back":
            self.stopped += f" There is no checkpoint in {args.output_dir} from before the trouble began."
        if state.is_world_process_zero:
            err.print(self.stopped, markup=False, soft_wrap=True)


def _inner(optimizer: Optimizer) -> Optimizer:
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def _checkpoint(args: TrainingArguments, step: int) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{step}"


def _save(kept: dict[str, Any], path: Path) -> None:
    aside = path.with_name(f".{path.name}.tmp")
    torch.save(kept, aside)
    aside.replace(path)


def _norm(model: nn.Module) -> Tensor:
    """Global norm of the gradients before the Trainer clips them."""
    norm = get_total_norm([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
