"""Labels of BlogCatalog's bloggers from vectors of their graph, as DeepWalk's authors measure it (Perozzi et al. 2014).

    python bench/graph_labels.py --data blogcatalog.mat --out runs/labels --json

Vectors come from the recipe `blogcatalog`, over random walks to contexts (--walks), walks within one table
(--one-table) or over the edges alone (--walks 0). Then, ten times: a share of the nodes is drawn, one logistic
regression a label (L2, C = 1, the constant regularised too, as liblinear's) is fitted to their vectors, and each other
node is given as many of the likeliest labels as it has. Needs scipy. DeepWalk's published micro-F1 at 50 % is 41.51.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy.io import loadmat
from scipy.optimize import minimize

from puna import recipe, run
from puna.graph.graph import Graph
from puna.graph.importing import import_graph
from puna.graph.trained import load
from puna.graph.walks import Walks

DEEPWALK = {10: 35.86, 20: 38.51, 30: 39.96, 40: 40.76, 50: 41.51, 60: 41.85, 70: 42.27, 80: 42.35, 90: 42.40}
SPLITS = 10


def graph_of(mat: dict[str, Any], out: Path, walks: Walks | None) -> Graph:
    """The network, each edge once, imported."""
    if not (out / "graph.json").is_file():
        out.mkdir(parents=True, exist_ok=True)
        network = mat["network"].tocoo()
        once = network.row < network.col
        rows = np.stack([network.row[once], network.col[once]], 1)
        np.savetxt(out / "edges.tsv", rows, "%d", "\t")
        import_graph({"train": out / "edges.tsv"}, out, ("head", "tail"), walks=walks)
    return Graph.open(out)


def vectors_of(graph: Graph, folder: Path, words: list[str]) -> np.ndarray:
    """Vectors in the order of the data's nodes."""
    run.train(recipe.load("blogcatalog", [f"--data.path={graph.folder}", f"--run.dir={folder}", *words]))
    scorer, _ = load(folder, recipe.load(folder).recipe.graph, graph)
    found = np.empty((graph.counts[0], scorer.config.dim), np.float32)
    found[np.array(graph.names()).astype(int)] = scorer.vectors(np.arange(graph.counts[0]))
    return found


def fit(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Weights (labels, features) of the least sum of logistic losses + |w|^2 / 2, all labels at once."""
    signs = 2.0 * labels - 1

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = flat.reshape(labels.shape[1], -1)
        margins = signs * (features @ weights.T)
        slopes = -signs / (1 + np.exp(np.clip(margins, -500, 500)))
        return np.logaddexp(0, -margins).sum() + 0.5 * flat @ flat, (slopes.T @ features + weights).ravel()

    start = np.zeros(labels.shape[1] * features.shape[1])
    return minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 1000}).x.reshape(labels.shape[1], -1)


def scores(vectors: np.ndarray, labels: np.ndarray, share: float) -> dict[str, float]:
    """Micro- and macro-F1 in per cent, means over the splits, and the deviation of the first."""
    features = np.concatenate([vectors, np.ones((len(vectors), 1))], 1).astype(float)
    micro, macro = [], []
    for n in range(SPLITS):
        order = np.random.default_rng(n).permutation(len(vectors))
        seen, unseen = np.split(order, [int(share * len(order))])
        likely = features[unseen] @ fit(features[seen], labels[seen]).T
        true = labels[unseen].astype(bool)
        place = np.argsort(np.argsort(-likely, 1), 1)
        given = place < true.sum(1, keepdims=True)
        hits, wrong = (given & true).sum(0), (given ^ true).sum(0)
        micro.append(200 * hits.sum() / (2 * hits.sum() + wrong.sum()))
        macro.append(float(np.mean(200 * hits / np.maximum(2 * hits + wrong, 1))))
    return {"micro_f1": float(np.mean(micro)), "macro_f1": float(np.mean(macro)), "deviation": statistics.stdev(micro)}


def main() -> None:
    """Train and judge; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="blogcatalog.mat: sparse network and group")
    parser.add_argument("--out", type=Path, default=Path("runs/labels"))
    parser.add_argument("--walks", type=int, default=80, help="walks from each node; 0: the edges alone")
    parser.add_argument("--one-table", action="store_true", help="contexts are nodes, not a type of their own")
    parser.add_argument("--shares", default="50", help="per cent of the nodes whose labels are known")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", action="store_true", help="print JSON only on stdout")
    parser.add_argument("extra", nargs="*", help="more settings, after --")
    args = parser.parse_args()
    mat = loadmat(args.data)
    labels = mat["group"].toarray()
    name = f"{args.walks}{'-one' if args.one_table else ''}"
    walks = Walks(args.walks, contexts=not args.one_table) if args.walks else None
    graph = graph_of(mat, args.out / f"graph-{name}", walks)
    words = ["--run.tensorboard=false", f"--run.num_threads={args.threads}", "--eval.every=0", "--eval.tokens=0"]
    began = time.perf_counter()
    vectors = vectors_of(graph, args.out / f"run-{name}", [*words, *args.extra])
    seconds = time.perf_counter() - began
    found = {share: scores(vectors, labels, share / 100) for share in map(int, args.shares.split(","))}
    for share, figures in found.items():
        print(f"{share} %: {figures}  DeepWalk {DEEPWALK[share]}", file=sys.stderr)
    result = {
        "walks": args.walks,
        "contexts": graph.is_typed,
        "settings": recipe.load("blogcatalog", args.extra).recipe.graph.model_dump(),
        "train_edges": graph.splits["train"]["edges"],
        "train_s": seconds,
        "scores": found,
        "deepwalk_micro_f1": {share: DEEPWALK[share] for share in found},
        "machine": platform.processor() or platform.machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
