"""Keys and values of earlier tokens, kept for decoding."""

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from puna.llama.attention import Attend, Mask, sdpa
from puna.llama.config import LlamaConfig


class Cache(Protocol):
    """What the model asks of a cache: given where the new tokens stand, a back end a layer that stores and attends."""

    def attend(self, positions: Tensor, mask: Mask) -> Callable[[int], Attend]:
        """Layer -> back end for new tokens at absolute positions (B, L)."""
        ...


class DenseCache:
    """One slot a row and position: keys and values (num_layers, B, max_len, num_kv_heads, head_dim).

    A query sees the keys of its row at positions up to its own. Rows may therefore differ in length: what stands behind
    the end of a row (right padding of a prompt) is never seen and is overwritten when the row grows.
    """

    def __init__(
        self, batch: int, max_len: int, config: LlamaConfig, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        shape = (config.num_layers, batch, max_len, config.num_kv_heads, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.max_len = max_len

    def attend(self, positions: Tensor, mask: Mask) -> Callable[[int], Attend]:
        """Raises IndexError where a position is beyond `max_len`, ValueError for a mask of documents."""
        if mask.documents is not None:
            raise ValueError("a cache holds one document a row; Mask.documents has no meaning with it")
        num_keys = int(positions.max()) + 1
        if num_keys > self.max_len:
            raise IndexError(f"position {num_keys - 1} is beyond the cache's max_len {self.max_len}")
        rows = torch.arange(len(positions), device=positions.device)[:, None]
        seen = mask.visible(positions, num_keys)

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            self.keys[layer, rows, positions] = key
            self.values[layer, rows, positions] = value
            return sdpa(query, self.keys[layer, :, :num_keys], self.values[layer, :, :num_keys], seen=seen)

        return lambda layer: partial(attend, layer)
