"""Samples per second of DLRM training on one machine, against the reference DLRM and TorchRec, alternated.

    python bench/dlrm_speed.py --json --dlrm FOLDER --dlrm-python PYTHON --torchrec-python PYTHON

The Kaggle networks (13-512-256-64-16 and 512-256-1), 26 tables with the Kaggle cardinalities up to 200,000 rows,
batches of 2,048, SGD. All take eight batches that were made beforehand, again and again; Puna's step is its whole one,
with its checks. `_reading`: Puna reads from disk instead, shuffled, never the same batch. Ids by Zipf's law with
exponent 1.05. `_bf16`: the networks multiply in bf16, the peers by autocast; left out where the CPU has no such
products. A round runs every arm once, after ten steps that are not timed; the figures are medians of rounds.
`speedup_KIND`: Puna over the faster peer of that kind; `speedup`: its faster kind over the fastest peer;
`speedup_reading`: that while it reads. --auc SAMPLES: also trains Puna and the reference on the same planted clicks,
and Puna in both dtypes, and compares AUC.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import machine
import torch

from puna.recsys.clicks import Clicks
from puna.recsys.config import DlrmConfig, ExchangeConfig
from puna.recsys.generator import generate
from puna.recsys.task import DlrmTask
from puna.train.config import MeshConfig, RunConfig, ScheduleConfig
from puna.train.mesh import open_mesh
from puna.train.task import Cursor

BATCH, MAX_ROWS, NUM_BATCHES, WARMUP, STEPS = 2048, 200_000, 8, 10, 40
HAS_BF16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
SUFFIX = {"fp32": "", "bf16": "_bf16"}
PEERS = Path(__file__).with_name("dlrm_peers.py")


class Puna:
    """One arm: a task that goes on from round to round."""

    def __init__(self, clicks: Clicks, dtype: Any) -> None:
        config = DlrmConfig(max_rows=MAX_ROWS, batch=BATCH, lr=0.1, dtype=dtype, epochs=1000)
        self.task = DlrmTask(config, ExchangeConfig(), ScheduleConfig(decay="constant"), clicks)
        self.coming = self.task.units(Cursor())
        made = [replace(next(self.coming), read_on=lambda: None) for _ in range(NUM_BATCHES)]
        self.made = itertools.cycle(made)

    def run(self, reading: bool) -> float:
        """Samples per second of `STEPS` steps, after some that are not timed."""
        units = self.coming if reading else self.made
        for unit in itertools.islice(units, WARMUP):
            self.task.step(unit)
        began = time.perf_counter()
        for unit in itertools.islice(units, STEPS):
            self.task.step(unit)
        return BATCH * STEPS / (time.perf_counter() - began)


def peer(python: str, *words: str, threads: int) -> dict[str, Any]:
    """The last line of a peer's program, in its own Python."""
    given = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([python, str(PEERS), *words], capture_output=True, text=True, env=given)
    if done.returncode:
        sys.exit(f"{' '.join(words)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(args: argparse.Namespace, clicks: Clicks) -> dict[str, Any]:
    """Rounds of every arm."""
    kinds = ("fp32", "bf16") if HAS_BF16 else ("fp32",)
    ours = {f"puna{SUFFIX[kind]}": Puna(clicks, kind) for kind in kinds}
    peers: dict[str, tuple[str, list[str]]] = {}
    for kind in kinds:
        if args.dlrm:
            peers[f"dlrm{SUFFIX[kind]}"] = (args.dlrm_python, ["dlrm", "--dtype", kind, "--folder", args.dlrm])
        if args.torchrec_python:
            peers[f"torchrec{SUFFIX[kind]}"] = (args.torchrec_python, ["torchrec", "--dtype", kind])
    rates: dict[str, list[float]] = {name: [] for name in (*ours, *(f"{name}_reading" for name in ours), *peers)}
    common = ["--batch", str(BATCH), "--max-rows", str(MAX_ROWS), "--warmup", str(WARMUP), "--steps", str(STEPS)]
    for number in range(args.rounds):
        for name, arm in ours.items():
            rates[name].append(arm.run(False))
            rates[f"{name}_reading"].append(arm.run(True))
        for name, (python, words) in peers.items():
            rates[name].append(peer(python, *words, *common, threads=args.threads)["samples_per_s"])
        shown = "  ".join(f"{name} {found[-1]:,.0f}" for name, found in rates.items())
        print(f"round {number + 1}, samples/s: {shown}", file=sys.stderr)
    result: dict[str, Any] = {
        name: {"samples_per_s": statistics.median(found), "min": min(found), "max": max(found)}
        for name, found in rates.items()
    }
    middle = {name: statistics.median(found) for name, found in rates.items()}
    for kind in kinds if peers else ():
        best = max(middle[name] for name in peers if name.endswith("_bf16") == (kind == "bf16"))
        result[f"speedup_{kind}"] = middle[f"puna{SUFFIX[kind]}"] / best
    if peers:
        best = max(middle[name] for name in peers)
        result["speedup"] = max(middle[name] for name in ours) / best
        result["speedup_reading"] = max(middle[f"{name}_reading"] for name in ours) / best
    return result


def accuracy(args: argparse.Namespace, clicks: Clicks) -> dict[str, Any]:
    """AUC on the test split after one pass over the same samples in the same order."""
    found: dict[str, Any] = {}
    for dtype in ("fp32", "bf16") if HAS_BF16 else ("fp32",):
        name = f"puna{SUFFIX[dtype]}"
        config = DlrmConfig(max_rows=MAX_ROWS, batch=BATCH, lr=args.lr, dtype=dtype, shuffle=False)
        task = DlrmTask(config, ExchangeConfig(), ScheduleConfig(decay="constant"), clicks, eval_samples=10**9)
        for unit in task.units(Cursor()):
            task.step(unit)
        found[name] = task.evaluate("heldout")["auc"]
        print(f"{name}: auc {found[name]:.5f}", file=sys.stderr)
    if args.dlrm:
        words = ["dlrm", "--dtype", "fp32", "--folder", args.dlrm, "--clicks", str(clicks.folder), "--lr", str(args.lr)]
        words += ["--batch", str(BATCH), "--max-rows", str(MAX_ROWS)]
        found["dlrm"] = peer(args.dlrm_python, *words, threads=args.threads)["auc"]
    return {"auc": found}


def main() -> None:
    """Alternate the arms; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON only on stdout")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dlrm", help="a checkout of facebookresearch/dlrm")
    parser.add_argument("--dlrm-python", default=sys.executable, help="a Python that it runs in")
    parser.add_argument("--torchrec-python", help="a Python that has torchrec and fbgemm_gpu")
    parser.add_argument("--auc", type=int, default=0, metavar="SAMPLES", help="also compare AUC after so many samples")
    parser.add_argument("--lr", type=float, default=0.1, help="of the comparison of AUC")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder, open_mesh(RunConfig(device="cpu"), MeshConfig()):
        samples = max(args.auc, BATCH * 200)
        generate(f"{folder}/clicks", samples=samples, test=samples // 4, max_rows=MAX_ROWS)
        clicks = Clicks.open(f"{folder}/clicks")
        result = compare(args, clicks) if args.rounds else {}
        if args.auc:
            result |= accuracy(args, clicks)
    print(json.dumps(result | {"threads": args.threads} | machine.facts()))


if __name__ == "__main__":
    main()
