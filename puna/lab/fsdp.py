"""FSDP, counted: a small Llama under every strategy on local processes, beside the formulas of `puna.plan.fsdp`."""

import json
import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.profiler import record_function

from puna.console import track
from puna.lab.counters import Allocations, Collectives, Unsharded
from puna.llama.config import LlamaConfig
from puna.llama.hub import build
from puna.llama.model import Llama
from puna.llama.parallel import spread
from puna.plan.fsdp import Reshard, Sharding, Traffic, micro_step, peak_unsharded, state_bytes
from puna.plan.llama import Layout, kept_bytes, units
from puna.train import mesh
from puna.train.config import MeshConfig, RunConfig, TrainConfig
from puna.train.launch import launch
from puna.train.mesh import DTYPES
from puna.train.optim import adamw, local
from puna.train.sharding import refuse_early
from puna.train.task import Cursor, GradientTask

Accumulate = Literal["reduced", "local", "kept"]
"""Gradients of a micro-step that is not the last: reduced; kept as they are; and the parameters stay gathered too."""

MODEL = LlamaConfig(
    num_layers=4, dim=64, ffn_dim=192, num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=1024, max_seq_len=128
)
UNEVEN = MODEL.model_copy(update={"vocab_size": 1001, "ffn_dim": 189})
"""Rows that do not divide by the ranks, so that FSDP pads."""
BATCH, SEQ_LEN = 2, 128
WARM_UP = 1
QUIET = {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}
"""Environment in which the profiler says nothing of its own."""
FORWARD = "puna lab forward"
TOLERANCE = 0.1
"""Of memory; counts, bytes sent and gathered elements must be equal."""


@dataclass(frozen=True)
class Case:
    """One way to train the model; the rest of the settings is full shard as `Sharding` has it by default."""

    name: str
    sharding: Sharding
    layout: Layout = "ends"
    param_dtype: str = "fp32"
    reduce_dtype: str = "fp32"
    offload: bool = False
    num_micro: int = 1
    accumulate: Accumulate = "local"
    model: LlamaConfig = MODEL


def cases(processes: int) -> list[Case]:
    """Every strategy that this number of processes allows."""
    full = Sharding(shard=processes)
    root = replace(full, encloses=True)
    return [
        Case("full shard, last unit too", replace(full, reshard="all")),
        Case("full shard", full),
        Case("full shard, no prefetch", replace(full, prefetch="none")),
        Case("full shard, prefetch in forward too", replace(full, prefetch="both")),
        Case("grad-op", replace(full, reshard="none")),
        Case("replicated", Sharding(shard=1, replicas=processes, reshard="none")),
        *_hybrid(processes),
        Case("bf16 parameters", replace(full, param_bytes=2), param_dtype="bf16"),
        Case(
            "bf16 parameters and reduction",
            replace(full, param_bytes=2, reduce_bytes=2),
            param_dtype="bf16",
            reduce_dtype="bf16",
        ),
        Case("parameters on the CPU (offload)", full, offload=True),
        Case("rows that do not divide", full, model=UNEVEN),
        Case("root encloses the blocks", root, layout="root"),
        Case("3 micro-steps, each reduced", root, layout="root", num_micro=3, accumulate="reduced"),
        Case("3 micro-steps, last reduced", root, layout="root", num_micro=3),
        Case(
            "3 micro-steps, last reduced, grad-op kept",
            replace(root, reshard="none"),
            layout="root",
            num_micro=3,
            accumulate="kept",
        ),
    ]


def _hybrid(processes: int) -> list[Case]:
    if processes < 4 or processes % 2:
        return []
    hybrid = Sharding(shard=2, replicas=processes // 2)
    ways: dict[str, Reshard] = {"hybrid, last unit too": "all", "hybrid": "inner", "hybrid grad-op": "none"}
    return [Case(name, replace(hybrid, reshard=reshard)) for name, reshard in ways.items()]


# --- what is run ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Sequences of one micro-step of one rank; every token is a target."""

    tokens: Tensor
    targets: Tensor
    ids: tuple[int, ...]

    @property
    def weight(self) -> int:
        """Number of targets."""
        return self.targets.numel()


@dataclass(frozen=True)
class Step:
    """One optimiser step on this rank's rows."""

    cursor: Cursor
    tokens: int
    batches: Sequence[Rows]


class Counted(GradientTask):
    """Training on random tokens with instruments around forward and backward; the step is that of every other task."""

    def __init__(self, case: Case, model: Llama) -> None:
        self.case, self.model = case, model
        self.ledger, self.collectives = Unsharded(model), Collectives()
        self.around: AbstractContextManager[Any] = nullcontext()
        optimizers = {"adamw": adamw(model.parameters(), TrainConfig())}
        refuse_early({"model": model}, optimizers)
        super().__init__({"model": model}, optimizers)

    def units(self, cursor: Cursor) -> Iterator[Step]:
        """The same rows again and again."""
        generator = torch.Generator().manual_seed(mesh.rank())
        shape = (self.case.num_micro, 2, BATCH, SEQ_LEN)
        drawn = torch.randint(self.case.model.vocab_size, shape, generator=generator)
        rows = [Rows(tokens, targets, tuple(range(BATCH))) for tokens, targets in drawn]
        while True:
            yield Step(cursor, drawn[:, 0].numel() * mesh.world_size(), rows)

    def loss_sum(self, batch: Rows) -> Tensor:
        """Sum of the cross-entropies (nats) over the rows."""
        self.collectives.begin_micro_step()
        before = self.ledger.live
        with record_function(FORWARD):
            loss = self.model(batch.tokens, batch.targets)
        self.newly_gathered = self.ledger.live - before
        return loss

    def accumulate(self, unit: Any, factor: float) -> list[Tensor]:
        """Forward and backward of every micro-step, between the instruments."""
        with self.around:
            losses = super().accumulate(unit, factor)
        self.grad_bytes = sum(local(p.grad).nbytes for p in self.model.parameters() if p.grad is not None)
        return losses

    def state_bytes(self) -> int:
        """Bytes of this rank's parameters, of their gradients in the last step, and of the optimiser's moments."""
        states = [state for optimizer in self.optimizers.values() for state in optimizer.state.values()]
        moments = [tensor for state in states for tensor in state.values() if tensor.dim()]
        return self.grad_bytes + sum(local(tensor).nbytes for tensor in [*self.model.parameters(), *moments])

    def _reduce_gradients(self, last: bool) -> None:
        super()._reduce_gradients(last or self.case.accumulate == "reduced")
        if self.case.accumulate == "kept":
            self.model.set_reshard_after_backward(last)  # type: ignore[operator]


def make(case: Case, *, deferred: bool = True) -> Llama:
    """The case's model with the weights of seed 0, sharded; deferred: on the meta device first, else whole first."""
    model = build(case.model) if deferred else Llama(case.model)
    if not deferred:
        model.init_weights()
    spread(
        model,
        _data_parallel(case.sharding),
        dtype=DTYPES[case.param_dtype],
        reduce_dtype=DTYPES[case.reduce_dtype],
        layout=case.layout,
        reshard_after_forward=case.sharding.reshard != "none",
        reshard_last=case.sharding.reshard == "all",
        prefetch=case.sharding.prefetch,
        offload=case.offload,
    )
    if deferred:
        model.to_empty(device="cpu")
        model.init_weights()
    return model


def _data_parallel(sharding: Sharding) -> DeviceMesh:
    if sharding.replicas == 1:
        return init_device_mesh("cpu", (sharding.shard,), mesh_dim_names=("dp_shard",))
    return init_device_mesh("cpu", (sharding.replicas, sharding.shard), mesh_dim_names=("dp_replicate", "dp_shard"))


# --- what is measured and predicted ---------------------------------------------------------------------------------


def run(case: Case, num_steps: int) -> dict[str, Any]:
    """One case on this rank: a row of the result."""
    task = Counted(case, make(case))
    step = next(task.units(Cursor()))
    for _ in range(WARM_UP):
        task.step(step)
    measured, predicted = observe(task, step), predict(case)
    return {
        "case": case.name,
        "layout": case.layout,
        "num_units": len(units(case.model, case.layout)),
        **asdict(case.sharding),
        "param_dtype": case.param_dtype,
        "reduce_dtype": case.reduce_dtype,
        "offload": case.offload,
        "num_micro": case.num_micro,
        "accumulate": case.accumulate,
        "measured": measured,
        "predicted": predicted,
        "agrees": agrees(measured, predicted),
        "step_seconds": statistics.median(_seconds(task, step) for _ in range(num_steps)),
    }


def observe(task: Counted, step: Step) -> dict[str, Any]:
    """One step between all instruments."""
    task.collectives = Collectives()
    task.around = task.collectives
    with task.ledger, Allocations() as watch:
        loss = task.step(step).loss
    task.around = nullcontext()
    unit_bytes = task.case.sharding.param_bytes
    kept = watch.kept_by(FORWARD) - task.newly_gathered * unit_bytes
    measured = _figures(task.collectives.micro_steps, task.ledger.peak, task.state_bytes(), kept, unit_bytes)
    return {**measured, "allocator_peak": watch.peak, "loss": loss}


def predict(case: Case) -> dict[str, Any]:
    """What the formulas say of one step of a case, under the names of what is measured."""
    parts, sharding = units(case.model, case.layout), case.sharding
    traffic = []
    for index in range(case.num_micro):
        reduces = index + 1 == case.num_micro or case.accumulate == "reduced"
        gathered = case.accumulate == "kept" and index > 0
        traffic.append(micro_step(parts, sharding, reduces=reduces, gathered=gathered))
    kept = kept_bytes(case.model, BATCH, SEQ_LEN) if case.param_dtype == "fp32" else None
    return _figures(traffic, peak_unsharded(parts, sharding), state_bytes(parts, sharding), kept, sharding.param_bytes)


def _figures(traffic: list[Traffic], peak: int, states: int, kept: int | None, unit_bytes: int) -> dict[str, Any]:
    return {
        **asdict(Traffic.total(traffic)),
        "by_micro_step": [asdict(part) for part in traffic],
        "peak_unsharded": peak,
        "state_bytes": states,
        "kept_bytes": kept,
        "memory_bytes": None if kept is None else states + peak * unit_bytes + kept,
    }


def agrees(measured: dict[str, Any], predicted: dict[str, Any]) -> bool:
    """Whether counts, bytes sent and gathered elements are equal, and memory, where predicted, is within a tenth."""
    exact = ("by_micro_step", "peak_unsharded")
    near = [key for key in ("state_bytes", "kept_bytes", "memory_bytes") if predicted[key] is not None]
    return all(measured[key] == predicted[key] for key in exact) and all(
        abs(measured[key] - predicted[key]) <= TOLERANCE * predicted[key] for key in near
    )


def _seconds(task: Counted, step: Step) -> float:
    start = time.perf_counter()
    task.step(step)
    return time.perf_counter() - start


def construct(case: Case) -> dict[str, Any]:
    """Memory to build the model deferred and not.

    bound_bytes: the shards, the largest parameter, which is drawn whole, and the shard that is cut from it; section 3.1
    of the paper needs the shards and the largest unit.
    """
    with Allocations() as lean:
        deferred = make(case)
    with Allocations() as rich:
        whole = make(case, deferred=False)
    parts = units(case.model, case.layout)
    ranks, largest = case.sharding.shard, max(math.prod(shape) for part in parts for shape in part.shapes)
    shards = sum(part.elements(ranks) for part in parts) // ranks
    pairs = zip(deferred.parameters(), whole.parameters(), strict=True)
    return {
        "deferred_peak_bytes": lean.peak,
        "bound_bytes": 4 * (shards + largest + -(-largest // ranks)),
        "paper_bytes": 4 * (shards + max(part.elements() for part in parts)),
        "whole_first_peak_bytes": rich.peak,
        "same_weights": all(torch.equal(local(a), local(b)) for a, b in pairs),
    }


# --- processes ------------------------------------------------------------------------------------------------------


def work(out: str, num_steps: str, *names: str) -> None:
    """What every rank does, in all cases or in those named; rank 0 writes `out`. A launcher calls it, with words."""
    with mesh.open_mesh(RunConfig(device="cpu", num_threads=1), MeshConfig()) as place:
        found = [case for case in cases(place.world_size) if case.name in names or not names]
        shown = track(found, f"FSDP on {place.world_size} processes") if place.rank == 0 else found
        rows = [run(case, int(num_steps)) for case in shown]
        deferred = construct(found[0])
        everywhere = mesh.gather([row["agrees"] for row in rows])
    if place.rank:
        return
    for row, *agreed in zip(rows, *everywhere, strict=True):
        row["agrees"] = all(agreed)
    result = {"processes": place.world_size, "rows": rows, "deferred": deferred}
    Path(out).with_suffix(".tmp").write_text(json.dumps(result), encoding="utf-8")
    os.replace(Path(out).with_suffix(".tmp"), out)


def count(processes: Sequence[int], num_steps: int) -> dict[str, Any]:
    """Run every case on so many local processes, one group of them after the other. Raises RankFailed."""
    runs = [_launch(number, num_steps) for number in processes]
    return {
        "model": MODEL.model_dump(),
        "num_parameters": MODEL.num_parameters,
        "batch": BATCH,
        "seq_len": SEQ_LEN,
        "torch": torch.__version__,
        "runs": runs,
        "agrees": all(row["agrees"] for run in runs for row in run["rows"]),
    }


def _launch(processes: int, num_steps: int) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="puna-lab-"))
    out = folder / "result.json"
    os.environ |= QUIET
    launch("puna.lab.fsdp:work", [str(out), str(num_steps)], processes, folder, num_threads=1)
    result = json.loads(out.read_text(encoding="utf-8"))
    shutil.rmtree(folder)  # kept after a failure, which names a log in it
    return result
