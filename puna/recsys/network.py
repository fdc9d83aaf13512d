"""Networks of linear layers with ReLU, forward and backward by hand: few passes over memory, widths that products like.

A width that is no multiple of 16 is padded with zeros inside: products of 367 numbers take half as long again as those
of 368. In bf16, products are of bf16 numbers; weights, their gradients and what comes out are float32.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from puna.sparse.compiled import exact_kernel
from puna.sparse.padding import padded
from puna.sparse.rows import BLOCK, array_of, mask_block

_ZERO = np.float32(0)
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
_SLOPE = 1e-30
"""oneDNN's ReLU makes 0 of NaN, its leaky ReLU does not; what this slope lets through is lost in any sum in bf16."""


@dataclass(frozen=True)
class Run:
    """What a network did with some samples, in its dtype, widths padded."""

    values: list[Tensor]  # what went into the first layer, and what came out of each
    weights: list[Tensor]


class Network(nn.Module):
    """(b, widths[0], or padded with zeros) -> (b, widths[-1]), float32; ReLU between layers, and at the end if `last`.

    Initialised as the reference DLRM is. Gradients come from `back`: nothing here has a graph.
    """

    def __init__(self, widths: Sequence[int], *, last: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.last, self.dtype = last, dtype
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        for layer in self._linear():
            outputs, inputs = layer.weight.shape
            nn.init.normal_(layer.weight, std=math.sqrt(2 / (inputs + outputs)))
            nn.init.normal_(layer.bias, std=math.sqrt(1 / outputs))

    def run(self, x: Tensor) -> tuple[Tensor, Run]:
        """What comes out, and what `back` wants to know."""
        weights, values = [], [_wide(x, self.dtype)]
        for n, layer in enumerate(self._linear()):
            weights.append(_wide(layer.weight.detach(), self.dtype, rows=True))
            bias = _wide(layer.bias.detach()[None], self.dtype)[0]
            values.append(_apply(values[-1], weights[-1], bias, self._has_relu(n)))
        return values[-1][:, : layer.out_features].float(), Run(values, weights)

    def back(self, run: Run, gradient: Tensor, *, inward: bool = False) -> tuple[Tensor, list[Tensor]]:
        """Gradients of what went in (padded, in the networks' dtype; only if `inward`), of the parameters in order."""
        found: list[Tensor] = []
        change = _wide(gradient, self.dtype)
        if change.data_ptr() == gradient.data_ptr():
            change = change.clone()
        for n, layer in reversed(list(enumerate(self._linear()))):
            bias = _mask(change, run.values[n + 1], self._has_relu(n))
            weight = torch.mm(change.t(), run.values[n])[: layer.out_features, : layer.in_features]
            found = [weight.float().contiguous(), bias[: layer.out_features], *found]
            if n or inward:
                change = torch.mm(change, run.weights[n])
        return change, found

    def _has_relu(self, n: int) -> bool:
        return self.last or n < len(self.layers) - 1

    def _linear(self) -> list[nn.Linear]:
        return [layer for layer in self.layers if isinstance(layer, nn.Linear)]


def _wide(x: Tensor, dtype: torch.dtype, *, rows: bool = False) -> Tensor:
    """The matrix in this dtype, contiguous, its columns (and rows, if asked) padded with zeros; itself where it is."""
    shape = padded(x.shape[0]) if rows else x.shape[0], padded(x.shape[1])
    if shape == x.shape and x.dtype == dtype and x.is_contiguous():
        return x
    out = x.new_empty(shape, dtype=dtype) if shape == x.shape else x.new_zeros(shape, dtype=dtype)
    out[: x.shape[0], : x.shape[1]] = x
    return out


def _apply(x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    """x weight^T + bias, then ReLU."""
    if x.dtype != torch.float32:
        if relu and _HAS_ONEDNN:
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "leaky_relu", [_SLOPE], "")
        out = torch.addmm(bias, x, weight.t())
        return out.relu_() if relu else out
    out = torch.mm(x, weight.t())
    _add_bias(out.numpy(), bias.numpy(), relu)
    return out


def _mask(change: Tensor, value: Tensor, relu: bool) -> Tensor:
    """change = 0 where ReLU let nothing through, in place; its sums over samples, float32."""
    if not relu:
        return change.float().sum(0)
    sums = torch.zeros(change.shape[1])
    _mask_rows(array_of(change.view(-1)), array_of(value.view(-1)), sums.numpy())
    return sums


@exact_kernel
def _add_bias(out: Any, bias: Any, relu: bool) -> None:
    for b in range(out.shape[0]):
        if relu:
            for c in range(out.shape[1]):
                value = out[b, c] + bias[c]
                out[b, c] = _ZERO if value < _ZERO else value
        else:
            for c in range(out.shape[1]):
                out[b, c] += bias[c]


@exact_kernel
def _mask_rows(change: Any, value: Any, sums: Any) -> None:
    for b in range(0, change.shape[0], sums.shape[0]):
        for c in range(0, sums.shape[0], BLOCK):
            mask_block(change, b + c, value, b + c, sums, c)  # type: ignore[call-arg]
