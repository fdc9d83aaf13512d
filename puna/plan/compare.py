"""A run that happened beside what was predicted for it."""

from pathlib import Path
from statistics import median
from typing import Any

from puna import report
from puna.plan.constants import Fitted
from puna.plan.describe import describe
from puna.plan.layout import Case
from puna.plan.workload import PlanError


def compare(case: Case, run: Path, fitted: Fitted) -> dict[str, Any]:
    """Step time and memory, predicted and measured (the median step after the first, the largest memory of a rank).

    Raises PlanError where the run has recorded fewer than two steps.
    """
    records = report.read(run)
    steps = [value for _, value in records.series("step_s")][1:]
    if not steps:
        raise PlanError(f"{run} has recorded fewer than two steps", "Train it for some steps first.")
    figures = describe(case, fitted)
    measured = median(steps)
    held = [value for _, value in records.series("peak_memory_bytes")]
    return {
        "steps": len(steps),
        "predicted_s": figures["seconds"],
        "low_s": figures["low"],
        "high_s": figures["high"],
        "measured_s": measured,
        "error": figures["seconds"] / measured - 1,
        "inside": figures["low"] <= measured <= figures["high"],
        "parts": figures["parts"],
        "predicted_gb": figures["memory_gb"]["total"],
        "measured_gb": max(held) / 1e9 if held else None,
    }
