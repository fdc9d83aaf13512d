"""The dense part of a recommendation model: bottom network, interaction, top network (Naumov et al. 2019, arXiv
1906.00091; cross layers: Wang et al. 2021, DCN-v2, arXiv 2008.13535)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from puna.recsys.config import DlrmConfig
from puna.recsys.interaction import Products
from puna.recsys.network import Network
from puna.sparse.threads import Team


class Dlrm(nn.Module):
    """bottom(dense) -> (b, D); top(x, vectors) -> (b,) logits. Tables are not in it."""

    def __init__(self, config: DlrmConfig, num_dense: int, num_tables: int, team: Team | None = None) -> None:
        """num_dense: 0 has the bottom network learn one vector for all samples."""
        super().__init__()
        self.config, self.team, self.num_dense = config, team or Team(), num_dense
        self.dtype = torch.bfloat16 if config.dtype == "bf16" else torch.float32
        flat = config.dim * (num_tables + 1)
        self.bottom_net = self._network([max(num_dense, 1), *config.bottom, config.dim], last=True)
        self.cross = nn.ModuleList()
        if config.interaction == "cross":
            self.cross.extend(Cross(flat, min(config.cross_rank, flat)) for _ in range(config.cross_layers))
        pairs = num_tables * (num_tables + 1) // 2
        width = config.dim + pairs if config.interaction == "dot" else flat
        self.top_net = self._network([width, *config.top, 1], last=False)

    def bottom(self, dense: Tensor) -> Tensor:
        """(b, dense features) -> (b, D), float32."""
        inputs = dense if self.num_dense else dense.new_ones(len(dense), 1)
        return self.bottom_net(inputs)

    def top(self, x: Tensor, vectors: Tensor) -> Tensor:
        """(b, D) of `bottom` and (b, T, D) of the tables -> (b,) logits, float32."""
        if self.config.interaction == "dot":
            return self.top_net(Products.apply(x, vectors, self.dtype, self.team)).squeeze(1)
        joined = crossed = torch.cat([x, vectors.flatten(1)], dim=1)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            for layer in self.cross:
                crossed = layer(joined, crossed)
        return self.top_net(crossed.float()).squeeze(1)

    def _network(self, widths: Sequence[int], *, last: bool) -> Network:
        return Network(widths, last=last, dtype=self.dtype, team=self.team)


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
