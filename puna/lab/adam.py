"""Controlled experiments on Adam's instability (Molybog et al. 2023, arXiv 2304.09871): small, seeded, on real text.

injection    some tensors stall and burst: the loss, and the histogram of the update r, before and after
mitigation   the same under twelve remedies
search       no injection: where does training diverge by itself?
scale        epsilon beside the gradient: how it damps the embedding's update
batch        a larger batch: gradients of successive steps agree more
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np

from puna.lab.adam_arms import MITIGATIONS
from puna.lab.adam_labels import onsets
from puna.lab.adam_spec import Job, RunSpec
from puna.lab.adam_store import complete

STALLED, STALLED_LAYERS = ("model.layers.*",), ("layer 0", "layer 1")
RELEASE = 160
AROUND = 20  # steps before and after the release that are compared
CENTRE, SIDE = 0.2, 0.5  # abs(r) of the middle peak, and beyond which a coordinate is in a side peak
PEAK = 0.2  # share of the coordinates that makes a peak
NEVER_FALLS = 1e6


@dataclass(frozen=True)
class Where:
    """Where an experiment reads and writes, with how many processes and seeds."""

    folder: Path
    num_workers: int = 1
    num_seeds: int = 20
    data: str = "stdlib"


def stall_and_burst(seed: int, data: str, steps_after: int) -> RunSpec:
    """The blocks without gradients for the first 160 steps, then with them; embedding, last norm and head train on."""
    return RunSpec(
        name=f"injection-{seed}", cause="stall", seed=seed, data=data, dim=48, rate=0.03, beta2=0.999, tensors=STALLED,
        length=RELEASE, depth=1e-9, steps=RELEASE + steps_after,
    )  # fmt: skip


def _losses(result: dict[str, Any]) -> np.ndarray:
    return np.array([np.inf if value is None else value for value in result["columns"]["loss"]])


# --- injection --------------------------------------------------------------------------------------------------------


def injection(where: Where) -> dict[str, Any]:
    """Spikes over seeds, and shares of r in the middle and beside it by layer, at a step before and at the release."""
    specs = [stall_and_burst(seed, where.data, AROUND) for seed in range(where.num_seeds)]
    jobs = [Job(spec, health={"histogram_every": 10}) for spec in specs]
    rows = [_burst(result) for result in complete(jobs, where.folder, where.num_workers, "injection")]
    return {
        "num_seeds": len(rows),
        "median_spike_nats": round(median(row["spike"] for row in rows), 3),
        "least_spike_nats": round(min(row["spike"] for row in rows), 3),
        "num_spikes_of_a_nat": sum(row["spike"] >= 1 for row in rows),
        "num_two_peaks": sum(row["two_peaks"] for row in rows),
        "num_others_one_peak": sum(row["others_one_peak"] for row in rows),
        "num_alarms_at_release": sum(row["alarm"] == RELEASE for row in rows),
        "seeds": rows,
    }


def _burst(result: dict[str, Any]) -> dict[str, Any]:
    losses, before, after = _losses(result), *_histograms(result)
    spike = losses[RELEASE : RELEASE + AROUND].max() - losses[RELEASE - AROUND : RELEASE].mean()
    score = np.array(result["columns"]["score"], dtype=float)
    alarms = np.flatnonzero(score >= 1)
    stalled = [(before[layer], after[layer]) for layer in STALLED_LAYERS]
    return {
        "seed": result["spec"]["seed"],
        "spike": round(float(spike), 3),
        "onset": next(iter(onsets(losses)), None),
        "alarm": int(alarms[0]) if len(alarms) else None,
        "two_peaks": all(_is_one_peak(old) and _is_two_peaks(new) for old, new in stalled),
        "others_one_peak": not any(_is_two_peaks(after[layer]) for layer in after if layer not in STALLED_LAYERS),
        "before": before,
        "after": after,
    }


def _histograms(result: dict[str, Any]) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Shares by layer in the newest histogram before the release, and in the one of its step (numbered from 1)."""
    found = {record["step"]: record["layers"] for record in result["records"] if record["event"] == "health_histogram"}
    release = RELEASE + 1
    before = max(step for step in found if step < release)
    return tuple({layer: _shares(counts) for layer, counts in found[step].items()} for step in (before, release))  # type: ignore[return-value]


def _shares(counts: Sequence[int]) -> dict[str, float]:
    middles = np.linspace(-2, 2, len(counts) + 1)[:-1] + 2 / len(counts)
    share = np.array(counts) / max(1, sum(counts))
    parts = {"centre": np.abs(middles) < CENTRE, "left": middles < -SIDE, "right": middles > SIDE}
    return {name: round(float(share[inside].sum()), 3) for name, inside in parts.items()}


def _is_one_peak(share: dict[str, float]) -> bool:
    return share["centre"] > PEAK > max(share["left"], share["right"])


def _is_two_peaks(share: dict[str, float]) -> bool:
    """Of the embedding, rows of characters that the batch does not have stay in the middle."""
    return min(share["left"], share["right"]) > PEAK


# --- mitigation -------------------------------------------------------------------------------------------------------


def mitigation(where: Where) -> dict[str, Any]:
    """By remedy: mean loss before the release, largest after it, and 20 and 80 steps later, as means over seeds."""
    specs = [stall_and_burst(seed, where.data, 90) for seed in range(where.num_seeds)]
    arms = {}
    for arm in MITIGATIONS:
        jobs = [Job(spec, arm, watch=False) for spec in specs]
        rows = [_around(result) for result in complete(jobs, where.folder, where.num_workers, f"remedy: {arm}")]
        arms[arm] = {key: round(mean(row[key] for row in rows), 3) for key in rows[0]}
    return {"num_seeds": len(specs), "arms": arms}


def _around(result: dict[str, Any]) -> dict[str, float]:
    losses = np.minimum(_losses(result), NEVER_FALLS)
    near = {"before": losses[RELEASE - AROUND : RELEASE], "after_20": losses[RELEASE + 16 : RELEASE + 25]}
    near |= {"after_80": losses[RELEASE + 76 : RELEASE + 85]}
    return {"largest": float(losses[RELEASE : RELEASE + 60].max())} | {
        key: float(part.mean()) for key, part in near.items()
    }


# --- search -----------------------------------------------------------------------------------------------------------


def search(where: Where) -> dict[str, Any]:
    """Every setting over seeds: onsets by the rule of the labels, and the largest rise above the running median."""
    settings = dict(_settings())
    rows = []
    for name, keys in settings.items():
        jobs = [
            Job(RunSpec(name=f"search-{name}-{seed}", seed=seed, data=where.data, **keys), watch=False)
            for seed in range(where.num_seeds)
        ]
        results = complete(jobs, where.folder, where.num_workers, f"search: {name}")
        rows.append({"setting": name} | _found(results))
    return {"num_seeds": where.num_seeds, "settings": rows}


def _settings() -> list[tuple[str, dict[str, Any]]]:
    rates = (0.01, 0.1, 1.0)
    grid: list[tuple[str, dict[str, Any]]] = []
    for rate in rates:
        grid += [
            (f"rate {rate:g}", {"rate": rate}),
            (f"rate {rate:g}, beta2 0.999", {"rate": rate, "beta2": 0.999}),
            (f"batch 128, rate {rate:g}", {"rate": rate, "batch": 128, "beta2": 0.999, "steps": 180}),
            (f"tied, rate {rate:g}", {"rate": rate, "tie_embeddings": True, "beta2": 0.999}),
            (f"low rank, rate {rate:g}", {"rate": rate, "rank": 4, "beta2": 0.999}),
            (f"moments in bf16, rate {rate:g}", {"rate": rate, "state_dtype": "bf16", "beta2": 0.999}),
            (f"eps 0.01, rate {rate:g}", {"rate": rate, "eps": 0.01, "beta2": 0.999}),
        ]
    grid += [(f"beta2 {beta2:g}, rate 0.005", {"rate": 0.005, "beta2": beta2}) for beta2 in (0.3, 0.5, 0.7)]
    return [(name, {"cause": "search", "steps": 250} | keys) for name, keys in grid]


def _found(results: list[dict[str, Any]]) -> dict[str, Any]:
    curves = [_losses(result) for result in results]
    starts = [next(iter(onsets(curve)), None) for curve in curves]
    return {
        "num_diverging": sum(start is not None for start in starts),
        "onsets": starts,
        "largest_rise_nats": round(min(NEVER_FALLS, max(_rise(curve) for curve in curves)), 2),
        "last_loss": round(mean(min(NEVER_FALLS, result["last_loss"] or NEVER_FALLS) for result in results), 2),
    }


def _rise(curve: np.ndarray) -> float:
    """Largest excess of three losses in a row over the median of the 100 before."""
    lows = np.minimum(np.minimum(curve[:-2], curve[1:-1]), curve[2:])
    return max((float(low - np.median(curve[i - 100 : i])) for i, low in enumerate(lows) if i >= 100), default=0.0)


# --- epsilon and batch ------------------------------------------------------------------------------------------------


def scale(where: Where) -> dict[str, Any]:
    """RMS of the embedding's r over steps 60 to 150 by epsilon, with the loss at the end."""
    cases = {f"eps {eps:g}": {"eps": eps, "beta2": 0.999, "steps": 150} for eps in (1e-8, 1e-5, 1e-4, 1e-3, 1e-2)}
    return _embedding(where, cases, ("u_rms", "stall"), 60, 150)


def batch(where: Where) -> dict[str, Any]:
    """Cosine of successive gradients of the embedding, its share beyond 0.9 and its RMS of r, by batch."""
    cases = {f"batch {rows}": {"batch": rows, "rate": 1e-3, "beta2": 0.999, "steps": 60} for rows in (4, 32, 256)}
    return _embedding(where, cases, ("lag_cosine", "f9", "u_rms"), 20, 60)


def _embedding(
    where: Where, cases: dict[str, dict[str, Any]], keys: Sequence[str], low: int, high: int
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, settings in cases.items():
        jobs = [
            Job(
                RunSpec(name=f"{name}-{seed}", cause="none", seed=seed, data=where.data, **settings),
                health={"record_every": 5},
            )
            for seed in range(where.num_seeds)
        ]
        results = complete(jobs, where.folder, where.num_workers, name)
        tensors = [
            record["tensors"]["model.embed_tokens.weight"]
            for result in results
            for record in result["records"]
            if record["event"] == "health" and low <= record["step"] <= high
        ]
        found[name] = {key: round(mean(tensor[key] for tensor in tensors), 4) for key in keys}
        found[name]["last_loss"] = round(mean(result["last_loss"] for result in results), 3)
    return {"num_seeds": where.num_seeds, "cases": found}


EXPERIMENTS: dict[str, Callable[[Where], dict[str, Any]]] = {
    "injection": injection,
    "mitigation": mitigation,
    "search": search,
    "scale": scale,
    "batch": batch,
}
SEEDS = {"injection": 20, "mitigation": 2, "search": 1, "scale": 1, "batch": 3}
"""Seeds unless said otherwise."""
