"""Seconds and bytes of a step on this machine's CPU, put together from kernels that `puna doctor` has timed here.

Where `estimate` takes a device's peak rates and constants fitted on published runs, this takes times: every kernel of
the trainer by size, forward and backward, in as many processes and threads as the run has. Nothing is fitted. What
kernels cost beside one another (cold caches, memory that is mapped anew, the interpreter) is taken from two small
stacks of blocks, timed by the doctor as well.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, Literal

import numpy as np

from puna.errors import DataError
from puna.llama.config import DataConfig, LlamaConfig
from puna.llama.shards import Shards
from puna.plan import hardware
from puna.plan.constants import Z80
from puna.plan.layout import Case
from puna.plan.llama import units
from puna.plan.memory import Memory, chunk_rows, estimate_memory
from puna.plan.workload import PlanError
from puna.train.config import MeshConfig, TrainConfig
from puna.train.hardware import PROBES, Hardware, Kernels, Probe, Table

NEWTON_SCHULZ_STEPS = 5
MAX_SEGMENTS = 512
MAPPED_BYTES = 32 << 20
"""Above which glibc maps every array anew and gives it back when it is freed (DEFAULT_MMAP_THRESHOLD_MAX)."""
SPREAD = 0.08
"""Root mean square of the logarithm of errors on nine recipes of development; see docs/plan.md."""


@dataclass(frozen=True)
class LocalJob:
    """A run on one machine. document_lengths: tokens of each document in the order read; None: longer than a row."""

    model: LlamaConfig
    train: TrainConfig
    mesh: MeshConfig
    num_processes: int = 1
    num_threads: int = 0
    averages: bool = False
    document_lengths: Sequence[int] | None = None

    @property
    def num_micro_batches(self) -> int:
        """Of one rank and step."""
        return max(1, self.train.batch_tokens // (self.train.seq_len * self.train.micro_batch * self.num_processes))

    @property
    def num_shards(self) -> int:
        """Ranks that one copy of the model is cut over."""
        return self.mesh.dp_shard or max(1, self.num_processes // self.mesh.dp_replicate)


@dataclass(frozen=True)
class _Block:
    """What one block computes: rows of its products, channels, and tokens of each segment within which it attends."""

    dim: int
    ffn_dim: int
    query: int
    key: int
    rows: int
    segments: Sequence[tuple[int, float]]  # tokens, how many


def predict(job: LocalJob, machine: Hardware) -> dict[str, Any]:
    """One plan in figures: seconds of a step with the ends of their 80 % interval, parts, bytes of a rank by kind.

    code_bytes: what a rank has resident once it has imported the trainer; growth_bytes: what comes to it, the most that
    a rank holds: kinds of `Memory`, runtime (threads and libraries), and slack (holes that the allocator leaves between
    what comes and goes in a step; Muon's update lies in them). Raises PlanError where the machine's kernels were not
    timed.
    """
    parts = step_seconds(job, machine)
    kernels, seconds = kernels_for(machine, job), sum(parts.values())
    counted = memory(job)
    slack = max(0, round(kernels.slack * counted.transient) - counted.update)
    kinds = asdict(counted) | {"runtime": kernels.runtime_bytes, "slack": slack}
    return {
        "seconds": seconds,
        "low": seconds * math.exp(-Z80 * SPREAD),
        "high": seconds * math.exp(Z80 * SPREAD),
        "parts": parts,
        "memory": kinds,
        "growth_bytes": sum(kinds.values()),
        "code_bytes": kernels.code_bytes,
    }


def here(
    case: Case,
    model: LlamaConfig,
    train: TrainConfig,
    mesh: MeshConfig,
    data: DataConfig,
    *,
    num_threads: int = 0,
    averages: bool = False,
) -> dict[str, Any] | None:
    """`predict` for a case that a recipe's sections gave, as its layout cuts it, if this machine's CPU is to train it.

    None where that is not so: another accelerator, kernels that were not timed, an axis or a dtype that they do not
    cover (they are float32).
    """
    machine, layout = hardware.measured(case.cluster.gpu), case.layout
    covered = layout.tp == layout.pp == layout.cp == layout.ep == 1 and layout.precision == "fp32"
    if machine is None or not covered or (layout.dp > 1 and layout.sharding not in ("zero2", "zero3", "hsdp")):
        return None
    cut = {
        "batch_tokens": layout.global_batch * layout.seq_len,
        "seq_len": layout.seq_len,
        "micro_batch": layout.micro_batch,
        "recompute": layout.recompute,
    }
    spread = {"dp_replicate": layout.dp // layout.shard_group if layout.shard_group else 1, "dp_shard": 0}
    spread["reshard_after_forward"] = layout.sharding != "zero2"
    job = LocalJob(
        model, train.model_copy(update=cut), mesh.model_copy(update=spread), layout.dp, num_threads, averages,
        document_lengths(data),
    )  # fmt: skip
    return predict(job, machine)


def overlay(figures: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """The figures of `puna.plan.describe` with time and memory as `here` found them."""
    faster = figures["seconds"] / found["seconds"]
    need = {"code": found["code_bytes"], **found["memory"]}
    total, capacity = sum(need.values()) / 1e9, figures["memory_gb"]["capacity"] / figures["gpus"]
    memory_gb = {name: size / 1e9 for name, size in need.items()} | {"total": total, "capacity": capacity}
    rates = {name: figures[name] * faster for name in ("tokens_per_s_per_gpu", "tflops_per_gpu", "mfu")}
    times = {name: found[name] for name in ("seconds", "low", "high", "parts")}
    exposed = found["parts"]["sharding"] / found["seconds"]
    return figures | rates | times | {"exposed": exposed, "memory_gb": memory_gb, "fits": total <= capacity}


def memory(job: LocalJob) -> Memory:
    """Bytes of one rank of the job, by kind."""
    return estimate_memory(
        job.model,
        job.train,
        num_ranks=job.num_processes,
        shard=job.num_shards,
        reshard=job.mesh.reshard_after_forward,
        accumulates=job.num_micro_batches > 1,
        averages=job.averages,
        compute_bytes=4,
        shares_memory=job.mesh.shared_memory and job.num_shards > 1,
    )


def document_lengths(data: DataConfig) -> Sequence[int] | None:
    """Tokens of the documents that a recipe reads, as they lie in its shards; None where there are none yet."""
    try:
        found = [Shards(folder, "train").lengths for folder, _ in data.mixture()]
    except DataError:
        return None
    return [int(length) for lengths in found for length in lengths[:MAX_SEGMENTS]]


def step_seconds(job: LocalJob, machine: Hardware) -> dict[str, float]:
    """Seconds of one optimiser step by part; they add up to the step.

    products, attention, pointwise, recompute and host (everything between kernels) of the blocks; loss; embedding;
    sharding (FSDP's exchanges and copies); optimizer. Raises PlanError where the machine's kernels were not timed.
    """
    kernels = kernels_for(machine, job)
    times = Times(kernels)
    model, rows = job.model, job.train.micro_batch * job.train.seq_len
    block = _Block(
        model.dim, model.ffn_dim, model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim, rows,
        segments(job),
    )  # fmt: skip
    parts = {name: model.num_layers * value for name, value in _block(times, block, job.train.recompute).items()}
    _, share = _beside(times, "none")
    parts["loss"] = share * _loss(times, rows, model)
    parts["embedding"] = share * _both(times, "lookup", rows * model.dim, model.vocab_size * model.dim)
    parts = {name: job.num_micro_batches * value for name, value in parts.items()}
    parts["sharding"] = _sharding(times, job, machine)
    parts["optimizer"] = _optimizer(times, job, machine)
    return parts


def kernels_for(machine: Hardware, job: LocalJob) -> Kernels:
    """Of the timings, those with as many processes (one, or several) and threads as the job.

    Where the job shares out all cores, the nearest number of threads counts. Raises PlanError where nothing fits.
    """
    several = job.num_processes > 1
    fitting = [timed for timed in machine.kernels if (timed.num_processes > 1) == several]
    if not fitting:
        raise PlanError("the trainer's kernels were not timed on this machine", "Run `puna doctor` here.")
    threads = job.num_threads or max(1, machine.num_cores // job.num_processes)
    nearest = min(fitting, key=lambda timed: abs(math.log(timed.num_threads / threads)))
    if job.num_threads not in (0, nearest.num_threads):
        raise PlanError(
            f"the trainer's kernels were timed with {nearest.num_threads} threads a process, the run has {threads}",
            f"--run.num_threads {nearest.num_threads} is what can be predicted here.",
        )
    return nearest


class Times:
    """Seconds of kernels at any size, between and beyond the sizes that were timed."""

    def __init__(self, kernels: Kernels) -> None:
        self.tables = kernels.tables

    def __call__(self, name: str, *sizes: float) -> float:
        """The logarithm of seconds is interpolated linearly in those of the sizes; above the largest size timed,
        seconds grow as the size does."""
        return interpolate(self.tables[name], sizes)


def interpolate(table: Table, sizes: Sequence[float]) -> float:
    """See `Times`."""
    places, beyond = [], 1.0
    for axis, size in zip(table.axes, sizes, strict=True):
        inside = min(max(size, 1.0), axis[-1])
        beyond *= max(size, 1.0) / inside
        upper = next((i for i in range(1, len(axis)) if inside <= axis[i]), len(axis) - 1)
        places.append((upper, math.log(inside / axis[upper - 1]) / math.log(axis[upper] / axis[upper - 1])))
    total = 0.0
    for corner in product((0, 1), repeat=len(places)):
        index, weight = 0, 1.0
        for side, (upper, share), axis in zip(corner, places, table.axes, strict=True):
            index = index * len(axis) + upper - 1 + side
            weight *= share if side else 1 - share
        total += weight * math.log(table.seconds[index])
    return beyond * math.exp(total)


def segments(job: LocalJob) -> list[tuple[int, float]]:
    """Pieces of documents in the rows of a micro-batch, as (tokens, how many): rows cut the documents' stream."""
    tokens = job.train.micro_batch * job.train.seq_len
    if job.document_lengths is None:
        return [(job.train.seq_len, float(job.train.micro_batch))]
    ends = np.cumsum(job.document_lengths)
    cuts = np.union1d(ends, np.arange(0, ends[-1], job.train.seq_len))
    lengths = np.diff(cuts)[:MAX_SEGMENTS]
    sizes, counts = np.unique(lengths, return_counts=True)
    return [(int(size), float(count * tokens / lengths.sum())) for size, count in zip(sizes, counts, strict=True)]


# --- parts ----------------------------------------------------------------------------------------------------------


def _both(times: Times, name: str, *sizes: float) -> float:
    return times(name, *sizes) + times(f"{name}_back", *sizes)


def _block(times: Times, block: _Block, recompute: Literal["none", "selective", "full"]) -> dict[str, float]:
    """Seconds of one block and micro-batch, forward and backward."""
    host, share = _beside(times, recompute)
    forward, backward = _kernels(times, block), _kernels(times, block, "_back")
    parts = {name: share * (forward[name] + backward[name]) for name in forward}
    return parts | {"recompute": share * _again(times, block, recompute), "host": host}


def _again(times: Times, block: _Block, recompute: str) -> float:
    """Of a block's forward, the seconds that are spent a second time.

    Full recomputation stops at the last tensor that backward needs: the input of the block's last product.
    """
    if recompute == "none":
        return 0.0
    forward = _kernels(times, block)
    if recompute == "selective":
        return forward["pointwise"]
    skipped = times("product", block.rows, block.ffn_dim, block.dim) + times("add", block.rows * block.dim)
    return sum(forward.values()) - skipped


def _beside(times: Times, recompute: str) -> tuple[float, float]:
    """Seconds of a block that no kernel takes, and what kernels take in a model over what they take alone.

    From the blocks that were timed together: of the small ones nearly everything is the former.
    """
    small, large = (seconds / p.num_layers for seconds, p in zip(_whole(times, recompute), PROBES, strict=True))
    alone = [_alone(times, probe, recompute) for probe in PROBES]
    share = (large - small) / (alone[1] - alone[0])
    return small - share * alone[0], share


def _whole(times: Times, recompute: str) -> Sequence[float]:
    return times.tables[f"blocks_{recompute}"].seconds


def _alone(times: Times, probe: Probe, recompute: str) -> float:
    """Seconds of the kernels of one of a probe's blocks, as each is alone."""
    documents = [(probe.document, probe.tokens / probe.document)]
    query, key = probe.head_dim * probe.num_heads, probe.head_dim * probe.num_kv_heads
    block = _Block(probe.dim, probe.ffn_dim, query, key, probe.tokens, documents)
    kernels = [*_kernels(times, block).values(), *_kernels(times, block, "_back").values()]
    return sum(kernels) + _again(times, block, recompute)


def _kernels(times: Times, block: _Block, way: Literal["", "_back"] = "") -> dict[str, float]:
    """Seconds of one block's kernels, forward or backward."""
    dim, ffn, query, key, rows = block.dim, block.ffn_dim, block.query, block.key, block.rows
    shapes = [(dim, query), (dim, key), (dim, key), (query, dim), (dim, ffn), (dim, ffn), (ffn, dim)]
    adds = 5 if way else 2
    return {
        "products": sum(times(f"product{way}", rows, inner, width) for inner, width in shapes),
        "attention": sum(count * times(f"attention{way}", length, query) for length, count in block.segments),
        "pointwise": 2 * times(f"norm{way}", rows * dim)
        + times(f"turn{way}", rows * query)
        + times(f"turn{way}", rows * key)
        + times(f"gate{way}", rows * ffn)
        + adds * times("add", rows * dim),
    }


def _loss(times: Times, rows: int, model: LlamaConfig) -> float:
    """The last norm, and the chunks of logits with their gradients; the buffer that all chunks share is made once."""
    chunk = min(rows, chunk_rows(model.vocab_size))
    elements = chunk * model.vocab_size
    one = _both(times, "product", chunk, model.dim, model.vocab_size) + times("softmax", elements)
    ends = times("scale", rows * model.dim) + times("scale", model.vocab_size * model.dim)
    if 4 * elements > MAPPED_BYTES:
        ends += times("fresh", elements)
    return rows / chunk * one + ends + _both(times, "norm", rows * model.dim)


def _sharding(times: Times, job: LocalJob, machine: Hardware) -> float:
    """Gathers of every unit in forward, and again in backward where they were freed; one reduction a step; sums of the
    micro-batches' gradients."""
    all_units = [unit.elements(job.num_shards) for unit in units(job.model, "root")]
    added = (job.num_micro_batches - 1) * sum(times("add", elements) for elements in all_units)
    if job.num_processes == 1:
        return added
    *blocks, root = (times("unit", elements) for elements in all_units)
    gathers = sum(blocks) * (2 if job.mesh.reshard_after_forward else 1) + root
    reductions = sum(times("unit_back", elements) for elements in all_units)
    return added + job.num_micro_batches * gathers + reductions + 3 * (machine.link_latency or 0.0)


def _optimizer(times: Times, job: LocalJob, machine: Hardware) -> float:
    """AdamW tensor by tensor; under Muon the blocks' matrices by products."""
    *blocks, root = units(job.model, "root")
    own = [shape for unit in blocks for shape in unit.shapes]
    matrices = [shape for shape in own if len(shape) == 2] if job.train.optimizer == "muon" else []
    rest = [shape for shape in own if shape not in matrices] + list(root.shapes)
    stepped = sum(times("adamw", math.prod(shape) / job.num_shards) for shape in rest)
    muon = sum(_muon(times, *shape) for shape in matrices) / job.num_shards
    if job.num_shards > 1 and machine.link_bandwidth:
        exchanged = 2 * 4 * sum(math.prod(shape) for shape in matrices) / job.num_shards
        muon += exchanged / machine.link_bandwidth
    return stepped + muon


def _muon(times: Times, rows: int, columns: int) -> float:
    """Momentum, and five steps of Newton-Schulz on the smaller side."""
    small, large = sorted((rows, columns))
    one = times("product", small, large, small) + times("product", small, small, small)
    one += times("product", small, small, large)
    return NEWTON_SCHULZ_STEPS * one + 8 * times("add", rows * columns)
