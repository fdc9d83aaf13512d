"""What is trained: the shape of a decoder and where to find it by name. No torch here."""

import difflib
from dataclasses import dataclass

from puna.errors import UserError


class PlanError(UserError):
    """A plan that cannot be: shapes that do not divide, sizes below one, unknown names."""


@dataclass(frozen=True)
class Transformer:
    """A decoder. gated: the feed-forward has three matrices (SwiGLU), else two; tied: one embedding table.

    A mixture has `experts` feed-forwards of width `expert_ffn`, of which each token takes `active`, beside the one of
    width `ffn` that all tokens take (0: none).
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    gated: bool = True
    tied: bool = False
    name: str = ""
    experts: int = 0
    active: int = 0
    expert_ffn: int = 0

    def __post_init__(self) -> None:
        for key in ("layers", "hidden", "heads", "kv_heads", "vocab"):
            if getattr(self, key) < 1:
                raise PlanError(f"{key} is {getattr(self, key)}", "Give a whole number of at least 1.")
        if self.ffn < 0 or self.ffn + self.experts < 1:
            raise PlanError(f"ffn is {self.ffn}", "Give a whole number of at least 1, or experts.")
        if not 0 <= self.active <= self.experts or (self.experts > 0) != (self.expert_ffn > 0):
            raise PlanError(
                f"{self.experts} experts of width {self.expert_ffn}, {self.active} of them active",
                "Give experts, their width, and no more active ones than there are.",
            )
        if self.heads % self.kv_heads:
            raise PlanError(
                f"{self.heads} heads do not divide among {self.kv_heads} key-value heads",
                "Make heads a multiple of kv_heads.",
            )

    @property
    def head_dim(self) -> float:
        """Width of one head."""
        return self.hidden / self.heads

    @property
    def block_matrices(self) -> float:
        """Elements of the matrices of one block: 2 h^2 + 2 h^2 kv / a + (3 or 2) h f, all experts included."""
        return self._matrices(self.experts)

    @property
    def active_matrices(self) -> float:
        """Of those, what one token multiplies."""
        return self._matrices(self.active)

    def _matrices(self, experts: int) -> float:
        attention = 2 * self.hidden**2 * (1 + self.kv_heads / self.heads)
        return attention + (3 if self.gated else 2) * self.hidden * (self.ffn + experts * self.expert_ffn)

    @property
    def parameters(self) -> float:
        """All of them, norms included; biases and learned positions are not."""
        tables = self.vocab * self.hidden * (1 if self.tied else 2)
        return self.layers * (self.block_matrices + 2 * self.hidden) + tables + self.hidden

    def flops_per_token(self, seq_len: int, causal: bool = True) -> float:
        """Model operations of forward and backward of one token, nothing recomputed."""
        matrices = self.layers * self.active_matrices + self.vocab * self.hidden
        return 6.0 * matrices + 12.0 * self.layers * seq_len * self.hidden * (0.5 if causal else 1.0)


def _gpt(name: str, layers: int, hidden: int, heads: int, vocab: int = 51200) -> Transformer:
    return Transformer(layers, hidden, 4 * hidden, heads, heads, vocab, gated=False, tied=True, name=name)


def _llama(
    name: str, layers: int, hidden: int, ffn: int, heads: int, kv: int, vocab: int, tied: bool = False
) -> Transformer:
    return Transformer(layers, hidden, ffn, heads, kv, vocab, tied=tied, name=name)


MODELS = {
    model.name: model
    for model in (
        _llama("llama2-7b", 32, 4096, 11008, 32, 32, 32000),
        _llama("llama2-13b", 40, 5120, 13824, 40, 40, 32000),
        _llama("llama2-70b", 80, 8192, 28672, 64, 8, 32000),
        _llama("llama3-8b", 32, 4096, 14336, 32, 8, 128256),
        _llama("llama3-70b", 80, 8192, 28672, 64, 8, 128256),
        _llama("llama3-405b", 126, 16384, 53248, 128, 8, 128256),
        _llama("llama3.1-8b", 32, 4096, 14336, 32, 8, 128256),
        _llama("llama3.1-70b", 80, 8192, 28672, 64, 8, 128256),
        _llama("llama3.1-405b", 126, 16384, 53248, 128, 8, 128256),
        Transformer(32, 4096, 0, 32, 8, 32000, name="mixtral-8x7b", experts=8, active=2, expert_ffn=14336),
        _llama("llama3.2-1b", 16, 2048, 8192, 32, 8, 128256, tied=True),
        _llama("llama3.2-3b", 28, 3072, 8192, 24, 8, 128256, tied=True),
        _gpt("gpt-125m", 12, 768, 12),
        _gpt("gpt-1.3b", 24, 2048, 16),
        _gpt("gpt-5b", 24, 4096, 32),
        _gpt("gpt-22b", 48, 6144, 64),
        _gpt("gpt3-175b", 96, 12288, 96),
        _gpt("gpt-530b", 105, 20480, 128),
        _gpt("gpt-1t", 128, 25600, 160),
    )
}


def find(name: str) -> Transformer:
    """A model by name. Raises PlanError, which names the nearest."""
    if name.lower() in MODELS:
        return MODELS[name.lower()]
    close = difflib.get_close_matches(name.lower(), MODELS, n=1, cutoff=0.0)[0]
    raise PlanError(f"no model named {name!r}", f"Did you mean {close}? Known: {', '.join(MODELS)}.")
