"""Companions of the health monitor: how large attention logits can be, and log Z of the output, on few tokens now and
then. Forward hooks; nothing is computed in the other steps.

Runs whose largest attention logit passed 1e4 all diverged, and z-loss bounds log Z (Wortsman et al. 2023,
"Small-scale proxies for large-scale Transformer training instabilities").
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from puna.train.health import HealthMonitor

NUM_TOKENS = 256  # of a forward that are looked at
NORMED, PROJECTED = ("q_norm", "k_norm"), ("q_proj", "k_proj")


class LogitWatch:
    """Tells a monitor "max_logit" and "z" every `every` steps.

    Attention: every module with children q_proj and k_proj (or q_norm and k_norm, which then count), whose outputs are
    (B, L, heads * head_dim) or (B, L, heads, head_dim). What is told is the largest product of norms of any query and
    any key of a head over sqrt(head_dim): a bound on its logits that rotary positions do not change. head: the module
    that makes the output's logits (..., vocabulary), if it is called as one; of it the mean log Z.
    """

    def __init__(
        self, monitor: HealthMonitor, model: nn.Module, head_dim: int, *, head: nn.Module | None = None, every: int = 20
    ) -> None:
        self.monitor, self.head_dim, self.every = monitor, head_dim, every
        self._step, self._largest = 0, torch.zeros(())
        self._handles: list[RemovableHandle] = []
        for module in model.modules():
            children = dict(module.named_children())
            pair = next((pair for pair in (NORMED, PROJECTED) if children.keys() >= {*pair}), None)
            if pair:
                self._watch_pair(children[pair[0]], children[pair[1]])
        if head:
            self._handles.append(head.register_forward_hook(self._on_output))

    def close(self) -> None:
        """Take the hooks out."""
        for handle in self._handles:
            handle.remove()

    def _watch_pair(self, query: nn.Module, key: nn.Module) -> None:
        norms: list[Tensor] = []

        def on_query(module: nn.Module, inputs: Any, output: Tensor) -> None:
            norms[:] = [self._norms(output)] if self._due() else []

        def on_key(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if norms and self._due():
                queries, keys = norms.pop(), self._norms(output)
                keys = keys.repeat_interleave(len(queries) // len(keys))
                self._tell((queries * keys).max() / math.sqrt(self.head_dim))

        self._handles += [query.register_forward_hook(on_query), key.register_forward_hook(on_key)]

    def _on_output(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if self._due():
            with torch.no_grad():
                self.monitor.companion("z", _few(output.flatten(0, -2)).float().logsumexp(-1).mean())

    def _due(self) -> bool:
        return torch.is_grad_enabled() and (self.monitor.step + 1) % self.every == 0

    @torch.no_grad()
    def _norms(self, output: Tensor) -> Tensor:
        """Largest norm by head, (heads,)."""
        heads = output.unflatten(-1, (-1, self.head_dim)) if output.ndim == 3 else output
        return _few(heads.flatten(0, -3)).float().norm(dim=-1).amax(0)

    def _tell(self, value: Tensor) -> None:
        """The largest of all layers and micro-batches of the step."""
        if self._step != self.monitor.step:
            self._step, self._largest = self.monitor.step, value
        self._largest = torch.maximum(self._largest, value)
        self.monitor.companion("max_logit", self._largest)


def _few(rows: Tensor) -> Tensor:
    """At most NUM_TOKENS rows, spread evenly."""
    return rows[:: max(1, math.ceil(len(rows) / NUM_TOKENS))]
