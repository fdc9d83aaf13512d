"""Fitting the constants to published runs: weighted least absolute log errors, sources balanced.

Nothing is fitted per source or per run: a source's name decides only how much its rows weigh and what is left out.
"""

from collections.abc import Callable, Sequence

import numpy as np

from puna.console import track
from puna.plan.constants import Z80, Fitted
from puna.plan.estimate import Constants, estimate
from puna.plan.layout import Columns, columns
from puna.plan.runs import Run

SOFTS = (0.3, 0.1, 0.04)  # log errors below this count quadratically, in turn
STEP = 1e-4  # of a logarithm, for derivatives
MOST_ROWS = 100  # of one source that a fit looks at, evenly spaced
PRIOR = 0.01  # pull of each constant to its start, per unit of log, in shares of the data's weight
BOUNDS = {
    "matmul": (0.6, 1.0), "align": (1e-3, 1.0), "memory": (0.3, 0.92), "attention": (0.2, 1.0), "link": (0.6, 0.95),
    "network": (0.75, 0.95), "hop": (1.8, 2.2), "hidden": (0.05, 0.95), "low": (0.3, 1.2), "throttle": (0.1, 2.0),
    "contention": (0.01, 1.0),
}  # fmt: skip
DEFAULT_BOUNDS = (0.02, 50.0)  # of the start


def weights(sources: Sequence[str]) -> np.ndarray:
    """Of each run, so that a source of n runs weighs n / (n + 25): large ones alike, small ones less."""
    _, inverse, counts = np.unique(np.asarray(sources), return_inverse=True, return_counts=True)
    return (1.0 / (counts + 25.0))[inverse]


def fit(
    c: Columns, seconds: np.ndarray, weight: np.ndarray, start: Constants | None = None, steps: int = 50
) -> Constants:
    """The constants that minimise the weighted robust log error, by damped Gauss-Newton steps in the logarithm.

    They are pulled weakly to the defaults of `Constants`, wherever they start.
    """
    names = Constants.names()
    begin = Constants().vector()
    low = np.array([BOUNDS.get(n, (b * DEFAULT_BOUNDS[0], 0))[0] for n, b in zip(names, begin, strict=True)])
    high = np.array([BOUNDS.get(n, (0, b * DEFAULT_BOUNDS[1]))[1] for n, b in zip(names, begin, strict=True)])
    prior = PRIOR * weight.sum()
    target = np.log(seconds)

    def errors(x: np.ndarray) -> np.ndarray:
        return np.log(estimate(c, Constants.of(np.clip(np.exp(x), low, high)))["seconds"]) - target

    center = np.log(begin)
    x = center.copy() if start is None else np.log(start.vector())
    for soft in SOFTS if start is None else SOFTS[-2:]:
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
        inward = np.where(x + STEP > box[1], -STEP, STEP)
        jacobian = np.stack([(errors(x + step) - e) / step.sum() for step in np.diag(inward)], axis=1)
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
        if gain < 2e-6 * best:
            break
    return x


def fit_runs(runs: Sequence[Run], start: Constants | None = None) -> Constants:
    """The constants for some runs, at most MOST_ROWS of each source."""
    kept = _thinned(runs)
    seconds = np.array([run.seconds for run in kept])
    return fit(columns([run.case for run in kept]), seconds, weights([run.source for run in kept]), start)


def leave_one_source_out(runs: Sequence[Run]) -> np.ndarray:
    """Seconds predicted for each run by constants fitted without its source, from the defaults on."""
    sources = np.array([run.source for run in runs])
    table = columns([run.case for run in runs])
    predicted = np.empty(len(runs))
    for source in track(sorted(set(sources)), "leave one source out"):
        constants = fit_runs([run for run in runs if run.source != source])
        inside = sources == source
        predicted[inside] = estimate(table.take(inside), constants)["seconds"]
    return predicted


def bootstrap(runs: Sequence[Run], start: Constants, draws: int, seed: int = 0) -> list[Constants]:
    """Constants fitted to draws of the sources with replacement."""
    by_source: dict[str, list[Run]] = {}
    for run in _thinned(runs):
        by_source.setdefault(run.source, []).append(run)
    names = sorted(by_source)
    generator = np.random.default_rng(seed)
    found = []
    for _ in track(range(draws), "bootstrap over sources"):
        times = generator.multinomial(len(names), np.full(len(names), 1 / len(names)))
        drawn = [run for name in names for run in by_source[name] if times[names.index(name)]]
        count = np.array([times[names.index(run.source)] for run in drawn])
        weight = weights([run.source for run in drawn]) * count
        seconds = np.array([run.seconds for run in drawn])
        found.append(fit(columns([run.case for run in drawn]), seconds, weight, start))
    return found


def fit_all(runs: Sequence[Run], draws: int) -> tuple[Fitted, np.ndarray]:
    """Constants with their confidence, and what each run is predicted without its source.

    The residual spread is the 80th percentile of the absolute log errors left out, sources balanced, over 1.2816.
    """
    constants = fit_runs(runs)
    out = leave_one_source_out(runs)
    errors = np.abs(np.log(out / np.array([run.seconds for run in runs])))
    weight = weights([run.source for run in runs])
    order = np.argsort(errors)
    share = np.cumsum(weight[order]) / weight.sum()
    spread = float(errors[order][np.searchsorted(share, 0.8)]) / Z80
    return Fitted(constants, spread, tuple(bootstrap(runs, constants, draws))), out


def _thinned(runs: Sequence[Run]) -> list[Run]:
    by_source: dict[str, list[Run]] = {}
    for run in runs:
        by_source.setdefault(run.source, []).append(run)
    return [run for group in by_source.values() for run in group[:: -(-len(group) // MOST_ROWS)]]
