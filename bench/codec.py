"""Ratio and speed of the row codec beside what a user would take instead, on one core.

    python bench/codec.py --json
    python bench/codec.py --json --slices DIR

Without --slices: 26 tables x 2,048 lookups for D = 16, 32 and 64 (codec_slices.py), kept in --cache. DIR holds
NAME.rows.npy (n, D) float32 and NAME.ids.npy (n,), a pair a table; tables of one D form a cell. Peers: codec_peers.py
(pip install lz4 blosc2 zfpy pysz backports-zstd). All are alternated, each table in a call of its own; times are the
process's processor seconds, each table's least of --rounds (so that other work counts less). Two accounts: the receiver
knows the ids (no index is counted), and it does not (the index is sent; Puna is then not given the ids). A
cell is a D, a bound and an account; sizes of a cell are those of all its tables.

entropy_gap_pct: largest over cells, of bytes over the order-0 entropy of the codes of distinct rows (and of the index
where it is sent), each table's by itself. geomean_ratio_over_best_peer: over cells; min_...: the smallest;
..._tables: the same over single tables. modelled_time_over_best_peer: largest over cells, at 1, 10, 100 Gbit/s, of
1/CR + B (1/Tc + 1/Td), Puna with the best of rans, fixed, raw and copy for each table. harmonic_ratio: of the largest
D with the published Kaggle bounds, index sent; _ids: ids known. published_scheme_harmonic_ratio: so with "published".
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("BLOSC_NTHREADS", "1")

import codec_peers
import numpy as np
import torch
from codec_slices import Table, kaggle_bound, read_slices, seeded_slices

from puna.console import track
from puna.recsys.codec.api import Codec
from puna.recsys.codec.choose import Measured

DIMS, BOUNDS, LINKS = (16, 32, 64), (0.01, 0.02, 0.03, 0.05), (1, 10, 100)
OURS = ("rans", "fixed", "raw", "copy")


class Side:
    """One codec over all tables of a cell."""

    def __init__(
        self, tables: list[Table], encode: Callable[[Table], Any], decode: Callable[[Table, Any], Any]
    ) -> None:
        self.tables, self._encode, self._decode = tables, encode, decode
        self.num_bytes = sum(table.rows.nbytes for table in tables)
        self.encoded: list[Any] = []
        self.times: list[list[tuple[float, float]]] = []

    def turn(self) -> None:
        """Encode and decode every table once."""
        self.encoded, times = [], []
        for table in self.tables:
            began = time.process_time()
            self.encoded.append(self._encode(table))
            middle = time.process_time()
            self._decode(table, self.encoded[-1])
            times.append((middle - began, time.process_time() - middle))
        self.times.append(times)

    def check(self, bound: float) -> None:
        """The bound, up to float32's rounding in the peers."""
        for table, one in zip(self.tables, self.encoded, strict=True):
            error = np.abs(table.rows.astype(np.float64) - self._decode(table, one)).max()
            assert error <= bound * float(table.rows.max() - table.rows.min()) * (1 + 1e-4), (table.name, error)

    def seconds(self) -> np.ndarray:
        """(tables, 2): each table's fastest encode and decode."""
        return np.array(self.times).min(axis=0)

    def measured(self, sizes: list[int]) -> Measured:
        """Of all tables."""
        encode_s, decode_s = self.seconds().sum(axis=0)
        return Measured(self.num_bytes / sum(sizes), self.num_bytes / encode_s, self.num_bytes / decode_s)

    def exchange(self, sizes: list[int], link_bytes_per_s: float) -> np.ndarray:
        """Each table's part of 1/CR + B (1/Tc + 1/Td) of all."""
        return (np.array(sizes) + link_bytes_per_s * self.seconds().sum(axis=1)) / self.num_bytes


def cell(tables: list[Table], bound: float, index_sent: bool, peers: list[str], rounds: int) -> dict[str, Any]:
    """Everything about one D, bound and account."""
    codec, sides, sizes = Codec(check_ids=False), {}, {}
    for name in OURS:
        sides[name] = _ours(codec, tables, bound, index_sent, name)
    for name in peers:
        peer = codec_peers.make(name, index_sent)
        sides[name] = _theirs(peer, tables, bound)
    for _ in range(rounds):
        for side in sides.values():
            side.turn()
    for name, side in sides.items():
        side.check(bound)
        sizes[name] = [len(one) if name in OURS else codec_peers.size(one) for one in side.encoded]
    auto = [len(codec.encode(t.rows, None if index_sent else t.ids, bound)) for t in tables]
    entropy = sum(code_entropy(t, bound) + (index_entropy(t) if index_sent else 0) for t in tables)
    return {
        "bytes": sum(auto),
        "entropy_bytes": entropy,
        "table_bytes": auto,
        "table_peer_bytes": [min(sizes[name][t] for name in peers) for t in range(len(tables))] if peers else None,
        "peer_bytes": {name: sum(sizes[name]) for name in peers},
        "measured": {name: vars(side.measured(sizes[name])) for name, side in sides.items()},
        "times": {link: _times(sides, sizes, link * 1e9 / 8) for link in LINKS},
    }


def _times(sides: dict[str, Side], sizes: dict[str, list[int]], link_bytes_per_s: float) -> dict[str, float]:
    """Modelled exchange time of each codec, and of Puna with the best of its own for each table."""
    parts = {name: side.exchange(sizes[name], link_bytes_per_s) for name, side in sides.items()}
    best = np.min([parts[name] for name in OURS], axis=0)
    return {name: float(part.sum()) for name, part in parts.items()} | {"puna": float(best.sum())}


def _ours(codec: Codec, tables: list[Table], bound: float, index_sent: bool, name: str) -> Side:
    outs = {table.name: np.empty_like(table.rows) for table in tables}

    def ids(table: Table) -> np.ndarray | None:
        return None if index_sent else table.ids

    return Side(
        tables,
        lambda table: codec.encode(table.rows, ids(table), bound, name),
        lambda table, stream: codec.decode(stream, ids(table), outs[table.name]),
    )


def _theirs(peer: codec_peers.Peer, tables: list[Table], bound: float) -> Side:
    return Side(
        tables,
        lambda table: peer.encode(table.rows, table.ids, bound),
        lambda table, parts: peer.decode(parts, table.ids, table.rows.shape),
    )


def code_entropy(table: Table, bound: float) -> float:
    """Bytes of the order-0 entropy of the published quantiser's codes of distinct rows."""
    values = table.rows.astype(np.float64)
    step = 2 * bound * (values.max() - values.min()) or 1.0
    kept = values[np.unique(table.ids, return_index=True)[1]]
    return _entropy(np.rint(kept / step).astype(np.int64))


def index_entropy(table: Table) -> float:
    """Bytes of the order-0 entropy of which distinct row each lookup is of."""
    return _entropy(table.ids)


def _entropy(symbols: Any) -> float:
    counts = np.array(list(Counter(np.asarray(symbols).reshape(-1).tolist()).values()))
    return float(-(counts * np.log2(counts / counts.sum())).sum()) / 8


def harmonic(tables: list[Table], codec_name: str, with_ids: bool) -> float:
    """Harmonic mean of the tables' ratios under the Kaggle bounds."""
    codec = Codec()
    sizes = [
        len(codec.encode(t.rows, t.ids if with_ids else None, kaggle_bound(n), codec_name)) / t.rows.nbytes
        for n, t in enumerate(tables)
    ]
    return len(sizes) / sum(sizes)


def geomean(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def summary(cells: dict[str, Any], peers: list[str]) -> dict[str, Any]:
    """What the cells come to; None where no peer is here."""
    found: dict[str, Any] = {
        "entropy_gap_pct": max(100 * (c["bytes"] / c["entropy_bytes"] - 1) for c in cells.values())
    }
    over = [min(c["peer_bytes"].values()) / c["bytes"] for c in cells.values() if peers]
    tables = [
        theirs / ours
        for c in cells.values()
        if peers
        for ours, theirs in zip(c["table_bytes"], c["table_peer_bytes"], strict=True)
    ]
    found["geomean_ratio_over_best_peer"] = geomean(over) if over else None
    found["min_ratio_over_best_peer"] = min(over, default=None)
    found["geomean_ratio_over_peer"] = {
        name: geomean([c["peer_bytes"][name] / c["bytes"] for c in cells.values()]) if name in peers else None
        for name in codec_peers.PACKAGES
    }
    found["geomean_ratio_over_best_peer_tables"] = geomean(tables) if tables else None
    found["min_ratio_over_best_peer_tables"] = min(tables, default=None)
    found["modelled_time_over_best_peer"] = {
        link: max(c["times"][link]["puna"] / min(c["times"][link][name] for name in peers) for c in cells.values())
        if peers
        else None
        for link in LINKS
    }
    return found


def main() -> None:
    """The last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON only on stdout")
    parser.add_argument("--slices", type=Path, help="folder of NAME.rows.npy and NAME.ids.npy")
    parser.add_argument("--cache", type=Path, default=Path("runs/bench-codec"), help="where seeded slices are kept")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    peers, missing = codec_peers.available()
    sets = by_width(read_slices(args.slices)) if args.slices else {d: seeded_slices(d, args.cache) for d in DIMS}
    plan = [(d, bound, sent) for d in sets for bound in BOUNDS for sent in (False, True)]
    cells = {}
    for dim, bound, sent in track(plan, "cells"):
        name = f"D={dim} bound={bound} {'index sent' if sent else 'ids known'}"
        cells[name] = cell(sets[dim], bound, sent, peers, args.rounds)
        print(line(name, cells[name]), file=sys.stderr)
    largest = sets[max(sets)]
    result = summary(cells, peers) | {
        "harmonic_ratio": harmonic(largest, "auto", False),
        "harmonic_ratio_ids": harmonic(largest, "auto", True),
        "published_scheme_harmonic_ratio": harmonic(largest, "published", False),
        "missing_peers": missing,
        "cells": cells,
    }
    print(json.dumps(result | machine.facts()))


def by_width(tables: list[Table]) -> dict[int, list[Table]]:
    """Tables by D; those without ids get a number for each distinct row."""
    found: dict[int, list[Table]] = {}
    for table in tables:
        ids = table.ids if table.ids is not None else np.unique(table.rows, axis=0, return_inverse=True)[1].reshape(-1)
        found.setdefault(table.rows.shape[1], []).append(table._replace(ids=ids))
    return found


def line(name: str, found: dict[str, Any]) -> str:
    """A cell in words."""
    speeds = "  ".join(
        f"{codec} {m['ratio']:.2f} ({m['encode_bytes_per_s'] / 1e6:.0f}/{m['decode_bytes_per_s'] / 1e6:.0f})"
        for codec, m in found["measured"].items()
    )
    return f"{name}: {found['bytes']} bytes, entropy {found['entropy_bytes']:.0f}; ratio (MB/s in/out): {speeds}"


if __name__ == "__main__":
    main()
