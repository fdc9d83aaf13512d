"""Optimisers, their parameter groups, the loss scale of fp16, averaged weights."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from puna.train.config import TrainConfig
from puna.train.sharding import local, sharded_over
from puna.train.stable_adamw import StableAdamW

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def make_optimizers(
    module: nn.Module,
    train: TrainConfig,
    *,
    is_block_matrix: Callable[[str, Tensor], bool] = lambda name, p: p.ndim == 2,
    muon_dtype: torch.dtype = torch.float32,
) -> dict[str, Optimizer]:
    """The recipe's optimisers, by name; make them after sharding.

    `is_block_matrix(name, parameter)` picks what Muon takes; the rest goes to AdamW. muon_dtype: dtype of its products.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if train.optimizer == "adamw":
        return {"adamw": adamw((p for _, p in named), train)}
    if train.optimizer == "stable_adamw":
        groups = decay_groups((p for _, p in named), train)
        return {"stable_adamw": StableAdamW(groups, lr=train.lr, betas=train.betas, eps=train.eps)}
    matrices = [p for name, p in named if is_block_matrix(name, p)]
    rest = [p for name, p in named if not is_block_matrix(name, p)]
    muon = Muon(matrices, lr=train.muon_lr, weight_decay=train.weight_decay, dtype=muon_dtype)
    return {"muon": muon, "adamw": adamw(rest, train)}


def adamw(parameters: Iterable[nn.Parameter], train: TrainConfig) -> AdamW:
    """Fused AdamW; matrices decay, gains and other 1-D parameters do not."""
    return AdamW(decay_groups(parameters, train), lr=train.lr, betas=train.betas, eps=train.eps, fused=True)


def decay_groups(parameters: Iterable[nn.Parameter], train: TrainConfig) -> list[dict[str, Any]]:
    """Parameter groups: matrices, which decay, and 1-D parameters, which do not."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class Muon(Optimizer):
    """Nesterov momentum made orthogonal by a Newton-Schulz iteration (Jordan et al. 2024, "Muon"), decoupled decay.

    A sharded matrix is orthogonalised whole: matrices are dealt out over the shard ranks, which collect theirs by one
    all-to-all and send the pieces back by a second one. So the step equals the single-process one.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype
        for group in self.param_groups:
            if bad := [tuple(p.shape) for p in group["params"] if p.ndim != 2]:
                raise ValueError(f"Muon takes matrices, not shapes {bad}")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            updates = [self._momentum(p, group["momentum"]) for p in trained]
            for p, update in zip(trained, self._orthogonal(trained, updates), strict=True):
                rate = group["lr"] * math.sqrt(max(1.0, p.shape[0] / p.shape[1]))
                local(p).mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)

    def _momentum(self, p: nn.Parameter, momentum: float) -> Tensor:
        """Nesterov momentum of this rank's rows."""
        assert p.grad is not None
        state, grad = self.state[p], p.grad
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        buffer = local(state["momentum_buffer"]).mul_(momentum).add_(local(grad))
        return local(grad).add(buffer, alpha=momentum)

    def _orthogonal(self, parameters: list[nn.Parameter], updates: list[Tensor]) -> list[Tensor]:
        if not parameters or not isinstance(parameters[0], DTensor) or sharded_over(parameters[0]) == 1:
            return [orthogonalize(update, self.dtype) for update in updates]
        group = parameters[0].device_mesh.get_group(parameters[0].device_mesh.ndim - 1)
        return _orthogonal_dealt(parameters, updates, group, self.dtype)


def _orthogonal_dealt(
    parameters: list[nn.Parameter], updates: list[Tensor], group: dist.ProcessGroup, dtype: torch.dtype
) -> list[Tensor]:
    """Every rank of the shard group collects its share of the matrices, orthogonalises them, sends the rows back."""
    me, size = dist.get_rank(group), dist.get_world_size(group)
    deals = [list(range(rank, len(parameters), size)) for rank in range(size)]
    rows = {i: _shard_rows(parameters[i].shape[0], size) for i in deals[me]}
    sent = [sum(updates[i].numel() for i in deal) for deal in deals]
    received = [sum(rows[i][rank] * parameters[i].shape[1] for i in deals[me]) for rank in range(size)]
    pieces = updates[0].new_empty(sum(received))
    outgoing = torch.cat([updates[i].reshape(-1) for deal in deals for i in deal])
    dist.all_to_all_single(pieces, outgoing, received, sent, group=group)
    by_rank = [
        part.split([rows[i][rank] * parameters[i].shape[1] for i in deals[me]])
        for rank, part in enumerate(pieces.split(received))
    ]
    whole = [
        orthogonalize(torch.cat(parts).view(parameters[i].shape), dtype)
        for i, parts in zip(deals[me], zip(*by_rank, strict=True), strict=True)
    ]
    cut = [matrix.split(rows[i]) for i, matrix in zip(deals[me], whole, strict=True)]
    back = torch.cat([matrix[rank].reshape(-1) for rank in range(size) for matrix in cut]) if cut else pieces
    returned = torch.empty_like(outgoing)
    dist.all_to_all_single(returned, back, sent, received, group=group)
    order = [i for deal in deals for i in deal]
    parts = dict(zip(order, returned.split([updates[i].numel() for i in order]), strict=True))
    return [parts[i].view_as(update) for i, update in enumerate(updates)]


def _shard_rows(rows: int, ranks: int) -> list[int]:
    """Rows that each rank holds of a tensor sharded on dim 0: ceiling split, the last ranks smaller or empty."""
    piece = -(-rows // ranks)
    return [max(0, min(piece, rows - r * piece)) for r in range(ranks)]


def orthogonalize(matrix: Tensor, dtype: torch.dtype = torch.float32, num_steps: int = 5) -> Tensor:
    """Near-orthogonal factor of a (rows, columns) matrix: quintic Newton-Schulz, singular values about 0.7 to 1.2."""
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).to(dtype)
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(num_steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype)


def optimizer_tensors(optimizer: Optimizer, names: Mapping[nn.Parameter, str]) -> dict[str, Tensor]:
    """Live state tensors as "PARAMETER.KEY", made where no step has made them. Settings are the recipe's, not state."""
    make_state(optimizer)
    return {
        f"{names[p]}.{key}": tensor
        for group in optimizer.param_groups
        for p in group["params"]
        for key, tensor in optimizer.state.get(p, {}).items()
    }


def make_state(optimizer: Optimizer) -> None:
    """State as before the first step: a step of zero gradients at rate 0 where there is none, then zeroed."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    fresh = [p for p in parameters if p.requires_grad and not optimizer.state.get(p)]
    if not fresh:
        return
    grads = [p.grad for p in parameters]
    rates = [group["lr"] for group in optimizer.param_groups]
    optimizer.zero_grad()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for p in fresh:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p in fresh:
        for tensor in optimizer.state[p].values():
            tensor.zero_()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for p, grad in zip(parameters, grads, strict=True):
        p.grad = grad


class LossScale:
    """The factor that keeps fp16 gradients above underflow (Micikevicius et al. 2018, §3.2).

    Halved at an overflow, which skips the step on all ranks (they vote on the global norm); doubled after `interval`
    steps without one.
    """

    def __init__(self, scale: float = 2.0**16, interval: int = 2000) -> None:
        self.scale, self.interval, self.good_steps = scale, interval, 0

    @property
    def can_fall(self) -> bool:
        """False once the scale is 1: then a gradient that is not finite is no overflow but an error."""
        return self.scale > 1.0

    def update(self, finite: bool) -> None:
        """After a step, with whether its gradients were finite."""
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.scale /= 2
        elif self.good_steps == self.interval:
            self.scale, self.good_steps = self.scale * 2, 0

    def state(self) -> dict[str, Any]:
        """For the manifest."""
        return {"scale": self.scale, "good_steps": self.good_steps}

    def restore(self, state: dict[str, Any]) -> None:
        """From the manifest."""
        self.scale, self.good_steps = state["scale"], state["good_steps"]


class Average:
    """Averaged weights kept beside the trained ones: "mean" of the steps so far, or "ema" with `decay` per step.

    The first update copies the weights. Make it after sharding.
    """

    def __init__(self, modules: Mapping[str, nn.Module], kind: Literal["ema", "mean"], decay: float = 0.99) -> None:
        self.kind, self.decay, self.count = kind, decay, 0
        self._live = {f"{m}.{n}": p for m, module in modules.items() for n, p in module.named_parameters()}
        self._average = {name: p.detach().clone() for name, p in self._live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are after a step."""
        self.count += 1
        weight = 1 / self.count if self.kind == "mean" or self.count == 1 else 1 - self.decay
        torch._foreach_lerp_(*self._pairs(), weight)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the modules hold the averaged weights (if there are any yet); afterwards the trained ones again."""
        if not self.count:
            yield
            return
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def tensors(self) -> dict[str, Tensor]:
        """Averaged tensors by "MODULE.PARAMETER"."""
        return self._average

    def state(self) -> dict[str, Any]:
        """For the manifest."""
        return {"count": self.count}

    def restore(self, state: dict[str, Any]) -> None:
        """From the manifest."""
        self.count = state["count"]

    @torch.no_grad()
    def _swap(self) -> None:
        for average, live in zip(*self._pairs(), strict=True):
            kept = live.clone()
            live.copy_(average)
            average.copy_(kept)

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        return [local(t) for t in self._average.values()], [local(p) for p in self._live.values()]
