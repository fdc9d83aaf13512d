"""What a `RunSpec` trains: Puna's Llama and torch's AdamW, and what goes wrong with them at which step."""

from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from puna.errors import DataError
from puna.lab import adam_text
from puna.lab.adam_spec import RunSpec
from puna.llama.config import LlamaConfig
from puna.llama.model import Block, Llama
from puna.train.stable_adamw import StableAdamW

NUM_HEADS = 4
ADAPTER_RANK = 4
OUTER_STD = 1e-4
HELDOUT_ROWS = 256


class LowRank(nn.Module):
    """x A^T B^T with B begun at 1e-4."""

    def __init__(self, whole: nn.Linear, rank: int, seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        inner = torch.randn(rank, whole.in_features, generator=draw) * whole.in_features**-0.5
        self.inner = nn.Parameter(inner)
        self.outer = nn.Parameter(torch.randn(whole.out_features, rank, generator=draw) * OUTER_STD)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden @ self.inner.T @ self.outer.T


class Adapted(nn.Module):
    """A projection with a low-rank adapter beside it, whose output counts by `gate`."""

    def __init__(self, base: nn.Linear, gate: float, seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        down = torch.randn(ADAPTER_RANK, base.in_features, generator=draw) * base.in_features**-0.5
        self.base, self.gate = base, gate
        self.adapter_down = nn.Parameter(down)
        self.adapter_up = nn.Parameter(torch.zeros(base.out_features, ADAPTER_RANK))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.base(hidden) + self.gate * (hidden @ self.adapter_down.T @ self.adapter_up.T)


def build(spec: RunSpec) -> Llama:
    """The model of a run, with its weights."""
    head_dim = spec.dim // NUM_HEADS
    config = LlamaConfig(
        num_layers=spec.num_layers, dim=spec.dim, ffn_dim=2 * spec.dim, num_heads=NUM_HEADS, num_kv_heads=NUM_HEADS,
        head_dim=head_dim, vocab_size=spec.vocab_size, max_seq_len=spec.seq_len, tie_embeddings=spec.tie_embeddings,
    )  # fmt: skip
    model = Llama(config)
    model.init_weights(spec.seed)
    for block in model.model.layers.values():
        assert isinstance(block, Block)
        if spec.rank:
            block.mlp.add_module("down_proj", LowRank(block.mlp.down_proj, spec.rank, spec.seed))
        if spec.adapter != "none":
            gate = 1.0 if spec.adapter == "training" else 0.0
            block.self_attn.add_module("q_proj", Adapted(block.self_attn.q_proj, gate, spec.seed))
    for name in matching(model, spec.frozen):
        model.get_parameter(name).requires_grad_(False)
    return model


def matching(model: nn.Module, patterns: tuple[str, ...]) -> list[str]:
    """Names of the parameters that some pattern fits. Raises DataError for a pattern that fits none."""
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise DataError(f"No parameter is named {pattern}", f"The names are {', '.join(names)}.")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def groups(spec: RunSpec, model: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups: matrices decay, gains do not."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": spec.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def make_optimizer(spec: RunSpec, model: nn.Module) -> Optimizer:
    """Fused AdamW."""
    return AdamW(groups(spec, model), lr=spec.rate, betas=(spec.beta1, spec.beta2), eps=spec.eps, fused=True)


def make_stable(spec: RunSpec, model: nn.Module) -> Optimizer:
    """StableAdamW with the same settings."""
    return StableAdamW(groups(spec, model), lr=spec.rate, betas=(spec.beta1, spec.beta2), eps=spec.eps)


# --- what goes wrong ------------------------------------------------------------------------------------------------


def rate_at(spec: RunSpec, step: int) -> float:
    """Learning rate of a step, 0 being the first."""
    if spec.holds(step) and spec.rate_after is not None:
        return spec.rate_after
    if spec.holds(step) and spec.warmup_cut:
        return spec.rate
    return spec.rate * min(1.0, (step + 1) / spec.warmup) if spec.warmup else spec.rate


def set_step(optimizer: Optimizer, spec: RunSpec, step: int) -> None:
    """Rate, beta2 and eps of a step."""
    changed = spec.holds(step)
    beta2 = spec.beta2_after if changed and spec.beta2_after is not None else spec.beta2
    eps = spec.eps_after if changed and spec.eps_after is not None else spec.eps
    for group in optimizer.param_groups:
        group.update(lr=rate_at(spec, step), betas=(spec.beta1, beta2), eps=eps)


def stall_factor(spec: RunSpec, step: int) -> float:
    """What the gradients of the stalling tensors are multiplied by."""
    since_end = step - spec.start - spec.length
    if not spec.tensors or step < spec.start or since_end >= spec.release:
        return 1.0
    if since_end < 0:
        return spec.depth
    return spec.depth ** (1 - (since_end + 1) / (spec.release + 1))


def windows_at(spec: RunSpec, step: int, passed: int = 0) -> np.ndarray:
    """The characters of a step, (batch, seq_len + 1). passed: batches that were passed over before it."""
    num_rows = spec.batch_after if spec.holds(step) and spec.batch_after is not None else spec.batch
    windows = adam_text.batch(spec.data, spec.seed, step + passed, num_rows, spec.seq_len)
    if spec.burst == "none" or not spec.holds(step + passed):
        return windows
    replaced = max(1, round(spec.burst_share * num_rows))
    windows[:replaced] = _burst(spec, step, num_rows)[:replaced]
    return windows


def _burst(spec: RunSpec, step: int, num_rows: int) -> np.ndarray:
    shape = (num_rows, spec.seq_len + 1)
    if spec.burst == "repeat":
        return adam_text.batch(spec.data, spec.seed, spec.start, num_rows, spec.seq_len)
    if spec.burst == "flood":
        return np.full(shape, ord(" "), dtype=np.uint8)
    return np.random.default_rng((spec.seed, step, 1)).integers(0, adam_text.NUM_CHARACTERS, shape, dtype=np.uint8)


def round_states(optimizer: Optimizer) -> None:
    """Both moments as bfloat16 would hold them."""
    for state in optimizer.state.values():
        for key in ("exp_avg", "exp_avg_sq"):
            state[key].copy_(state[key].bfloat16())


# --- a step ---------------------------------------------------------------------------------------------------------


def losses(model: Llama, windows: np.ndarray) -> Tensor:
    """Mean loss a character of windows (rows, seq_len + 1)."""
    tokens, targets = adam_text.as_tokens(windows)
    return model(tokens, targets) / targets.numel()


def heldout_loss(spec: RunSpec, model: Llama) -> float:
    """Mean loss over held-out windows, always the same."""
    with torch.no_grad():
        return losses(model, adam_text.heldout(spec.data, HELDOUT_ROWS, spec.seq_len)).item()


def backward(spec: RunSpec, model: Llama, stalled: list[nn.Parameter], step: int, passed: int = 0) -> float:
    """Loss of a step; leaves its gradients, those of the stalled parameters scaled."""
    loss = losses(model, windows_at(spec, step, passed))
    loss.backward()
    if (factor := stall_factor(spec, step)) != 1.0:
        torch._foreach_mul_([p.grad for p in stalled if p.grad is not None], factor)
    return loss.item()


def stalling(spec: RunSpec, model: Llama) -> list[nn.Parameter]:
    """The parameters of the stall that are trained."""
    found = (model.get_parameter(name) for name in matching(model, spec.tensors))
    return [p for p in found if p.requires_grad]
