"""The fitted constants that ship, with their confidence, and the interval they give a prediction."""

import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from puna.plan.estimate import Constants, estimate
from puna.plan.layout import Columns
from puna.plan.output import write

FILE = Path(__file__).parent / "constants.json"
Z80 = 1.2816
MIXTURE_SPREAD = 0.371
"""Spread of log errors on mixtures, none of which any fit saw: the 80th percentile over 87 published rows, over Z80."""
FROZEN_SPREAD = 0.159
"""The same of frozen decoders, over 54 published rows of adapters."""


@dataclass(frozen=True)
class Fitted:
    """Constants, the spread of log errors on sources that no fit saw, and fits to draws of the sources."""

    constants: Constants
    spread: float
    draws: tuple[Constants, ...] = ()

    def predict(self, c: Columns) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Seconds of a step, and the ends of their 80 % interval.

        In the logarithm: the residual spread and that of the draws for this very job, added as variances.
        """
        middle = estimate(c, self.constants)["seconds"]
        drawn = [np.log(estimate(c, draw)["seconds"] / middle) for draw in self.draws]
        own = np.mean(np.square(drawn), axis=0) if drawn else np.zeros_like(middle)
        unseen = np.select([c.E > 0, c.frozen > 0], [MIXTURE_SPREAD, FROZEN_SPREAD], 0.0)
        spread = np.maximum(self.spread, unseen)
        half = Z80 * np.sqrt(spread**2 + own)
        return middle, middle * np.exp(-half), middle * np.exp(half)

    def confidence(self) -> dict[str, dict[str, float]]:
        """Of each constant: its value, and the 10th and 90th percentile over the draws."""
        drawn = np.array([draw.vector() for draw in self.draws]) if self.draws else self.constants.vector()[None]
        low, high = np.quantile(drawn, [0.1, 0.9], axis=0)
        values = asdict(self.constants)
        return {
            name: {"value": values[name], "low": float(low[i]), "high": float(high[i])} for i, name in enumerate(values)
        }


def save(fitted: Fitted, path: Path = FILE, **about: Any) -> None:
    """Write the constants as JSON. Raises DataError."""
    table = about | {
        "constants": {
            name: {k: float(f"{v:.5g}") for k, v in entry.items()} for name, entry in fitted.confidence().items()
        },
        "spread": round(fitted.spread, 5),
        "draws": [[float(f"{value:.5g}") for value in draw.vector()] for draw in fitted.draws],
    }
    write(path, json.dumps(table, indent=1) + "\n")


def about(path: Path = FILE) -> dict[str, Any]:
    """What the file says of its fit: runs, errors with each source left out."""
    return dict(json.loads(path.read_text(encoding="utf-8")))


@cache
def load(path: Path = FILE) -> Fitted:
    """Read what `save` wrote."""
    table = json.loads(path.read_text(encoding="utf-8"))
    values = {name: entry["value"] for name, entry in table["constants"].items()}
    return Fitted(Constants(**values), table["spread"], tuple(Constants.of(np.array(draw)) for draw in table["draws"]))
