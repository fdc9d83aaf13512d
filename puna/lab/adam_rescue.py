"""Diverging runs again, under every remedy: how many end where the healthy run ends."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from puna.lab.adam_jobs import ARMS
from puna.lab.adam_spec import Job, RunSpec
from puna.lab.adam_store import complete

NEAR = 1.02  # of the reference's loss
SHORT = {"act": True, "good_after": 40, "margin": 10, "wait": 30, "recover": 40}
"""The controller in runs of a few hundred steps: what it waits for is shorter in proportion."""


def rescue(specs: Sequence[RunSpec], folder: Path, num_workers: int) -> dict[str, dict[str, Any]]:
    """By arm: share of the runs whose held-out loss ends within 2 % of the reference's, median ratio, worst ratio."""
    references = complete([Job(spec.reference(), watch=False) for spec in specs], folder, num_workers, "references")
    found = {}
    for arm in ARMS:
        jobs = [_job(spec, arm) for spec in specs]
        found[arm] = _figures(specs, complete(jobs, folder, num_workers, f"remedy: {arm}"), references)
    return found


def _job(spec: RunSpec, arm: str) -> Job:
    """Nothing is the run of the detector's figures."""
    return Job(spec, arm, watch=arm in ("nothing", "controller"), health=SHORT if arm == "controller" else {})


def _figures(
    specs: Sequence[RunSpec], results: list[dict[str, Any]], references: list[dict[str, Any]]
) -> dict[str, Any]:
    ratios = [_ratio(result, reference) for result, reference in zip(results, references, strict=True)]
    causes = {
        cause: [ratio for spec, ratio in zip(specs, ratios, strict=True) if spec.cause == cause]
        for cause in dict.fromkeys(spec.cause for spec in specs)
    }
    return _counts(ratios) | {"by_cause": {cause: _counts(group) for cause, group in causes.items()}}


def _counts(ratios: list[float]) -> dict[str, Any]:
    rescued = sum(ratio <= NEAR for ratio in ratios)
    return {
        "num_runs": len(ratios),
        "rescued_pct": round(100 * rescued / len(ratios), 2) if ratios else None,
        "median_ratio": round(median(ratios), 4) if ratios else None,
        "worst_ratio": round(min(max(ratios), 1e6), 4) if ratios else None,
    }


def _ratio(result: dict[str, Any], reference: dict[str, Any]) -> float:
    """Held-out loss over the reference's; infinite where it is not finite."""
    return float("inf") if result["heldout"] is None else result["heldout"] / reference["heldout"]
