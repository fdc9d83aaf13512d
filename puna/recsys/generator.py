"""`puna recsys generate`: clicks with a planted truth, in the form of imported ones.

    ids of a table: Zipf, P(k-th most frequent) ~ k^-exponent      dense: normal      bags: 1 to h ids, evenly
    logit = bias + <a, dense> + sum_t w_t[id_t] + c (|sum_t u_t[id_t]|^2 - sum_t |u_t[id_t]|^2) / 2

w and the vectors u are functions of (seed, table, id), so the truth needs no memory; the last term is the sum of the
products of all pairs of vectors, which a model with an interaction can learn. Of a bag, w and u are the sums over its
ids, divided by the root of h. Samples are functions of (seed, chunk).
"""

import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from puna.console import track
from puna.errors import DataError
from puna.recsys.clicks import COLUMNS, FORMAT_VERSION, MANIFEST
from puna.recsys.figures import auc, log_loss
from puna.recsys.importing import write_last
from puna.sparse.compiled import exact_kernel
from puna.sparse.hashing import key_of, mix
from puna.train.hashed import Hashed

CHUNK = 1 << 16
VECTOR = 4
"""Numbers of a planted vector."""
KAGGLE_ROWS = (
    1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27, 14992, 5461306, 10, 5652,
    2173, 4, 7046547, 18, 15, 286181, 105, 142572,
)  # fmt: skip
TERABYTE_ROWS = (
    9980333, 36084, 17217, 7378, 20134, 3, 7112, 1442, 61, 9758201, 1333352, 313829, 10, 2208, 11156, 122, 4, 970, 14,
    9994222, 7267859, 9946608, 415421, 12420, 101, 36,
)  # fmt: skip
ROWS = {"kaggle": KAGGLE_ROWS, "terabyte": TERABYTE_ROWS}


def generate(
    out: Path | str,
    *,
    samples: int,
    test: int,
    rows: Sequence[int] = KAGGLE_ROWS,
    max_rows: int = 0,
    hots: Sequence[int] = (),
    num_dense: int = 13,
    exponent: float = 1.05,
    click_rate: float = 0.25,
    spread: float = 1.0,
    seed: int = 0,
    num_threads: int = 0,
) -> dict[str, Any]:
    """Write `samples` to train on and `test` to test on. rows: of each table, `max_rows` at most (0: no limit).
    hots: ids that a sample has of each table at most; none: one of each.

    spread: deviation of the logits, about. Returns out, samples, click_rate, and of the truth itself on the test
    split best_auc and best_loss: no model can be expected to do better. Raises DataError where `out` holds clicks, or
    hots are of another number of tables.
    """
    out = Path(out)
    if (out / MANIFEST).exists():
        raise DataError(f"{out} holds clicks already", "Name another folder with --out, or remove that one.")
    hots = tuple(hots) or (1,) * len(rows)
    if len(hots) != len(rows) or min(hots) < 1:
        raise DataError(f"bags of {list(hots)} ids do not fit {len(rows)} tables", "Give 1 or more for every table.")
    out.mkdir(parents=True, exist_ok=True)
    sizes = [min(count, max_rows or count) for count in rows]
    truth = _Truth(sizes, hots, num_dense, exponent, click_rate, spread, seed)
    total = samples + test
    starts = range(0, total, CHUNK)
    clicked, logits, files = [], [], {}
    with (
        (out / "labels").open("wb") as labels_file,
        (out / "dense").open("wb") as dense_file,
        (out / "ids").open("wb") as ids_file,
        ThreadPoolExecutor(num_threads or len(os.sched_getaffinity(0))) as pool,
    ):
        raw = {"labels": labels_file, "dense": dense_file, "ids": ids_file}
        hashed = {name: Hashed(file) for name, file in raw.items()}
        chunks = pool.map(lambda start: truth.chunk(start // CHUNK, min(CHUNK, total - start)), starts)
        for start, (columns, logit) in zip(starts, track(chunks, "generating", len(starts)), strict=True):
            for name, file in hashed.items():
                file.write(np.ascontiguousarray(columns[name], COLUMNS[name]))
            left = max(0, samples - start)
            clicked.append(columns["labels"][left:])
            logits.append(logit[left:])
        for name, column in raw.items():
            column.flush()
            os.fsync(column.fileno())
            files[name] = hashed[name].fingerprint
    labels, wanted = np.concatenate(clicked).astype(np.float32), np.concatenate(logits).astype(np.float32)
    manifest = {
        "format_version": FORMAT_VERSION,
        "samples": total,
        "dense": [f"I{n + 1}" for n in range(num_dense)],
        "tables": [f"C{n + 1}" for n in range(len(sizes))],
        "rows": sizes,
        "hots": hots,
        "splits": {"train": [0, samples], "test": [samples, total]},
        "options": {"planted": {"exponent": exponent, "click_rate": click_rate, "spread": spread, "seed": seed}},
        "files": files,
    }
    write_last(out / MANIFEST, json.dumps(manifest, indent=1).encode())
    best = {"best_auc": auc(wanted, labels), "best_loss": log_loss(wanted, labels)} if test else {}
    return {"out": str(out), "samples": total, "num_rows": sum(sizes), **best}


class _Truth:
    """What makes somebody click."""

    def __init__(
        self, sizes: Sequence[int], hots: Sequence[int], num_dense: int, exponent: float, click_rate: float,
        spread: float, seed: int,
    ) -> None:  # fmt: skip
        self.sizes, self.num_dense, self.exponent, self.seed = sizes, num_dense, exponent, seed
        rng = np.random.default_rng([seed, 1])
        num, self.columns = len(sizes), np.concatenate([[0], np.cumsum(hots)])
        self.slopes = rng.normal(size=num_dense) * spread * np.sqrt(0.2 / max(num_dense, 1))
        self.linear = spread * np.sqrt(0.5 / num)
        self.pairs = spread * np.sqrt(0.3 / (num * max(num - 1, 1) / 2 * VECTOR))
        self.bias = 0.0
        self.bias = self._bias(click_rate)

    def _bias(self, click_rate: float) -> float:
        """That makes the mean probability of a first sample the click rate, by bisection."""
        logits = self._logits(*self._features(np.random.default_rng([self.seed, 2]), 20_000))
        low, high = -20.0, 20.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if (1 / (1 + np.exp(-logits - middle))).mean() < click_rate else (low, middle)
        return low

    def chunk(self, number: int, count: int) -> tuple[dict[str, npt.NDArray[Any]], npt.NDArray[np.float64]]:
        """Columns and logits of chunk `number`, of its first `count` samples."""
        rng = np.random.default_rng([self.seed, 3, number])
        dense, ids = self._features(rng, CHUNK)
        logits = self._logits(dense, ids) + self.bias
        labels = (rng.random(CHUNK) < 1 / (1 + np.exp(-logits))).astype(np.uint8)
        return {"labels": labels[:count], "dense": dense[:count], "ids": ids[:count]}, logits[:count]

    def _features(self, rng: np.random.Generator, count: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32]]:
        dense = rng.standard_normal((count, self.num_dense), np.float32)
        ids = np.empty((count, self.columns[-1]), np.int32)
        for size, first, end in zip(self.sizes, self.columns, self.columns[1:], strict=False):
            for column in range(first, end):
                ids[:, column] = zipf(rng.random(count), size, self.exponent)
            if end - first > 1:
                lengths = rng.integers(1, end - first + 1, size=(count, 1))
                ids[:, first:end][np.arange(end - first) >= lengths] = -1
        return dense, ids

    def _logits(self, dense: npt.NDArray[Any], ids: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
        out = dense @ self.slopes
        _add_planted(ids, self.columns, np.uint64(key_of(self.seed, "planted")), self.linear, self.pairs, out)
        return out


def zipf(uniform: npt.NDArray[np.float64], size: int, exponent: float) -> npt.NDArray[np.int32]:
    """Ids below `size` with P(k) ~ (k + 1)^-exponent, by the inverse of a continuous one over 1 .. size + 1."""
    power = 1 - exponent
    if abs(power) < 1e-9:
        values = np.exp(uniform * np.log(size + 1))
    else:
        values = (1 + uniform * ((size + 1) ** power - 1)) ** (1 / power)
    return np.minimum(values.astype(np.int64) - 1, size - 1).astype(np.int32)


@exact_kernel
def _normal(key: Any, place: Any) -> float:
    """A number with mean 0 and variance 1 (a sum of four even ones), a function of (key, place)."""
    bits = mix(key ^ mix(place))
    total = 0.0
    for n in range(4):
        total += float((bits >> np.uint64(16 * n)) & np.uint64(0xFFFF)) / 65536.0
    return (total - 2.0) * 1.7320508075688772


@exact_kernel
def _add_planted(ids: Any, columns: Any, key: Any, linear: float, pairs: float, out: Any) -> None:
    vector, own = np.empty(VECTOR), np.empty(VECTOR)
    for i in range(ids.shape[0]):
        vector[:] = 0.0
        squares = 0.0
        for t in range(columns.shape[0] - 1):
            own[:] = 0.0
            scale = 1.0 / math.sqrt(columns[t + 1] - columns[t])
            for n in range(columns[t], columns[t + 1]):
                if ids[i, n] < 0:
                    break
                place = (np.uint64(t) << np.uint64(40)) + (np.uint64(ids[i, n]) << np.uint64(3))
                out[i] += linear * scale * _normal(key, place)
                for k in range(VECTOR):
                    own[k] += scale * _normal(key, place + np.uint64(k + 1))
            for k in range(VECTOR):
                vector[k] += own[k]
                squares += own[k] * own[k]
        total = 0.0
        for k in range(VECTOR):
            total += vector[k] * vector[k]
        out[i] += pairs * (total - squares) / 2
