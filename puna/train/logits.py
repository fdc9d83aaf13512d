"""Companions of the health monitor: how large attention logits can be, and log Z of the output, on few tokens now and
then. Forward hooks; nothing is computed in the other steps.

Runs whose largest attention logit passed 1e4 all diverged, and z-loss bounds log Z (Wortsman et al. 2023,
"Small-scale proxies for large-scale Transformer training instabilities").
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from puna.train import mesh
from puna.train.health import HealthMonitor
from puna.train.phase import during

NUM_TOKENS = 256  # of a forward that are looked at
NORMED, PROJECTED = ("q_norm", "k_norm"), ("q_proj", "k_proj")


class LogitWatch:
    """Tells a monitor "max_logit" and "z" every `every` steps, in a loop of one's own that compiles nothing.

    Attention: see `watch_pairs`. head: the module that makes the output's logits (..., vocabulary), if it is called as
    one; of it the mean log Z.
    """

    def __init__(
        self, monitor: HealthMonitor, model: nn.Module, head_dim: int, *, head: nn.Module | None = None, every: int = 20
    ) -> None:
        self.monitor, self.every = monitor, every
        self._step, self._largest = 0, torch.zeros(())
        self._handles = watch_pairs(model, head_dim, self._tell, self._due)
        if head:
            self._handles.append(head.register_forward_hook(self._on_output))

    def close(self) -> None:
        """Take the hooks out."""
        for handle in self._handles:
            handle.remove()

    def _on_output(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if self._due():
            self.monitor.companion("z", _log_z(output))

    def _due(self) -> bool:
        return torch.is_grad_enabled() and (self.monitor.step + 1) % self.every == 0

    def _tell(self, value: Tensor) -> None:
        """The largest of all layers and micro-batches of the step."""
        if self._step != self.monitor.step:
            self._step, self._largest = self.monitor.step, value
        self._largest = torch.maximum(self._largest, value)
        self.monitor.companion("max_logit", self._largest)


def measured(model: nn.Module, head_dim: int, tokens: Tensor) -> dict[str, Tensor]:
    """The figures "max_logit" and "z" of a forward of its own, model(tokens) -> logits (..., vocabulary), no graph.

    Over the ranks, which all call it, the largest and the mean; scalars on the device, which is not waited for. What is
    compiled must not run as such: hooks are new to it (`torch.compiler.set_stance("force_eager")`).
    """
    found: list[Tensor] = []
    handles = watch_pairs(model, head_dim, found.append)
    try:
        with torch.no_grad():
            z = _log_z(model(tokens))
    finally:
        for handle in handles:
            handle.remove()
    largest = torch.stack(found).max()
    if dist.is_initialized():
        with during("collective"):
            dist.all_reduce(largest, dist.ReduceOp.MAX)
            dist.all_reduce(z)
    return {"max_logit": largest, "z": z / mesh.world_size()}


def watch_pairs(
    model: nn.Module, head_dim: int, tell: Callable[[Tensor], None], due: Callable[[], bool] = lambda: True
) -> list[RemovableHandle]:
    """Hooks on every module with children q_proj and k_proj (or q_norm and k_norm, which then count), whose outputs are
    (B, L, heads * head_dim) or (B, L, heads, head_dim).

    Where a forward is due, `tell` gets of each the largest product of norms of any query and any key of a head over
    sqrt(head_dim), a scalar: a bound on its logits that rotary positions do not change.
    """
    handles = []
    for module in model.modules():
        children = dict(module.named_children())
        pair = next((pair for pair in (NORMED, PROJECTED) if children.keys() >= {*pair}), None)
        if pair:
            handles += _watch_pair(children[pair[0]], children[pair[1]], head_dim, tell, due)
    return handles


def _watch_pair(
    query: nn.Module, key: nn.Module, head_dim: int, tell: Callable[[Tensor], None], due: Callable[[], bool]
) -> list[RemovableHandle]:
    norms: list[Tensor] = []

    def on_query(module: nn.Module, inputs: Any, output: Tensor) -> None:
        norms[:] = [_norms(output, head_dim)] if due() else []

    def on_key(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if norms and due():
            queries, keys = norms.pop(), _norms(output, head_dim)
            keys = keys.repeat_interleave(len(queries) // len(keys))
            tell((queries * keys).max() / math.sqrt(head_dim))

    return [query.register_forward_hook(on_query), key.register_forward_hook(on_key)]


@torch.no_grad()
def _norms(output: Tensor, head_dim: int) -> Tensor:
    """Largest norm by head, (heads,)."""
    heads = output.unflatten(-1, (-1, head_dim)) if output.ndim == 3 else output
    return _few(heads.flatten(0, -3)).float().norm(dim=-1).amax(0)


@torch.no_grad()
def _log_z(logits: Tensor) -> Tensor:
    return _few(logits.flatten(0, -2)).float().logsumexp(-1).mean()


def _few(rows: Tensor) -> Tensor:
    """At most NUM_TOKENS rows, spread evenly."""
    return rows[:: max(1, math.ceil(len(rows) / NUM_TOKENS))]
