"""A run that happened beside what was predicted for it."""

from pathlib import Path
from statistics import median
from typing import Any

from puna import report
from puna.plan.constants import Fitted
from puna.plan.describe import describe
from puna.plan.layout import Case
from puna.plan.local import overlay
from puna.plan.workload import PlanError


def compare(case: Case, run: Path, fitted: Fitted, here: dict[str, Any] | None = None) -> dict[str, Any]:
    """Step time and memory, predicted and measured (the median step after the first, the largest memory of a rank).

    here: what `puna.plan.local.here` says of the case; memory is then resident memory, the code's included, and its
    error that of its growth since the code was imported. Raises PlanError where the run has recorded fewer than two
    steps.
    """
    records = report.read(run)
    steps = [value for _, value in records.series("step_s")][1:]
    if not steps:
        raise PlanError(f"{run} has recorded fewer than two steps", "Train it for some steps first.")
    figures = describe(case, fitted)
    if here is not None:
        figures = overlay(figures, here)
    measured = median(steps)
    held = max((value for _, value in records.series("peak_memory_bytes")), default=None)
    need, code = figures["memory_gb"]["total"], figures["memory_gb"].get("code", 0.0)
    return {
        "steps": len(steps),
        "predicted_s": figures["seconds"],
        "low_s": figures["low"],
        "high_s": figures["high"],
        "measured_s": measured,
        "error": figures["seconds"] / measured - 1,
        "inside": figures["low"] <= measured <= figures["high"],
        "parts": figures["parts"],
        "predicted_gb": need,
        "measured_gb": None if held is None else held / 1e9,
        "memory_error": None if held is None else (need - code) / (held / 1e9 - code) - 1,
        "memory_parts_gb": figures["memory_gb"],
    }
