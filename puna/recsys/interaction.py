"""Inner products of all pairs of vectors of a sample, forward and backward, without index tensors.

Of x, (b, D), and vectors, (b, T, D), the result is x beside the products of every vector with those before it (x the
first), D + F (F - 1) / 2 with F = T + 1, in the order of Naumov et al. 2019 (arXiv 1906.00091, section 2.1.3), and
zeros up to a multiple of 16.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from puna.recsys.threads import Team
from puna.sparse.compiled import exact_kernel
from puna.sparse.padding import padded

_ZERO = np.float32(0)


@exact_kernel
def _lower(x: Any, products: Any, begin: int, end: int, out: Any) -> None:
    """out[b] = x[b], then what is below the diagonal of products[b], row by row."""
    dim = x.shape[1]
    for b in range(begin, end):
        for d in range(dim):
            out[b, d] = x[b, d]
        place = dim
        for i in range(1, products.shape[1]):
            for j in range(i):
                out[b, place + j] = products[b, i, j]
            place += i


@exact_kernel
def _symmetric(given: Any, dim: int, begin: int, end: int, out: Any) -> None:
    """out[b] = the symmetric matrix, its diagonal 0, of which given[b, dim:] is what is below the diagonal."""
    for b in range(begin, end):
        place = dim
        for i in range(out.shape[1]):
            out[b, i, i] = _ZERO
            for j in range(i):
                out[b, i, j] = given[b, place + j]
            for j in range(i):
                out[b, j, i] = out[b, i, j]
            place += i


class Products(torch.autograd.Function):
    """Products.apply(x, vectors, team); float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, vectors: Tensor, team: Team) -> Tensor:
        (size, tables, dim), x = vectors.shape, x.detach().contiguous()
        stacked = torch.empty(size, tables + 1, dim)
        stacked[:, 0], stacked[:, 1:] = x, vectors.detach()
        ctx.save_for_backward(stacked)
        ctx.team = team
        out = torch.zeros(size, padded(dim + tables * (tables + 1) // 2))
        arrays = x.numpy(), torch.bmm(stacked, stacked.transpose(1, 2)).numpy(), out.numpy()
        team(lambda begin, end: _lower(arrays[0], arrays[1], begin, end, arrays[2]), size)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        (stacked,) = ctx.saved_tensors
        size, num, dim = stacked.shape
        pairs = torch.empty(size, num, num)
        given, matrices = gradient.contiguous().numpy(), pairs.numpy()
        ctx.team(lambda begin, end: _symmetric(given, dim, begin, end, matrices), size)
        change = torch.bmm(pairs, stacked)
        return change[:, 0] + gradient[:, :dim], change[:, 1:], None
