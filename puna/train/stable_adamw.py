"""StableAdamW: AdamW whose update of a tensor is made smaller where its second moment lags behind the gradient."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from puna.train.sharding import local, sharded_over


class StableAdamW(Optimizer):
    """AdamW with update clipping (Wortsman et al. 2023, "Stable and low-precision training", §3.5, algorithm 2).

    The rate of a tensor is divided by max(1, RMS), RMS = sqrt(mean(g^2 / max(v^, eps^2))), v^ with this step's g. The
    mean of a sharded tensor is over all of it: one all-reduce of a number a tensor. Decay is decoupled, at that rate.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every tensor that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            squares = [self._moments(p, group) for p in trained]
            for p, rms in zip(trained, _rms(trained, squares), strict=True):
                self._update(p, group, group["lr"] / rms.clamp(min=1.0))
        return loss

    def _moments(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """Take in the gradient; this rank's sum of g^2 / max(v^, eps^2)."""
        assert p.grad is not None
        grad, state = local(p.grad), self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        local(state["exp_avg"]).lerp_(grad, 1 - beta1)
        v = local(state["exp_avg_sq"]).mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        least = max(group["eps"] ** 2, torch.finfo(v.dtype).tiny)
        return (grad.square() / (v / (1 - beta2 ** state["step"].item())).clamp(min=least)).sum()

    def _update(self, p: Tensor, group: dict[str, Any], rate: Tensor) -> None:
        state, (beta1, beta2) = self.state[p], group["betas"]
        num_steps = state["step"].item()
        root = (local(state["exp_avg_sq"]) / (1 - beta2**num_steps)).sqrt_().add_(group["eps"])
        update = (local(state["exp_avg"]) / (1 - beta1**num_steps)).div_(root)
        local(p).mul_(1 - rate * group["weight_decay"]).sub_(update.mul_(rate))


def _rms(parameters: list[Tensor], squares: list[Tensor]) -> list[Tensor]:
    """Root of the mean over all of each tensor, from the sums over this rank's part of it."""
    sums = [square.double() for square in squares]
    cut = [i for i, p in enumerate(parameters) if isinstance(p, DTensor) and sharded_over(p) > 1]
    if cut:
        first = parameters[cut[0]]
        assert isinstance(first, DTensor)
        totals = torch.stack([sums[i] for i in cut])
        dist.all_reduce(totals, group=first.device_mesh.get_group(first.device_mesh.ndim - 1))
        for i, total in zip(cut, totals, strict=True):
            sums[i] = total
    return [(total / p.numel()).sqrt().to(local(p).dtype) for p, total in zip(parameters, sums, strict=True)]
