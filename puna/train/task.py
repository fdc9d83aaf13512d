"""What a run does: the contract of a task, and the task that trains modules by gradients."""

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import blake2b
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from puna.errors import DataError, Diverged, NonFinite
from puna.train import mesh
from puna.train.actions import Limits, Recovery, Verdict
from puna.train.clipping import SpamClip, ZClip
from puna.train.config import HealthConfig
from puna.train.controller import Controller
from puna.train.optim import Average, LossScale, local, optimizer_tensors, sharded_over
from puna.train.oversight import Oversight
from puna.train.phase import during
from puna.train.rows import RowStore
from puna.train.sharding import refuse_early


@dataclass(frozen=True)
class Cursor:
    """Where a run stands; all of it is in every manifest."""

    units: int = 0  # units of work done (a unit is a batch for a language model, a bucket for a graph)
    tokens: int = 0  # tokens (or edges, rows) consumed over all ranks
    skipped: int = 0  # tokens of the data that were passed over: batches left out, spans that roll-backs leap

    @property
    def position(self) -> int:
        """Where the next unit begins in the data."""
        return self.tokens + self.skipped

    def after(self, tokens: int, passed: int = 0) -> "Cursor":
        """The cursor one unit later, with `tokens` more consumed and `passed` more passed over."""
        return Cursor(self.units + 1, self.tokens + tokens, self.skipped + passed)


@dataclass(frozen=True)
class Setback:
    """Something that began at step `onset` and that the run is to leave by going back to a checkpoint before it."""

    onset: int
    reason: str


@dataclass(frozen=True)
class StepReport:
    """What one unit of work came to; the same on every rank."""

    loss: float  # mean over the global weight; finite unless there is a setback
    weight: int  # target tokens (rows, edges) over all ranks
    tokens: int  # what the cursor advances by
    metrics: dict[str, float] = field(default_factory=dict)
    passed: int = 0  # tokens of a unit that was left out, which are not consumed but passed over
    records: Sequence[dict[str, Any]] = ()  # of the health monitor, each with its "event"
    setback: Setback | None = None


@dataclass(frozen=True)
class Tensors:
    """State in torch DCP: `get` gives tensors by name, into which a load copies; `set` is then called with them.

    Where they are the live ones, there is nothing to set.
    """

    get: Callable[[], dict[str, Tensor]]
    set: Callable[[dict[str, Tensor]], None] = lambda tensors: None


@dataclass(frozen=True)
class Rows:
    """State in copy-on-write partition files, for tables larger than memory."""

    store: RowStore


@dataclass(frozen=True)
class Json:
    """Small state in the manifest itself; the same on every rank."""

    get: Callable[[], Any]
    set: Callable[[Any], None]


State = dict[str, Tensors | Rows | Json]

ASIDE = frozenset({"health", "health_sample", "controller", "done"})
"""States that are restored where a checkpoint has them in this shape, and that begin anew where it does not."""


class Task(ABC):
    """Work in units, under the one loop. Every rank calls every method at the same time."""

    controller: Controller | None = None  # where there is one, the run may go back to a checkpoint

    @abstractmethod
    def units(self, cursor: Cursor) -> Iterator[Any]:
        """The units from `cursor` to the end of the work, a pure function of the cursor; ends the run by ending."""

    @abstractmethod
    def step(self, unit: Any) -> StepReport:
        """Do one unit. Random numbers have been seeded for it."""

    @abstractmethod
    def state(self) -> State:
        """Everything that a resumed run needs and that is not a function of the cursor, by name."""

    def evaluate(self, split: str) -> dict[str, float]:
        """Figures on a split that is not trained on; none by default."""
        return {}

    def samples(self, unit: Any) -> Sequence[Any]:
        """Names of this rank's samples of a unit, for reports; no other rank's unit may have one of them."""
        return ()

    def describe(self) -> dict[str, Any]:
        """Facts for the start record and the bar; the loop knows `total_tokens` and `flops_per_token`."""
        return {}


class Batch(Protocol):
    """A micro-batch of one rank."""

    @property
    def weight(self) -> int: ...  # target tokens: what the loss sum is a sum over
    @property
    def ids(self) -> Sequence[Any]: ...  # names of the samples, for error reports


class GradientUnit(Protocol):
    """One optimiser step: where the run stands before it, what all ranks consume, this rank's micro-batches."""

    @property
    def cursor(self) -> Cursor: ...
    @property
    def tokens(self) -> int: ...
    @property
    def batches(self) -> Sequence[Any]: ...  # of Batch; as many on every rank, at least one


class OptimizerTask(Task):
    """Trains modules: counts targets over ranks and micro-batches first, accumulates, votes on finiteness, steps.

    `modules` and `optimizers` are named; a name is also that of the state in a checkpoint (optimisers: "optim.NAME").
    Parameters are float32 (or float64) so that gradients accumulate in it; lower precision is the model's affair
    (autocast, or FSDP2's MixedPrecisionPolicy with reduce_dtype float32). Modules may be FSDP2 modules; gradients of
    plain ones are averaged over the ranks. A module without gradients in a step (another phase) is not stepped.

    learning_rate: multiplier of every group's own rate, from consumed tokens; asked at the middle of the step.
    clip: global norm above which gradients are scaled down, 0: none. zclip, spam: rules that know what is usual.
    averages: whether weights are averaged after a step that ends at these tokens.
    health: how the optimisers are watched, and whether a controller acts; None: not at all. limits: the controller's,
    else those that `health` comes to.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        optimizers: Mapping[str, Optimizer],
        *,
        learning_rate: Callable[[float], float] = lambda tokens: 1.0,
        clip: float = 0.0,
        zclip: ZClip | None = None,
        spam: SpamClip | None = None,
        loss_scale: LossScale | None = None,
        average: Average | None = None,
        averages: Callable[[int], bool] = lambda tokens: True,
        health: HealthConfig | None = None,
        limits: Limits | None = None,
    ) -> None:
        refuse_early(modules, optimizers)
        self.modules, self.optimizers = dict(modules), dict(optimizers)
        self.learning_rate, self.clip, self.zclip, self.spam = learning_rate, clip, zclip, spam
        self.loss_scale, self.average, self.averages = loss_scale, average, averages
        self._names = {p: f"{m}.{n}" for m, module in modules.items() for n, p in module.named_parameters()}
        groups = [group for optimizer in optimizers.values() for group in optimizer.param_groups]
        self._groups = [(group, group["lr"], group.get("betas")) for group in groups]
        self._parameters = [p for group in groups for p in group["params"] if p.requires_grad]
        self._shares = {p: math.sqrt(sharded_over(p) / mesh.world_size()) for p in self._parameters}
        for parameter in self._parameters:
            if parameter.dtype not in (torch.float32, torch.float64):
                raise TypeError(
                    f"{self._names[parameter]} is {parameter.dtype}; trained parameters are kept in float32"
                )
        self._oversight: Oversight | None = None
        if health and health.enabled:
            self._oversight = Oversight(self.modules, self.optimizers, health, limits)
        self.controller = self._oversight.controller if self._oversight else None

    @abstractmethod
    def differentiate(self, batch: Any, factor: float) -> Tensor:
        """Sum (not mean) of the losses over the batch's `weight` targets, without a graph; adds the gradients of sum x
        factor to the parameters'."""

    def step(self, unit: GradientUnit) -> StepReport:
        """One optimiser step. Raises DataError (no targets), NonFinite (no controller), Diverged (a controller at its
        wits' end); none changes a weight. With a controller, a step that is not finite ends in a setback.
        """
        weight = self._global_weight(unit)
        lr = self._set_learning_rate(unit)
        if self._oversight and self._oversight.looks_beside(unit.cursor.units + 1):
            self._oversight.beside(self.companions(unit))
        scale = self.loss_scale.scale if self.loss_scale else 1.0
        losses = self.accumulate(unit, scale * mesh.world_size() / weight)
        loss_sum, norm = self._vote(losses, scale)
        verdict = self._judge(unit, losses, loss_sum / weight, norm)
        taken = verdict.kind == "go" and self._update(norm, scale, unit.cursor.tokens + unit.tokens)
        self._zero_grad()
        metrics = {"lr": lr} | ({"grad_norm": norm} if math.isfinite(norm) else {})
        metrics |= {} if taken else {"skipped": 1.0}
        if self.loss_scale:
            self.loss_scale.update(math.isfinite(norm))
            metrics["loss_scale"] = scale
        report = StepReport(loss_sum / weight, weight, unit.tokens, metrics)
        return self._overseen(report, verdict, taken) if self._oversight else report

    @during("forward/backward")
    def accumulate(self, unit: GradientUnit, factor: float) -> list[Tensor]:
        """Forward and backward of every micro-batch; gradients of sum x factor, reduced in the last one only.

        FSDP2 and `_average_plain_gradients` average over ranks, hence the number of ranks in the factor.
        """
        losses = []
        for i, batch in enumerate(unit.batches):
            self._reduce_gradients(last=i + 1 == len(unit.batches))
            losses.append(self.differentiate(batch, factor))
        self._average_plain_gradients()
        return losses

    def companions(self, unit: GradientUnit) -> dict[str, Tensor]:
        """Figures beside Adam's that the health monitor knows ("max_logit", "z"), the same on every rank; before the
        forward of a step, now and then."""
        return {}

    def samples(self, unit: GradientUnit) -> list[Any]:
        """The ids of its micro-batches."""
        return _ids(unit.batches)

    def state(self) -> State:
        """Modules, optimisers, and where there are any the loss scale and the averaged weights."""
        state: State = {name: Tensors(partial(module_tensors, m)) for name, m in self.modules.items()}
        for name, optimizer in self.optimizers.items():
            state[f"optim.{name}"] = Tensors(partial(optimizer_tensors, optimizer, self._names))
        if self.loss_scale:
            state["loss_scale"] = Json(self.loss_scale.state, self.loss_scale.restore)
        if self.average:
            state["average"] = Tensors(self.average.tensors)
            state["average.count"] = Json(self.average.state, self.average.restore)
        if self.zclip:
            state["zclip"] = Json(self.zclip.state, self.zclip.restore)
        if self.spam:
            state["spam"] = Json(self.spam.state, self.spam.restore)
        if self._oversight:
            monitor = self._oversight.monitor
            state["health"] = Json(self._oversight.numbers, self._oversight.restore)
            state["health_sample"] = Tensors(monitor.state_tensors, monitor.restore_tensors)
        if self.controller:
            state["controller"] = Json(self.controller.numbers, self.controller.restore)
        return state

    def _global_weight(self, unit: GradientUnit) -> int:
        (weight,) = mesh.agree([sum(batch.weight for batch in unit.batches)])
        if not weight:
            ids = [i for ids in mesh.gather(_ids(unit.batches)) for i in ids]
            raise DataError(
                f"step {unit.cursor.units + 1} has no target token: samples {_few(ids)}",
                "Every token of these samples is masked; check the data or the loss mask.",
            )
        return int(weight)

    def _overseen(self, report: StepReport, verdict: Verdict, taken: bool) -> StepReport:
        """The report with what monitor and controller have to tell; a batch that was left out is passed over."""
        assert self._oversight
        records = [*verdict.records, *self._oversight.take_records()]
        if verdict.kind == "roll_back":
            return replace(report, records=records, setback=Setback(verdict.onset, verdict.reason))
        if self.controller and not taken and "grad_norm" in report.metrics:
            return replace(report, records=records, tokens=0, passed=report.tokens)
        return replace(report, records=records)

    def _set_learning_rate(self, unit: GradientUnit) -> float:
        recovery = self._oversight.begin(unit.cursor.units + 1, unit.tokens) if self._oversight else Recovery()
        multiplier = self.learning_rate(unit.cursor.tokens + unit.tokens / 2) * recovery.rate
        for group, peak, betas in self._groups:
            group["lr"] = peak * multiplier
            if betas:
                group["betas"] = (betas[0], min(betas[1], recovery.beta2))
        return self._groups[0][0]["lr"]

    def _reduce_gradients(self, last: bool) -> None:
        for module in self.modules.values():
            if isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(last)
                module.set_is_last_backward(last)

    @during("collective")
    def _average_plain_gradients(self) -> None:
        plain = [p.grad for p in self._parameters if p.grad is not None and not isinstance(p, DTensor)]
        if mesh.world_size() == 1 or not plain:
            return
        flat = torch.cat([grad.reshape(-1) for grad in plain])
        dist.all_reduce(flat)
        flat /= mesh.world_size()
        for grad, piece in zip(plain, flat.split([grad.numel() for grad in plain]), strict=True):
            grad.copy_(piece.view_as(grad))

    @during("collective")
    @torch.no_grad()
    def _vote(self, losses: list[Tensor], scale: float) -> tuple[float, float]:
        """Loss sum over ranks and global gradient norm, by one all-reduce; not finite if one rank's are not."""
        trained = [p for p in self._parameters if p.grad is not None]
        norms = torch._foreach_norm([local(p.grad) for p in trained])
        shares = [self._shares[p] for p in trained]
        squares = torch.stack(torch._foreach_mul(norms, shares)).double().square().sum()
        totals = torch.stack([torch.stack(losses).double().sum(), squares])
        if dist.is_initialized():
            dist.all_reduce(totals)
        loss_sum, square = totals.tolist()
        return loss_sum, math.sqrt(square) / scale if square >= 0 else math.nan

    def _judge(self, unit: GradientUnit, losses: list[Tensor], loss: float, norm: float) -> Verdict:
        """Whether the step is taken. With a loss scale a gradient that is not finite is an overflow, and it is not."""
        finite = math.isfinite(loss) and math.isfinite(norm)
        if not finite and math.isfinite(loss) and self.loss_scale and self.loss_scale.can_fall:
            return Verdict("skip")
        if not finite and not self.controller:
            raise NonFinite(self._blame(unit, losses))
        if not self._oversight:
            return Verdict()
        verdict = self._oversight.judge(unit.cursor.units + 1, loss, norm, "" if finite else self._blame(unit, losses))
        if verdict.kind == "stop":
            raise Diverged(f"step {unit.cursor.units + 1}: {verdict.reason}; two returns to a checkpoint did not help")
        return verdict

    def _blame(self, unit: GradientUnit, losses: list[Tensor]) -> str:
        bad = [batch for batch, loss in zip(unit.batches, losses, strict=True) if not loss.isfinite()]
        tensors = (p for p in self._parameters if p.grad is not None and not local(p.grad).isfinite().all())
        name = next((f"the gradient of {self._names[p]}" for p in tensors), None)
        reports = mesh.gather((bool(bad), "the loss" if bad else name, _ids(bad or unit.batches)))
        any_loss = any(loss for loss, _, _ in reports)
        told = [(r, what, ids) for r, (loss, what, ids) in enumerate(reports) if (loss if any_loss else what)]
        where = "; ".join(f"rank {r}: {what}, samples {_few(ids)}" for r, what, ids in told)
        return f"step {unit.cursor.units + 1} is not finite and was not taken; no weight changed. {where}"

    @during("optimizer")
    @torch.no_grad()
    def _update(self, norm: float, scale: float, tokens: int) -> bool:
        """Clip and step; whether weights changed."""
        most = min(self.clip or math.inf, self.zclip.limit(norm) if self.zclip else math.inf)
        factor = min(1.0, most / (norm + 1e-6)) / scale
        if factor != 1.0:
            torch._foreach_mul_([local(p.grad) for p in self._parameters if p.grad is not None], factor)
        for optimizer in self.optimizers.values():
            optimizer.step()
        taken = not (self.controller and self.controller.skipped)
        if taken and self.average and self.averages(tokens):
            self.average.update()
        return taken

    def _zero_grad(self) -> None:
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()


class GradientTask(OptimizerTask):
    """An OptimizerTask whose gradients are autograd's, of `loss_sum`."""

    @abstractmethod
    def loss_sum(self, batch: Any) -> Tensor:
        """Sum (not mean) of the losses over the batch's `weight` targets, a scalar with a graph."""

    def differentiate(self, batch: Any, factor: float) -> Tensor:
        """By going backward through the graph of the loss."""
        loss = self.loss_sum(batch)
        (loss * factor).backward()
        return loss.detach()


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters (a tied one once) and persistent buffers by name: what a checkpoint holds of a module."""
    kept = module.state_dict(keep_vars=True)
    tensors = {name: p.detach() for name, p in module.named_parameters()}
    return tensors | {name: buffer for name, buffer in module.named_buffers() if name in kept}


def seed_step(seed: int, unit_index: int, rank: int) -> None:
    """Seed torch, NumPy and random as a function of (seed, unit, rank), so that no generator's state needs saving."""
    digest = blake2b(f"{seed}/{unit_index}/{rank}".encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "little") >> 1
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_available():
        torch.cuda.manual_seed(number)
    np.random.seed(number & 0xFFFFFFFF)
    random.seed(number)


def _ids(batches: Sequence[Batch]) -> list[Any]:
    return [i for batch in batches for i in batch.ids]


def _few(ids: list[Any], limit: int = 8) -> str:
    return ", ".join(map(str, ids[:limit])) + (f" and {len(ids) - limit} more" if len(ids) > limit else "")
