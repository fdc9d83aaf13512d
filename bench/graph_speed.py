"""Edges per second of graph training, alone or beside other programs on the same cores and the same edges.

    python bench/graph_speed.py --json
    python bench/graph_speed.py --peer PBG_CHECKOUT --pykeen PYTHON --data FB15K_GRAPH --mrr-epochs 3 --json

Shapes. complex: PyTorch-BigGraph's FB15k example, ComplEx of 400 numbers, softmax, N3, batches of 1,000 edges, 1,000
uniform and 50 same-batch negatives a side; ours draws the uniform ones once for 200 edges, the peer once for 50.
complex_unshared: our own with the peer's draws. transe: a translation of 100 numbers under cosine and ranking loss,
50 + 50 negatives, both sides draw for 50 edges. transe_wide: the same from vectors of deviation 0.1 in place of 0.001
on both sides (both learn faster), ours with a draw for 200 edges. pykeen_complex: ComplEx of 400 numbers, 10 negatives
an edge (ours: 5 uniform and 4 of the batch for each side), PyKEEN's batches of 1,024 and Adam. Without --data the
graph is random, of FB15k's sizes.

A round runs every shape once, ours and then its peer, as many workers as cores; each runs over the same edges twice,
and the second pass counts, by its own clock (PyTorch-BigGraph's is in its log; neither counts its start). ratio_NAME:
median over rounds of ours over the peer's. gflops: what our products do, complex; matrix_gflops: torch's own.

--mrr-epochs N: both sides then train N epochs on all edges, and the filtered MRR of test edges is told of both, ranked
by the same code.

Peers' Python: --peer-python for PyTorch-BigGraph (torch, h5py, attrs, tqdm); --pykeen names PyKEEN's.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch

from puna.graph.config import GraphConfig
from puna.graph.graph import Edges, Graph
from puna.graph.ranking import Scorer, rank
from puna.graph.tables import fill_normal
from puna.graph.task import fresh_relations
from puna.graph.worker import Part, Rates, Relations, Worker
from puna.graph.workers import NUM_ALONE, Workers

NUM_NODES, NUM_RELATIONS, NUM_EDGES = 14_951, 1_345, 483_142
COMPLEX: dict[str, Any] = {
    "dim": 400, "n3": 1e-3, "num_uniform_negs": 1000, "num_batch_negs": 50, "batch_edges": 1000,
}  # fmt: skip
TRANSE: dict[str, Any] = {
    "dim": 100, "operator": "translation", "comparator": "cos", "loss": "ranking", "margin": 0.1,
    "num_uniform_negs": 50, "num_batch_negs": 50, "batch_edges": 1000,
}  # fmt: skip
FEW: dict[str, Any] = {"dim": 400, "n3": 1e-3, "num_uniform_negs": 5, "num_batch_negs": 5, "batch_edges": 1000}


@dataclass(frozen=True)
class Shape:
    """One of our configurations, the edges of a timed pass, and what its peer is told."""

    config: GraphConfig
    num_edges: int
    peer: str = ""
    settings: dict[str, Any] = field(default_factory=dict)


def _pbg(config: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "dimension": config["dim"],
        "num_uniform_negs": config["num_uniform_negs"],
        "num_batch_negs": config["num_batch_negs"],
        "batch_size": config["batch_edges"],
        "lr": 0.1,
    } | more


SHAPES = {
    "complex": Shape(
        GraphConfig(**COMPLEX, share_negs=4),
        20_000,
        "pbg",
        _pbg(COMPLEX, comparator="dot", loss_fn="softmax", regularization_coef=1e-3),
    ),
    "transe": Shape(
        GraphConfig(**TRANSE),
        200_000,
        "pbg",
        _pbg(TRANSE, comparator="cos", loss_fn="ranking", margin=0.1),
    ),
    "transe_wide": Shape(
        GraphConfig(**TRANSE, init_scale=0.1, share_negs=4),
        200_000,
        "pbg",
        _pbg(TRANSE, comparator="cos", loss_fn="ranking", margin=0.1, init_scale=0.1),
    ),
    "pykeen_complex": Shape(
        GraphConfig(**FEW),
        20_000,
        "pykeen",
        {"embedding_dim": 200, "num_negs_per_pos": 10, "batch_size": 1024, "lr": 1e-3},
    ),
    "complex_unshared": Shape(GraphConfig(**COMPLEX, share_negs=1), 20_000),
}
RATIOS = {
    "complex": "ratio_pbg_complex", "transe": "ratio_pbg_transe", "transe_wide": "ratio_pbg_transe_wide",
    "pykeen_complex": "ratio_pykeen_complex",
}  # fmt: skip


class Ours:
    """Tables and workers of one shape, as the graph task uses them."""

    def __init__(self, shape: Shape, edges: Edges, sizes: tuple[int, int], num_workers: int, seed: int = 0) -> None:
        """sizes: nodes, relations."""
        self.config, self.edges, self.seed = shape.config, edges, seed
        vectors = np.empty((sizes[0], self.config.dim), np.float32)
        fill_normal(np.uint64(seed + 1), self.config.init_scale, 0, 1, vectors)
        self.part = Part(vectors, np.zeros(sizes[0], np.float32))
        self.relations = fresh_relations(self.config, sizes[1])
        self.workers = Workers([Worker(self.config, sizes[1], sizes[0]) for _ in range(num_workers)])
        self.num_passes = 0

    def run(self) -> tuple[float, float]:
        """Seconds, and the threads' processor seconds, of a pass over all edges in an order of its own."""
        began = time.perf_counter()
        self.num_passes += 1
        order = np.random.default_rng((self.seed, self.num_passes)).permutation(len(self.edges))
        edges, size = self.edges.take(order), self.config.batch_edges
        spent: list[float] = []

        def train(worker: Worker, n: int) -> None:
            before = time.thread_time()
            batch = edges.take(slice(n * size, (n + 1) * size))
            key = hash((self.seed, self.num_passes, n))
            worker.train(batch, edges, key, self.part, self.part, self.relations, Rates(0.1, 0.1))
            spent.append(time.thread_time() - before)

        self.workers.share(-(-len(edges) // size), train, NUM_ALONE if self.num_passes == 1 else 0)
        return time.perf_counter() - began, sum(spent)


@dataclass(frozen=True)
class Peers:
    """Where other programs are, and the sizes of what they train on."""

    checkout: Path | None
    pbg_python: str
    pykeen_python: str | None
    sizes: tuple[int, int]

    def has(self, shape: Shape) -> bool:
        """Whether a shape's peer was named."""
        return bool({"pbg": self.checkout, "pykeen": self.pykeen_python}.get(shape.peer))

    def train(self, shape: Shape, edges: Edges, epochs: int, threads: int, out: Path | None = None) -> list[float]:
        """Seconds of each epoch. out: an .npz for the model."""
        settings = shape.settings | ({"workers": threads} if shape.peer == "pbg" else {})
        with tempfile.TemporaryDirectory() as folder:
            columns: dict[str, Any] = {name: np.asarray(vars(edges)[name]) for name in ("heads", "relations", "tails")}
            np.savez(Path(folder) / "edges.npz", **columns)
            job = {
                "edges": f"{folder}/edges.npz", "num_nodes": self.sizes[0], "num_relations": self.sizes[1], "seed": 0,
                "operator": shape.config.operator, "settings": settings, "epochs": epochs,
                "out": None if out is None else str(out),
            }  # fmt: skip
            path = Path(folder) / "job.json"
            path.write_text(json.dumps(job), encoding="utf-8")
            python = self.pbg_python if shape.peer == "pbg" else str(self.pykeen_python)
            script = Path(__file__).with_name("run_graph_peer.py")
            command = [python, str(script), shape.peer, str(self.checkout or "-"), str(path)]
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
        if done.returncode:
            raise SystemExit(f"{shape.peer} ended with {done.returncode}:\n{done.stderr[-3000:]}")
        seconds: list[float] = json.loads(done.stdout.splitlines()[-1])["seconds"]
        if len(seconds) != epochs:
            raise SystemExit(
                f"{shape.peer} told the time of {len(seconds)} epochs, not {epochs}:\n{done.stdout[-3000:]}"
            )
        return seconds


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


def random_edges() -> Edges:
    """As many as FB15k has, evenly over its numbers of nodes and relations."""
    rng = np.random.default_rng(0)
    sizes = (NUM_NODES, NUM_RELATIONS, NUM_NODES)
    columns: list[Any] = [rng.integers(n, size=NUM_EDGES).astype(np.int32) for n in sizes]
    return Edges(*columns)


def mrr_of(config: GraphConfig, graph: Graph, limit: int, nodes: Any, relations: Iterable[Any]) -> float:
    """Filtered MRR of the first `limit` test edges under a model: nodes (N, D), relations' tables by side."""
    sides = [Relations(np.ascontiguousarray(table), np.zeros(0, np.float32)) for table in relations]
    scorer = Scorer(config, graph, lambda part, rows=slice(None): nodes[rows], sides)
    figures = rank(scorer, graph.edges("test").take(slice(limit))).figures()
    return float(figures["filtered"]["mrr"])


def compare_mrr(name: str, peers: Peers, graph: Graph, args: argparse.Namespace) -> dict[str, float]:
    """Both sides over all edges for so many epochs: ours, peer, and the seconds of training of each."""
    shape, edges = SHAPES[name], graph.edges("train")
    ours = Ours(shape, edges, peers.sizes, args.threads)
    seconds = sum(ours.run()[0] for _ in range(args.mrr_epochs))
    torch.set_num_threads(args.threads)
    tables = (side.table for side in ours.relations)
    found = {"ours": mrr_of(shape.config, graph, args.mrr_edges, ours.part.vectors, tables), "seconds": seconds}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "model.npz"
        found["peer_seconds"] = sum(peers.train(shape, edges, args.mrr_epochs, args.threads, out))
        model = np.load(out)
        found["peer"] = mrr_of(shape.config, graph, args.mrr_edges, model["nodes"], (model["tail"], model["head"]))
    return found


def summary(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"edges_per_s": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> None:
    """Alternate the shapes and the peers; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON only on stdout")
    parser.add_argument("--rounds", type=int, default=5, help="0: only --mrr-epochs")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="workers")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="which, by commas")
    parser.add_argument("--peer", type=Path, help="a checkout of PyTorch-BigGraph")
    parser.add_argument("--peer-python", help="its Python  [default: .venv/bin/python there, or this one]")
    parser.add_argument("--pykeen", help="a Python that has PyKEEN")
    parser.add_argument("--data", type=Path, help="a graph folder whose edges are trained on")
    parser.add_argument("--mrr-epochs", type=int, default=0, help="compare MRR after so many epochs; needs --data")
    parser.add_argument("--mrr-edges", type=int, default=10_000, help="test edges that are ranked")
    args = parser.parse_args()
    graph = Graph.open(args.data) if args.data else None
    sizes = (graph.num_nodes, graph.num_relations) if graph else (NUM_NODES, NUM_RELATIONS)
    pbg_python = args.peer_python or sys.executable
    if args.peer and not args.peer_python and (args.peer / ".venv/bin/python").exists():
        pbg_python = str(args.peer / ".venv/bin/python")
    peers = Peers(args.peer, pbg_python, args.pykeen, sizes)
    result: dict[str, Any] = {}
    if args.rounds:
        result = timed(args, peers, graph.edges("train") if graph else random_edges())
    if graph and args.mrr_epochs:
        names = [name for name in args.shapes.split(",") if peers.has(SHAPES[name])]
        result["mrr"] = {name: compare_mrr(name, peers, graph, args) for name in names}
        result["mrr_epochs"] = args.mrr_epochs
    print(json.dumps(result | {"threads": args.threads} | machine.facts()))


def timed(args: argparse.Namespace, peers: Peers, edges: Edges) -> dict[str, Any]:
    """Rates of every shape, of its peer where there is one, and their ratios by round."""
    shapes = {name: SHAPES[name] for name in args.shapes.split(",")}
    rates: dict[str, list[float]] = {name: [] for name in shapes}
    cpu_rates: dict[str, list[float]] = {name: [] for name in shapes}
    peer_rates: dict[str, list[float]] = {name: [] for name, shape in shapes.items() if peers.has(shape)}
    peaks = []
    for number in range(args.rounds):
        for name, shape in shapes.items():
            chosen = np.random.default_rng(number).choice(len(edges), min(shape.num_edges, len(edges)), replace=False)
            own = edges.take(np.sort(chosen))
            ours = Ours(shape, own, peers.sizes, args.threads)
            ours.run()
            seconds, spent = ours.run()
            rates[name].append(len(own) / seconds)
            cpu_rates[name].append(args.threads * len(own) / spent)
            line = f"round {number + 1}  {name:17s} {rates[name][-1]:10,.0f} edges/s"
            if name in peer_rates:
                peer_rates[name].append(len(own) / peers.train(shape, own, 2, args.threads)[-1])
                line += f", {shape.peer} {peer_rates[name][-1]:,.0f}"
            print(line, file=sys.stderr)
        peaks.append(matrix_rate(args.threads))
        print(f"round {number + 1}  matrices          {peaks[-1] / 1e9:10.0f} GFLOP/s", file=sys.stderr)
    result: dict[str, Any] = {"matrix_gflops": statistics.median(peaks) / 1e9}
    for name, shape in shapes.items():
        flops = flops_per_edge(shape.config) / 1e9
        found = summary(rates[name])
        result[name] = found | {
            "gflops": found["edges_per_s"] * flops,
            "cpu_edges_per_s": statistics.median(cpu_rates[name]),
        }
        if name in peer_rates:
            ratios = [a / b for a, b in zip(rates[name], peer_rates[name], strict=True)]
            result[name]["peer"] = summary(peer_rates[name])
            result[RATIOS[name]] = statistics.median(ratios)
            result[f"{RATIOS[name]}_rounds"] = ratios
    if "complex" in result:
        result["gflops"] = result["complex"]["gflops"]
    return result


if __name__ == "__main__":
    main()
