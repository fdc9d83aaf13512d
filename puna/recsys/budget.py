"""Bounds for an accuracy budget: the largest ones under which normalised entropy rises by no more, by short rehearsals.

A rehearsal trains on the first samples in one process, with what would be exchanged put through the codec; raw and
compressed ones are alike in all else, so that their difference is the codec's.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from puna.console import track
from puna.errors import DataError
from puna.recsys.clicks import Clicks
from puna.recsys.config import DlrmConfig, ExchangeConfig
from puna.recsys.figures import figures
from puna.recsys.task import DlrmTask
from puna.train.config import ScheduleConfig
from puna.train.task import Cursor

SCALES = (4.0, 2.83, 2.0, 1.41, 1.0, 0.71, 0.5, 0.35, 0.25, 0.125)
"""Of all bounds, both ways; largest first."""


def search(
    config: DlrmConfig, exchange: ExchangeConfig, clicks: Clicks, budget: float, *, samples: int, seed: int = 0
) -> dict[str, Any]:
    """budget: relative rise of the normalised entropy, such as 0.0002. samples: of a rehearsal, and as many held out.

    Returns scale (None where even the smallest is too much), tight, base, loose, backward_bound, ne, ne_raw, rise, and
    the trials. Raises DataError where the clicks have no samples held out.
    """
    if not {"valid", "test"} & clicks.splits.keys():
        raise DataError(f"{clicks.folder} has no valid or test split", "Import with --valid-share or --test-share.")
    short = config.model_copy(update={"samples": samples})
    raw = _rehearse(short, ExchangeConfig(), clicks, samples, seed)
    trials: list[dict[str, float]] = []

    def fits(scale: float) -> bool:
        ne = _rehearse(short, scaled(exchange, scale), clicks, samples, seed)
        trials.append({"scale": scale, "ne": ne, "rise": ne / raw - 1})
        return trials[-1]["rise"] <= budget

    scale = largest(fits)
    best = next((trial for trial in trials if trial["scale"] == scale), None)
    bounds = scaled(exchange, scale) if scale else None
    names = ("tight", "base", "loose", "backward_bound")
    return {
        "scale": scale,
        **({name: vars(bounds)[name] for name in names} if bounds else {}),
        "ne_raw": raw,
        "ne": best["ne"] if best else None,
        "rise": best["rise"] if best else None,
        "trials": trials,
    }


def largest(fits: Callable[[float], bool]) -> float | None:
    """The largest scale that fits, by bisection: what fits is taken to go on fitting when it gets smaller."""
    low, high = 0, len(SCALES)
    bar = track(range(len(SCALES).bit_length()), "rehearsing")
    while low < high:
        next(bar, None)
        middle = (low + high) // 2
        low, high = (low, middle) if fits(SCALES[middle]) else (middle + 1, high)
    bar.close()  # type: ignore[attr-defined]
    return SCALES[low] if low < len(SCALES) else None


def scaled(exchange: ExchangeConfig, scale: float) -> ExchangeConfig:
    """The exchange with all bounds times `scale`, rehearsed on one process, its factor at its end."""
    names = ("tight", "base", "loose", "backward_bound")
    bounds = {name: min(0.5, vars(exchange)[name] * scale) for name in names}
    return exchange.model_copy(update={**bounds, "local": True, "decay_steps": 0})


def _rehearse(config: DlrmConfig, exchange: ExchangeConfig, clicks: Clicks, samples: int, seed: int) -> float:
    """Normalised entropy on the held-out samples."""
    task = DlrmTask(config, exchange, ScheduleConfig(decay="constant"), clicks, seed=seed)
    for unit in task.units(Cursor()):
        task.step(unit)
    held = "valid" if "valid" in clicks.splits else "test"
    count = clicks.count(held)
    logits, labels = task.predict(held, max(0, count - samples), count)
    return float(np.float64(figures(logits, labels)["ne"]))
