"""When a loss diverged, and how well a score foresaw it.

The rule: a step is high where its loss lies more than 6 deviations (1.4826 times the median absolute deviation) above
the median of the 100 losses before; the onset is the first of 3 high steps in a row, which are not among the 100
losses of one another, or a loss that is not finite. Onsets less than 2,000 steps apart are one event.
"""

import math

import numpy as np
from numpy.typing import ArrayLike

from puna.train.clipping import ZClip

WINDOW, KAPPA, RUN, APART = 100, 6.0, 3, 2_000
MAD_TO_STD = 1.4826
FIRST = 25  # losses without which there is no deviation


def deviation(loss: float, before: np.ndarray) -> float:
    """Robust deviations of a loss above the losses before; infinite for a loss that is not finite."""
    if not np.isfinite(loss):
        return float("inf")
    middle = np.median(before)
    spread = MAD_TO_STD * np.median(np.abs(before - middle))
    return float((loss - middle) / max(spread, np.finfo(float).tiny))


def onsets(losses: ArrayLike) -> list[int]:
    """Indices of the first high step of every event."""
    curve = np.asarray(losses, dtype=float)
    found: list[int] = []
    run = 0
    for index in range(len(curve)):
        finite = np.isfinite(curve[index])
        if index - run < WINDOW and finite:
            continue
        high = not finite or deviation(curve[index], curve[index - run - WINDOW : index - run]) > KAPPA
        run = run + 1 if high else 0
        if not finite or run == RUN:
            first = index - run + 1
            if not found or first - found[-1] >= APART:
                found.append(first)
    return found


def loss_z(losses: ArrayLike) -> np.ndarray:
    """Deviation of every loss above up to 100 before it; 0 for the first 25."""
    curve = np.asarray(losses, dtype=float)
    return np.array(
        [
            deviation(loss, curve[max(0, index - WINDOW) : index]) if index >= FIRST else 0.0
            for index, loss in enumerate(curve)
        ]
    )


def norm_z(norms: ArrayLike) -> np.ndarray:
    """Deviations of every gradient norm above its running mean, as ZClip counts them; 0 for the first 25."""
    zclip, scores = ZClip(), []
    for norm in map(float, np.asarray(norms)):
        scores.append(zclip.trend.z(norm) if math.isfinite(norm) else math.inf)
        zclip.limit(norm)
    return np.array(scores)


def auc(diverging: ArrayLike, healthy: ArrayLike) -> float | None:
    """Area under the ROC: how often a diverging run's score exceeds a healthy one's, ties as halves."""
    high, low = np.asarray(diverging, dtype=float), np.asarray(healthy, dtype=float)
    if not len(high) or not len(low):
        return None
    above = (high[:, None] > low).mean()
    return float(above + (high[:, None] == low).mean() / 2)
