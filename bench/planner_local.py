"""Twelve recipes trained on this machine, each predicted before it runs: step time, and memory of a rank.

    python bench/planner_local.py --json

`puna doctor` measures the machine first; token shards are made of this package's own source. Of each recipe the plan is
made, then `puna train` runs it in a fresh process for `--steps` steps. Measured are the median step after the first
four, and by how much the largest rank's resident memory has grown since the trainer was imported. A disturbed run
(quartiles of its steps further apart than a fifth of the median, or others kept more than 0.15 cores busy) is repeated
up to twice; the least disturbed one counts, whatever its error. What others did while the doctor measured is told too.
Each result is a file in the folder, so that the same command goes on where it was stopped; a new folder measures anew.
The shapes on which the model was developed are others.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from puna.plan.local import LocalJob, document_lengths, predict
from puna.recipe import Recipe, load
from puna.train import hardware

WARM_UP = 4
WIDE, BUSY, MAX_REPEATS = 0.2, 0.15, 2
SHAPE = ("num_layers", "dim", "ffn_dim", "num_heads", "num_kv_heads", "vocab_size")
WORK = ("seq_len", "micro_batch", "sequences", "recompute", "optimizer", "processes", "reshard")
RECIPES: dict[str, tuple[Any, ...]] = {
    "base": (5, 256, 768, 4, 1, 4096, 320, 4, 16, "none", "adamw", 1, True),
    "wide": (2, 768, 2048, 12, 4, 3072, 128, 3, 9, "none", "adamw", 1, True),
    "deep": (12, 192, 512, 3, 1, 2048, 256, 3, 12, "none", "adamw", 1, True),
    "vocabulary": (2, 320, 832, 5, 5, 24_000, 256, 2, 8, "none", "adamw", 1, True),
    "long": (5, 192, 512, 3, 1, 4096, 1536, 1, 3, "none", "adamw", 1, True),
    "full": (8, 320, 896, 5, 5, 4096, 384, 3, 6, "full", "adamw", 1, True),
    "selective": (5, 256, 640, 4, 2, 6144, 768, 1, 4, "selective", "adamw", 1, True),
    "muon": (4, 384, 1024, 6, 3, 8192, 192, 4, 8, "none", "muon", 1, True),
    "base-2": (4, 320, 832, 5, 1, 6144, 256, 4, 16, "none", "adamw", 2, True),
    "wide-2": (2, 640, 1728, 10, 5, 4096, 192, 3, 12, "none", "adamw", 2, False),
    "deep-2": (10, 256, 704, 4, 2, 4096, 384, 4, 8, "full", "adamw", 2, True),
    "muon-2": (3, 384, 1024, 6, 2, 6144, 160, 6, 24, "none", "muon", 2, False),
}


def puna(*words: str) -> float:
    """One command of Puna in a process of its own; the cores that other programs kept busy meanwhile."""
    before, began = _busy(), time.monotonic()
    done = subprocess.run([sys.executable, "-m", "puna.cli", *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"puna {' '.join(words)}: {done.stderr}")
    return round((_busy() - before) / (time.monotonic() - began), 2)


def once(file: Path, *words: str) -> None:
    """A command whose result is `file`, unless it is there."""
    if not file.exists():
        others = puna(*words)
        print(f"puna {words[0]} {words[1]}: others kept {others} cores busy", file=sys.stderr)


def prepare(folder: Path) -> hardware.Hardware:
    """Token shards and the doctor's figures."""
    folder.mkdir(parents=True, exist_ok=True)
    entry, corpus, tokenizer, shards = (
        folder / name for name in ("machine.toml", "corpus", "tokenizer.json", "shards")
    )
    source = str(Path(__file__).parent.parent / "puna")
    once(corpus, "corpus", "build", "--source", source, "--out", str(corpus))
    once(tokenizer, "corpus", "tokenizer", str(corpus), "--vocab-size", "2048", "--out", str(tokenizer))
    once(shards, "corpus", "tokenize", str(corpus), "--tokenizer", str(tokenizer), "--out", str(shards))
    once(entry, "doctor", "--write", str(entry))
    return hardware.read(entry)


def settings(name: str, folder: Path, num_steps: int) -> list[str]:
    """A recipe as flags."""
    values = RECIPES[name]
    shape, work = dict(zip(SHAPE, values, strict=False)), dict(zip(WORK, values[len(SHAPE) :], strict=True))
    tokens = work["sequences"] * work["seq_len"]
    flags = {f"model.{key}": value for key, value in shape.items()} | {
        "model.head_dim": shape["dim"] // shape["num_heads"],
        "model.max_seq_len": work["seq_len"],
        "run.dir": folder / "runs" / name,
        "run.num_processes": work["processes"],
        "run.num_threads": 0,
        "data.path": folder / "shards",
        "train.tokens": num_steps * tokens,
        "train.batch_tokens": tokens,
        "train.seq_len": work["seq_len"],
        "train.micro_batch": work["micro_batch"],
        "train.recompute": work["recompute"],
        "train.optimizer": work["optimizer"],
        "train.dtype": "fp32",
        "mesh.reshard_after_forward": str(work["reshard"]).lower(),
        "schedule.warmup_tokens": 0,
        "checkpoint.every": 10 * num_steps,
        "eval.tokens": 0,
    }
    return [word for key, value in flags.items() for word in (f"--{key}", str(value))]


def planned(recipe: Recipe, machine: hardware.Hardware) -> dict[str, Any]:
    """What the planner says before the run."""
    job = LocalJob(
        recipe.model, recipe.train, recipe.mesh, recipe.run.num_processes, recipe.run.num_threads,
        document_lengths=document_lengths(recipe.data),
    )  # fmt: skip
    return predict(job, machine)


def trained(name: str, folder: Path, num_steps: int) -> dict[str, Any]:
    """One run: seconds of its steps, the most memory of a rank, and the cores that others kept busy meanwhile."""
    run = folder / "runs" / name
    subprocess.run(["rm", "-rf", str(run)], check=True)
    others = puna("train", "tiny", *settings(name, folder, num_steps))
    records = [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [record for record in records if record["event"] == "step"]
    seconds = [step["step_s"] for step in steps[WARM_UP:]]
    low, middle, high = statistics.quantiles(seconds, n=4)
    return {
        "seconds": seconds,
        "measured_s": middle,
        "spread": (high - low) / middle,
        "peak_bytes": max(step["peak_memory_bytes"] for step in steps),
        "others_cores": others,
        "disturbance": max((high - low) / middle / WIDE, others / BUSY),
    }


def _busy() -> float:
    """Seconds of CPU time that processes other than this one's children have used since the machine started."""
    fields = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:]
    user, nice, system, _, _, interrupts, soft, steal = (int(field) / os.sysconf("SC_CLK_TCK") for field in fields[:8])
    mine = resource.getrusage(resource.RUSAGE_CHILDREN)
    return user + nice + system + interrupts + soft + steal - mine.ru_utime - mine.ru_stime


def imported_bytes() -> int:
    """Resident memory of a process that has imported the trainer and done nothing."""
    code = "import puna.cli, puna.run; print(open('/proc/self/statm').read().split()[1])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout) * os.sysconf("SC_PAGE_SIZE")


def one(name: str, folder: Path, machine: hardware.Hardware, num_steps: int) -> dict[str, Any]:
    """A recipe's prediction, then its runs, in a file that is read where it is there."""
    file = folder / f"{name}.json"
    if file.exists():
        return dict(json.loads(file.read_text(encoding="utf-8")))
    plan = planned(load("tiny", settings(name, folder, num_steps)).recipe, machine)
    runs = [trained(name, folder, num_steps)]
    while runs[-1]["disturbance"] > 1 and len(runs) <= MAX_REPEATS:
        runs.append(trained(name, folder, num_steps))
    best = min(runs, key=lambda run: run["disturbance"])
    growth = max(run["peak_bytes"] for run in runs) - imported_bytes()
    result = {
        "predicted_s": plan["seconds"], "measured_s": best["measured_s"],
        "step_error": plan["seconds"] / best["measured_s"] - 1,
        "predicted_bytes": plan["growth_bytes"], "measured_bytes": growth,
        "memory_error": plan["growth_bytes"] / growth - 1,
        "spread": best["spread"], "others_cores": best["others_cores"], "repeats": len(runs) - 1,
        "parts": plan["parts"], "memory": plan["memory"], "seconds": best["seconds"],
    }  # fmt: skip
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(result), encoding="utf-8")
    os.replace(temporary, file)
    return result


def line(name: str, found: dict[str, Any]) -> str:
    """A recipe's result in one line."""
    step = f"step {found['predicted_s']:.3f} s of {found['measured_s']:.3f} ({found['step_error']:+.1%}"
    steps = f"{step}, spread {found['spread']:.0%}, others {found['others_cores']} cores)"
    memory = f"memory {found['predicted_bytes'] / 1e6:.0f} MB of {found['measured_bytes'] / 1e6:.0f}"
    return f"{name:<11} {steps}  {memory} ({found['memory_error']:+.1%})"


def main() -> None:
    """All recipes; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON only on stdout")
    parser.add_argument("--out", type=Path, default=Path("runs/planner-local"), help="folder of results")
    parser.add_argument("--steps", type=int, default=16, help="steps of each run")
    args = parser.parse_args()
    machine = prepare(args.out.resolve())
    results = {}
    for name in RECIPES:
        found = results[name] = one(name, args.out.resolve(), machine, args.steps)
        print(line(name, found), file=sys.stderr)
    errors = {key: [abs(found[key]) for found in results.values()] for key in ("step_error", "memory_error")}
    summary = {
        "num_recipes": len(results),
        "step_median_error": statistics.median(errors["step_error"]),
        "step_worst_error": max(errors["step_error"]),
        "memory_median_error": statistics.median(errors["memory_error"]),
        "memory_worst_error": max(errors["memory_error"]),
        "machine": machine.device_name,
        "software": machine.software,
        "measured": machine.measured,
        "recipes": results,
    }
    if not args.json:
        for key, value in summary.items():
            if key != "recipes":
                print(f"{key}: {value}", file=sys.stderr)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
