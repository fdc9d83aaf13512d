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
    "seen", "nonfinite", "g2", "old", "old_g2", "old_v", "below", "r", "r2", "r3", "r4", "far",
    "rg", "lag", "lag2", "weight2", "stable",
)  # fmt: skip
RATIO_BINS, RATIO_LIMIT = 41, 2.0
STALL_BINS, STALL_DECADES = 40, (-8.0, 12.0)
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
    v: Tensor  # of Adamax: the infinity norm
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
"""v^ before the update, v^ after it, and r."""


def adam(s: Sample, h: Hyper) -> Moments:
    """Kingma and Ba 2015, algorithm 1; with `peak` AMSGrad as torch has it."""
    v = h.beta2 * s.v + (1 - h.beta2) * s.g.square()
    old, new = (s.v, v) if s.peak is None else (s.peak, torch.maximum(s.peak, v))
    old, new = old / (1 - h.beta2 ** (h.step - 1)).clamp(min=TINY), new / (1 - h.beta2**h.step)
    return old, new, _first_moment(s, h) / (1 - h.beta1**h.step) / (new.sqrt() + h.eps)


def nadam(s: Sample, h: Hyper) -> Moments:
    """Dozat 2016 as torch has it."""
    assert h.mu_product is not None
    assert h.momentum_decay is not None
    mu = h.beta1 * (1 - 0.5 * 0.96 ** (h.step * h.momentum_decay))
    mu_next = h.beta1 * (1 - 0.5 * 0.96 ** ((h.step + 1) * h.momentum_decay))
    product = h.mu_product * mu
    old, new, _ = adam(s, h)
    nesterov = (1 - mu) / (1 - product) * s.g + mu_next / (1 - product * mu_next) * _first_moment(s, h)
    return old, new, nesterov / (new.sqrt() + h.eps)


def radam(s: Sample, h: Hyper) -> Moments:
    """Liu et al. 2020, algorithm 2: no second moment until its variance can be told."""
    old, new, _ = adam(s, h)
    correction = 1 - h.beta2**h.step
    longest = 2 / (1 - h.beta2) - 1
    length = longest - 2 * h.step * h.beta2**h.step / correction
    rectified = ((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)).clamp(min=0).sqrt()
    first = _first_moment(s, h) / (1 - h.beta1**h.step)
    scaled = rectified * first * correction.sqrt() / ((new * correction).sqrt() + h.eps)
    return old, new, torch.where(length > 5, scaled, first)


def adamax(s: Sample, h: Hyper) -> Moments:
    """Kingma and Ba 2015, algorithm 2: the infinity norm in the place of sqrt(v^)."""
    norm = torch.maximum(h.beta2 * s.v, s.g.abs() + h.eps)
    return s.v.square(), norm.square(), _first_moment(s, h) / (1 - h.beta1**h.step) / norm


def _first_moment(s: Sample, h: Hyper) -> Tensor:
    return s.m + (1 - h.beta1) * (s.g - s.m)


def rule_of(optimizer: Optimizer) -> Callable[[Sample, Hyper], Moments]:
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


def sums(
    s: Sample, h: Hyper, rule: Callable[[Sample, Hyper], Moments], layers: Tensor, num_layers: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums (tensors, SUMS), counts of log10(sqrt(v^) / eps) (tensors, STALL_BINS), counts of r (layers, RATIO_BINS).

    layers: (tensors,), the layer of each. All three add over shards. In place, s.g becomes the gradient that Adam uses,
    and what is not finite becomes 0.
    """
    s.g.mul_(h.sign).addcmul_(s.weight, h.decay)
    finite = s.g.isfinite() & s.m.isfinite() & s.v.isfinite()
    for values in (s.g, s.m, s.v):
        values.masked_fill_(~finite, 0.0)
    seen = (s.v > 0) | (s.m != 0) | (s.g != 0)
    old_v, new_v, r = rule(s, h)
    r = torch.where(seen, r, 0.0).nan_to_num(0.0, HUGE, -HUGE)
    root = new_v.sqrt()
    g2, r2, old = s.g.square(), r.square(), s.v > 0
    columns = [
        seen,
        ~finite,
        g2,
        old,
        torch.where(old, g2, 0.0),
        torch.where(old, old_v, 0.0),
        seen & (root < h.eps),
        r,
        r2,
        r2 * r,
        r2 * r2,
        r.abs() > 0.9,
        r * s.g,
        s.g * s.previous,
        s.previous.square(),
        s.weight.square(),
        torch.where(seen, g2 / torch.maximum(new_v, h.eps.square()).clamp(min=TINY), 0.0),
    ]
    totals = torch.stack([column.sum(1, dtype=torch.float64) for column in columns], 1)
    low, high = STALL_DECADES
    decades = (root.clamp(min=TINY).log10() - h.eps.clamp(min=TINY).log10() - low) / (high - low)
    rows = torch.arange(len(r), device=r.device)
    stall = _counts(decades, seen, rows, len(r), STALL_BINS)
    ratio = _counts((r + RATIO_LIMIT) / (2 * RATIO_LIMIT), seen, layers, num_layers, RATIO_BINS)
    return totals, stall, ratio


def _counts(place: Tensor, counted: Tensor, rows: Tensor, num_rows: int, num_bins: int) -> Tensor:
    """Counts (num_rows, num_bins) of places in [0, 1), what lies outside in the outermost bins."""
    bins = (place * num_bins).floor_().clamp_(0, num_bins - 1).long().add_(rows[:, None] * num_bins)
    counts = torch.zeros(num_rows * num_bins, dtype=torch.float64, device=place.device)
    counts.index_add_(0, bins.view(-1), counted.double().view(-1))
    return counts.view(num_rows, num_bins)


def statistics(totals: Numbers, stall_counts: Numbers, rates: Numbers, num_sampled: Integers) -> dict[str, Numbers]:
    """What global sums come to, by statistic, (tensors,) each; NaN where no coordinate has anything to tell.

    rates: learning rate of each tensor; num_sampled: its coordinates in the sample, over all ranks.

    g_rms: RMS of the gradient. stall: median of sqrt(v^) / eps (to half a decade, interpolated; 1e12 at most).
    below_eps: share with sqrt(v^) < eps. u_rms, f9, bc: RMS of r, share of abs(r) > 0.9, bimodality coefficient
    (skew^2 + 1) / kurtosis. surprise: g_rms over the root of the mean v^ of the step before. lag_cosine: cosine of
    this gradient and the last. descent_cosine: of r and the gradient. update_ratio: rate norm(r) / norm(weights).
    stable_rms: sqrt(mean g^2 / max(v^, eps^2)). Beside them num_active (coordinates counted), unseen (share that has
    never had a gradient) and num_nonfinite.
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
        "unseen": 1 - (total["seen"] + total["nonfinite"]) / np.maximum(num_sampled, 1),
        "num_nonfinite": total["nonfinite"],
    }


def _median(counts: Numbers) -> Numbers:
    """Median of values counted in bins of STALL_DECADES, by row, interpolated within its bin."""
    low, high = STALL_DECADES
    half = counts.sum(1, keepdims=True) / 2
    upto = counts.cumsum(1)
    bins = (upto < half).sum(1, keepdims=True).clip(max=STALL_BINS - 1)
    inside = np.take_along_axis(counts, bins, 1)
    below = np.take_along_axis(upto, bins, 1) - inside
    part = np.divide(half - below, inside, out=np.full_like(half, np.nan), where=inside > 0)
    return (10 ** (low + (high - low) * (bins + part) / STALL_BINS))[:, 0]
