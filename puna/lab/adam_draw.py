"""Runs drawn at random, by what goes wrong in them: a run is a function of its kind and its seed.

Seeds below `EVALUATION` are for choosing thresholds, those from there on for judging them. (Those from 5,000 and from
6,000 on judged earlier lists; see docs/benchmarks.md.)
"""

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from puna.lab.adam_labels import onsets
from puna.lab.adam_spec import Job, RunSpec
from puna.lab.adam_store import complete

EVALUATION = 7_000
STEPS = 240
SHARED: dict[str, Any] = {"steps": STEPS, "warmup": 20}

Draw = np.random.Generator
PARTS = (
    ("model.embed_tokens.weight", "*_proj.weight"),
    ("model.embed_tokens.weight", "model.layers.*"),
    ("model.layers.*",),
    ("model.embed_tokens.weight", "model.layers.0.*"),
)


def draw(kind: str, seed: int) -> RunSpec:
    """The run of a kind (a key of `KINDS`) and a seed."""
    random = np.random.default_rng((seed, *kind.encode()))
    size = {"dim": int(random.choice([32, 48])), "num_layers": int(random.choice([2, 2, 3]))}
    settings = SHARED | size | {"cause": kind, "name": f"{kind}-{seed}", "seed": seed}
    return RunSpec(**(settings | KINDS[kind](random)))


def _log(random: Draw, low: float, high: float) -> float:
    return float(f"{np.exp(random.uniform(np.log(low), np.log(high))):.3g}")


def _start(random: Draw) -> int:
    return int(random.integers(140, 155))


def _while(random: Draw) -> int:
    return int(random.integers(20, 31))


# --- meant to diverge; whether they do is read off the loss -----------------------------------------------------------


def _stall(random: Draw) -> dict[str, Any]:
    """Some tensors' gradients vanish early, for 90 to 200 steps. (Of 40 that vanished later, none moved the loss.)"""
    start, length = int(random.integers(30)), int(random.integers(90, 201))
    return {
        "rate": _log(random, 0.01, 0.1), "beta2": float(random.choice([0.99, 0.999])), "steps": start + length + 80,
        "tensors": PARTS[random.integers(len(PARTS))], "start": start, "length": length,
        "depth": _log(random, 1e-9, 1e-3),
    }  # fmt: skip


def _warmup_cut(random: Draw) -> dict[str, Any]:
    """The warm-up is cut short for a while: the rate is at its peak."""
    return {
        "rate": _log(random, 0.3, 0.7), "beta2": float(random.choice([0.95, 0.999])),
        "warmup": int(random.integers(1000, 3000)), "warmup_cut": True, "start": _start(random),
        "length": _while(random),
    }  # fmt: skip


def _batch_jump(random: Draw) -> dict[str, Any]:
    """A batch sixteen times as large, and the rate raised in proportion."""
    rate = _log(random, 0.02, 0.04)
    return {
        "rate": rate, "beta2": float(random.choice([0.95, 0.999])), "start": _start(random),
        "batch": 4, "batch_after": 64, "rate_after": 16 * rate,
    }  # fmt: skip


def _data_burst(random: Draw) -> dict[str, Any]:
    """A single character, or one batch, again and again; then text as before."""
    burst = str(random.choice(["flood", "flood", "flood", "repeat"]))
    return {
        "rate": _log(random, 0.005, 0.03) if burst == "flood" else _log(random, 0.02, 0.04),
        "beta2": float(random.choice([0.95, 0.999])), "burst": burst, "start": _start(random),
        "length": int(random.integers(15, 31)),
    }  # fmt: skip


def _eps(random: Draw) -> dict[str, Any]:
    """Trained under a large epsilon and a rate to match, for a while under a small one."""
    return {
        "rate": _log(random, 0.7, 2.0), "eps": _log(random, 5e-3, 3e-2), "eps_after": _log(random, 1e-10, 1e-6),
        "beta2": 0.999, "start": _start(random), "length": _while(random),
    }  # fmt: skip


def _beta2(random: Draw) -> dict[str, Any]:
    """A second moment that forgets faster than the first, beta2 below beta1 squared, for a while."""
    return {
        "rate": _log(random, 0.02, 0.04), "beta2": float(random.choice([0.95, 0.999])),
        "beta2_after": float(random.choice([0.2, 0.3])), "start": _start(random),
        "length": int(random.integers(26, 41)),
    }  # fmt: skip


def _bf16_states(random: Draw) -> dict[str, Any]:
    """Moments in bf16 at a high rate."""
    return {
        "rate": _log(random, 0.03, 0.3), "beta2": float(random.choice([0.95, 0.99, 0.999])), "state_dtype": "bf16",
        "warmup": int(random.choice([2, 20])),
    }  # fmt: skip


# --- meant to be healthy ----------------------------------------------------------------------------------------------


def _plain(random: Draw) -> dict[str, Any]:
    """Nothing happens."""
    return {
        "rate": _log(random, 0.001, 0.03), "beta2": float(random.choice([0.95, 0.99, 0.999])),
        "batch": int(random.choice([8, 16, 32])), "eps": float(random.choice([1e-8, 1e-10, 1e-6])),
    }  # fmt: skip


def _unseen_rows(random: Draw) -> dict[str, Any]:
    """Nine tenths of the embedding's rows belong to no character of the text."""
    return _plain(random) | {"vocab_size": 1280, "batch": 8, "dim": 32}


def _frozen_layer(random: Draw) -> dict[str, Any]:
    """A block is not trained."""
    return _plain(random) | {"frozen": (f"model.layers.{random.integers(2)}.*",)}


def _rate_change(random: Draw) -> dict[str, Any]:
    """The rate is multiplied by 0.2 to 3 at a step."""
    rate = _log(random, 0.001, 0.01)
    return {"rate": rate, "rate_after": float(f"{rate * _log(random, 0.2, 3.0):.3g}"), "start": _start(random)}


def _batch_change(random: Draw) -> dict[str, Any]:
    """The batch is four times or a quarter as large from a step on."""
    return {"rate": _log(random, 0.001, 0.01), "batch_after": int(random.choice([4, 64])), "start": _start(random)}


def _dormant_adapter(random: Draw) -> dict[str, Any]:
    """Adapters that are there and switched off, or trained from zero."""
    return _plain(random) | {"adapter": str(random.choice(["dormant", "training"]))}


def _soft_stall(random: Draw) -> dict[str, Any]:
    """A stall whose gradients come back by equal ratios."""
    return {
        "rate": _log(random, 0.001, 0.01), "tensors": PARTS[random.integers(len(PARTS))],
        "start": int(random.integers(30, 80)), "length": int(random.integers(20, 31)),
        "depth": _log(random, 1e-5, 1e-2), "release": int(random.integers(80, 110)),
    }  # fmt: skip


KINDS: dict[str, Callable[[Draw], dict[str, Any]]] = {
    "stall": _stall,
    "warmup_cut": _warmup_cut,
    "batch_jump": _batch_jump,
    "data_burst": _data_burst,
    "eps": _eps,
    "beta2": _beta2,
    "bf16_states": _bf16_states,
    "plain": _plain,
    "unseen_rows": _unseen_rows,
    "frozen_layer": _frozen_layer,
    "rate_change": _rate_change,
    "batch_change": _batch_change,
    "dormant_adapter": _dormant_adapter,
    "soft_stall": _soft_stall,
}

DIVERGING = {"stall": 10, "warmup_cut": 5, "data_burst": 6, "eps": 4, "beta2": 5}
HEALTHY = {
    "plain": 4, "unseen_rows": 5, "frozen_layer": 4, "rate_change": 5, "batch_change": 4, "dormant_adapter": 4,
    "soft_stall": 4,
}  # fmt: skip


def drawn_list(folder: Path, num_workers: int) -> list[RunSpec]:
    """The list of the evaluation: of each kind, seed by seed, the first so many runs that have the kind's label.

    Draws whose loss gives them the other label are left out; what the monitor said of them is not looked at.
    """
    wanted = [(kind, number, True) for kind, number in DIVERGING.items()]
    wanted += [(kind, number, False) for kind, number in HEALTHY.items()]
    return [spec for kind, number, diverges in wanted for spec in _first(kind, number, diverges, folder, num_workers)]


def _first(kind: str, number: int, diverges: bool, folder: Path, num_workers: int) -> list[RunSpec]:
    found: list[RunSpec] = []
    for first in count(EVALUATION, number):
        specs = [draw(kind, first + i) for i in range(number)]
        results = complete([Job(spec) for spec in specs], folder, num_workers, f"labels: {kind}")
        labels = (bool(onsets(_losses(result))) for result in results)
        found += [spec for spec, label in zip(specs, labels, strict=True) if label == diverges]
        if len(found) >= number:
            return found[:number]
    raise AssertionError


def _losses(result: dict[str, Any]) -> list[float]:
    return [np.inf if value is None else value for value in result["columns"]["loss"]]
