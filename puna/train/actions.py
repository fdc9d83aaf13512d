"""What the controller sees, what it may do, and within which bounds. Without torch: plain numbers on the host."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Limits:
    """Thresholds and bounds of the controller. Numbers of steps unless said otherwise."""

    # level 1: a tensor whose update epsilon damps
    stall: float = 10.0  # sqrt(v) / eps below which a tensor stalls
    stall_steps: int = 50  # in a row
    free: float = 100.0  # sqrt(v) / eps that lowering eps aims at
    eps_factor: float = 1e-3
    eps_floor: float = 1e-30
    aligned: float = 0.6  # lag cosine above which a stalled tensor also goes slower
    slow: float = 0.5
    slow_steps: int = 200
    rise: float = 2.0  # of an update over its usual size, from which on an alarm holds it
    calm_steps: int = 20  # in a row that nothing had to be held, after which a hold is over
    usual_rate: float = 0.05  # of the running mean of the size of updates
    # level 2: a burst, seen before the update
    burst: float = 10.0  # surprise: gradient RMS over the root of the mean second moment
    dead: float = 100.0  # surprise that no living tensor has: it is a burst without any other alarm
    min_age: int = 20  # steps since a tensor's moments began
    ramp_steps: int = 50  # the rate goes from 1 / ramp_steps to 1 after a reset
    reset_share: float = 0.05  # most resets in a step, as a share of the tensors, but not below
    min_resets: int = 8
    bad_batch_share: float = 0.5  # of the tensors burst at once: the batch is to blame
    # level 3: a bad batch
    norm_z: float = 6.0
    norm_ratio: float = 1.5  # to the mean norm: below it no norm is bad, however steady it was
    calm_norms: int = 10  # with a usual gradient norm before a skip
    max_skips: int = 3
    skip_window: int = 100
    # level 4: a spike of the loss
    loss_z: float = 6.0
    spike_steps: int = 3  # in a row
    window: int = 100  # losses that median and deviation are of
    min_losses: int = 30
    recent: int = 30  # losses that a single one is held against
    max_lost: int = 40  # in a row far above recent ones, after which they are taken for usual
    min_scale: float = 0.005  # of the median: the least that counts as a deviation of the loss
    slope_steps: int = 10  # losses in each of the two medians that say whether it falls
    wait: int = 200  # for a spike that falls by itself
    margin: int = 100  # before the onset, where a roll-back goes to
    good_after: int = 200  # without level 2 or more, after which a checkpoint is good
    num_good: int = 3  # good checkpoints that stay
    rate_after: float = 0.7
    rate_steps: int = 1000
    again_steps: int = 2000
    rate_again: float = 0.5
    beta2_again: float = 0.95


@dataclass(frozen=True)
class Symptoms:
    """One tensor before its update, from its gradient and the moments of the step before."""

    surprise: float  # gradient RMS / sqrt(mean v^)
    stall: float  # median sqrt(v^) / the epsilon that it is updated with
    lag_cosine: float
    ratio: float  # of the update, as it would be made, to the weights
    age: int  # steps since its moments began
    eps: float  # of its parameter group
    eps_floor: float = 0.0  # that its dtype allows


@dataclass(frozen=True)
class Knobs:
    """How one tensor is updated in one step: rate times the group's own; eps None: the group's."""

    rate: float = 1.0
    eps: float | None = None


@dataclass(frozen=True)
class Plan:
    """What happens to the tensors in one step."""

    skip: bool = False  # no tensor changes, nor its moments
    resets: tuple[str, ...] = ()
    knobs: dict[str, Knobs] = field(default_factory=dict)
    records: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What happens to a step as a whole, before any weight changes."""

    kind: Literal["go", "skip", "roll_back", "stop"] = "go"
    onset: int = 0  # step at which it began
    reason: str = ""
    records: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Recovery:
    """What roll-backs leave behind for a step: a rate, a bound on beta 2, moments to be zeroed before it."""

    rate: float = 1.0
    beta2: float = 1.0
    reset: bool = False
    first: bool = False  # the first step after a roll-back


def action(
    step: int,
    level: int,
    name: str,
    reason: str,
    *,
    statistic: str,
    value: float,
    threshold: float,
    tensor: str | None = None,
    before: float | None = None,
    after: float | None = None,
) -> dict[str, Any]:
    """A record of one action; numbers that are not finite become null, as JSON has none. tensor None: all of them."""
    numbers = {"value": value, "threshold": threshold, "before": before, "after": after}
    return {
        "event": "health_action",
        "step": step,
        "level": level,
        "action": name,
        "tensor": tensor,
        "statistic": statistic,
        **{key: number if number is not None and math.isfinite(number) else None for key, number in numbers.items()},
        "reason": reason,
    }


def ramp(steps_since: int, ramp_steps: int) -> float:
    """Factor of the rate `steps_since` a reset (0: the step of the reset): linear from 1 / ramp_steps to 1."""
    return min(1.0, (steps_since + 1) / ramp_steps)
