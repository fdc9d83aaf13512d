"""Fitting the constants to published runs: weighted least absolute log errors, sources balanced."""

from collections.abc import Callable, Sequence

import numpy as np

from puna.plan.estimate import Constants, estimate
from puna.plan.layout import Columns

SOFTS = (0.3, 0.1, 0.04)  # log errors below this count quadratically, in turn
PRIOR = 0.002  # pull of each constant to its start, per unit of log, in shares of the data's weight
BOUNDS = {
    "matmul": (0.6, 1.0), "align": (1e-3, 0.3), "memory": (0.3, 1.0), "attention": (0.2, 1.0), "link": (0.3, 1.0),
    "network": (0.3, 1.0), "hidden": (0.05, 0.95), "low": (0.3, 1.2), "throttle": (0.1, 2.0), "contention": (0.01, 1.0),
}  # fmt: skip
DEFAULT_BOUNDS = (0.02, 50.0)  # of the start


def weights(sources: Sequence[str]) -> np.ndarray:
    """Of each run, so that a source of n runs weighs n / (n + 10): large ones alike, small ones less."""
    names, inverse, counts = np.unique(np.asarray(sources), return_inverse=True, return_counts=True)
    return (1.0 / (counts + 10.0))[inverse]


def fit(c: Columns, seconds: np.ndarray, weight: np.ndarray, start: Constants, steps: int = 25) -> Constants:
    """The constants that minimise the weighted robust log error, by damped Gauss-Newton steps in the logarithm."""
    names = Constants.names()
    begin = start.vector()
    low = np.array([BOUNDS.get(n, (b * DEFAULT_BOUNDS[0], 0))[0] for n, b in zip(names, begin, strict=True)])
    high = np.array([BOUNDS.get(n, (0, b * DEFAULT_BOUNDS[1]))[1] for n, b in zip(names, begin, strict=True)])
    prior = PRIOR * weight.sum()
    target = np.log(seconds)

    def errors(x: np.ndarray) -> np.ndarray:
        return np.log(estimate(c, Constants.of(np.clip(np.exp(x), low, high)))["seconds"]) - target

    center = np.log(begin)
    x = center.copy()
    for soft in SOFTS:
        x = _descend(errors, x, center, weight, prior, (np.log(low), np.log(high)), soft, steps)
    return Constants.of(np.clip(np.exp(x), low, high))


def _descend(
    errors: Callable[[np.ndarray], np.ndarray],
    x: np.ndarray,
    center: np.ndarray,
    weight: np.ndarray,
    prior: float,
    box: tuple[np.ndarray, np.ndarray],
    soft: float,
    steps: int,
) -> np.ndarray:
    """Damped Gauss-Newton steps on the loss of one softness, inside a box."""

    def loss(x: np.ndarray, e: np.ndarray) -> float:
        return float(np.sum(weight * np.sqrt(e**2 + soft**2)) + 0.5 * prior * np.sum((x - center) ** 2))

    damping, e = 1e-2, errors(x)
    best = loss(x, e)
    for _ in range(steps):
        jacobian = np.stack([(errors(x + 1e-4 * unit) - e) / 1e-4 for unit in np.eye(len(x))], axis=1)
        w = weight / np.sqrt(e**2 + soft**2)
        normal = (jacobian * w[:, None]).T @ jacobian + prior * np.eye(len(x))
        slope = (jacobian * w[:, None]).T @ e + prior * (x - center)
        stuck = ((x <= box[0]) & (slope > 0)) | ((x >= box[1]) & (slope < 0))
        slope = np.where(stuck, 0, slope)
        normal[stuck, :], normal[:, stuck] = 0, 0
        normal[stuck, stuck] = 1
        gain = 0.0
        for _ in range(8):
            step = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), slope)
            new = np.clip(x - np.clip(step, -0.7, 0.7), *box)
            tried = errors(new)
            if (value := loss(new, tried)) < best:
                x, e, gain, best, damping = new, tried, best - value, value, max(damping / 4, 1e-4)
                break
            damping = min(damping * 5, 1e4)
        if gain < 2e-5 * best:
            break
    return x
