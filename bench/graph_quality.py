"""Trains a graph recipe with several seeds and ranks the test edges: the quality that a recipe has, for the record.

    puna graph import --train train.txt.xz --valid valid.txt.xz --test test.txt.xz --out fb15k
    python bench/graph_quality.py fb15k-complex --data fb15k --runs runs/quality --seeds 0,1,2 --out RESULT.json

The same command again goes on where it was stopped. --minutes ends it after about so long (at the end of an epoch) with
exit status 75, so that a long job can be cut into pieces. What follows `--` is passed to `puna train`. Seconds are of
training alone, memory the largest that the training process had; the last line of stdout is JSON.
"""

import argparse
import datetime
import json
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import machine

from puna.train.metrics import read_events

UNFINISHED = 75
PUNA = (sys.executable, "-m", "puna.cli")
FIGURES = ("mrr", "hits1", "hits10", "mr")


def finished(run: Path) -> bool:
    """Whether a run has ended as it should."""
    stops = [event for event in read_events(run) if event["event"] == "stop"] if (run / "events.jsonl").exists() else []
    return bool(stops) and stops[-1]["reason"] == "done"


def train(recipe: str, run: Path, data: Path, seed: int, overrides: list[str], until: float) -> bool:
    """Go on with a run until it ends or the clock does; whether it ended."""
    command = [*PUNA, "train", recipe, "--data.path", str(data), "--run.dir", str(run), "--run.seed", str(seed)]
    process = subprocess.Popen([*command, *overrides])
    try:
        process.wait(max(1.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    if finished(run):
        return True
    if time.monotonic() < until:
        raise SystemExit(f"{run} ended with {process.returncode} before its work did")
    return False


def judge(run: Path, seed: int) -> dict[str, Any]:
    """Ranks of the test edges, and what training took."""
    told = subprocess.run([*PUNA, "graph", "eval", str(run), "--json"], capture_output=True, text=True, check=True)
    figures = json.loads(told.stdout)
    steps = {event["step"]: event for event in read_events(run) if event["event"] == "step"}
    return {
        "seed": seed,
        "filtered": figures["filtered"],
        "raw": figures["raw"],
        "edges_trained": max(step["tokens"] for step in steps.values()),
        "train_s": sum(step["step_s"] for step in steps.values()),
        "peak_memory_bytes": max(step["peak_memory_bytes"] for step in steps.values()),
        "heldout_mrr": [[e["step"], e["mrr"]] for e in read_events(run) if e["event"] == "eval" and "mrr" in e],
    }


def main() -> int:
    """Train, rank, write; the last line is JSON."""
    own, overrides = sys.argv[1:], []
    if "--" in own:
        own, overrides = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--data", type=Path, required=True, help="the graph folder")
    parser.add_argument("--runs", type=Path, required=True, help="where run folders stand: RECIPE-SEED")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--minutes", type=float, default=1e6, help="stop after about so long")
    parser.add_argument("--out", type=Path, help="a JSON file for the result")
    args = parser.parse_args(own)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(UNFINISHED))
    until = time.monotonic() + 60 * args.minutes
    seeds = [int(seed) for seed in args.seeds.split(",")]
    runs = {seed: args.runs / f"{Path(args.recipe).stem}-{seed}" for seed in seeds}
    for seed, run in runs.items():
        if not finished(run) and not train(args.recipe, run, args.data, seed, overrides, until):
            print(json.dumps({"recipe": args.recipe, "unfinished": str(run)}))
            return UNFINISHED
    found = [judge(run, seed) for seed, run in runs.items()]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    result = {
        "command": f"python bench/graph_quality.py {args.recipe} --seeds {args.seeds} {' '.join(overrides)}".strip(),
        "commit": commit.stdout.strip(),
        "date": datetime.date.today().isoformat(),
        "seeds": found,
        "mean": {
            kind: {name: statistics.fmean(one[kind][name] for one in found) for name in FIGURES}
            for kind in ("filtered", "raw")
        },
    } | machine.facts()
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
