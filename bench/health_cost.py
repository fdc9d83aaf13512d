"""What the health monitor costs: CPU time, memory, and whether the weights stay the same, on the 32.0 M benchmark.

    python bench/health_cost.py --json

Model, batches and optimiser are those of train_throughput.py (fp32, eager). One model takes steps by turns with the
monitor's hooks and without them, records going to a file as in a run. Per pair of steps the ratio is the CPU time of
the process (all threads) inside the monitor's functions over that of the step without it; the bound is the mean plus
1.96 standard errors. Memory: largest resident size of a fresh process with and without the monitor. Weights: a hash
over all of them after some steps, in the same fresh processes.
"""

import argparse
import hashlib
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import machine
import torch
from torch import Tensor
from train_throughput import BATCH, SEQ_LEN, SHAPE, Bench, unit

from puna.llama.pretrain import make_model
from puna.train.config import HealthConfig, MeshConfig, RunConfig, TrainConfig
from puna.train.health import HealthMonitor
from puna.train.mesh import Compute, open_mesh
from puna.train.metrics import peak_memory_bytes
from puna.train.optim import local


class Meter:
    """CPU seconds that the process spends inside some functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, metered."""

        def metered(*words: Any, **named: Any) -> Any:
            start = time.process_time()
            try:
                return function(*words, **named)
            finally:
                self.seconds += time.process_time() - start

        return metered


class Metered(HealthMonitor):
    """The monitor with its hooks and its loss metered, so that they can be left out of a step."""

    def __init__(self, *words: Any, **named: Any) -> None:
        self.meter, self.watching = Meter(), True
        super().__init__(*words, **named)
        self._metered_before = self.meter.around(super()._before)
        self._metered_after = self.meter.around(super()._after)
        self.loss = self.meter.around(super().loss)  # type: ignore[method-assign]

    def _before(self, *words: Any) -> Any:
        return self._metered_before(*words) if self.watching else None

    def _after(self, *words: Any) -> None:
        if self.watching:
            self._metered_after(*words)


def batches(num: int) -> list[Tensor]:
    """The same for every side."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(SHAPE.vocab_size, (BATCH, SEQ_LEN), generator=generator) for _ in range(num)]


def task_of(place: Any) -> Bench:
    """The benchmark's task, freshly made."""
    model = make_model(
        SHAPE, TrainConfig(), MeshConfig(reshard_after_forward=False), 0, place, Compute(torch.float32, "", 1.0)
    )
    return Bench(model)


def monitor_of(task: Bench, folder: str) -> Metered:
    """A monitor with default settings, whose records go to a file."""
    return Metered(task.optimizers, task.modules, HealthConfig(), folder=folder)


def cost(num_steps: int) -> dict[str, Any]:
    """By turns one step with the monitor and one without; the first pair is not counted."""
    watched, plain = [], []
    with open_mesh(RunConfig(device="cpu"), MeshConfig()) as place, tempfile.TemporaryDirectory() as folder:
        task = task_of(place)
        monitor = monitor_of(task, folder)
        for number, tokens in enumerate(batches(num_steps + 2)):
            monitor.watching = number % 2 == 0
            before, start = monitor.meter.seconds, time.process_time()
            report = task.step(unit(tokens))
            spent = time.process_time() - start
            if monitor.watching:
                monitor.loss(report.loss)
                watched.append(monitor.meter.seconds - before)
            else:
                plain.append(spent)
            if number % 10 == 9:
                print(f"{number + 1} steps: {json.dumps(figures(watched[1:], plain[1:]))}", file=sys.stderr, flush=True)
        assert monitor.off_reason is None, monitor.off_reason
    return figures(watched[1:], plain[1:])


def figures(watched: list[float], plain: list[float]) -> dict[str, Any]:
    """Of pairs of the monitor's and a step's CPU seconds."""
    ratios = [one / other for one, other in zip(watched, plain, strict=True)]
    mean, error = statistics.mean(ratios), statistics.stdev(ratios) / math.sqrt(len(ratios))
    return {
        "num_steps": 2 * len(ratios),
        "cpu_ratio_mean": mean,
        "cpu_ratio_upper95": mean + 1.96 * error,
        "cpu_ratio_largest": max(ratios),
        "monitor_cpu_s_median": statistics.median(watched),
        "step_cpu_s_median": statistics.median(plain),
    }


def side(watched: bool, num_steps: int) -> dict[str, Any]:
    """Some steps in this process: peak memory and a hash over the weights."""
    with open_mesh(RunConfig(device="cpu"), MeshConfig()) as place, tempfile.TemporaryDirectory() as folder:
        task = task_of(place)
        monitor = monitor_of(task, folder) if watched else None
        for tokens in batches(num_steps):
            loss = task.step(unit(tokens)).loss
            if monitor:
                monitor.loss(loss)
        digest = hashlib.sha256()
        for parameter in task.modules["model"].parameters():
            digest.update(local(parameter.detach()).numpy().tobytes())
    return {"peak_bytes": peak_memory_bytes(), "weights": digest.hexdigest()}


def in_fresh_process(watched: bool, num_steps: int) -> dict[str, Any]:
    """`side` elsewhere."""
    words = [sys.executable, __file__, "--side", "watched" if watched else "plain", "--memory-steps", str(num_steps)]
    words += ["--threads", str(torch.get_num_threads())]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def memory(num_rounds: int, num_steps: int) -> dict[str, Any]:
    """Peaks of fresh processes with and without the monitor, and whether their weights are the same."""
    peaks: dict[bool, list[int]] = {True: [], False: []}
    hashes = set()
    for _ in range(num_rounds):
        for watched in (True, False):
            found = in_fresh_process(watched, num_steps)
            peaks[watched].append(found["peak_bytes"])
            hashes.add(found["weights"])
    watched_bytes, plain_bytes = statistics.median(peaks[True]), statistics.median(peaks[False])
    return {
        "memory_ratio": watched_bytes / plain_bytes,
        "peak_bytes_watched": watched_bytes,
        "peak_bytes_plain": plain_bytes,
        "weights_bit_identical": len(hashes) == 1,
    }


def main() -> None:
    """Run it; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON only on stdout")
    parser.add_argument("--steps", type=int, default=400, help="steps by turns with and without, half of each")
    parser.add_argument("--memory-steps", type=int, default=4, help="steps of each fresh process")
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes of each kind; their medians count")
    parser.add_argument("--threads", type=int, default=2, help="threads of every process")
    parser.add_argument("--parts", nargs="+", default=["memory", "cost"], choices=["memory", "cost"])
    parser.add_argument("--side", choices=["watched", "plain"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.side:
        print(json.dumps(side(args.side == "watched", args.memory_steps)))
        return
    result = (memory(args.rounds, args.memory_steps) if "memory" in args.parts else {}) | (
        cost(args.steps) if "cost" in args.parts else {}
    )
    result |= {
        "num_threads": args.threads,
    } | machine.facts()
    if not args.json:
        for key, value in result.items():
            print(f"{key}: {value}", file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
