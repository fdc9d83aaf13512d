"""Shape of a Llama 2 / 3 / 3.1 / 3.2 text model. No torch here."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from puna.train.config import Section, setting


class RopeScaling(Section):
    """Frequency scaling of Llama 3.1 and later (rope type "llama3")."""

    factor: float = setting(8.0, "division of the low frequencies (8 for 3.1, 32 for 3.2 1B and 3B)", gt=0)
    low_freq_factor: float = setting(1.0, "wavelengths above original_seq_len / this are divided by factor", gt=0)
    high_freq_factor: float = setting(4.0, "wavelengths below original_seq_len / this are kept", gt=0)
    original_seq_len: int = setting(8_192, "context before the extension", "tokens", ge=1)


class LlamaConfig(Section):
    """Shape of the text model; names as in the papers (Llama 3, Table 3)."""

    num_layers: int = setting(4, "transformer blocks", "layers", ge=1)
    dim: int = setting(256, "width of the residual stream", ge=1)
    ffn_dim: int = setting(688, "hidden width of the SwiGLU feed-forward", ge=1)
    num_heads: int = setting(4, "query heads", "heads", ge=1)
    num_kv_heads: int = setting(2, "key and value heads (grouped-query attention)", "heads", ge=1)
    head_dim: int = setting(64, "width of one head", ge=2)
    vocab_size: int = setting(4_096, "rows of the embedding table, special tokens included", "tokens", ge=1)
    max_seq_len: int = setting(2_048, "longest sequence the model is meant for", "tokens", ge=1)
    rope_theta: float = setting(500_000.0, "base of the rotary frequencies (10,000 in Llama 2)", gt=0)
    rope_scaling: RopeScaling | None = setting(None, "frequency scaling of Llama 3.1 and later")
    norm_eps: float = setting(1e-5, "epsilon of RMSNorm", gt=0)
    tie_embeddings: bool = setting(False, "one table for input embedding and output head")

    @model_validator(mode="after")
    def _heads_divide(self) -> "LlamaConfig":
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}; "
                "every key-value head serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary embedding turns pairs of channels")
        return self

    @property
    def num_parameters(self) -> int:
        """Exact count: V d (1 or 2) + L (2 d H h + 2 d K h + 3 d F + 2 d) + d (no biases)."""
        attention = 2 * self.dim * self.head_dim * (self.num_heads + self.num_kv_heads)
        block = attention + 3 * self.dim * self.ffn_dim + 2 * self.dim
        return self.vocab_size * self.dim * (1 if self.tie_embeddings else 2) + self.num_layers * block + self.dim

    def flops_per_token(self, seq_len: int) -> float:
        """Matrix operations to train on one token of a causal sequence of `seq_len`, forward and backward.

        6 x (weights that multiply: everything but the embedding lookup and the gains) + 6 x layers x seq_len x heads x
        head_dim (scores and values of causal attention, half of the square).
        """
        head = self.vocab_size * self.dim
        attention = 2 * self.dim * self.head_dim * (self.num_heads + self.num_kv_heads)
        weights = head + self.num_layers * (attention + 3 * self.dim * self.ffn_dim)
        return 6.0 * weights + 6.0 * self.num_layers * seq_len * self.num_heads * self.head_dim


Sources = Annotated[tuple[tuple[str, Annotated[float, Field(gt=0)]], ...], Field(strict=False)]


class DataConfig(Section):
    """What a text run reads."""

    path: str = setting("runs/shards", "folder of token shards (`puna corpus tokenize` writes one)", "path")
    sources: Sources = setting(
        (),
        "mixture, read in place of data.path: pairs (folder of token shards, weight); a source's share of the tokens "
        "is its weight over the sum of all weights",
    )
    packing: Literal["packed", "unpacked"] = setting(
        "packed", "packed: rows hold several documents under a document mask; unpacked: a row a document, padded"
    )

    def mixture(self) -> tuple[tuple[str, float], ...]:
        """Folders of token shards and their weights: `sources`, or `path` alone."""
        return self.sources or ((self.path, 1.0),)
