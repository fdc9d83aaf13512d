"""Inner products of all pairs of vectors of a sample, forward and backward, a few samples abreast.

Of x, (b, D), and vectors, (b, T, D), the result is x beside the products of every vector with those before it (x the
first), (b, D + F (F - 1) / 2) with F = T + 1, in the order of Naumov et al. 2019 (arXiv 1906.00091, section 2.1.3).
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from puna.recsys.compiled import Team, kernel

LANES = 16
"""Samples abreast: numbers of one vector register."""
_ZERO = np.float32(0)


@kernel
def _load(x: Any, vectors: Any, first: int, count: int, tile: Any) -> None:
    """tile[f, d, lane] = number d of vector f of sample first + lane; lanes beyond `count` are 0."""
    for lane in range(count):
        for d in range(x.shape[1]):
            tile[0, d, lane] = x[first + lane, d]
        for t in range(vectors.shape[1]):
            for d in range(x.shape[1]):
                tile[t + 1, d, lane] = vectors[first + lane, t, d]
    for lane in range(count, LANES):
        for f in range(tile.shape[0]):
            for d in range(tile.shape[1]):
                tile[f, d, lane] = _ZERO


@kernel
def _products(x: Any, vectors: Any, begin: int, end: int, out: Any) -> None:
    num, dim = vectors.shape[1] + 1, x.shape[1]
    tile, total = np.empty((num, dim, LANES), np.float32), np.empty(LANES, np.float32)
    for first in range(begin, end, LANES):
        count = min(LANES, end - first)
        _load(x, vectors, first, count, tile)
        for lane in range(count):
            for d in range(dim):
                out[first + lane, d] = x[first + lane, d]
        place = dim
        for i in range(1, num):
            for j in range(i):
                for lane in range(LANES):
                    total[lane] = tile[i, 0, lane] * tile[j, 0, lane]
                for d in range(1, dim):
                    for lane in range(LANES):
                        total[lane] += tile[i, d, lane] * tile[j, d, lane]
                for lane in range(count):
                    out[first + lane, place] = total[lane]
                place += 1


@kernel
def _gradients(x: Any, vectors: Any, given: Any, begin: int, end: int, x_out: Any, out: Any) -> None:
    num, dim = vectors.shape[1] + 1, x.shape[1]
    tile, change = np.empty((num, dim, LANES), np.float32), np.empty((num, dim, LANES), np.float32)
    weight = np.zeros(LANES, np.float32)
    for first in range(begin, end, LANES):
        count = min(LANES, end - first)
        _load(x, vectors, first, count, tile)
        change[:] = _ZERO
        for lane in range(count):
            for d in range(dim):
                change[0, d, lane] = given[first + lane, d]
        place = dim
        for i in range(1, num):
            for j in range(i):
                for lane in range(count):
                    weight[lane] = given[first + lane, place]
                for d in range(dim):
                    for lane in range(LANES):
                        change[i, d, lane] += weight[lane] * tile[j, d, lane]
                        change[j, d, lane] += weight[lane] * tile[i, d, lane]
                place += 1
        for lane in range(count):
            for d in range(dim):
                x_out[first + lane, d] = change[0, d, lane]
            for t in range(num - 1):
                for d in range(dim):
                    out[first + lane, t, d] = change[t + 1, d, lane]


class Products(torch.autograd.Function):
    """Products.apply(x, vectors, team); float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, vectors: Tensor, team: Team) -> Tensor:
        x, vectors = x.detach().contiguous(), vectors.detach().contiguous()
        ctx.save_for_backward(x, vectors)
        ctx.team = team
        num = vectors.shape[1] + 1
        out = torch.empty(len(x), x.shape[1] + num * (num - 1) // 2)
        arrays = x.numpy(), vectors.numpy(), out.numpy()
        team(lambda begin, end: _products(arrays[0], arrays[1], begin, end, arrays[2]), len(x))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, vectors = ctx.saved_tensors
        x_out, out = torch.empty_like(x), torch.empty_like(vectors)
        arrays = x.numpy(), vectors.numpy(), gradient.contiguous().numpy(), x_out.numpy(), out.numpy()
        team, (a, b, g, dx, dv) = ctx.team, arrays
        team(lambda begin, end: _gradients(a, b, g, begin, end, dx, dv), len(x))
        return x_out, out, None
