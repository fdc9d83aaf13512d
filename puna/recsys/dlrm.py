"""The dense part of a recommendation model: bottom network, interaction, top network (Naumov et al. 2019, arXiv
1906.00091; cross layers: Wang et al. 2021, DCN-v2, arXiv 2008.13535)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from puna.recsys.config import DlrmConfig
from puna.recsys.interaction import products, products_back
from puna.recsys.network import Network, Run


@dataclass(frozen=True)
class Top:
    """What the model did above the bottom network: what `back_top` wants to know."""

    vectors: Tensor
    crossed: list[tuple[Tensor, ...]]
    run: Run


class Dlrm(nn.Module):
    """Bottom network, interaction and top network, forward and backward by hand; no operator has a graph.

    Tables are not in it: their vectors, (b, 1 + T, D) of `vector_dtype`, come with the first place free, for what the
    bottom network gives.
    """

    def __init__(self, config: DlrmConfig, num_dense: int, num_tables: int) -> None:
        """num_dense: 0 has the bottom network learn one vector for all samples."""
        super().__init__()
        self.config, self.num_dense = config, num_dense
        self.dtype = torch.bfloat16 if config.dtype == "bf16" else torch.float32
        self.vector_dtype = self.dtype if config.interaction == "dot" else torch.float32
        flat = config.dim * (num_tables + 1)
        self.bottom_net = self._network([max(num_dense, 1), *config.bottom, config.dim], last=True)
        self.cross = nn.ModuleList()
        if config.interaction == "cross":
            self.cross.extend(Cross(flat, min(config.cross_rank, flat)) for _ in range(config.cross_layers))
        pairs = num_tables * (num_tables + 1) // 2
        width = config.dim + pairs if config.interaction == "dot" else flat
        self.top_net = self._network([width, *config.top, 1], last=False)

    def bottom(self, dense: Tensor) -> tuple[Tensor, Run]:
        """(b, dense features) -> (b, D), float32."""
        return self.bottom_net.run(dense if self.num_dense else dense.new_ones(len(dense), 1))

    def top(self, x: Tensor, vectors: Tensor) -> tuple[Tensor, Top]:
        """(b, D) of `bottom`, which is put before the vectors of the tables, and those -> (b,) logits, float32."""
        vectors[:, 0] = x
        crossed: list[tuple[Tensor, ...]] = []
        if self.config.interaction == "dot":
            features = products(vectors)
        else:
            first = features = vectors.flatten(1)
            for layer in self._cross():
                features, kept = layer.run(first, features, self.dtype)
                crossed.append(kept)
        logits, run = self.top_net.run(features)
        return logits.squeeze(1), Top(vectors, crossed, run)

    def back_top(self, top: Top, gradient: Tensor, out: Tensor) -> list[Tensor]:
        """Gradients of the parameters from that of the logits; those of the vectors, the first too, to `out`."""
        change, found = self.top_net.back(top.run, gradient[:, None], inward=True)
        if self.config.interaction == "dot":
            products_back(top.vectors, change, out)
            return found
        first = top.vectors.flatten(1)
        change = change[:, : first.shape[1]].float()
        total = torch.zeros_like(change)
        for layer, kept in reversed(list(zip(self._cross(), top.crossed, strict=True))):
            given, change, own = layer.back(first, kept, change)
            total += given
            found = [*own, *found]
        out.copy_((total + change).view_as(out))
        return found

    def back_bottom(self, run: Run, gradient: Tensor) -> list[Tensor]:
        """Gradients of the parameters from that of what `bottom` gave."""
        return self.bottom_net.back(run, gradient)[1]

    def _cross(self) -> list["Cross"]:
        return [layer for layer in self.cross if isinstance(layer, Cross)]

    def _network(self, widths: Sequence[int], *, last: bool) -> Network:
        return Network(widths, last=last, dtype=self.dtype)


class Cross(nn.Module):
    """x' = x0 * (W V x + b) + x, W V of low rank (DCN-v2, equation 2)."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width)
        for layer in (self.down, self.up):
            nn.init.xavier_normal_(layer.weight)
        nn.init.zeros_(self.up.bias)

    def run(self, first: Tensor, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(b, width) each, float32; products are of numbers in `dtype`."""
        down, up, bias = (p.detach().to(dtype) for p in (self.down.weight, self.up.weight, self.up.bias))
        x_low = x.to(dtype)
        inner = torch.mm(x_low, down.t())
        outer = torch.addmm(bias, inner, up.t())
        return first * outer + x, (x_low, inner, outer, down, up)

    def back(
        self, first: Tensor, kept: tuple[Tensor, ...], gradient: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Gradients of first, of x, and of the parameters, in order."""
        x_low, inner, outer, down, up = kept
        outward = (gradient * first).to(outer.dtype)
        inward = torch.mm(outward, up)
        own = torch.mm(inward.t(), x_low).float(), torch.mm(outward.t(), inner).float(), outward.sum(0).float()
        return gradient * outer, gradient + torch.mm(inward, down), own
