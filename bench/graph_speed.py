"""Edges per second of graph training at the two shapes that PyTorch-BigGraph's FB15k examples have.

    python bench/graph_speed.py --json

complex: ComplEx of 400 numbers, softmax, 1,000 uniform and 50 same-batch negatives a side, batches of 1,000 edges that
share a draw. transe: a translation of 100 numbers under cosine and ranking loss, 50 + 50 negatives, four chunks to a
draw. NAME_unshared: the same with a draw for every chunk of 50 edges, as PyTorch-BigGraph does. The graph has FB15k's
sizes (14,951 nodes, 1,345 relations) and random edges. As many worker threads as cores; rounds of the shapes and of
torch's own matrix product (its rate is what `gflops` is held against) are alternated. cpu_edges_per_s: edges per second
of processor time a core, times the cores: what the rate would be if nothing else ran.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch

from puna.graph.config import GraphConfig
from puna.graph.graph import Edges
from puna.graph.task import fresh_relations
from puna.graph.worker import Part, Rates, Worker

NUM_NODES, NUM_RELATIONS = 14_951, 1_345
COMPLEX = {"dim": 400, "n3": 1e-3, "num_uniform_negs": 1000, "num_batch_negs": 50, "batch_edges": 1000}
TRANSE = {"dim": 100, "operator": "translation", "comparator": "cos", "loss": "ranking", "margin": 0.1} | {
    "num_uniform_negs": 50,
    "num_batch_negs": 50,
    "batch_edges": 1000,
}
SHAPES = {
    "complex": GraphConfig(**COMPLEX, share_negs=0),
    "complex_unshared": GraphConfig(**COMPLEX, share_negs=1),
    "transe": GraphConfig(**TRANSE, share_negs=4),
    "transe_unshared": GraphConfig(**TRANSE, share_negs=1),
}
NUM_BATCHES = {"complex": 60, "complex_unshared": 40, "transe": 600, "transe_unshared": 600}


class Side:
    """Tables and workers of one shape."""

    def __init__(self, config: GraphConfig, num_workers: int) -> None:
        rng = np.random.default_rng(0)
        vectors = rng.normal(scale=1e-1, size=(NUM_NODES, config.dim)).astype(np.float32)
        self.config, self.part = config, Part(vectors, np.zeros(NUM_NODES, np.float32))
        self.relations = fresh_relations(config, NUM_RELATIONS)
        columns = (rng.integers(n, size=200_000).astype(np.int32) for n in (NUM_NODES, NUM_RELATIONS, NUM_NODES))
        self.edges = Edges(*columns)
        self.workers = [Worker(config, NUM_RELATIONS, NUM_NODES) for _ in range(num_workers)]
        self.run(2 * num_workers)

    def run(self, num_batches: int) -> tuple[float, float]:
        """Seconds, and the threads' processor seconds, of so many batches over all workers."""
        todo, lock, size = iter(range(num_batches)), threading.Lock(), self.config.batch_edges

        def work(worker: Worker) -> float:
            torch.set_num_threads(1)
            began = time.thread_time()
            while True:
                with lock:
                    n = next(todo, None)
                if n is None:
                    return time.thread_time() - began
                start = n * size % (len(self.edges) - size)
                batch = self.edges.take(slice(start, start + size))
                worker.train(batch, self.edges, n, self.part, self.part, self.relations, Rates(0.1, 0.1))

        began = time.perf_counter()
        with ThreadPoolExecutor(len(self.workers)) as pool:
            spent = sum(pool.map(work, self.workers))
        return time.perf_counter() - began, spent


def flops_per_edge(config: GraphConfig) -> int:
    """Of the products, both sides, forward and backward: 3 x 2 x dim for each negative."""
    return 12 * config.dim * (config.num_batch_negs + config.num_uniform_negs)


def matrix_rate(num_threads: int, seconds: float = 0.5) -> float:
    """FLOP/s of 1,000 x 400 by 400 x 1,000 on all cores."""
    torch.set_num_threads(num_threads)
    a, b, out = torch.randn(1000, 400), torch.randn(400, 1000), torch.empty(1000, 1000)
    torch.mm(a, b, out=out)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        torch.mm(a, b, out=out)
        count += 1
    return 2 * 1000 * 400 * 1000 * count / (time.perf_counter() - began)


def main() -> None:
    """Alternate the shapes; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON only on stdout")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="workers")
    args = parser.parse_args()
    sides = {name: Side(config, args.threads) for name, config in SHAPES.items()}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    cpu_rates: dict[str, list[float]] = {name: [] for name in sides}
    peaks = []
    for number in range(args.rounds):
        for name, side in sides.items():
            edges = NUM_BATCHES[name] * side.config.batch_edges
            seconds, spent = side.run(NUM_BATCHES[name])
            rates[name].append(edges / seconds)
            cpu_rates[name].append(args.threads * edges / spent)
        peaks.append(matrix_rate(args.threads))
        shown = "  ".join(f"{name} {rate[-1]:,.0f} (cpu {cpu_rates[name][-1]:,.0f})" for name, rate in rates.items())
        print(f"round {number + 1}, edges/s: {shown}  matrices {peaks[-1] / 1e9:.0f} GFLOP/s", file=sys.stderr)
    result: dict[str, Any] = {"matrix_gflops": statistics.median(peaks) / 1e9}
    for name, side in sides.items():
        flops = flops_per_edge(side.config)
        rate, cpu = statistics.median(rates[name]), statistics.median(cpu_rates[name])
        result[name] = {
            "edges_per_s": rate,
            "min": min(rates[name]),
            "max": max(rates[name]),
            "gflops": rate * flops / 1e9,
            "cpu_edges_per_s": cpu,
            "cpu_gflops": cpu * flops / 1e9,
        }
    result |= {
        "threads": args.threads,
        "machine": f"{platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        "numba": numba.__version__,
        "python": platform.python_version(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
