"""A graph larger than the memory it is given: an R-MAT graph, imported and trained for an epoch under a memory cgroup.

    python bench/graph_scale.py --nodes 1_000_000 --edges 10_000_000 --memory 700MB --out runs/scale-1m --json
    python bench/graph_scale.py --nodes 10_000_000 --edges 100_000_000 --memory 3GB --out runs/scale-10m --json

`puna graph import` and `puna train social --memory SIZE` run as processes of their own in a memory control group
(version 1) whose limit is that size; page cache counts too, and is taken back by the
kernel. Growth: peak resident memory of the training process over that of the same command on a graph of one edge; it
is to be at most (b + 0.3) / P of the table (vectors and Adagrad sums), b partitions of P held. What is done is not done
again: a run that was cut short goes on.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import machine
import rmat
import social

from puna.graph.config import num_bytes
from puna.train.metrics import last_steps, read_events

DIM = social.SETTINGS["graph.dim"]
STOPPED = 4  # exit code of a run with work left
SETTINGS = social.SETTINGS | {"graph.epochs": 1}


class Group:
    """A memory control group inside the one that this process is in."""

    def __init__(self, name: str, limit: int) -> None:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        own = next(line.split(":", 2)[2] for line in lines if line.split(":")[1] == "memory")
        self.folder = Path("/sys/fs/cgroup/memory") / own.lstrip("/") / name
        self.limit = limit

    def __enter__(self) -> "Group":
        self.folder.mkdir(exist_ok=True)
        self._write("memory.limit_in_bytes", self.limit)
        self._write("memory.max_usage_in_bytes", 0)
        return self

    def __exit__(self, *error: object) -> None:
        self._write("memory.force_empty", 0)
        self.folder.rmdir()

    def enter(self) -> None:
        """This process, and those that it starts, are in it from here on."""
        self._write("cgroup.procs", os.getpid())

    def read(self, file: str) -> int:
        """A number of the kernel's."""
        return int((self.folder / file).read_text(encoding="utf-8"))

    def _write(self, file: str, value: int) -> None:
        (self.folder / file).write_text(str(value), encoding="utf-8")


def within(limit: int, *words: str, stop_after: float = 0) -> dict[str, Any]:
    """A puna command under the limit: seconds, processor seconds, peak resident bytes, peak of the group.

    stop_after: seconds after which it is asked to stop; `stopped` says whether it did so with work left.
    """
    with Group(f"puna-{os.getpid()}", limit) as group:
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "puna.cli", *words], preexec_fn=group.enter, stdout=sys.stderr
        )
        timer = threading.Timer(stop_after, os.kill, [process.pid, signal.SIGTERM])
        if stop_after:
            timer.start()
        _, status, usage = os.wait4(process.pid, 0)
        timer.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode not in (0, STOPPED):
            raise SystemExit(f"puna {' '.join(words)} ended with {process.returncode}")
        return {
            "stopped": process.returncode == STOPPED,
            "seconds": time.perf_counter() - began,
            "cpu_s": usage.ru_utime + usage.ru_stime,
            "peak_rss_bytes": usage.ru_maxrss * 1024,
            "group_peak_bytes": group.read("memory.max_usage_in_bytes"),
            "group_limit_hits": group.read("memory.failcnt"),
        }


def once(path: Path, act: Any) -> dict[str, Any]:
    """What `act` returns, kept in a file."""
    if not path.is_file():
        figures = act()
        path.write_text(json.dumps(figures))
    print(path.name, path.read_text(), file=sys.stderr)
    return json.loads(path.read_text())


def train(data: Path, run: Path, args: argparse.Namespace) -> dict[str, Any]:
    """An epoch under the limit, and what its records say."""
    words = [f"--{key}={value}" for key, value in SETTINGS.items()]
    words += [f"--memory={args.memory}", f"--run.num_threads={args.threads}", f"--run.dir={run}", f"--data.path={data}"]
    words += ["--run.tensorboard=false", "--eval.every=0", "--eval.tokens=0", "--checkpoint.every=1000000"]
    words += ["--checkpoint.keep=1"]
    figures = within(num_bytes(args.memory), "train", "social", *words, stop_after=args.stop_after)
    with (run / "pieces.jsonl").open("a") as file:
        file.write(json.dumps(figures) + "\n")
    if figures["stopped"]:
        raise SystemExit(f"{run} is not done; the same command goes on")
    pieces = [json.loads(line) for line in (run / "pieces.jsonl").read_text().splitlines()]
    figures = {key: sum(piece[key] for piece in pieces) for key in ("seconds", "cpu_s", "group_limit_hits")}
    figures |= {key: max(piece[key] for piece in pieces) for key in ("peak_rss_bytes", "group_peak_bytes")}
    figures["pieces"] = len(pieces)
    events = read_events(run)
    steps = last_steps(events)
    start = next(event for event in events if event["event"] == "start")
    step_s = sum(step["step_s"] for step in steps.values())
    return figures | {
        "edges": steps[max(steps)]["tokens"],
        "step_s": step_s,
        "wait_s": sum(step["swap_s"] for step in steps.values()),
        "swaps": sum(step["swaps"] for step in steps.values()),
        "edges_per_s_per_core": steps[max(steps)]["tokens"] / step_s / args.threads,
        "first_loss": steps[min(steps)]["loss"],
        "last_loss": steps[max(steps)]["loss"],
        **{
            key: start[key]
            for key in ("num_partitions", "held_partitions", "bucket_order", "swaps_per_epoch", "memory")
        },
    }


def main() -> None:
    """Draw, import, train; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=1_000_000)
    parser.add_argument("--edges", type=int, default=10_000_000)
    parser.add_argument("--memory", default="700MB")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="workers")
    parser.add_argument("--stop-after", type=float, default=0, help="seconds of training after which to stop; 0: never")
    parser.add_argument("--out", type=Path, default=Path("runs/scale"))
    parser.add_argument("--json", action="store_true", help="print JSON only on stdout")
    args = parser.parse_args()
    out, limit = args.out, num_bytes(args.memory)
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "edges.tsv").is_file():
        rmat.write(out / "edges.tsv", args.nodes, args.edges)
    (out / "one.tsv").write_text("u0\tu1\n")
    for name, file in (("empty", "one.tsv"), ("graph", "edges.tsv")):
        words = ["graph", "import", "--train", str(out / file), "--columns", "head,tail", "--out", str(out / name)]
        once(out / f"import-{name}.json", lambda words=words: within(limit, *words))
    runs = {
        name: once(out / f"train-{name}.json", lambda name=name: train(out / name, out / f"run-{name}", args))
        for name in ("empty", "graph")
    }
    imported, trained = (json.loads((out / f"{name}-graph.json").read_text()) for name in ("import", "train"))
    table = args.nodes * (DIM + 1) * 4
    parts, held = trained["num_partitions"], trained["held_partitions"]
    growth = trained["peak_rss_bytes"] - runs["empty"]["peak_rss_bytes"]
    base = json.loads((out / "import-empty.json").read_text())
    result = {
        "nodes": args.nodes,
        "edges": args.edges,
        "memory": args.memory,
        "file_bytes": (out / "edges.tsv").stat().st_size,
        "import": imported | {"rows_per_s": args.edges / imported["seconds"]},
        "import_growth_bytes": imported["peak_rss_bytes"] - base["peak_rss_bytes"],
        "train": trained,
        "empty_peak_rss_bytes": runs["empty"]["peak_rss_bytes"],
        "table_bytes": table,
        "growth_bytes": growth,
        "growth_of_table": growth / table,
        "allowed_of_table": (held + 0.3) / parts,
        "threads": args.threads,
    }
    print(json.dumps(result | machine.facts()))


if __name__ == "__main__":
    main()
