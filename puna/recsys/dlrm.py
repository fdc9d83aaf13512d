"""The dense part of a recommendation model: bottom network, interaction, top network (Naumov et al. 2019, arXiv
1906.00091; cross layers: Wang et al. 2021, DCN-v2, arXiv 2008.13535)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from puna.recsys.compiled import Team
from puna.recsys.config import DlrmConfig
from puna.recsys.interaction import Products


class Dlrm(nn.Module):
    """bottom(dense) -> (b, D); top(x, vectors) -> (b,) logits. Tables are not in it."""

    def __init__(self, config: DlrmConfig, num_dense: int, num_tables: int, team: Team | None = None) -> None:
        """num_dense: 0 has the bottom network learn one vector for all samples."""
        super().__init__()
        self.config, self.team, self.num_dense = config, team or Team(), num_dense
        self.dtype = torch.bfloat16 if config.dtype == "bf16" else torch.float32
        flat = config.dim * (num_tables + 1)
        self.bottom_net = network([max(num_dense, 1), *config.bottom, config.dim], last=True)
        self.cross = nn.ModuleList()
        if config.interaction == "cross":
            self.cross.extend(Cross(flat, min(config.cross_rank, flat)) for _ in range(config.cross_layers))
        pairs = num_tables * (num_tables + 1) // 2
        width = config.dim + pairs if config.interaction == "dot" else flat
        self.top_net = network([width, *config.top, 1], last=False)

    def bottom(self, dense: Tensor) -> Tensor:
        """(b, dense features) -> (b, D), float32."""
        inputs = dense if self.num_dense else dense.new_ones(len(dense), 1)
        with self._autocast():
            return self.bottom_net(inputs).float()

    def top(self, x: Tensor, vectors: Tensor) -> Tensor:
        """(b, D) of `bottom` and (b, T, D) of the tables -> (b,) logits, float32."""
        if self.config.interaction == "dot":
            joined = Products.apply(x, vectors, self.team)
        else:
            joined = torch.cat([x, vectors.flatten(1)], dim=1)
        with self._autocast():
            crossed = joined
            for layer in self.cross:
                crossed = layer(joined, crossed)
            return self.top_net(crossed).float().squeeze(1)

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16)


class Cross(nn.Module):
    """x' = x0 * (W V x + b) + x, W V of low rank (DCN-v2, equation 2)."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width)
        for layer in (self.down, self.up):
            nn.init.xavier_normal_(layer.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, first: Tensor, x: Tensor) -> Tensor:
        """(b, width) each."""
        return first * self.up(self.down(x)) + x


def network(widths: Sequence[int], *, last: bool) -> nn.Sequential:
    """Linear layers with ReLU between them, and after the last one where `last`; initialised as in the reference."""
    layers: list[nn.Module] = []
    for n, (inputs, outputs) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        linear = nn.Linear(inputs, outputs)
        nn.init.normal_(linear.weight, std=math.sqrt(2 / (inputs + outputs)))
        nn.init.normal_(linear.bias, std=math.sqrt(1 / outputs))
        layers.append(linear)
        if last or n < len(widths) - 2:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)
