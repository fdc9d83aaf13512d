"""Processes and devices: process group, roles, five-axis mesh, what one rank tells the others, the compute dtype."""

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from puna.errors import DeviceError, RecipeError
from puna.train import flight, network
from puna.train.config import MeshConfig, RunConfig
from puna.train.phase import during
from puna.train.shared_memory import shares_memory

AXES = ("dp_replicate", "dp_shard", "pp", "cp", "tp")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Mesh:
    """Where this process stands among the others."""

    device: torch.device
    rank: int
    world_size: int
    sizes: dict[str, int]
    devices: DeviceMesh
    shares_memory: bool = False  # the ranks of the axis dp_shard are processes of one machine, and go that way

    @property
    def data_parallel(self) -> DeviceMesh:
        """What `fully_shard` takes: (dp_shard,), or (dp_replicate, dp_shard) for hybrid sharding."""
        return self.devices["dp_replicate", "dp_shard"] if self.sizes["dp_replicate"] > 1 else self.devices["dp_shard"]

    def __str__(self) -> str:
        axes = ", ".join(f"{axis} {size}" for axis, size in self.sizes.items())
        return f"{self.world_size} x {self.device.type} [{axes}]" + (", shared memory" if self.shares_memory else "")


@contextmanager
def open_mesh(run: RunConfig, config: MeshConfig, on_meet: Callable[[], None] = lambda: None) -> Iterator[Mesh]:
    """Join the processes that the launcher (or torchrun) started; without one, be a group of one.

    on_meet: called when all processes have met, before the axes are laid out, which takes their agreement on the mesh.
    Raises DeviceError (no such device), RecipeError (axes do not multiply to the world size).
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    sizes = axis_sizes(config, size)
    device = choose_device(run.device)
    if run.num_threads:
        torch.set_num_threads(run.num_threads)
    if size > 1:
        flight.switch_on(Path(run.dir))
    join_group(rank, size, device)
    on_meet()
    devices = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=AXES)
    try:
        together = config.shared_memory and device.type == "cpu" and shares_memory(devices["dp_shard"].get_group())
        yield Mesh(device, rank, size, sizes, devices, together)
    except BaseException:
        # Ranks may be gone: taking a group of several down would wait for them, and the process ends anyway.
        if size == 1:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def axis_sizes(config: MeshConfig, world_size: int) -> dict[str, int]:
    """Size of every axis, outermost first; dp_shard 0 takes the ranks that remain. Raises RecipeError."""
    shard = config.dp_shard or max(1, world_size // config.dp_replicate)
    sizes = dict(zip(AXES, (config.dp_replicate, shard, 1, 1, 1), strict=True))
    if math.prod(sizes.values()) != world_size:
        product = " x ".join(f"{axis} {n}" for axis, n in sizes.items() if n > 1) or "1"
        raise RecipeError(
            f"the mesh {product} does not multiply to the {world_size} processes of this run",
            "Set mesh.dp_replicate and mesh.dp_shard so that their product is the number of processes "
            "(mesh.dp_shard 0 takes all that remain), or change run.num_processes.",
        )
    return sizes


def choose_device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device of this process; on CUDA each process takes the one of its local rank. Raises DeviceError."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if not torch.cuda.is_available() or local >= count:
        raise DeviceError(
            f"CUDA device {local} was asked for but this machine shows {count}",
            "Set run.device to cpu (or auto), lower run.num_processes, or install a CUDA build of PyTorch.",
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def join_group(rank: int, world_size: int, device: torch.device) -> None:
    """Default process group: gloo for CPU tensors, and NCCL for CUDA tensors where the device is CUDA."""
    path = os.environ.get("PUNA_STORE")
    if world_size == 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # alone, a host name that does not resolve does no harm
    network.choose_interface()
    store = dist.FileStore(path, world_size) if path else dist.HashStore() if world_size == 1 else None
    cuda = device.type == "cuda"
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, device_id=device if cuda else None)


@dataclass(frozen=True)
class Role:
    """What kind of process this is, and its rank among those of its kind."""

    name: str
    rank: int
    size: int


def role() -> Role:
    """This process's role, as the launcher or `torchrun --role` gave it; trainer where nothing did."""
    name = os.environ.get("ROLE_NAME", "trainer")
    return Role(name, int(os.environ.get("ROLE_RANK", rank())), int(os.environ.get("ROLE_WORLD_SIZE", world_size())))


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for every rank."""
    agree([0.0])


def agree(values: list[float], how: Literal["sum", "max"] = "sum") -> list[float]:
    """Reduce a few numbers over all ranks, on the CPU (no device is waited for)."""
    if world_size() == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64)
    with during("collective"):
        dist.all_reduce(tensor, dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX)
    return tensor.tolist()


def gather(value: Any) -> list[Any]:
    """The value of every rank, by rank, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    with during("collective"):
        dist.all_gather_object(values, value)
    return values


def from_rank_0(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    with during("collective"):
        dist.broadcast_object_list(box, src=0)
    return box[0]


@dataclass(frozen=True)
class Compute:
    """The compute dtype, why it was chosen, and the matrix rate of one rank in it (FLOP/s, measured)."""

    dtype: torch.dtype
    reason: str
    peak_flops: float


def choose_compute(name: Literal["auto", "fp32", "bf16", "fp16"], device: torch.device) -> Compute:
    """Decide the compute dtype once: rank 0 measures and tells the others."""
    return from_rank_0(_choose_compute(name, device) if rank() == 0 else None)


@cache
def _choose_compute(name: str, device: torch.device) -> Compute:
    large = 1024 if device.type == "cpu" else 8192
    if name != "auto":
        return Compute(DTYPES[name], f"{name} was asked for", matrix_rate(DTYPES[name], device, large // 4, large))
    rates = {dtype: matrix_rate(DTYPES[dtype], device, large // 4, large) for dtype in ("fp32", "bf16")}
    best = "bf16" if rates["bf16"] > rates["fp32"] else "fp32"
    shown = ", ".join(f"{dtype} {rate / 1e9:,.0f} GFLOP/s" for dtype, rate in rates.items())
    return Compute(DTYPES[best], f"auto chose {best}: matrices multiply at {shown}", rates[best])


def matrix_rate(dtype: torch.dtype, device: torch.device, small: int, large: int, budget_s: float = 0.1) -> float:
    """FLOP/s of a square matrix product of width `large`, or `small` where the large one would overrun the budget."""
    rate = _timed_product(dtype, device, small)
    return rate if 2 * large**3 / rate > budget_s else _timed_product(dtype, device, large)


def _timed_product(dtype: torch.dtype, device: torch.device, width: int) -> float:
    a = torch.randn(width, width, device=device).to(dtype)
    best = math.inf
    for _ in range(4):
        start = time.perf_counter()
        (a @ a).view(-1)[0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * width**3 / best
