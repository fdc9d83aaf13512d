"""Statistics of Adam's state before it steps: a sample of coordinates, sums that add across shards, what they come to.

All is known before the update: the sample holds the gradient g, the old moments m and v and the weight of each
coordinate, and the ratio r that Adam is about to apply (the update over the rate) follows from them. A coordinate
that has never had a gradient (v, m and g all 0: a row of the vocabulary that no text has used, a frozen tensor) is
counted apart and is in no share and no mean.
"""

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import NAdam, Optimizer, RAdam
from torch.optim.adam import Adam
from torch.optim.adamax import Adamax

Numbers = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

STATISTICS = (
    "g_rms",
    "stall",
    "below_eps",
    "u_rms",
    "f9",
    "bc",
    "surprise",
    "lag_cosine",
    "descent_cosine",
    "update_ratio",
    "stable_rms",
)
"""Section 5 of the theory's diagnostics; `statistics` says how each is made."""

SUMS = (
    "seen", "broken", "g2", "old", "old_g2", "old_v", "below", "r", "r2", "r3", "r4", "far", "rg", "lag", "lag2",
    "weight2", "stable",
)  # fmt: skip
RATIO_BINS, RATIO_LIMIT = 41, 2.0
STALL_BINS, STALL_LEAST = 128, -40  # of powers of two, from 2^-40
EXPONENT_BITS, EXPONENT_BIAS = 23, 127  # of a float32
TINY, HUGE = 1e-300, 1e30


@dataclass
class Watched:
    """A tensor under watch and where it stands: `group` is the live parameter group of `optimizer`."""

    name: str
    layer: str
    parameter: nn.Parameter
    optimizer: Optimizer
    group: dict[str, Any]


# --- which coordinates -----------------------------------------------------------------------------------------------


def coordinates(name: str, size: int, count: int) -> Integers:
    """Ascending flat indices of at most `count` of `size` coordinates: a random one in each of `count` equal stretches.

    A function of name and size alone, so that every sharding of a tensor looks at the same coordinates.
    """
    if size <= count:
        return np.arange(size)
    seed = int.from_bytes(blake2b(f"{name}/{size}".encode(), digest_size=8).digest(), "little")
    edges = np.arange(count + 1) * size // count
    return edges[:-1] + (np.random.Generator(np.random.Philox(seed)).random(count) * np.diff(edges)).astype(np.int64)


def follows(parameter: Tensor) -> bool:
    """Whether it is known which coordinates of a tensor this rank holds: not where it is sharded in strides."""
    return not isinstance(parameter, DTensor) or all(
        type(placement) in (Shard, Replicate) for placement in parameter.placements
    )


def held_here(parameter: Tensor, chosen: Integers) -> tuple[Integers, Integers]:
    """Which of the `chosen` global coordinates this rank holds: their places in `chosen`, and local flat indices."""
    if not isinstance(parameter, DTensor):
        return np.arange(len(chosen)), chosen
    shape, here = parameter.shape, parameter.device_mesh.get_coordinate()
    spans = [(0, size) for size in shape]
    for axis, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard) and here is not None:
            low, high = spans[placement.dim]
            piece = -(-(high - low) // parameter.device_mesh.size(axis))
            start = min(high, low + here[axis] * piece)
            spans[placement.dim] = (start, min(high, start + piece))
    index = np.unravel_index(chosen, tuple(shape))
    inside = np.logical_and.reduce([(low <= i) & (i < high) for i, (low, high) in zip(index, spans, strict=True)])
    places = np.flatnonzero(inside)
    local_shape = tuple(high - low for low, high in spans)
    local_index = tuple(i[places] - low for i, (low, _) in zip(index, spans, strict=True))
    return places, np.ravel_multi_index(local_index, local_shape) if len(places) else places


# --- what Adam is about to do ----------------------------------------------------------------------------------------


@dataclass
class Sample:
    """Sampled coordinates before an update, (tensors, width) each; places beyond a tensor's sample hold 0."""

    g: Tensor
    m: Tensor
    v: Tensor  # of Adamax: the infinity norm less epsilon
    weight: Tensor
    previous: Tensor  # gradient of the step before
    peak: Tensor | None = None  # amsgrad's largest v


@dataclass
class Hyper:
    """What an update depends on beside its sample, (tensors, 1) each; `step` is the number of the coming update."""

    step: Tensor
    beta1: Tensor
    beta2: Tensor
    eps: Tensor
    decay: Tensor  # weight decay that is added to the gradient
    sign: Tensor  # -1 where the optimiser maximises
    mu_product: Tensor | None = None  # NAdam
    momentum_decay: Tensor | None = None  # NAdam


Moments = tuple[Tensor, Tensor, Tensor]
"""v^ before the update, the root of v^ after it, and r."""
Rule = Callable[[Sample, Hyper], Moments]


def adam(s: Sample, h: Hyper) -> Moments:
    """Kingma and Ba 2015, algorithm 1; with `peak` AMSGrad as torch has it."""
    old, new = _second_moments(s, h)
    return old, new, _first_moment(s, h) / (1 - h.beta1**h.step) / (new + h.eps)


def nadam(s: Sample, h: Hyper) -> Moments:
    """Dozat 2016 as torch has it."""
    assert h.mu_product is not None
    assert h.momentum_decay is not None
    mu = h.beta1 * (1 - 0.5 * 0.96 ** (h.step * h.momentum_decay))
    mu_next = h.beta1 * (1 - 0.5 * 0.96 ** ((h.step + 1) * h.momentum_decay))
    product = h.mu_product * mu
    old, new = _second_moments(s, h)
    nesterov = (1 - mu) / (1 - product) * s.g + mu_next / (1 - product * mu_next) * _first_moment(s, h)
    return old, new, nesterov / (new + h.eps)


def radam(s: Sample, h: Hyper) -> Moments:
    """Liu et al. 2020, algorithm 2: no second moment until its variance can be told."""
    old, new = _second_moments(s, h)
    correction = 1 - h.beta2**h.step
    longest = 2 / (1 - h.beta2) - 1
    length = longest - 2 * h.step * h.beta2**h.step / correction
    rectified = ((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)).clamp(min=0).sqrt()
    first = _first_moment(s, h) / (1 - h.beta1**h.step)
    scaled = rectified * first * correction.sqrt() / (new * correction.sqrt() + h.eps)
    return old, new, torch.where(length > 5, scaled, first)


def adamax(s: Sample, h: Hyper) -> Moments:
    """Kingma and Ba 2015, algorithm 2: the infinity norm in the place of the root of v^, here less epsilon."""
    norm = torch.maximum(h.beta2 * (s.v + h.eps), s.g.abs() + h.eps)
    return s.v.square(), less_eps(norm, h.eps), _first_moment(s, h) / (1 - h.beta1**h.step) / norm


def less_eps(norm: Tensor, eps: Tensor) -> Tensor:
    """Adamax's norm without the epsilon in it: 0 for what never had a gradient, rounding aside."""
    return (norm - eps * (1 + 1e-6)).clamp_(min=0)


def _first_moment(s: Sample, h: Hyper) -> Tensor:
    return torch.lerp(s.m, s.g, 1 - h.beta1)


def _second_moments(s: Sample, h: Hyper) -> tuple[Tensor, Tensor]:
    """v^ before and the root of v^ after the update."""
    v = torch.lerp(s.g.square(), s.v, h.beta2)
    old, new = (s.v, v) if s.peak is None else (s.peak, torch.maximum(s.peak, v))
    return old / (1 - h.beta2 ** (h.step - 1)).clamp(min=TINY), root(new / (1 - h.beta2**h.step))


def root(x: Tensor) -> Tensor:
    """Square root; PyTorch's own wakes all threads for 2,048 numbers, its reciprocal does not."""
    return x.clamp(min=TINY).rsqrt_().mul_(x)


def rule_of(optimizer: Optimizer) -> Rule:
    """How an optimiser of the Adam family makes r; others that keep Adam's two moments are taken for AdamW."""
    if isinstance(optimizer, NAdam):
        return nadam
    if isinstance(optimizer, RAdam):
        return radam
    return adamax if isinstance(optimizer, Adamax) else adam


def adds_decay(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Whether weight decay is part of the gradient (L2), not decoupled; unknown classes are taken to decouple."""
    if isinstance(optimizer, Adamax):
        return True
    return isinstance(optimizer, Adam | NAdam | RAdam) and not group["decoupled_weight_decay"]


# --- sums and what they come to --------------------------------------------------------------------------------------


def sums(s: Sample, h: Hyper, rule: Rule, layers: Tensor, num_layers: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sums (tensors, SUMS), counts of the root of v^ over eps by powers of two (tensors, STALL_BINS), counts of r
    (layers, RATIO_BINS), all of which add over shards.

    layers: (tensors,), the layer of each. In place, s.g becomes the gradient that Adam uses, and what is not finite 0.
    Written for few passes, without masks: what has never had a gradient is 0 throughout, and so are its terms.
    """
    s.g.mul_(h.sign).addcmul_(s.weight, h.decay)
    broken = (s.g + s.m).add_(s.v).sum(1).isfinite().logical_not()
    for values in (s.g, s.m, s.v):
        values.nan_to_num_(0.0, 0.0, 0.0)
    old_v, new, r = rule(s, h)
    r.nan_to_num_(0.0, HUGE, -HUGE)
    g2, r2, old = s.g.square(), r.square(), s.v.sign()
    seen = s.g.abs().add_(s.m.abs()).add_(s.v).sign_().sum(1)
    unseen = r.shape[1] - seen
    below = (h.eps - new).sign_().clamp_(min=0).sum(1) - unseen
    dot = torch.linalg.vecdot
    columns = [
        seen,
        broken,
        g2.sum(1),
        old.sum(1),
        dot(g2, old),
        old_v.sum(1),
        torch.where(h.eps[:, 0] > 0, below, 0.0),
        r.sum(1),
        r2.sum(1),
        dot(r2, r),
        dot(r2, r2),
        (r.abs() - 0.9).sign_().clamp_(min=0).sum(1),
        dot(r, s.g),
        dot(s.g, s.previous),
        dot(s.previous, s.previous),
        dot(s.weight, s.weight),
        g2.div_(torch.maximum(new, h.eps).square_().clamp_(min=TINY)).sum(1),
    ]
    powers = (new / h.eps).nan_to_num_(0.0).float().view(torch.int32) >> EXPONENT_BITS
    rows = torch.arange(len(r), device=r.device)
    stall = _counts(powers - (EXPONENT_BIAS + STALL_LEAST), rows, len(r), STALL_BINS)
    stall[:, 0] -= unseen
    places = (r * (RATIO_BINS / (2 * RATIO_LIMIT))).add_(RATIO_BINS / 2).clamp_(0, RATIO_BINS - 1).int()
    ratio = _counts(places, layers, num_layers, RATIO_BINS)
    ratio[:, RATIO_BINS // 2].index_add_(0, layers, -unseen)
    return torch.stack([column.double() for column in columns], 1), stall, ratio


def _counts(bins: Tensor, rows: Tensor, num_rows: int, num_bins: int) -> Tensor:
    """Counts (num_rows, num_bins) of bins (len(rows), width), what lies outside in the outermost."""
    flat = (bins.clamp_(0, num_bins - 1) + rows[:, None] * num_bins).view(-1)
    counts = torch.zeros(num_rows * num_bins, dtype=torch.int64, device=bins.device)
    return counts.scatter_add_(0, flat, torch.ones_like(flat)).double().view(num_rows, num_bins)


def statistics(totals: Numbers, stall_counts: Numbers, rates: Numbers, num_sampled: Integers) -> dict[str, Numbers]:
    """What global sums come to, by statistic, (tensors,) each; NaN where no coordinate has anything to tell.

    rates: learning rate of each tensor; num_sampled: its coordinates in the sample, over all ranks.

    g_rms: RMS of the gradient. stall: median of sqrt(v^) / eps, interpolated between powers of two. below_eps: share
    with sqrt(v^) < eps. u_rms, f9, bc: RMS of r, share of abs(r) > 0.9, bimodality coefficient (skew^2 + 1) / kurtosis.
    surprise: g_rms over the root of the mean v^ of the step before. lag_cosine: cosine of this gradient and the last.
    descent_cosine: of r and the gradient. update_ratio: rate norm(r) / norm(weights). stable_rms: sqrt(mean g^2 /
    max(v^, eps^2)). Beside them num_active (coordinates counted), unseen (share that has never had a gradient) and
    num_nonfinite (1 where some are not finite).
    """
    total = dict(zip(SUMS, totals.T, strict=True))
    with np.errstate(all="ignore"):
        seen = np.where(total["seen"] > 0, total["seen"], np.nan)
        old = np.where(total["old"] > 0, total["old"], np.nan)
        mean, second, third, fourth = (total[key] / seen for key in ("r", "r2", "r3", "r4"))
        spread = second - mean**2
        third_moment = third - 3 * mean * second + 2 * mean**3
        fourth_moment = fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4
        found = {
            "g_rms": np.sqrt(total["g2"] / seen),
            "stall": _median(stall_counts),
            "below_eps": total["below"] / seen,
            "u_rms": np.sqrt(second),
            "f9": total["far"] / seen,
            "bc": (third_moment**2 / spread + spread**2) / fourth_moment,
            "surprise": np.sqrt(total["old_g2"] / old) / np.sqrt(total["old_v"] / old),
            "lag_cosine": total["lag"] / np.sqrt(total["g2"] * total["lag2"]),
            "descent_cosine": total["rg"] / np.sqrt(total["r2"] * total["g2"]),
            "update_ratio": rates * np.sqrt(total["r2"] / total["weight2"]),
            "stable_rms": np.sqrt(total["stable"] / seen),
        }
    found = {key: np.where(np.isfinite(values), values, np.nan) for key, values in found.items()}
    return found | {
        "num_active": total["seen"],
        "unseen": 1 - total["seen"] / np.maximum(num_sampled, 1),
        "num_nonfinite": (total["broken"] > 0).astype(np.float64),
    }


def _median(counts: Numbers) -> Numbers:
    """Median by row of values counted in STALL_BINS, interpolated within its bin."""
    half = counts.sum(1, keepdims=True) / 2
    upto = counts.cumsum(1)
    bins = (upto < half).sum(1, keepdims=True).clip(max=STALL_BINS - 1)
    inside = np.take_along_axis(counts, bins, 1)
    below = np.take_along_axis(upto, bins, 1) - inside
    part = np.divide(half - below, inside, out=np.full_like(half, np.nan), where=inside > 0)
    return 2.0 ** (STALL_LEAST + bins + part)[:, 0]
