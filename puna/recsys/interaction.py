"""Inner products of all pairs of vectors of a sample, forward and backward, in the networks' dtype.

Of x, (b, D), and vectors, (b, T, D), the result is x beside the products of every vector with those before it (x the
first), D + F (F - 1) / 2 with F = T + 1, in the order of Naumov et al. 2019 (arXiv 1906.00091, section 2.1.3), and
zeros up to a multiple of 16.
"""

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from puna.sparse.compiled import exact_kernel
from puna.sparse.padding import padded
from puna.sparse.threads import Team


@exact_kernel
def _pick(source: Any, places: Any, first: int, begin: int, end: int, out: Any) -> None:
    """out[b, first + k] = source[b, places[k]]."""
    for b in range(begin, end):
        for k in range(places.shape[0]):
            out[b, first + k] = source[b, places[k]]


@cache
def _places(num: int) -> tuple[Any, Any]:
    """Where what is below the diagonal of a matrix (num, num), row by row, stands in it; and the other way about, for
    a symmetric one: which of those each of its numbers is, and anything on the diagonal."""
    rows, cols = np.tril_indices(num, -1)
    back = np.zeros((num, num), np.int64)
    back[rows, cols] = back[cols, rows] = np.arange(len(rows))
    return rows * num + cols, back.reshape(-1)


class Products(torch.autograd.Function):
    """Products.apply(x, vectors, dtype, team); float32 in, `dtype` out, which is also what is multiplied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, vectors: Tensor, dtype: torch.dtype, team: Team) -> Tensor:
        size, tables, dim = vectors.shape
        stacked = torch.empty(size, tables + 1, dim, dtype=dtype)
        stacked[:, 0], stacked[:, 1:] = x.detach(), vectors.detach()
        ctx.save_for_backward(stacked)
        ctx.team = team
        out = torch.zeros(size, padded(dim + tables * (tables + 1) // 2), dtype=dtype)
        out[:, :dim] = stacked[:, 0]
        products, found = _bits(torch.bmm(stacked, stacked.transpose(1, 2)).flatten(1)), _bits(out)
        team(lambda begin, end: _pick(products, _places(tables + 1)[0], dim, begin, end, found), size)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        (stacked,) = ctx.saved_tensors
        size, num, dim = stacked.shape
        pairs = torch.empty(size, num * num, dtype=stacked.dtype)
        given, found = _bits(gradient[:, dim:]), _bits(pairs)
        ctx.team(lambda begin, end: _pick(given, _places(num)[1], 0, begin, end, found), size)
        pairs[:, :: num + 1] = 0
        change = torch.bmm(pairs.view(size, num, num), stacked)
        return change[:, 0].float() + gradient[:, :dim], change[:, 1:].float(), None, None


def _bits(x: Tensor) -> Any:
    """The tensor as kernels take it: itself, but bfloat16, which NumPy has not, as int16."""
    return x.view(torch.int16).numpy() if x.dtype == torch.bfloat16 else x.numpy()
