"""The attention seam: a mask is described here, and a back end for it chosen once a forward."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, queries (B, L, H, head_dim), keys (B, L, K, head_dim), values) -> (B, L, H, head_dim)."""


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
        """The back end for rows of `length` tokens.

        On a CPU one causal call a document beats one call with an explicit mask at every size tried. Forward and
        backward of 4,096 tokens, 8 heads on 4 of width 64, fp32, one core of a Zen 3, CPU milliseconds, explicit mask
        and by document: 512 tokens a row 240 and 118 (4 documents a row), 236 and 63 (10); 1,024: 491 and 178, 449 and
        116; 2,048: 982 and 276, 1,016 and 161.
        """
        if self.documents is not None and self.causal and self.prefix is None and device.type == "cpu":
            return by_document(segment_lengths(self.documents))
        if self.documents is None and self.prefix is None:
            causal = self.causal
            return lambda layer, query, key, value: sdpa(query, key, value, causal=causal)
        seen = self.visible(torch.arange(length, device=device)[None], length)
        return lambda layer, query, key, value: sdpa(query, key, value, seen=seen)


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


def by_document(lengths: list[int]) -> Attend:
    """One causal call a document: nothing is computed for pairs of different documents."""

    @torch.compiler.disable
    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        pieces = (tensor.flatten(0, 1).split(lengths) for tensor in (query, key, value))
        mixed = [sdpa(q[None], k[None], v[None], causal=True)[0] for q, k, v in zip(*pieces, strict=True)]
        return torch.cat(mixed).view(query.shape)

    return attend
