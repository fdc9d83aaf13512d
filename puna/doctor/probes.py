"""What torch reaches on this machine: matrices, memory, and what two processes say to each other."""

import json
import math
import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from puna.errors import DeviceError
from puna.train.launch import launch
from puna.train.mesh import DTYPES, choose_device, join_group, matrix_rate

NUM_PROCESSES = 2
LATENCY_ROUNDS, LARGE_BYTES, LARGE_ROUNDS = 200, 32 << 20, 5
MAX_SECONDS = 30
"""After which two processes that cannot meet are given up."""


def devices() -> list[dict[str, Any]]:
    """Every CUDA device torch shows: name and bytes of memory."""
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [{"name": device.name, "memory": device.total_memory} for device in found]


def torch_facts() -> dict[str, Any]:
    """How torch is built and set: threads of one operation, CPU instructions it uses, CUDA it was built for."""
    return {
        "num_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda,
    }


def flops(kind: str, dtype: str) -> float:
    """FLOP/s of a square matrix product."""
    large = 2_048 if kind == "cpu" else 8_192
    return matrix_rate(DTYPES[dtype], torch.device(kind), large // 8, large, budget_s=0.4)


def bandwidth(kind: str, dtype: str, num_bytes: int) -> float:
    """Bytes/s read and written by y = 2 x on an array of `num_bytes`."""
    source = torch.ones(num_bytes // DTYPES[dtype].itemsize, dtype=DTYPES[dtype], device=kind)
    target = torch.empty_like(source)

    def scale() -> None:
        torch.mul(source, 2, out=target)
        target[-1].item()

    return 2 * num_bytes / best_of(4, scale)


def best_of(rounds: int, work: Callable[[], None]) -> float:
    """Seconds of the fastest of so many rounds, after one that is not timed."""
    work()
    best = math.inf
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
    return best


def link(kind: str) -> dict[str, float]:
    """Latency (s) and bandwidth (bytes/s) of an all-reduce between two processes of this machine.

    Through gloo on CPU tensors, or NCCL on those of two CUDA devices. Raises DeviceError or RankFailed where they
    cannot talk.
    """
    if "RANK" in os.environ:
        raise DeviceError("a launcher has set RANK, so no processes can be started", "Run puna doctor by itself.")
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "link.json"
        launch("puna.doctor.probes:exchange", [str(out), kind], NUM_PROCESSES, Path(scratch), num_threads=1)
        return json.loads(out.read_text(encoding="utf-8"))


def exchange(out: str, kind: str) -> None:
    """What each of the two processes does; rank 0 writes the figures."""
    signal.alarm(MAX_SECONDS)
    try:
        figures = _exchange(choose_device("cuda" if kind == "cuda" else "cpu"))
    except Exception as error:  # whatever the network makes of it, said by the launcher as one sentence
        problem = f"two processes cannot talk: {str(error).partition(chr(10))[0]}"
        raise DeviceError(problem, "Set GLOO_SOCKET_IFNAME to the loopback: lo.") from error
    if os.environ["RANK"] == "0":
        Path(out).write_text(json.dumps(figures), encoding="utf-8")


def _exchange(device: torch.device) -> dict[str, float]:
    join_group(int(os.environ["RANK"]), NUM_PROCESSES, device)
    one, large = torch.zeros(1, device=device), torch.zeros(LARGE_BYTES // 4, device=device)

    def reduce(tensor: torch.Tensor, rounds: int) -> None:
        for _ in range(rounds):
            dist.all_reduce(tensor)
        tensor[-1].item()

    latency = best_of(3, lambda: reduce(one, LATENCY_ROUNDS)) / LATENCY_ROUNDS
    seconds = best_of(LARGE_ROUNDS, lambda: reduce(large, 1))
    dist.destroy_process_group()
    return {"latency": latency, "bandwidth": LARGE_BYTES / seconds}
