"""Llama 2 / 3 / 3.1 / 3.2 text model: plain single-device torch.nn; parameter names are Hugging Face's."""

import hashlib
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor.experimental import implicit_replication
from torch.nn import functional

from puna.llama.attention import Attend, Mask
from puna.llama.cache import Cache
from puna.llama.config import LlamaConfig
from puna.llama.loss import token_loss_sum
from puna.llama.rope import Rotary

Between = Callable[[int, Tensor], Tensor]
"""(index of the block that comes next, hidden (B, L, D)) -> hidden; for cross-attention put between the blocks."""

Init = Literal["normal", "zero_out"]
INIT_STD = 0.02


class RMSNorm(nn.Module):
    """x / rms(x) in float32, cast back, times a gain."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        return functional.rms_norm(hidden, (hidden.shape[-1],), self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query_dim, key_dim = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, query_dim, bias=False)
        self.k_proj = nn.Linear(config.dim, key_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, key_dim, bias=False)
        self.o_proj = nn.Linear(query_dim, config.dim, bias=False)

    def forward(self, hidden: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (project(hidden).unflatten(-1, (-1, self.head_dim)) for project in projections)
        mixed = attend(rotary.turn(query), rotary.turn(key), value)
        return self.o_proj(mixed.flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.down_proj = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, hidden: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rotary, attend)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Trunk(nn.Module):
    """Embedding, blocks and the last norm: everything but a head.

    A pipeline stage keeps some entries of `layers`, takes `embeddings` where it has no table, and puts nn.Identity in
    the place of a norm it does not hold.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleDict({str(index): Block(config) for index in range(config.num_layers)})
        self.norm = RMSNorm(config.dim, config.norm_eps)

    def forward(
        self,
        tokens: Tensor | None = None,
        *,
        embeddings: Tensor | None = None,
        mask: Mask | None = None,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        between: Between | None = None,
        layer: int | None = None,
    ) -> Tensor:
        hidden = self.embed_tokens(tokens) if embeddings is None else embeddings
        mask = mask or Mask()
        if positions is None:
            positions = torch.arange(hidden.shape[1], device=hidden.device)
        rotary = Rotary.at(positions, self.config, hidden.dtype)
        attend_in = back_ends(hidden, mask, positions, cache)
        for name, block in self.layers.items():
            if layer == int(name):
                return hidden
            if between is not None:
                hidden = between(int(name), hidden)
            hidden = block(hidden, rotary, attend_in(int(name)))
        return self.norm(hidden) if layer is None else hidden


def back_ends(hidden: Tensor, mask: Mask, positions: Tensor, cache: Cache | None) -> Callable[[int], Attend]:
    """Layer -> attention back end for one forward of hidden states (B, L, D); without a cache all layers share it."""
    if cache is not None:
        return cache.attend(positions.expand(hidden.shape[:2]), mask)
    attend = mask.attend(hidden.shape[1], hidden.device)
    return lambda layer: attend


class Llama(nn.Module):
    """The language model: a trunk and a linear head, which is the embedding table itself where the two are tied."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)

    @property
    def head(self) -> Tensor:
        """Weight of the output head, (V, D)."""
        return self.model.embed_tokens.weight if self.config.tie_embeddings else self.lm_head.weight

    def hidden(self, tokens: Tensor | None = None, **as_trunk: Any) -> Tensor:
        """Hidden states (B, L, D) of `tokens` (B, L) or of `embeddings=` (B, L, D), behind the last norm.

        mask: a `Mask`, causal unless said otherwise. positions (L,) or (B, L): 0, 1, ... unless given. cache: a `Cache`
        that holds earlier tokens and takes these. between: a `Between` hook, called before every block.
        layer=k: the state after k blocks (0: the embeddings), without the last norm.
        """
        return self.model(tokens, **as_trunk)

    def logits(self, hidden: Tensor, rows: Tensor | None = None) -> Tensor:
        """Float32 logits (..., V) of hidden states, or of the vocabulary entries `rows` alone."""
        weight = self.head if rows is None else self.head[rows]
        return functional.linear(hidden, weight).to(torch.promote_types(hidden.dtype, torch.float32))

    def forward(self, tokens: Tensor | None = None, targets: Tensor | None = None, **as_hidden: Any) -> Tensor:
        """Logits (B, L, V), or with targets (B, L; -100 does not count) the float32 sum of the token losses."""
        hidden = self.hidden(tokens, **as_hidden)
        return self.logits(hidden) if targets is None else token_loss_sum(hidden, self.head, targets)

    def init_weights(self, seed: int = 0, kind: Init = "normal") -> None:
        """Draw every parameter anew, whatever its device or sharding: a function of (seed, name of the parameter)."""
        init_weights(self, self.config.num_layers, seed, kind)


class LlamaScorer(nn.Module):
    """A trunk with a scalar head, as reward models have; names are those of Hugging Face's sequence classifier."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.score = nn.Linear(config.dim, 1, bias=False)

    def forward(self, tokens: Tensor | None = None, **as_hidden: Any) -> Tensor:
        """A float32 score for every token, (B, L); a reward model reads the last one of a row."""
        scores = self.score(self.model(tokens, **as_hidden)).squeeze(-1)
        return scores.to(torch.promote_types(scores.dtype, torch.float32))

    def init_weights(self, seed: int = 0) -> None:
        """As `Llama.init_weights`."""
        init_weights(self, self.config.num_layers, seed)


@torch.no_grad()
def init_weights(model: nn.Module, num_layers: int, seed: int, kind: Init = "normal") -> None:
    """Gains 1, matrices normal with the deviation of `init_std`.

    A value depends on the seed and the parameter's name only, so that every sharding and every pipeline split begins
    with the same model.
    """
    with implicit_replication():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            std = init_std(name, parameter, num_layers, kind)
            digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest()
            generator = torch.Generator(parameter.device).manual_seed(int.from_bytes(digest))
            values = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
            parameter.copy_(values.normal_(std=std, generator=generator))


def init_std(name: str, matrix: Tensor, num_layers: int, kind: Init) -> float:
    """Deviation of a fresh matrix; the initialisation of Llama is not published.

    normal: 0.02, and 0.02 / sqrt(2 num_layers) for those that write to the residual stream (GPT-2's). zero_out: nothing
    for these and for an untied head, so that every block begins as the identity and every token as likely as the next;
    0.5 for the embedding, 1 / sqrt(fan-in) for the rest.
    """
    writes = name.endswith(("o_proj.weight", "down_proj.weight"))
    if kind == "normal":
        return INIT_STD / (2 * num_layers) ** 0.5 if writes else INIT_STD
    if writes or name.startswith("lm_head"):
        return 0.0
    return 0.5 if "embed_tokens" in name else matrix.shape[1] ** -0.5
