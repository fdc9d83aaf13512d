"""What is trained: the shape of a decoder and where to find it by name. No torch here."""

import difflib
from dataclasses import dataclass, replace

from puna.errors import UserError


class PlanError(UserError):
    """A plan that cannot be: shapes that do not divide, sizes below one, unknown names."""


@dataclass(frozen=True)
class Vision:
    """What makes a decoder see: an image encoder, blocks that attend from text to its patches (Llama 3, section 7.1).

    image_tokens: patches of all images of a sequence; tile: patches of one image, which attend to one another. A block
    that attends across has the width, heads and feed-forward of the decoder's own; features: width of a patch's
    features, which a matrix brings to the decoder's width.
    """

    cross_layers: int
    image_tokens: int = 6404
    tile: int = 6404
    layers: int = 40
    hidden: int = 1280
    ffn: int = 5120
    heads: int = 16
    features: int = 7680

    def __post_init__(self) -> None:
        for key, value in vars(self).items():
            if value < 1:
                raise PlanError(f"vision: {key} is {value}", "Give a whole number of at least 1.")

    @property
    def matrices(self) -> float:
        """Elements of the encoder's matrices, which every patch multiplies."""
        return self.layers * (4.0 * self.hidden**2 + 2 * self.hidden * self.ffn)


@dataclass(frozen=True)
class Transformer:
    """A decoder. gated: the feed-forward has three matrices (SwiGLU), else two; tied: one embedding table.

    A mixture has `experts` feed-forwards of width `expert_ffn`, of which each token takes `active`, beside the one of
    width `ffn` that all tokens take (0: none). head_width: of one head (0: hidden / heads).
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
    head_width: int = 0
    vision: Vision | None = None

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
        return self.head_width or self.hidden / self.heads

    @property
    def block_matrices(self) -> float:
        """Elements of the matrices of one block: 2 h a d + 2 h kv d + (3 or 2) h f, all experts included."""
        return self._matrices(self.experts)

    @property
    def active_matrices(self) -> float:
        """Of those, what one token multiplies."""
        return self._matrices(self.active)

    def _matrices(self, experts: int) -> float:
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return attention + (3 if self.gated else 2) * self.hidden * (self.ffn + experts * self.expert_ffn)

    @property
    def parameters(self) -> float:
        """All of them, norms included; biases and learned positions are not."""
        tables = self.vocab * self.hidden * (1 if self.tied else 2)
        return self.layers * (self.block_matrices + 2 * self.hidden) + tables + self.hidden + self.vision_parameters

    @property
    def vision_parameters(self) -> float:
        """Those of the image encoder, of the matrix behind it and of the blocks that attend across."""
        if self.vision is None:
            return 0.0
        joint = self.vision.features * self.hidden
        return self.vision.matrices + joint + self.vision.cross_layers * self.block_matrices

    def flops_per_token(self, seq_len: int, causal: bool = True, frozen: bool = False) -> float:
        """Model operations of forward and backward of one token, nothing recomputed, with its share of the images.

        frozen: the decoder's own matrices have no gradient; what makes it see has.
        """
        matrices = self.layers * self.active_matrices + self.vocab * self.hidden
        square = 12.0 * self.layers * seq_len * self.heads * self.head_dim * (0.5 if causal else 1.0)
        return (4.0 if frozen else 6.0) * matrices + square + self._vision_flops(seq_len)

    def _vision_flops(self, seq_len: int) -> float:
        if self.vision is None:
            return 0.0
        eye, wide = self.vision, self.heads * self.head_dim
        keys = 2 * self.hidden * self.kv_heads * self.head_dim
        encoder = 6 * (eye.matrices + eye.features * self.hidden) + 12 * eye.layers * eye.tile * eye.hidden
        image = eye.image_tokens / seq_len
        across = 6 * (self.active_matrices - keys) + image * 6 * keys + 12 * eye.image_tokens * wide
        return image * encoder + eye.cross_layers * across


def _gpt(name: str, layers: int, hidden: int, heads: int, vocab: int = 51200) -> Transformer:
    return Transformer(layers, hidden, 4 * hidden, heads, heads, vocab, gated=False, tied=True, name=name)


def _llama(
    name: str, layers: int, hidden: int, ffn: int, heads: int, kv: int, vocab: int, tied: bool = False
) -> Transformer:
    return Transformer(layers, hidden, ffn, heads, kv, vocab, tied=tied, name=name)


def _sees(text: str, name: str, cross_layers: int, image_tokens: int = 6404) -> Transformer:
    return replace(TEXT[text], name=name, vision=Vision(cross_layers, image_tokens, image_tokens))


def _qwen3_moe(name: str, layers: int, hidden: int, heads: int, expert_ffn: int) -> Transformer:
    return Transformer(
        layers, hidden, 0, heads, 4, 151936, name=name, experts=128, active=8, expert_ffn=expert_ffn, head_width=128
    )


def _gpt_oss(name: str, layers: int, experts: int) -> Transformer:
    return Transformer(
        layers, 2880, 0, 64, 8, 201088, name=name, experts=experts, active=4, expert_ffn=2880, head_width=64
    )


TEXT = {
    model.name: model
    for model in (
        _llama("llama2-7b", 32, 4096, 11008, 32, 32, 32000),
        _llama("llama2-13b", 40, 5120, 13824, 40, 40, 32000),
        _llama("llama2-34b", 48, 8192, 22016, 64, 8, 32000),
        _llama("llama2-70b", 80, 8192, 28672, 64, 8, 32000),
        _llama("llama3-8b", 32, 4096, 14336, 32, 8, 128256),
        _llama("llama3-70b", 80, 8192, 28672, 64, 8, 128256),
        _llama("llama3-405b", 126, 16384, 53248, 128, 8, 128256),
        _llama("llama3.1-8b", 32, 4096, 14336, 32, 8, 128256),
        _llama("llama3.1-70b", 80, 8192, 28672, 64, 8, 128256),
        _llama("llama3.1-405b", 126, 16384, 53248, 128, 8, 128256),
        Transformer(32, 4096, 0, 32, 8, 32000, name="mixtral-8x7b", experts=8, active=2, expert_ffn=14336),
        Transformer(56, 6144, 0, 48, 8, 32768, name="mixtral-8x22b", experts=8, active=2, expert_ffn=16384),
        _qwen3_moe("qwen3-30b-a3b", 48, 2048, 32, 768),
        _qwen3_moe("qwen3-235b-a22b", 94, 4096, 64, 1536),
        _gpt_oss("gpt-oss-20b", 24, 32),
        _gpt_oss("gpt-oss-120b", 36, 128),
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
MODELS = TEXT | {
    model.name: model
    for model in (
        _sees("llama3.1-8b", "llama3.2-11b-vision", 8),
        _sees("llama3.1-70b", "llama3.2-90b-vision", 20),
        _sees("llama3.1-405b", "llama3-405b-vision", 32, 2308),
    )
}
"""Text models, and those that see. Shapes: papers and public configurations of the models."""


def find(name: str) -> Transformer:
    """A model by name. Raises PlanError, which names the nearest."""
    if name.lower() in MODELS:
        return MODELS[name.lower()]
    close = difflib.get_close_matches(name.lower(), MODELS, n=1, cutoff=0.0)[0]
    raise PlanError(f"no model named {name!r}", f"Did you mean {close}? Known: {', '.join(MODELS)}.")
