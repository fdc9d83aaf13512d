"""What a run should take and hold, told before it starts; and what to say when it is refused memory."""

import math
import os
import re
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from puna.console import err
from puna.errors import OutOfMemory, RankFailed, UserError
from puna.plan import fits, hardware, job, local
from puna.plan.constants import load
from puna.plan.describe import describe
from puna.plan.estimate import estimate
from puna.plan.hardware import HardwareError
from puna.plan.layout import Case, columns
from puna.plan.memory import Memory, estimate_memory
from puna.plan.workload import PlanError
from puna.recipe import Recipe, stages
from puna.train.checkpoint import complete_steps
from puna.train.hardware import default_path, read
from puna.train.mesh import DTYPES, Compute, Mesh, axis_sizes, choose_device
from puna.train.metrics import append_event, last_steps, read_events
from puna.train.out_of_memory import is_out_of_memory, kernel_kills, limit_bytes

HERE = hardware.THIS_MACHINE
GB = 1e9


def memory(recipe: Recipe, sizes: Mapping[str, int], compute_bytes: int, device: torch.device) -> Memory:
    """Bytes of one rank by use; sizes: of the mesh's axes."""
    num_ranks = math.prod(sizes.values())
    micro_tokens = recipe.train.seq_len * recipe.train.micro_batch * num_ranks
    return estimate_memory(
        recipe.model,
        recipe.train,
        num_ranks=num_ranks,
        shard=sizes["dp_shard"],
        reshard=recipe.mesh.reshard_after_forward,
        accumulates=max(stage.batch_tokens for stage in stages(recipe)) > micro_tokens,
        averages=recipe.schedule.average != "none",
        compute_bytes=compute_bytes,
        shares_memory=recipe.mesh.shared_memory and device.type == "cpu" and sizes["dp_shard"] > 1,
    )


def available(device: torch.device, num_ranks: int) -> int:
    """Bytes of memory a rank: the device's; on a CPU what this job may hold, shared by the processes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return limit_bytes(num_ranks)


# --- before ---------------------------------------------------------------------------------------------------------


def predict(recipe: Recipe, place: Mesh, compute: Compute) -> dict[str, Any] | None:
    """The "prediction" record: seconds of a step with the ends of the 80 % interval, tokens/s, bytes of a rank by kind.

    Of the first stage; on a CPU from the kernels that `puna doctor` timed, code included in the bytes, as is what a
    rank's peak is measured by. None, and a line that says why, where this machine has not been measured or the job is
    none that was.
    """
    try:
        case = _case(recipe, place.world_size, place.device.type)
        figures = _figures(recipe, case, place, compute)
    except UserError as reason:
        if place.rank == 0:
            err.print(f"no prediction: {reason}", markup=False, soft_wrap=True)
        return None
    return figures | {
        "tokens_per_s": recipe.train.batch_tokens / figures["seconds"],
        "batch_tokens": recipe.train.batch_tokens,
        "memory_bytes": sum(figures["memory"].values()),
    }


def _figures(recipe: Recipe, case: Case, place: Mesh, compute: Compute) -> dict[str, Any]:
    """Seconds, their interval and bytes by kind. Raises PlanError where a CPU's kernels were not timed for the job."""
    if place.device.type == "cuda":
        told = describe(case, load())
        held = asdict(memory(recipe, place.sizes, compute.dtype.itemsize, place.device))
        return {name: told[name] for name in ("seconds", "low", "high")} | {"memory": held}
    found = _here(recipe, case)
    if found is None:
        raise PlanError(
            f"the kernels of this job ({case.layout.precision}) were not timed", "`puna doctor` times fp32."
        )
    bytes_by_kind = {"code": found["code_bytes"], **found["memory"]}
    return {name: found[name] for name in ("seconds", "low", "high")} | {"memory": bytes_by_kind}


def _here(recipe: Recipe, case: Case) -> dict[str, Any] | None:
    return local.here(
        case, recipe.model, recipe.train, recipe.mesh, recipe.data, num_threads=recipe.run.num_threads,
        averages=recipe.schedule.average != "none",
    )  # fmt: skip


def _case(recipe: Recipe, num_ranks: int, kind: str) -> Case:
    """A recipe as a job on this machine. Raises HardwareError where it was not measured, or another kind of device."""
    if not default_path().is_file():
        raise HardwareError("this machine has not been measured", "`puna doctor` does it in seconds.")
    measured = read(default_path()).device
    if measured != kind:
        raise HardwareError(f"`puna doctor` measured {measured} here and this run is on {kind}", "Run it again.")
    cluster = hardware.cluster(HERE, num_ranks)
    shape, layout = job.of_recipe(recipe.model, recipe.train, recipe.mesh, cluster)
    return job.build(shape, cluster, layout, {})


# --- refused memory -------------------------------------------------------------------------------------------------


@contextmanager
def explained(recipe: Recipe, run: Path, place: Mesh) -> Iterator[None]:
    """Where what happens inside is refused memory, raise OutOfMemory, which says what is needed and what helps."""
    words = ""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        words = f"rank {place.rank} was refused {_asked(error)} of memory"
        traceback.clear_frames(error.__traceback__)  # whose tensors the diagnosis may need the room of
    if words:
        raise OutOfMemory(f"{words}. {diagnosis(recipe, run, place.world_size, place.device)}")


@contextmanager
def out_of_memory_recorded(recipe: Recipe, run: Path) -> Iterator[None]:
    """Around all ranks of a run: how it stopped is recorded, also where the kernel ended a rank for lack of memory.

    Raises OutOfMemory instead of the RankFailed that such an end would be.
    """
    kills = kernel_kills()
    try:
        yield
    except (OutOfMemory, RankFailed) as error:
        if isinstance(error, RankFailed) and kernel_kills() == kills:
            raise
        told = error
        if isinstance(error, RankFailed):
            num_ranks = int(os.environ.get("WORLD_SIZE", recipe.run.num_processes))
            more = diagnosis(recipe, run, num_ranks, choose_device(recipe.run.device))
            told = OutOfMemory(f"{error}. The kernel ended it for lack of memory. {more}")
        if int(os.environ.get("RANK", "0")) == 0:
            step = max(last_steps(read_events(run)), default=0)
            append_event(run, {"event": "stop", "reason": str(told), "error": "OutOfMemory", "step": step})
        raise told from None


def _asked(error: Exception) -> str:
    found = re.search(r"tried to allocate ([\d.]+)( ?bytes| [KMG]iB)", str(error), re.I)
    if found is None:
        return "a piece"
    size = float(found[1].rstrip(".")) * {"K": 2**10, "M": 2**20, "G": 2**30}.get(found[2].strip()[0].upper(), 1)
    return f"{size / 1e6:,.0f} MB"


def diagnosis(recipe: Recipe, run: Path, num_ranks: int, device: torch.device) -> str:
    """Need, capacity and gap by kind, what helps at what price, and where the run stands. Never raises."""
    try:
        told = _told(recipe, num_ranks, device)
    except Exception as error:  # whatever this is, the reader must hear of the memory first
        told = f"More is not known ({type(error).__name__}: {error})."
    steps = complete_steps(run)
    if not steps:
        return f"{told} No checkpoint was saved yet."
    return f"{told} The checkpoint of step {steps[-1]:,} is as it was; the same command resumes from it."


def _told(recipe: Recipe, num_ranks: int, device: torch.device) -> str:
    compute_bytes = _compute_bytes(recipe.train.dtype, device)
    sizes = axis_sizes(recipe.mesh, num_ranks)
    held = memory(recipe, sizes, compute_bytes, device)
    short = fits.gap({name: size / GB for name, size in asdict(held).items()}, available(device, num_ranks) / GB)
    ways = remedies(recipe, num_ranks, device, compute_bytes)
    if short["gap_gb"] > 0:
        return fits.sentence(short, ways)
    return (
        f"By the planner's count it fits ({short['need_gb']:.2f} of {short['capacity_gb']:.2f} GB), but the count "
        f"leaves out code, libraries, the allocator's slack and other programs. {fits.advice(ways)}"
    )


def _compute_bytes(dtype: str, device: torch.device) -> int:
    """Of an element; "auto" counts as 16 bit on CUDA and as 32 on a CPU, because a rank alone cannot ask the others."""
    return DTYPES.get(dtype, torch.bfloat16 if device.type == "cuda" else torch.float32).itemsize


def remedies(recipe: Recipe, num_ranks: int, device: torch.device, compute_bytes: int) -> list[dict[str, Any]]:
    """The cheapest settings under which a rank's memory fits, or (where it fits already) is at least a tenth smaller.

    Only settings that a resumed run may change. Prices are None where this machine was not measured.
    """
    need = memory(recipe, axis_sizes(recipe.mesh, num_ranks), compute_bytes, device).total
    bound = min(available(device, num_ranks), 0.9 * need)
    now = _seconds(recipe, num_ranks, device)
    found: list[tuple[float, int, dict[str, Any]]] = []
    for words, other in _changed(recipe):
        then = memory(other, axis_sizes(other.mesh, num_ranks), compute_bytes, device).total
        if then <= bound:
            seconds = _seconds(other, num_ranks, device)
            price = seconds / now - 1 if seconds and now else None
            way = {"change": words, "device_time": price, "step_time": price, "need_gb": then / GB}
            found.append((price or 0.0, -then, way))
    return [way for *_, way in sorted(found, key=lambda entry: entry[:2])][: fits.NUM_REMEDIES]


def _changed(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """The recipe after each change of one setting, then of two."""
    train, mesh = recipe.train, recipe.mesh
    sizes = [size for size in range(train.micro_batch - 1, 0, -1) if train.micro_batch % size == 0]
    kinds = [kind for kind in ("selective", "full") if kind != train.recompute and train.recompute != "full"]
    singles: list[tuple[str, str, Any]] = [("train", "micro_batch", size) for size in sizes]
    singles += [("train", "recompute", kind) for kind in kinds]
    singles += [("mesh", "reshard_after_forward", True)] * (not mesh.reshard_after_forward)
    singles += [("mesh", "dp_replicate", 1)] * (mesh.dp_replicate > 1)
    pairs = [pair for pair in combinations(singles, 2) if pair[0][1] != pair[1][1]]
    for changes in [*((single,) for single in singles), *pairs]:
        other = recipe
        for section, key, value in changes:
            more = {"dp_shard": 0} if key == "dp_replicate" else {}
            other = other.model_copy(update={section: getattr(other, section).model_copy(update={key: value} | more)})
        told = (f"{s}.{k} {_word(v)} instead of {_word(getattr(getattr(recipe, s), k))}" for s, k, v in changes)
        yield " and ".join(told), other


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _seconds(recipe: Recipe, num_ranks: int, device: torch.device) -> float | None:
    """Of a step, where this machine was measured."""
    try:
        case = _case(recipe, num_ranks, device.type)
        found = _here(recipe, case)
    except UserError:
        return None
    return float(found["seconds"] if found else estimate(columns([case]), load().constants)["seconds"][0])
