"""The attention seam: a mask is described here, and a back end for it chosen once a forward."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from puna.llama.attention_products import causal_products, document_starts

TILE = 128
SHORT = 1024
"""Tokens of a row of one document up to which products are faster than the flash kernel in float32 too."""
flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A back end: (queries (B, L, H, head_dim), keys (B, L, K, head_dim), values) -> (B, L, H, head_dim)."""


@dataclass(frozen=True, eq=False)
class Mask:
    """Who may look at whom; query q sees key k where every rule given holds.

    causal: k <= q. documents (B, L): integer ids, equal for q and k (Llama 3 §3.2); the tokens of one document stand
    together. prefix (B,): the first tokens of a row also see each other forwards.
    """

    causal: bool = True
    documents: Tensor | None = None
    prefix: Tensor | None = None

    def visible(self, queries: Tensor, num_keys: int) -> Tensor:
        """Boolean (B, 1, L, num_keys) for queries at positions (B or 1, L); key j stands at position j."""
        keys = torch.arange(num_keys, device=queries.device)
        seen = keys <= queries[:, None, :, None] if self.causal else queries.new_ones(1, 1, 1, num_keys).bool()
        if self.prefix is not None:
            both = torch.maximum(queries[:, None, :, None], keys)
            seen = seen | (both < self.prefix[:, None, None, None])
        if self.documents is not None:
            seen = seen & (self.documents[:, None, :, None] == self.documents[:, None, None, :])
        return seen

    def attend(self, length: int, device: torch.device) -> Attend:
        """The back end for rows of `length` tokens: causal ones on a CPU, else SDPA, its mask explicit if need be."""
        if device.type == "cpu" and self.causal and self.prefix is None:
            return on_cpu(self.documents, length)
        if self.documents is None and self.prefix is None:
            causal = self.causal
            return lambda query, key, value: sdpa(query, key, value, causal=causal)
        seen = self.visible(torch.arange(length, device=device)[None], length)
        return lambda query, key, value: sdpa(query, key, value, seen=seen)


def sdpa(query: Tensor, key: Tensor, value: Tensor, *, causal: bool = False, seen: Tensor | None = None) -> Tensor:
    """Attention of queries (B, L, H, head_dim) to keys and values (B, S, K, head_dim); H / K heads share a key head.

    `enable_gqa` and repeated keys take the same time on a CPU (within 5 %); the former needs no copy.
    """
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    mixed = scaled_dot_product_attention(query, key, value, attn_mask=seen, is_causal=causal, enable_gqa=True)
    return mixed.transpose(1, 2)


def segment_lengths(documents: Tensor) -> list[int]:
    """Lengths of the runs of equal ids, row after row."""
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    edges = torch.nonzero(starts.flatten()).flatten()
    return torch.diff(edges, append=edges.new_tensor([documents.numel()])).tolist()


def on_cpu(documents: Tensor | None, length: int) -> Attend:
    """Causal attention on a CPU in rows of `length` tokens, within documents (B, L), by what is fastest there."""
    starts = None if documents is None else document_starts(documents)
    if starts is not None and not starts.any():
        documents = starts = None
    by_flash = by_document(None if documents is None else segment_lengths(documents))
    is_short = starts is None and length <= SHORT

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if is_short or query.dtype == torch.bfloat16:
            return causal_products(query, key, value, starts)
        return by_flash(query, key, value)

    return attend


def by_document(lengths: list[int] | None) -> Attend:
    """Causal attention on a CPU within documents of these lengths, row after row; None: within whole rows.

    Nothing is computed for pairs of different documents.
    """

    @torch.compiler.disable
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if lengths is None:
            return _Causal.apply(query, key, value, [query.shape[1]])
        tokens = (tensor.flatten(0, 1)[None] for tensor in (query, key, value))
        return _Causal.apply(*tokens, lengths).view(query.shape)

    return attend


class _Causal(torch.autograd.Function):
    """Causal attention of (B, L, heads, head_dim) within segments of L, by PyTorch's flash kernels for the CPU.

    The kernel's backward computes whole blocks of 512 keys, masked or not. It is therefore called tile by tile below
    the diagonal: with the output and log-sum-exp of the whole row every tile's gradients are exact and add up.

    Forward and backward of 4,096 tokens, 8 heads on 4 of width 64, fp32, one core of a Zen 3, CPU milliseconds,
    SDPA and this: 512 tokens a row 275 and 213; 1,024: 366 and 315; 2,048: 617 and 579. With documents, SDPA with an
    explicit mask, one SDPA call a document, and this: 512 tokens of 4 documents 299, 135, 128, of 10 documents
    277, 81, 82; 1,024: 548, 218, 198 and 556, 153, 126; 2,048: 1,003, 358, 336 and 1,141, 201, 184.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
        heads_first = [tensor.transpose(1, 2) for tensor in (query, key, value)]
        parts = zip(*(tensor.split(lengths, dim=2) for tensor in heads_first), strict=True)
        pairs = zip(*(flash(*part, 0.0, True) for part in parts), strict=True)
        mixed, sums = (pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2) for pieces in pairs)
        ctx.save_for_backward(*heads_first, mixed, sums)
        ctx.lengths = lengths
        return mixed.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        query, key, value, mixed, sums = ctx.saved_tensors
        grad = grad.transpose(1, 2)
        exact = torch.promote_types(query.dtype, torch.float32)
        totals = [torch.zeros_like(tensor, dtype=exact) for tensor in (query, key, value)]
        for rows, columns in (tile for start, end in spans(ctx.lengths) for tile in tiles(start, end)):
            at_rows = (tensor[:, :, rows] for tensor in (grad, query))
            at_columns = (tensor[:, :, columns] for tensor in (key, value))
            parts = flash_backward(*at_rows, *at_columns, mixed[:, :, rows], sums[:, :, rows], 0.0, rows == columns)
            for total, place, part in zip(totals, (rows, columns, columns), parts, strict=True):
                total[:, :, place] += part
        grad_query, grad_key, grad_value = (total.transpose(1, 2).to(query.dtype) for total in totals)
        return grad_query, grad_key, grad_value, None


def spans(lengths: list[int]) -> list[tuple[int, int]]:
    """First and one-past-last index of segments that follow one another."""
    ends = list(accumulate(lengths))
    return list(zip([0, *ends], ends, strict=False))


def tiles(start: int, end: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of squares that make up the causal triangle of [start, end); the diagonal's are causal."""
    if end - start <= TILE:
        yield slice(start, end), slice(start, end)
        return
    middle = (start + end) // 2
    yield from tiles(start, middle)
    yield slice(middle, end), slice(start, middle)
    yield from tiles(middle, end)
