"""Slices to measure a codec on: what 26 embedding tables of a small DLRM give for one batch of lookups.

Cardinalities are those of Criteo Kaggle, capped at 200,000 rows; ids are Zipf(1.05); values come from training (bottom
13-512-256-64-D, pairwise products, top 512-256-1, SGD 0.1, 1,500 batches of 128, DLRM's initialisation) on clicks that
the ids and the dense features decide. A function of the seed and D, up to the rounding of torch's matrix products.
"""

from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

CARDINALITIES = (
    1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27, 14992, 5461306, 10, 5652,
    2173, 4, 7046547, 18, 15, 286181, 105, 142572,
)  # fmt: skip
CAP, SKEW = 200_000, 1.05
NUM_LOOKUPS, NUM_BATCHES, BATCH, RATE, NUM_DENSE = 2048, 1500, 128, 0.1, 13
TIGHT, LOOSE = {2, 3, 9, 11, 15, 20, 23, 25}, {8, 16, 19, 21, 22, 24}


class Table(NamedTuple):
    """Looked-up rows (n, D), and ids (n,) where they are known."""

    name: str
    rows: np.ndarray
    ids: np.ndarray | None


def kaggle_bound(number: int) -> float:
    """The published bound of a Kaggle table: by the number of its rows."""
    return 0.01 if number in TIGHT else 0.05 if number in LOOSE else 0.03


def read_slices(folder: Path) -> list[Table]:
    """NAME.rows.npy (n, D) float32 with NAME.ids.npy (n,) where there are ids, by name."""
    found = []
    for path in sorted(folder.glob("*.rows.npy")):
        ids = path.with_name(path.name.replace(".rows.npy", ".ids.npy"))
        found.append(Table(path.name[: -len(".rows.npy")], np.load(path), np.load(ids) if ids.exists() else None))
    return found


def seeded_slices(dim: int, cache: Path, seed: int = 0) -> list[Table]:
    """The 26 tables' slices, trained once and kept in the cache."""
    folder = cache / f"seed-{seed}-dim-{dim}"
    if not (folder / "done").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for table in _train(dim, seed):
            np.save(folder / f"{table.name}.rows.npy", table.rows)
            np.save(folder / f"{table.name}.ids.npy", table.ids)
        (folder / "done").touch()
    return read_slices(folder)


class _Clicks:
    """Dense features, Zipf ids of every table, and labels that they decide."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.sizes = np.minimum(CARDINALITIES, CAP)
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)[:-1]])
        weights = 1 / np.arange(1, CAP + 1) ** SKEW
        self.cumulative = np.cumsum(weights)
        self.effects = self.rng.normal(0, 0.4, self.sizes.sum()).astype(np.float32)
        self.slopes = self.rng.normal(0, 0.2, NUM_DENSE)

    def ids(self, count: int) -> np.ndarray:
        """(count, 26), each within its table."""
        drawn = self.rng.random((count, len(self.sizes))) * self.cumulative[self.sizes - 1]
        return np.minimum(np.searchsorted(self.cumulative, drawn), self.sizes - 1)

    def batch(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Dense (B, 13), rows of the joint table (B, 26), labels (B,)."""
        dense = np.log1p(self.rng.lognormal(0, 1, (count, NUM_DENSE)))
        rows = self.ids(count) + self.starts
        logits = (dense - 0.9) @ self.slopes + self.effects[rows].sum(1) - 1
        labels = self.rng.random(count) < 1 / (1 + np.exp(-logits))
        return torch.tensor(dense, dtype=torch.float32), torch.tensor(rows), torch.tensor(labels, dtype=torch.float32)


def _layers(widths: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        linear = nn.Linear(fan_in, fan_out)
        nn.init.normal_(linear.weight, 0, (2 / (fan_in + fan_out)) ** 0.5)
        nn.init.normal_(linear.bias, 0, (1 / fan_out) ** 0.5)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers)


def _train(dim: int, seed: int) -> list[Table]:
    torch.manual_seed(seed)
    clicks = _Clicks(seed)
    spread = torch.tensor(np.repeat(1 / np.sqrt(clicks.sizes), clicks.sizes), dtype=torch.float32)[:, None]
    table = (torch.rand(len(spread), dim) * 2 - 1) * spread
    bottom = _layers([NUM_DENSE, 512, 256, 64, dim])
    num_vectors = 1 + len(CARDINALITIES)
    pairs = torch.tril_indices(num_vectors, num_vectors, -1)
    top = _layers([dim + pairs.shape[1], 512, 256, 1])[:-1]
    optimizer = torch.optim.SGD([*bottom.parameters(), *top.parameters()], RATE)
    for _ in range(NUM_BATCHES):
        dense, rows, labels = clicks.batch(BATCH)
        vectors = table[rows].requires_grad_()
        seen = bottom(dense)
        every = torch.cat([seen[:, None], vectors], 1)
        products = (every @ every.transpose(1, 2))[:, pairs[0], pairs[1]]
        loss = nn.functional.binary_cross_entropy_with_logits(top(torch.cat([seen, products], 1))[:, 0], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert vectors.grad is not None
        table.index_add_(0, rows.reshape(-1), vectors.grad.reshape(-1, dim), alpha=-RATE)
    ids = clicks.ids(NUM_LOOKUPS)
    return [
        Table(f"t{t:02d}", table[torch.tensor(ids[:, t] + start)].numpy(), ids[:, t].copy())
        for t, start in enumerate(clicks.starts)
    ]
