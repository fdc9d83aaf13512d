"""Slices of every kind, as a function of a seed, and what must hold of each."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest

BOUNDS = (0.001, 0.005, 0.01, 0.02, 0.03, 0.05, 0.2, 0.5)


class Case(NamedTuple):
    rows: np.ndarray
    ids: np.ndarray | None
    bound: float


def values(kind: str, rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    normal = rng.standard_normal(shape)
    made = {
        "normal": lambda: normal * 10.0 ** rng.integers(-6, 6),
        "constant": lambda: np.full(shape, rng.standard_normal()),
        "heavy": lambda: rng.standard_cauchy(shape) ** 3,
        "denormal": lambda: normal * 1e-40,
        "nearly_denormal": lambda: normal * 10.0 ** rng.integers(-38, -28),
        "one_sided": lambda: 1000 + rng.random(shape),
        "far": lambda: 10.0 ** rng.integers(4, 8) + normal,
        "huge": lambda: np.clip(normal * 1e38, -3.4e38, 3.4e38),
        "edges": lambda: rng.integers(-50, 51, shape) * 0.01,
        "rows_of_scales": lambda: normal * np.exp(rng.uniform(-8, 0, (shape[0], 1))),
        "zeros": lambda: rng.choice([0.0, -0.0], shape),
        "two": lambda: rng.choice([-1.5, 2.5], shape),
        "outlier": lambda: normal * 1e-3 + 1e6 * (rng.random(shape) < 0.01),
        "not_finite": lambda: np.where(rng.random(shape) < 0.05, rng.choice([np.nan, np.inf, -np.inf], shape), normal),
        "nothing_finite": lambda: rng.choice([np.nan, np.inf, -np.inf], shape),
        "any_bits": lambda: rng.integers(0, 1 << 32, shape, dtype=np.uint32).view(np.float32),
    }
    with np.errstate(all="ignore"):
        return made[kind]().astype(np.float32)


KINDS = (
    "normal", "constant", "heavy", "denormal", "nearly_denormal", "one_sided", "far", "huge", "edges", "rows_of_scales",
    "zeros", "two", "outlier", "not_finite", "nothing_finite", "any_bits",
)  # fmt: skip


@pytest.fixture(scope="session")
def case_of() -> Callable[[int], Case]:
    def make(seed: int) -> Case:
        rng = np.random.default_rng(seed)
        num_rows, width = int(rng.choice([1, 2, 7, 40, 120])), int(rng.choice([1, 3, 8, 16, 33]))
        num_distinct = int(rng.integers(1, num_rows + 1))
        table = values(KINDS[seed % len(KINDS)], rng, (num_distinct, width))
        ids = rng.integers(0, num_distinct, num_rows)
        names = rng.integers(-(1 << 60), 1 << 60, num_distinct)[ids]
        return Case(table[ids], names if seed // len(KINDS) % 2 else None, float(rng.choice(BOUNDS)))

    return make


@pytest.fixture(scope="session")
def check_bound() -> Callable[[np.ndarray, np.ndarray, float], None]:
    def check(rows: np.ndarray, again: np.ndarray, bound: float) -> None:
        assert again.shape == rows.shape
        assert again.dtype == np.float32
        finite = np.isfinite(rows)
        assert (rows.view(np.uint32)[~finite] == again.view(np.uint32)[~finite]).all()
        if finite.any():
            exact = rows[finite].astype(np.float64)
            error = np.abs(exact - again[finite].astype(np.float64))
            assert error.max() <= bound * (exact.max() - exact.min())
            with np.errstate(over="ignore"):
                assert error.max() <= np.float32(bound) * (rows[finite].max() - rows[finite].min())

    return check


@pytest.fixture(scope="session")
def lookups() -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """Zipf lookups into a table of rows that were trained the more the more often they are met."""

    def make(num_rows: int, width: int, seed: int = 0, num_lookups: int = 2048) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(seed)
        weights = 1 / np.arange(1, num_rows + 1) ** 1.05
        ids = rng.choice(num_rows, num_lookups, p=weights / weights.sum())
        table = rng.uniform(-1, 1, (num_rows, width)) / np.sqrt(num_rows)
        trained = np.minimum(weights / weights[0] * 50, 1)[:, None]
        table += trained * 0.3 * rng.standard_normal((num_rows, width))
        return table.astype(np.float32)[ids], ids

    return make
