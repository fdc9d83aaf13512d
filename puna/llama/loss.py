"""Cross-entropy of a language model in which the matrix of logits is never whole."""

from typing import Any

import torch
from torch import Tensor

IGNORED = -100
CHUNK_BYTES = 1 << 26
MIN_CHUNK = 512
"""Tokens below which adding to the weight's gradient would cost more than the products themselves."""
PIECE_BYTES = 1 << 23
"""Of the float32 logits that softmax works on at a time on a CPU: in its caches, and in memory that is not new."""


def token_loss_sum(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum over tokens of -log softmax(hidden weight^T)[target], a float32 scalar (float64 for float64 inputs).

    hidden (..., D), weight (V, D), targets (...) with -100 where a token does not count. The logits exist for one chunk
    of tokens at a time, `CHUNK_BYTES` of float32 or `MIN_CHUNK` tokens; their gradients are taken in the same pass, so
    that nothing is kept and nothing computed twice.
    """
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    counted = targets != IGNORED
    if not counted.all():
        hidden, targets = hidden[counted], targets[counted]
    return _TokenLossSum.apply(hidden, weight, targets, torch.is_grad_enabled())


class _TokenLossSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, with_gradients: bool) -> Tensor:
        need_hidden, need_weight = (with_gradients and need for need in ctx.needs_input_grad[:2])
        exact = torch.promote_types(hidden.dtype, torch.float32)
        chunk = max(MIN_CHUNK, CHUNK_BYTES // (weight.shape[0] * exact.itemsize))
        total = torch.zeros((), dtype=exact, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if need_weight else None
        buffer = hidden.new_empty(min(chunk, len(targets)), weight.shape[0])
        for start in range(0, len(targets), chunk):
            span = slice(start, start + chunk)
            logits = buffer[: len(targets[span])]
            torch.mm(hidden[span], weight.T, out=logits)
            total += _lose(logits, targets[span, None], need_hidden or need_weight)
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[span])
            if grad_weight is not None:
                add_product(grad_weight, logits.T, hidden[span])
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grad).to(ctx.weight_dtype),
            None,
            None,
        )


def _lose(logits: Tensor, picked: Tensor, with_gradient: bool) -> Tensor:
    """Sum over rows of -log softmax(logits)[picked], in float32; logits (n, V) are used up, or become its gradient."""
    exact = torch.promote_types(logits.dtype, torch.float32)
    if exact == logits.dtype:
        return _lose_exactly(logits, picked, with_gradient)
    num_rows = len(logits)
    if logits.device.type == "cpu":
        num_rows = min(num_rows, max(1, PIECE_BYTES // (logits.shape[1] * exact.itemsize)))
    total = torch.zeros((), dtype=exact, device=logits.device)
    scratch = logits.new_empty(num_rows, logits.shape[1], dtype=exact)
    for piece, chosen in zip(logits.split(num_rows), picked.split(num_rows), strict=True):
        slopes = scratch[: len(piece)].copy_(piece)
        total += _lose_exactly(slopes, chosen, with_gradient)
        if with_gradient:
            piece.copy_(slopes)
    return total


def _lose_exactly(logits: Tensor, picked: Tensor, with_gradient: bool) -> Tensor:
    torch.log_softmax(logits, dim=-1, out=logits)
    total = -logits.gather(1, picked).sum()
    if with_gradient:
        logits.exp_().scatter_add_(1, picked, logits.new_full((), -1).expand_as(picked))
    return total


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in one pass where the dtypes agree."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
