"""Gradient clipping that knows what is usual: ZClip on the global norm, SPAM's on every coordinate. Usable alone.

```python
zclip = ZClip()  # a plain loop: after backward, before optimizer.step()
norm = zclip(model.parameters())

spam = SpamClip(optimizer)  # through step hooks: nothing else changes
```
"""

import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from puna.train.levers import zero_moments
from puna.train.sharding import local
from puna.train.trend import TINY, Trend


class ZClip:
    """Clips a global gradient norm that is unusually large (Kumar, Owen, Chowdhury, Güra 2025, "ZClip").

    z = (norm - mean) / deviation, both of an exponential average; above `threshold` the norm is brought down to
    mean + threshold * deviation * (threshold / z), and it is that value which enters the average.
    """

    def __init__(self, threshold: float = 2.5, alpha: float = 0.97, warmup: int = 25) -> None:
        self.threshold, self.trend = threshold, Trend(alpha, warmup)

    def limit(self, norm: float) -> float:
        """Largest norm that a step of this norm may have, infinity where it is usual; the norm enters the average."""
        if not math.isfinite(norm):
            return math.inf
        z, most = self.trend.z(norm), math.inf
        if z > self.threshold:
            most = self.trend.mean + self.threshold * self.trend.deviation * self.threshold / z
        self.trend.add(min(norm, most))
        return most

    def __call__(self, parameters: Iterable[nn.Parameter], max_norm: float = math.inf) -> float:
        """Scale the gradients in place, to `max_norm` at most; their global norm before it. Waits for the device."""
        grads = [p.grad for p in parameters if p.grad is not None]
        total = nn.utils.get_total_norm(grads)
        norm = float(total.full_tensor() if isinstance(total, DTensor) else total)
        factor = min(self.limit(norm), max_norm) / (norm + TINY)
        if factor < 1.0:
            torch._foreach_mul_([local(grad) for grad in grads], factor)
        return norm

    def state(self) -> dict[str, Any]:
        """For the manifest."""
        return asdict(self.trend)

    def restore(self, state: dict[str, Any]) -> None:
        """From the manifest."""
        self.trend = Trend(**state)


class SpamClip:
    """Clips coordinates, and begins Adam's moments anew by the clock (Huang et al. 2025, "SPAM"), around torch's Adams.

    Where g^2 > threshold * v, g becomes sign(g) * sqrt(threshold * v), with Adam's own v, not corrected for bias.
    Every `interval` steps moments and step counters are zeroed, and the rate rises from 1 % along a cosine over
    `rewarm` steps. There is no clipping in the first `pause` steps and in those after a reset, nor where v is zero: a
    row that never saw a gradient would never see one.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        threshold: float = 5000.0,
        interval: int = 500,
        rewarm: int = 150,
        pause: int = 20,
    ) -> None:
        self.threshold, self.interval, self.rewarm, self.pause = threshold, interval, rewarm, pause
        self.steps = 0
        self._rates: list[tuple[dict[str, Any], Any]] = []  # groups, and the rates that they have between steps
        before, after = optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)
        self._handles = [before, after]

    @property
    def rate(self) -> float:
        """Factor of the learning rate in the step that comes."""
        since = self.steps % self.interval
        if self.steps < self.interval or since >= self.rewarm:
            return 1.0
        return 1 - 0.99 * 0.5 * (1 + math.cos(math.pi * since / self.rewarm))

    def state(self) -> dict[str, Any]:
        """For the manifest."""
        return {"steps": self.steps}

    def restore(self, state: dict[str, Any]) -> None:
        """From the manifest."""
        self.steps = state["steps"]

    def close(self) -> None:
        """Leave the optimiser alone."""
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stepped = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        since = self.steps % self.interval
        if self.steps and since == 0:
            zero_moments(optimizer, stepped)
        if since >= self.pause:
            self._clip(optimizer, stepped)
        self._rates = [(group, group["lr"]) for group in optimizer.param_groups]
        for group, rate in self._rates:
            group["lr"] = rate * self.rate

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for group, rate in self._rates:
            group["lr"] = rate
        self.steps += 1

    def _clip(self, optimizer: Optimizer, stepped: Iterable[nn.Parameter]) -> None:
        for p in stepped:
            if "exp_avg_sq" not in optimizer.state[p]:
                continue
            assert p.grad is not None
            grad, v = local(p.grad), local(optimizer.state[p]["exp_avg_sq"])
            most = torch.where(v > 0, v.mul(self.threshold).sqrt(), math.inf).to(grad.dtype)
            grad.copy_(grad.clamp(-most, most))
