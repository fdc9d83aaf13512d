"""How well the planner predicts published runs."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from puna.plan.constants import Fitted
from puna.plan.footprint import footprint
from puna.plan.layout import columns
from puna.plan.output import write
from puna.plan.runs import Run, Runs

GRID = "vts"
KEYS = (
    "median_abs_pct_error", "p90_abs_pct_error", "mean_signed_pct_error", "source_balanced_median",
    "interval_coverage_80",
)  # fmt: skip
"""Of a summary, beside n."""
FEWEST = 3
"""Rows a source needs to count in the source-balanced median."""


def validate(found: Runs, fitted: Fitted) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Errors over all runs and by source, and each run's prediction with the ends of its 80 % interval.

    Error = predicted / measured iteration time - 1. The single-node grid `vts` is left out of keys that end in
    `_without_vts`.
    """
    runs = found.runs
    middle, low, high = fitted.predict(columns([run.case for run in runs])) if runs else (np.empty(0),) * 3
    figures = scores(runs, middle, low, high) | {"skipped": found.skipped, "memory": memory([*runs, *found.untimed])}
    rows = [
        {"id": run.id, "predicted_s": float(m), "low_s": float(lo), "high_s": float(hi)}
        for run, m, lo, hi in zip(runs, middle, low, high, strict=True)
    ]
    return figures, rows


def scores(runs: Sequence[Run], middle: np.ndarray, low: np.ndarray, high: np.ndarray) -> dict[str, Any]:
    """The summary of some predictions."""
    measured = np.array([run.seconds for run in runs])
    source = np.array([run.source for run in runs], dtype=str)
    error = middle / measured - 1
    inside = (low <= measured) & (measured <= high)
    rest = source != GRID
    figures = _summary(error, source, inside)
    figures |= {f"{key}_without_vts": value for key, value in _summary(error[rest], source[rest], inside[rest]).items()}
    by_source = {
        str(name): {
            "n": int((source == name).sum()),
            "median_abs_pct_error": _pct(np.median(np.abs(error[source == name]))),
            "p90_abs_pct_error": _pct(np.quantile(np.abs(error[source == name]), 0.9)),
            "mean_signed_pct_error": _pct(error[source == name].mean()),
            "interval_coverage_80": _pct(inside[source == name].mean()),
        }
        for name in sorted(set(source))
    }
    return figures | {"by_source": by_source}


def _summary(error: np.ndarray, source: np.ndarray, inside: np.ndarray) -> dict[str, Any]:
    if not len(error):
        return {"n": 0} | dict.fromkeys(KEYS)
    size = np.abs(error)
    medians = [np.median(size[source == name]) for name in sorted(set(source)) if (source == name).sum() >= FEWEST]
    return {
        "n": len(error),
        "median_abs_pct_error": _pct(np.median(size)),
        "p90_abs_pct_error": _pct(np.quantile(size, 0.9)),
        "mean_signed_pct_error": _pct(error.mean()),
        "source_balanced_median": _pct(np.mean(medians)) if medians else None,
        "interval_coverage_80": _pct(inside.mean()),
    }


def left_out(runs: Sequence[Run], fitted: Fitted, predicted: np.ndarray) -> dict[str, Any]:
    """The summary of predictions that were made without each run's source, under the intervals of the fit."""
    middle, low, high = fitted.predict(columns([run.case for run in runs]))
    return scores(runs, predicted, predicted * low / middle, predicted * high / middle)


GIB = 1.073741824
CONTEXT = 2.0
"""GB that the driver's context and NCCL's buffers take beside the allocator's."""
SLACK = 1.08
"""What the allocator holds over what is allocated."""
UNSAID = "as printed; the source does not say whether allocated, reserved or of the device"
REPORTED = {
    "bloompre": ("nvidia-smi of the first or last stage", 1.0, SLACK, CONTEXT),
    "ttitan": ("reserved, GiB, most of the ranks", GIB, SLACK, 0.0),
    "dlperf": ("nvidia-smi, MiB / 1024", GIB, 1.0, 0.0),
    "mlperf": ("max_memory as logged", 1.0, 1.0, 0.0),
    "zb": (UNSAID, 1.0, 1.0, 0.0),
    "nanotron": (UNSAID, 1.0, 1.0, 0.0),
    "internevo": ("GPU memory in GB; the source does not say which", 1.0, 1.0, 0.0),
    "colossal": (UNSAID, 1.0, 1.0, 0.0),
}
UNKNOWN = (UNSAID, 1.0, 1.0, 0.0)
"""What a source means by peak memory: words, GB of its unit, and what of `footprint` it is: slack and context."""


def memory(runs: Sequence[Run]) -> dict[str, Any]:
    """Errors of the peak memory, over the runs whose source reports one."""
    told = [run for run in runs if np.isfinite(run.memory)]
    if not told:
        return {"n": 0}
    source = np.array([run.source for run in told])
    _, unit, slack, context = zip(*(REPORTED.get(name, UNKNOWN) for name in source), strict=True)
    predicted = footprint(columns([run.case for run in told]))["total"] / 1e9 * slack + context
    error = predicted / (np.array([run.memory for run in told]) * unit) - 1
    return {
        "n": len(told),
        "median_abs_pct_error": _pct(np.median(np.abs(error))),
        "mean_signed_pct_error": _pct(error.mean()),
        "by_source": {
            str(s): {
                "n": int((source == s).sum()),
                "median_abs_pct_error": _pct(np.median(np.abs(error[source == s]))),
                "reported": REPORTED.get(s, UNKNOWN)[0],
            }
            for s in sorted(set(source))
        },
    }


def _pct(share: float) -> float:
    return round(100 * float(share), 2)


def write_predictions(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write id, predicted_s, low_s, high_s; a reader sees the old file or the new one. Raises DataError."""
    text = io.StringIO()
    writer = csv.DictWriter(text, ["id", "predicted_s", "low_s", "high_s"], lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: value if key == "id" else f"{value:.6g}" for key, value in row.items()} for row in rows)
    write(path, text.getvalue())
