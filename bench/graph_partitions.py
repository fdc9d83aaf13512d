"""Does cutting a graph into partitions cost quality or time? One graph, trained whole and in 4, 8 and 16 partitions.

    python bench/graph_partitions.py --data ego-twitter-undirected.jlg.gz --out runs/partitions --json

The edge list is split once (10,000 edges are held out), each P trains for the same number of epochs with the settings
below, and each is judged on the held-out edges among the same 10,000 candidates, drawn as often as nodes occur in
training edges. Runs that are there are not made again. Wall time: steps and waits between them, no evaluation; with
--rounds above 1 the numbers of partitions are alternated and medians taken.
"""

import argparse
import gzip
import json
import os
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import machine
import numpy as np
import social

from puna import recipe, run
from puna.graph.graph import Graph
from puna.graph.importing import import_graph
from puna.graph.trained import evaluate, load
from puna.train.metrics import last_steps, read_events

HELD_OUT, CANDIDATES, SEED = 10_000, 10_000, 0
SETTINGS = social.SETTINGS | {"graph.held_partitions": 4, "graph.bucket_order": "buffered"}


def split(data: Path, out: Path) -> Graph:
    """The edges, shuffled once, as a graph with a test split."""
    if not (out / "graph.json").is_file():
        out.mkdir(parents=True, exist_ok=True)
        with gzip.open(data, "rt") as file:
            lines = file.read().splitlines()[1:]
        order = np.random.default_rng(SEED).permutation(len(lines))
        for name, rows in (("test", order[:HELD_OUT]), ("train", order[HELD_OUT:])):
            (out / f"{name}.csv").write_text("".join(f"{lines[row]}\n" for row in rows))
        import_graph({name: out / f"{name}.csv" for name in ("train", "test")}, out, ("head", "tail"))
    return Graph.open(out)


def train(graph: Graph, folder: Path, parts: int, epochs: int, threads: int, extra: list[str]) -> dict[str, Any]:
    """One run, or what there is of it: seconds, edges/s, swaps, MRR with its interval."""
    words = [f"--{key}={value}" for key, value in SETTINGS.items()]
    words += [f"--graph.epochs={epochs}", f"--graph.num_partitions={parts}", f"--run.num_threads={threads}"]
    words += [f"--run.dir={folder}", f"--data.path={graph.folder}", "--run.tensorboard=false"]
    words += [
        f"--checkpoint.every={parts * parts * epochs}",
        "--checkpoint.keep=1",
        "--eval.every=0",
        "--eval.tokens=0",
    ]
    began, cpu = time.perf_counter(), time.process_time()
    run.train(recipe.load("social", [*words, *extra]))
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    events = read_events(folder)
    steps = last_steps(events)
    scorer, _ = load(folder, recipe.load(folder).recipe.graph, graph)
    figures = evaluate(scorer, "test", candidates=CANDIDATES, sampling="prevalence", seed=SEED)
    told = [event for event in events if event["event"] in ("start", "resume", "step")]
    spent = [after["time"] - before["time"] for before, after in pairwise(told) if after["event"] == "step"]
    begun = next(event for event in events if event["event"] == "start")
    return {
        "num_partitions": parts,
        "held_partitions": begun["held_partitions"],
        "table_resident": begun["held_partitions"] / parts,
        "train_s": sum(spent),
        "wall_s": wall,
        "cpu_s": cpu,
        "edges": steps[max(steps)]["tokens"],
        "wait_s": sum(step["swap_s"] for step in steps.values()),
        "swaps": sum(step["swaps"] for step in steps.values()),
        "mrr": figures["raw"]["mrr"],
        "mrr_interval": figures["raw"]["mrr_interval"],
        "filtered_mrr": figures["filtered"]["mrr"],
        "hits10": figures["raw"]["hits10"],
    }


def main() -> None:
    """Train, judge, compare; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="edge list: a header, then src,dst (gzip)")
    parser.add_argument("--out", type=Path, default=Path("runs/partitions"))
    parser.add_argument("--partitions", default="1,4,8,16")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="workers")
    parser.add_argument("--json", action="store_true", help="print JSON only on stdout")
    parser.add_argument("extra", nargs="*", help="more settings, after --: --graph.lr=0.05")
    args = parser.parse_args()
    graph = split(args.data, args.out / "graph")
    numbers = [int(word) for word in args.partitions.split(",")]
    rounds: dict[int, list[dict[str, Any]]] = {parts: [] for parts in numbers}
    for n in range(args.rounds):
        for parts in numbers:
            kept = args.out / f"p{parts}-round{n}.json"
            if not kept.is_file():
                folder = args.out / f"p{parts}-round{n}"
                figures = train(graph, folder, parts, args.epochs, args.threads, args.extra)
                kept.write_text(json.dumps(figures))
            rounds[parts].append(json.loads(kept.read_text()))
            print(kept.name, kept.read_text(), file=sys.stderr)
    medians = {
        parts: found[0]
        | {key: statistics.median(f[key] for f in found) for key in ("train_s", "cpu_s", "mrr", "wait_s")}
        for parts, found in rounds.items()
    }
    mrrs = [found["mrr"] for found in medians.values()]
    first, last = medians[numbers[0]], medians[numbers[-1]]
    result = {
        "nodes": graph.num_nodes,
        "train_edges": graph.splits["train"]["edges"],
        "candidates": CANDIDATES,
        "epochs": args.epochs,
        "rounds": args.rounds,
        "settings": SETTINGS,
        "runs": list(medians.values()),
        "mrr_spread": max(mrrs) - min(mrrs),
        "time_ratio": last["train_s"] / first["train_s"],
        "cpu_ratio": last["cpu_s"] / first["cpu_s"],
        "threads": args.threads,
    }
    print(json.dumps(result | machine.facts()))


if __name__ == "__main__":
    main()
