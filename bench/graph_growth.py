"""What is gained by training only what is new: 1 % of a graph's nodes come later, with their edges.

    python bench/graph_growth.py --data ego-twitter-undirected.jlg.gz --out runs/growth --json

The nodes that come later are drawn; the edges without them are imported and trained first. Then the rest is added (a
tenth of the new nodes' edges is held out) and trained with the old rows frozen. The held-out edges are ranked among the
same 10,000 drawn nodes before (fresh new rows), after, and by a run that trained everything from the start. Old rows
are compared bit for bit.
"""

import argparse
import gzip
import json
import os
import time
from pathlib import Path
from typing import Any

import machine
import numpy as np
from graph_partitions import CANDIDATES, SEED, SETTINGS

from puna import recipe, run
from puna.graph.graph import Graph
from puna.graph.importing import import_graph
from puna.graph.ranking import Scorer
from puna.graph.trained import evaluate, load


def graphs(data: Path, out: Path, share: float) -> tuple[Graph, Graph]:
    """The graph without the nodes that come later, and with them."""
    if not (out / "new" / "graph.json").is_file():
        out.mkdir(parents=True, exist_ok=True)
        with gzip.open(data, "rt") as file:
            lines = file.read().splitlines()[1:]
        rng = np.random.default_rng(SEED)
        names = sorted({name for line in lines for name in line.split(",")})
        later = set(rng.choice(names, int(share * len(names)), replace=False).tolist())
        is_new = np.array([not later.isdisjoint(line.split(",")) for line in lines])
        old, added = rng.permutation(np.flatnonzero(~is_new)), rng.permutation(np.flatnonzero(is_new))
        cut = len(added) // 10
        for name, rows in (("old", old), ("test", added[:cut]), ("added", added[cut:])):
            (out / f"{name}.csv").write_text("".join(f"{lines[row]}\n" for row in rows))
        import_graph({"train": out / "old.csv"}, out / "old", ("head", "tail"))
        files = {"train": out / "added.csv", "test": out / "test.csv"}
        import_graph(files, out / "new", ("head", "tail"), add=out / "old")
    return Graph.open(out / "old"), Graph.open(out / "new")


def train(graph: Graph, folder: Path, epochs: int, *extra: str) -> tuple[Scorer, float]:
    """A run's model and its seconds."""
    words = [f"--{key}={value}" for key, value in SETTINGS.items()]
    words += [
        f"--graph.epochs={epochs}",
        f"--run.dir={folder}",
        f"--data.path={graph.folder}",
        "--run.tensorboard=false",
    ]
    words += ["--checkpoint.every=1000", "--checkpoint.keep=1", "--eval.every=0", "--eval.tokens=0", *extra]
    began = time.perf_counter()
    run.train(recipe.load("social", words))
    return load(folder, recipe.load(folder).recipe.graph, graph)[0], time.perf_counter() - began


def main() -> None:
    """Train, add, train what is new; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="edge list: a header, then src,dst (gzip)")
    parser.add_argument("--out", type=Path, default=Path("runs/growth"))
    parser.add_argument("--share", type=float, default=0.01, help="of the nodes that come later")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="workers")
    parser.add_argument("--json", action="store_true", help="print JSON only on stdout")
    args = parser.parse_args()
    old, new = graphs(args.data, args.out, args.share)
    threads = f"--run.num_threads={args.threads}"
    frozen = [threads, f"--graph.start={args.out / 'first'}", "--graph.freeze=true"]
    first, first_s = train(old, args.out / "first", args.epochs, threads)
    before, _ = train(new, args.out / "begun", 1, *frozen, "--graph.lr=1e-12")
    after, after_s = train(new, args.out / "second", args.epochs, *frozen)
    whole, whole_s = train(new, args.out / "whole", args.epochs, threads)
    known = np.arange(old.num_nodes)
    runs: dict[str, Any] = {}
    for name, scorer in (("before", before), ("after", after), ("whole", whole)):
        figures = evaluate(scorer, "test", candidates=CANDIDATES, sampling="prevalence", seed=SEED)["filtered"]
        runs[name] = {key: figures[key] for key in ("mrr", "mrr_interval", "hits10")}
    result = {
        "old_nodes": old.num_nodes,
        "new_nodes": new.num_nodes - old.num_nodes,
        "old_edges": old.splits["train"]["edges"],
        "new_edges": new.splits["train"]["edges"] - old.splits["train"]["edges"],
        "held_out": new.splits["test"]["edges"],
        "old_rows_identical": bool(np.array_equal(after.vectors(known), first.vectors(known))),
        **runs,
        "seconds": {"first": first_s, "after": after_s, "whole": whole_s},
        "epochs": args.epochs,
        "threads": args.threads,
    }
    print(json.dumps(result | machine.facts()))


if __name__ == "__main__":
    main()
