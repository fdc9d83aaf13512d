"""Sizes of a Llama that a plan needs: its FSDP units, what a forward keeps for backward. No torch here."""

from typing import Literal

from puna.llama.config import LlamaConfig
from puna.plan.fsdp import Unit

Layout = Literal["root", "ends"]
"""root: each block, and the rest in the root, which encloses them. ends: embedding, each block, norm with head."""


def units(config: LlamaConfig, layout: Layout) -> list[Unit]:
    """FSDP units in the order of the forward; under "root" the enclosing root comes last."""
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = ((query, config.dim), (key, config.dim), (key, config.dim), (config.dim, query))
    feed_forward = ((config.ffn_dim, config.dim), (config.ffn_dim, config.dim), (config.dim, config.ffn_dim))
    block = (*attention, *feed_forward, (config.dim,), (config.dim,))
    blocks = [Unit(f"layers.{index}", block) for index in range(config.num_layers)]
    table = (config.vocab_size, config.dim)
    head = ((config.dim,),) if config.tie_embeddings else ((config.dim,), table)
    if layout == "root":
        return [*blocks, Unit("root", (table, *head))]
    return [Unit("embedding", (table,)), *blocks, Unit("head", head)]


def kept_bytes(config: LlamaConfig, batch: int, seq_len: int) -> int:
    """Bytes that a float32 forward of Puna's Llama keeps for its backward, without recomputation.

    Of a block and a token: the block's input, the middle of its residual stream, and both behind their norm before and
    after the gain; queries, keys and values behind the rotation; attention's output and log-sum-exp; the reciprocal
    root of both norms; gate, its SiLU, up, and their product. Of the rest: the last norm's input and output before the
    gain, the gradient of the loss with respect to the hidden states and to the head (they are made in the forward),
    and the rotary tables.
    """
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    block = 6 * config.dim + 2 * query + 2 * key + config.num_heads + 2 + 4 * config.ffn_dim
    end = 3 * config.dim + 1
    tables = 2 * seq_len * config.head_dim
    elements = batch * seq_len * (config.num_layers * block + end) + config.vocab_size * config.dim + tables
    return 4 * elements
