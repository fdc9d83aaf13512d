"""What the detector's figures are counted from: labels, alarms and leads of runs, and areas under ROC curves.

A run diverges where its loss has an onset (`puna.lab.adam_labels`). It was detected if the monitor raised an alarm (a
score of 1) in a step before the onset and not before the burst; the step of the coherent burst is known from the
specification: the end of a stall, the start of a data burst or change (where the loss moves before that, or there is
none, any step). The lead is the onset minus that step of alarm, in steps. A healthy run with an alarm in any step is a
false alarm. A score of a run is its largest value before the onset, or over the whole of a healthy run.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from puna.lab.adam_labels import auc, loss_z, norm_z, onsets
from puna.lab.adam_spec import CHANGES, RunSpec

ALARM = 1.0  # score
RIVALS = ("gradnorm", "loss_z", "update_rms", "stall_only")


@dataclass(frozen=True)
class Outcome:
    """A run, judged. Steps are counted from 0."""

    title: str
    cause: str
    onset: int | None
    burst: int | None
    alarm: int | None  # first step at alarm from the burst on
    early: bool  # at alarm before the burst
    scores: Mapping[str, float]

    @property
    def diverging(self) -> bool:
        """Whether the loss has an onset."""
        return self.onset is not None

    @property
    def lead(self) -> int | None:
        """Steps from the alarm to the onset, where the alarm came first."""
        if self.onset is None or self.alarm is None or self.alarm >= self.onset:
            return None
        return self.onset - self.alarm

    @property
    def detected(self) -> bool:
        """Diverging, with an alarm before the loss moved."""
        return self.lead is not None

    @property
    def false_alarm(self) -> bool:
        """Healthy, with an alarm at any step."""
        return not self.diverging and (self.alarm is not None or self.early)

    def as_json(self) -> dict[str, Any]:
        """For a list of runs."""
        found = {key: getattr(self, key) for key in ("title", "cause", "onset", "burst", "alarm", "early", "lead")}
        return found | {"scores": {key: _number(value) for key, value in self.scores.items()}}


def burst_step(spec: RunSpec) -> int | None:
    """Step at which the cause reaches the update at the earliest; None: there is no such step."""
    if spec.tensors:
        return spec.start + spec.length
    changed = spec.warmup_cut or any(getattr(spec, key) is not None for key in CHANGES)
    return spec.start if changed or spec.burst != "none" else None


def outcome(result: Mapping[str, Any]) -> Outcome:
    """Judge the result of `puna.lab.adam_trial.train` under the monitor."""
    spec, columns = RunSpec.model_validate(result["spec"]), result["columns"]
    losses = _column(columns, "loss")
    found = onsets(losses)
    onset, burst = (found[0] if found else None), burst_step(spec)
    if onset is not None and burst is not None and onset <= burst:
        burst = None
    alarms = np.flatnonzero(_column(columns, "score") >= ALARM)
    after = alarms[alarms >= (burst or 0)]
    return Outcome(
        title=spec.title,
        cause=spec.cause,
        onset=onset,
        burst=burst,
        alarm=int(after[0]) if len(after) else None,
        early=len(alarms) > len(after),
        scores={key: float(np.max(values[:onset], initial=0.0)) for key, values in _scores(columns, losses).items()},
    )


def _scores(columns: Mapping[str, Any], losses: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "ours": _column(columns, "score"),
        "gradnorm": norm_z(_column(columns, "grad_norm")),
        "loss_z": loss_z(losses),
        "update_rms": _column(columns, "update_rms")[30:],
        "stall_only": _column(columns, "stall_share"),
    }


def _column(columns: Mapping[str, Any], key: str) -> np.ndarray:
    return np.array([np.inf if value is None else value for value in columns[key]], dtype=float)


def _number(value: float) -> float | None:
    """Four figures; None for what is not finite."""
    return float(f"{value:.4g}") if np.isfinite(value) else None


def figures(outcomes: Iterable[Outcome]) -> dict[str, Any]:
    """The detector's figures over runs; None where there is nothing to count."""
    outcomes = list(outcomes)
    diverging = [one for one in outcomes if one.diverging]
    healthy = [one for one in outcomes if not one.diverging]
    areas = {
        f"auc_{key}": auc([one.scores[key] for one in diverging], [one.scores[key] for one in healthy])
        for key in ("ours", *RIVALS)
    }
    causes = defaultdict(list)
    for one in outcomes:
        causes[one.cause].append(one)
    return _counts(outcomes) | areas | {"by_cause": {cause: _counts(group) for cause, group in causes.items()}}


def _counts(outcomes: list[Outcome]) -> dict[str, Any]:
    diverging = [one for one in outcomes if one.diverging]
    healthy = [one for one in outcomes if not one.diverging]
    leads = [one.lead for one in diverging if one.lead is not None]
    return {
        "num_diverging": len(diverging),
        "num_healthy": len(healthy),
        "detected_pct": _percent(sum(one.detected for one in diverging), len(diverging)),
        "median_lead_steps": median(leads) if leads else None,
        "false_alarm_pct": _percent(sum(one.false_alarm for one in healthy), len(healthy)),
    }


def _percent(part: int, whole: int) -> float | None:
    return round(100 * part / whole, 2) if whole else None
