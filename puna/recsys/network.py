"""Networks of linear layers with ReLU, forward and backward by hand: few passes over memory, widths that products like.

A width that is no multiple of 16 is padded with zeros inside: products of 367 numbers take half as long again as those
of 368. In bf16, products are of bf16 numbers; weights, their gradients and what comes out are float32.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from puna.sparse.compiled import exact_kernel, kernel
from puna.sparse.padding import padded
from puna.sparse.threads import Team

_ZERO = np.float32(0)


class Network(nn.Module):
    """(b, widths[0], or padded with zeros) -> (b, widths[-1]), float32; ReLU between layers, and at the end if `last`.

    Initialised as the reference DLRM is.
    """

    def __init__(self, widths: Sequence[int], *, last: bool, dtype: torch.dtype, team: Team) -> None:
        super().__init__()
        self.last, self.dtype, self.team = last, dtype, team
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        for layer in self._linear():
            outputs, inputs = layer.weight.shape
            nn.init.normal_(layer.weight, std=math.sqrt(2 / (inputs + outputs)))
            nn.init.normal_(layer.bias, std=math.sqrt(1 / outputs))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        parameters = [p for layer in self._linear() for p in (layer.weight, layer.bias)]
        return _Layers.apply(x, self.last, self.dtype, self.team, *parameters)

    def _linear(self) -> list[nn.Linear]:
        return [layer for layer in self.layers if isinstance(layer, nn.Linear)]


class _Layers(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, last: bool, dtype: torch.dtype, team: Team, *parameters: Tensor) -> Tensor:
        weights = [_wide(weight.detach(), dtype, rows=True) for weight in parameters[::2]]
        values = [_wide(x.detach(), dtype)]
        for n, (weight, bias) in enumerate(zip(weights, parameters[1::2], strict=True)):
            wide = _wide(bias.detach()[None], dtype)[0]
            values.append(_apply(values[-1], weight, wide, last or n < len(weights) - 1, team))
        ctx.save_for_backward(*values, *weights)
        ctx.dtype = x.dtype
        ctx.rest = last, team, x.shape[1], [tuple(p.shape) for p in parameters[::2]]
        return values[-1][:, : len(parameters[-1])].float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        last, team, width, shapes = ctx.rest
        values, weights = ctx.saved_tensors[: len(shapes) + 1], ctx.saved_tensors[len(shapes) + 1 :]
        found: list[Tensor | None] = []
        change = _wide(gradient, values[0].dtype)
        if change.data_ptr() == gradient.data_ptr():
            change = change.clone()
        for n in reversed(range(len(shapes))):
            outputs, inputs = shapes[n]
            bias = _mask(change, values[n + 1], last or n < len(shapes) - 1, team)
            weight = torch.mm(change.t(), values[n])
            found = [weight[:outputs, :inputs].float(), bias[:outputs], *found]
            if n or ctx.needs_input_grad[0]:
                change = torch.mm(change, weights[n])
        given = change[:, :width].to(ctx.dtype) if ctx.needs_input_grad[0] else None
        return given, None, None, None, *found


def _wide(x: Tensor, dtype: torch.dtype, *, rows: bool = False) -> Tensor:
    """The matrix in this dtype, contiguous, its columns (and rows, if asked) padded with zeros; itself where it is."""
    shape = padded(x.shape[0]) if rows else x.shape[0], padded(x.shape[1])
    if shape == x.shape and x.dtype == dtype and x.is_contiguous():
        return x
    out = x.new_empty(shape, dtype=dtype) if shape == x.shape else x.new_zeros(shape, dtype=dtype)
    out[: x.shape[0], : x.shape[1]] = x
    return out


def _apply(x: Tensor, weight: Tensor, bias: Tensor, relu: bool, team: Team) -> Tensor:
    """x weight^T + bias, then ReLU."""
    if x.dtype != torch.float32:
        out = torch.addmm(bias, x, weight.t())
        return out.relu_() if relu else out
    out = torch.mm(x, weight.t())
    array, numbers = out.numpy(), bias.numpy()
    team(lambda begin, end: _add_bias(array, numbers, relu, begin, end), len(array))
    return out


def _mask(change: Tensor, value: Tensor, relu: bool, team: Team) -> Tensor:
    """change = 0 where ReLU let nothing through, in place; its sums over samples, float32."""
    if change.dtype != torch.float32:
        if relu:
            torch.ops.aten.threshold_backward.grad_input(change, value, 0, grad_input=change)
        return change.sum(0).float()
    sums = torch.zeros(team.size, change.shape[1])
    arrays, total = (change.numpy(), value.numpy()), sums.numpy()
    cuts = [len(change) * n // team.size for n in range(team.size + 1)]

    def act(first: int, last: int) -> None:
        for n in range(first, last):
            _mask_rows(*arrays, relu, cuts[n], cuts[n + 1], total[n])

    team(act, team.size)
    return sums.sum(0)


@exact_kernel
def _add_bias(out: Any, bias: Any, relu: bool, begin: int, end: int) -> None:
    for b in range(begin, end):
        if relu:
            for c in range(out.shape[1]):
                value = out[b, c] + bias[c]
                out[b, c] = _ZERO if value < _ZERO else value
        else:
            for c in range(out.shape[1]):
                out[b, c] += bias[c]


@kernel
def _mask_rows(change: Any, value: Any, relu: bool, begin: int, end: int, sums: Any) -> None:
    for b in range(begin, end):
        for c in range(change.shape[1]):
            kept = change[b, c] if value[b, c] > _ZERO or not relu else _ZERO
            change[b, c] = kept
            sums[c] += kept
