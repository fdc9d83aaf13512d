"""Rotary position embedding: half-split channel pairs (Hugging Face layout), frequency scaling of Llama 3.1."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from puna.llama.config import LlamaConfig, RopeScaling


def inverse_frequencies(config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Radians a position for each channel pair, (head_dim / 2,): theta^(-2i / head_dim), scaled if so configured."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=dtype, device=device) / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    return scaled(frequencies, config.rope_scaling) if config.rope_scaling else frequencies


def scaled(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1's bands: short waves are kept, long ones divided by `factor`, those between blended.

    From the reference code of Llama 3.1; the paper says only that the context was raised in six steps (§3.4.2).
    """
    waves_in_context = scaling.original_seq_len * frequencies / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    kept = ((waves_in_context - scaling.low_freq_factor) / span).clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


@dataclass(frozen=True, eq=False)
class Rotary:
    """Cosines and signed sines of the positions of one forward, (1 or B, L, 1, head_dim).

    Not a pair of tensors, so that mixed-precision wrappers leave its float32 alone.
    """

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(cls, positions: Tensor, config: LlamaConfig, dtype: torch.dtype) -> "Rotary":
        """Tables of `positions` (L,) or (B, L): float64 for float64 models, else float32."""
        exact = torch.promote_types(dtype, torch.float32)
        frequencies = inverse_frequencies(config, exact, positions.device)
        angles = (positions.to(exact)[..., None] * frequencies).unsqueeze(-2)
        angles = angles if angles.dim() == 4 else angles.unsqueeze(0)
        cos, sin = angles.cos(), angles.sin()
        return cls(torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))

    def turn(self, heads: Tensor) -> Tensor:
        """Queries or keys (B, L, heads, head_dim), each channel pair (i, i + head_dim / 2) turned by its angle."""
        return _Turn.apply(heads, self.cos, self.sin)


class _Turn(torch.autograd.Function):
    """A rotation; its gradient is the rotation back, so nothing but the tables is kept."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(heads, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, -sin), None, None


def _turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    partners = heads.roll(heads.shape[-1] // 2, dims=-1)
    return (heads * cos).addcmul_(partners, sin).to(heads.dtype)
