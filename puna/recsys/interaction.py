"""Inner products of all pairs of vectors of a sample, forward and backward, in the networks' dtype.

The result is the first vector of a sample beside the products of every vector with those before it, D + F (F - 1) / 2
of F vectors, in the order of Naumov et al. 2019 (arXiv 1906.00091, section 2.1.3), and zeros up to a multiple of 16.
"""

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from puna.sparse.compiled import exact_kernel
from puna.sparse.padding import padded
from puna.sparse.rows import BLOCK, array_of, copy_block


def products(vectors: Tensor) -> Tensor:
    """(b, F, D) -> (b, D + F (F - 1) / 2 and zeros)."""
    size, num, dim = vectors.shape
    out = vectors.new_empty(size, padded(dim + num * (num - 1) // 2))
    out[:, :dim] = vectors[:, 0]
    square = torch.bmm(vectors, vectors.transpose(1, 2))
    _pack(array_of(square.view(-1)), num, dim, out.shape[1], array_of(out.view(-1)))
    return out


def products_back(vectors: Tensor, gradient: Tensor, out: Tensor) -> None:
    """The gradient of `products` to that of the vectors, all contiguous and of one dtype."""
    size, num, dim = vectors.shape
    square = vectors.new_empty(size, num, num)
    _unpack(array_of(gradient.view(-1)), _mirrored(num), num, dim, gradient.shape[1], array_of(square.view(-1)))
    torch.bmm(square, vectors, out=out)
    out[:, 0] += gradient[:, :dim]


@exact_kernel
def _pack(square: Any, num: int, first: int, width: int, out: Any) -> None:
    """Of (b, num, num) what is below the diagonal, row by row, to out (b, width) from `first` on, zeros after it."""
    for b in range(out.shape[0] // width):
        start, at, end = b * num * num, b * width + first, (b + 1) * width
        for i in range(1, num):
            _copy(square, start + i * num, start + num * num, i, out, at, end)
            at += i
        for c in range(at, end):
            out[c] = 0


@cache
def _mirrored(num: int) -> Any:
    """Where what is below the diagonal of (num, num), row by row, stands above it. Unsigned, which kernels like better:
    a signed place might count from the end."""
    rows, columns = np.tril_indices(num, -1)
    return (columns * num + rows).astype(np.uint32)


@exact_kernel
def _unpack(packed: Any, mirrored: Any, num: int, first: int, width: int, square: Any) -> None:
    """The other way about: a symmetric (b, num, num) with zeros on the diagonal."""
    for b in range(packed.shape[0] // width):
        start, at, end = b * num * num, b * width + first, (b + 1) * width
        own, given = square[start : start + num * num], packed[at:end]
        for i in range(1, num):
            _copy(packed, at, end, i, square, start + i * num, start + num * num)
            at += i
        for k in range(mirrored.shape[0]):
            own[mirrored[k]] = given[k]
        for i in range(num):
            own[i * num + i] = 0


@exact_kernel
def _copy(source: Any, start: int, stop: int, count: int, target: Any, at: int, end: int) -> None:
    """So many numbers; whole blocks where both sides go on that long before stop and end, though it overwrites."""
    c = 0
    while c < count:
        if start + c + BLOCK <= stop and at + c + BLOCK <= end:
            copy_block(target, at + c, source, start + c)
            c += BLOCK
        else:
            target[at + c] = source[start + c]
            c += 1
