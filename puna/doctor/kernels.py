"""What the trainer's kernels take on this machine's CPU: seconds by size, forward and backward, in float32.

A step is put together from these by `puna.plan.local`. They are run as the trainer runs them: through autograd, with
outputs allocated anew, and in as many processes and threads as a run would have.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice, product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

from puna.errors import DeviceError
from puna.llama.attention import by_document
from puna.llama.config import DataConfig, LlamaConfig
from puna.llama.model import Llama, RMSNorm
from puna.llama.parallel import spread
from puna.llama.pretrain import Pretrain
from puna.llama.rope import Rotary
from puna.llama.shards import ShardWriter
from puna.llama.tokenizer import BEGIN_OF_TEXT, Tokenizer, special_names
from puna.llama.tokenizer_json import byte_level
from puna.plan.memory import Memory, estimate_memory
from puna.train.config import EvalConfig, MeshConfig, RunConfig, ScheduleConfig, TrainConfig
from puna.train.hardware import PROBES, Probe
from puna.train.launch import launch, resolve
from puna.train.mesh import Mesh, choose_compute, open_mesh
from puna.train.metrics import Recorder
from puna.train.optim import adamw, local
from puna.train.shared_memory import shares_memory, use_shared_memory
from puna.train.task import Cursor

MIN_ROUNDS, MAX_ROUNDS, ROUND_SECONDS = 3, 15, 0.03
MAX_SECONDS = 600
WIDTH, HEAD_DIM = 256, 64
ELEMENTS = (1 << 12, 1 << 16, 1 << 20, 1 << 22)
PRODUCTS = ((64, 512, 2048), (64, 256, 1024), (64, 256, 1024))
LENGTHS, CHANNELS = (32, 128, 512, 2048), (128, 512)
UNITS = (1 << 12, 1 << 18, 1 << 22)
UNIT_TENSORS, NUM_UNITS = 9, 3
OPTIMIZED = (1 << 8, 1 << 16, 1 << 21)
NUM_OPTIMIZED = 8
TABLES = (1 << 16, 1 << 22)
FRESH = (1 << 24, 1 << 25)
TRIAL = LlamaConfig(
    num_layers=3, dim=256, ffn_dim=704, num_heads=4, num_kv_heads=2, head_dim=64, vocab_size=4096, max_seq_len=256
)
TRIAL_SEQ_LEN, TRIAL_ROWS = 256, (2, 10)  # tokens of a sequence, sequences of a micro-batch
NUM_TRIAL_STEPS, NUM_DOCUMENTS, NUM_SPECIAL = 6, 64, 16


class Spent(NamedTuple):
    """Seconds of a kernel's forward and of its backward."""

    forward: float
    backward: float


Work = Callable[[], Callable[[], object]]
"""Does the forward, and returns what does the backward."""


def measure(num_processes: int, num_threads: int) -> dict[str, Any]:
    """The figures of `puna.train.hardware.Kernels` with so many processes at work, the slowest of them for each.

    Raises RankFailed or DeviceError where processes cannot be started or cannot talk.
    """
    with tempfile.TemporaryDirectory() as scratch:
        arguments = [scratch, str(num_threads)]
        if num_processes == 1:
            command = [sys.executable, "-c", "import sys; from puna.doctor.kernels import work; work(*sys.argv[1:])"]
            environment = os.environ | {"OMP_NUM_THREADS": str(num_threads)}
            done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
                raise DeviceError(f"the trainer's kernels could not be timed: {last}", "Run puna doctor again.")
        else:
            launch("puna.doctor.kernels:work", arguments, num_processes, Path(scratch), num_threads)
        found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(Path(scratch).glob("rank-*.json"))]
    slowest = {name: _slowest([one["tables"][name] for one in found]) for name in found[0]["tables"]}
    most = {key: max(one[key] for one in found) for key in ("code_bytes", "runtime_bytes", "slack")}
    return {"num_processes": num_processes, "num_threads": num_threads, "tables": slowest} | most


def _slowest(tables: list[dict[str, Any]]) -> dict[str, Any]:
    columns = zip(*(table["seconds"] for table in tables), strict=True)
    return tables[0] | {"seconds": [max(column) for column in columns]}


def work(folder: str, num_threads: str) -> None:
    """What each process does: measures, and leaves its figures in FOLDER/rank-N.json."""
    signal.alarm(MAX_SECONDS)
    resolve("puna.run:work")
    code_bytes = resident_bytes("VmRSS")
    torch.manual_seed(0)
    with open_mesh(RunConfig(dir=folder, device="cpu", num_threads=int(num_threads)), MeshConfig()) as place:
        grown = [held(place, Path(folder), rows) - code_bytes for rows in TRIAL_ROWS]
        mesh = place.data_parallel if place.world_size > 1 else None
        found = {name: {"axes": axes, "seconds": seconds} for name, axes, seconds in tables(mesh)}
        runtime_bytes, slack = beside_counted(grown, [counted(place, rows) for rows in TRIAL_ROWS])
    figures = {"tables": found, "code_bytes": code_bytes, "runtime_bytes": runtime_bytes, "slack": slack}
    (Path(folder) / f"rank-{place.rank}.json").write_text(json.dumps(figures), encoding="utf-8")


def resident_bytes(key: Literal["VmRSS", "VmHWM"]) -> int:
    """Memory that this process has resident, or the most it has had (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


# --- memory ---------------------------------------------------------------------------------------------------------


def held(place: Mesh, folder: Path, rows: int) -> int:
    """The most bytes that this process has had resident after a small run with so many rows in a micro-batch."""
    data = DataConfig(path=str(write_shards(folder / f"data-{place.rank}-{rows}")))
    compute, train = choose_compute("fp32", place.device), trial(place, rows)
    task = Pretrain(TRIAL, data, train, ScheduleConfig(), MeshConfig(), EvalConfig(), 0, place, compute)
    with Recorder(folder, speaks=place.rank == 0) as record:
        record.begin(folder, 0, 0, None, tensorboard=True)
        for unit in islice(task.units(Cursor()), NUM_TRIAL_STEPS):
            task.step(unit)
    return resident_bytes("VmHWM")


def trial(place: Mesh, rows: int) -> TrainConfig:
    """Two micro-batches a step."""
    return TrainConfig(
        seq_len=TRIAL_SEQ_LEN, micro_batch=rows, batch_tokens=2 * TRIAL_SEQ_LEN * rows * place.world_size
    )


def counted(place: Mesh, rows: int) -> Memory:
    """What `puna.plan.memory` counts of that run."""
    return estimate_memory(
        TRIAL, trial(place, rows), num_ranks=place.world_size, shard=place.world_size, reshard=True, accumulates=True,
        averages=False, compute_bytes=4, shares_memory=place.shares_memory,
    )  # fmt: skip


def beside_counted(grown: Sequence[int], memory: Sequence[Memory]) -> tuple[int, float]:
    """runtime_bytes and slack, from what two runs have grown to and what was counted of them."""
    small, large = memory
    slack = max(0.0, (grown[1] - grown[0] - large.total + small.total) / (large.transient - small.transient))
    return round(grown[0] - small.total - slack * small.transient), slack


def write_shards(folder: Path) -> Path:
    """Random bytes as token shards, in documents of many lengths, with a tokenizer that merges nothing."""
    folder.mkdir()
    alphabet = {piece: index for index, piece in enumerate(sorted(ByteLevel.alphabet()))}
    special = {name: len(alphabet) + index for index, name in enumerate(special_names(NUM_SPECIAL))}
    spec = byte_level(alphabet, [], special, BEGIN_OF_TEXT, ignore_merges=False)
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    with ShardWriter(folder / "shards", Tokenizer.load(folder / "tokenizer.json")) as shards:
        for split in ("train", "heldout"):
            for length in torch.randint(TRIAL_SEQ_LEN // 8, 2 * TRIAL_SEQ_LEN, (NUM_DOCUMENTS,)).tolist():
                shards.add(split, torch.randint(len(alphabet), (length,)).numpy(), length)
    return folder / "shards"


# --- time -----------------------------------------------------------------------------------------------------------


Table = tuple[str, tuple[tuple[int, ...], ...], list[float]]


def tables(mesh: DeviceMesh | None) -> Iterator[Table]:
    """Every kernel's name, the sizes along each of its axes, and seconds for all of their combinations in order."""
    for name, axes, kernel in (
        ("product", PRODUCTS, _product),
        ("attention", (LENGTHS, CHANNELS), _attention),
        ("norm", (ELEMENTS,), _norm),
        ("turn", (ELEMENTS,), _turn),
        ("gate", (ELEMENTS,), _gate),
        ("lookup", (ELEMENTS, TABLES), _lookup),
    ):
        yield from _both(name, axes, [spent(kernel(*sizes)) for sizes in product(*axes)])
    for name, plain in (("add", _add), ("scale", _scale), ("softmax", _softmax)):
        yield name, (ELEMENTS,), [spent(plain(size)).forward for size in ELEMENTS]
    yield "fresh", (FRESH,), [spent(_fresh_memory(size)).forward for size in FRESH]
    for recompute in ("none", "selective", "full"):
        seconds = [sum(spent(_blocks(probe, recompute))) for probe in PROBES]
        yield f"blocks_{recompute}", (tuple(range(1, len(PROBES) + 1)),), seconds
    if mesh is not None:
        yield from _both("unit", (UNITS,), [_unit(size, mesh) for size in UNITS])
    yield "adamw", (OPTIMIZED,), [_adamw(size, mesh) for size in OPTIMIZED]


def _both(name: str, axes: tuple[tuple[int, ...], ...], found: Sequence[Spent]) -> Iterator[Table]:
    yield name, axes, [one.forward for one in found]
    yield f"{name}_back", axes, [one.backward for one in found]


def spent(run: Work) -> Spent:
    """Medians over rounds, after one that does not count."""
    run()()
    found: list[Spent] = []
    began = time.perf_counter()
    while len(found) < MIN_ROUNDS or (len(found) < MAX_ROUNDS and time.perf_counter() - began < ROUND_SECONDS):
        start = time.perf_counter()
        back = run()
        middle = time.perf_counter()
        back()
        found.append(Spent(middle - start, time.perf_counter() - middle))
    return Spent(*(statistics.median(column) for column in zip(*found, strict=True)))


# --- kernels --------------------------------------------------------------------------------------------------------


def _nothing() -> None:
    pass


def _through(call: Callable[[], Tensor]) -> Work:
    """A call's forward and its backward with a gradient that is already there."""
    slope = torch.randn_like(call())

    def run() -> Callable[[], object]:
        out = call()
        return lambda: out.backward(slope)

    return run


def _fresh(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def _product(rows: int, inner: int, width: int) -> Work:
    """A linear layer; backward: the gradients of its input and of its matrix."""
    left, right, slope = torch.randn(rows, inner), torch.randn(width, inner), torch.randn(rows, width)

    def run() -> Callable[[], object]:
        functional.linear(left, right)
        return lambda: (slope @ right, slope.T @ left)

    return run


def _attention(length: int, channels: int) -> Work:
    """Causal attention of one document; half as many key and value channels as `channels`."""
    widths = (channels, channels // 2, channels // 2)
    query, key, value = (_fresh(1, length, width // HEAD_DIM, HEAD_DIM) for width in widths)
    attend = by_document([length])
    return _through(lambda: attend(query, key, value))


def _norm(size: int) -> Work:
    norm, rows = RMSNorm(WIDTH, 1e-5), _fresh(size // WIDTH, WIDTH)
    return _through(lambda: norm(rows))


def _turn(size: int) -> Work:
    tokens = size // WIDTH
    heads = _fresh(1, tokens, WIDTH // HEAD_DIM, HEAD_DIM)
    rotary = Rotary.at(torch.arange(tokens), LlamaConfig(dim=WIDTH, head_dim=HEAD_DIM), torch.float32)
    return _through(lambda: rotary.turn(heads))


def _gate(size: int) -> Work:
    gate, up = _fresh(size), _fresh(size)
    return _through(lambda: functional.silu(gate) * up)


def _lookup(size: int, elements: int) -> Work:
    """Rows of a table; its gradient is as large as the table."""
    table, ids = _fresh(elements // WIDTH, WIDTH), torch.randint(elements // WIDTH, (size // WIDTH,))
    return _through(lambda: functional.embedding(ids, table))


def _add(size: int) -> Work:
    left, right = torch.randn(size), torch.randn(size)
    return lambda: (left + right, _nothing)[1]


def _scale(size: int) -> Work:
    values, factor = torch.randn(size), torch.tensor(2.0)
    return lambda: (values * factor, _nothing)[1]


def _fresh_memory(size: int) -> Work:
    """Memory that the system has to map anew, as it does for every array beyond malloc's largest threshold."""
    return lambda: (torch.empty(size).fill_(0.0), _nothing)[1]


def _softmax(size: int) -> Work:
    """What the chunked loss does to logits between its products."""
    logits, picked = torch.randn(size // WIDTH, WIDTH), torch.randint(WIDTH, (size // WIDTH, 1))

    def run() -> Callable[[], object]:
        torch.log_softmax(logits, dim=-1, out=logits)
        logits.gather(1, picked).sum()
        slope = logits.exp_()
        slope.scatter_add_(1, picked, slope.new_full((), -1).expand_as(picked))
        return _nothing

    return run


def _blocks(probe: Probe, recompute: Any) -> Work:
    """Whole blocks of the trainer's model, one after another."""
    sizes = {key: size for key, size in asdict(probe).items() if key not in ("tokens", "document")}
    model = Llama(LlamaConfig(vocab_size=1, max_seq_len=probe.tokens, **sizes))
    spread(model, None, dtype=torch.float32, recompute=recompute)
    hidden = _fresh(1, probe.tokens, probe.dim)
    rotary = Rotary.at(torch.arange(probe.tokens), model.config, torch.float32)
    attend = by_document([probe.document] * (probe.tokens // probe.document))

    def call() -> Tensor:
        model.zero_grad()
        out = hidden
        for block in model.model.layers.values():
            out = block(out, rotary, attend)
        return out

    return _through(call)


def _adamw(size: int, mesh: DeviceMesh | None) -> float:
    """Seconds for one of several tensors of which a rank has `size` elements: norm, clipping and step."""
    module = nn.Module()
    for index in range(NUM_OPTIMIZED):
        module.register_parameter(f"p{index}", nn.Parameter(torch.randn(size * (mesh.size() if mesh else 1) // 64, 64)))
    if mesh is not None:
        fully_shard(module, mesh=mesh)
    parameters = list(module.parameters())
    optimizer = adamw(parameters, TrainConfig())
    grads = [torch.zeros_like(parameter) for parameter in parameters]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad

    def run() -> Callable[[], object]:
        torch.stack(torch._foreach_norm([local(grad) for grad in grads])).double().square().sum()
        torch._foreach_mul_([local(grad) for grad in grads], 0.5)
        optimizer.step()
        return _nothing

    return spent(run).forward / NUM_OPTIMIZED


class _Idle(torch.autograd.Function):
    """Uses parameters without touching them; their gradients are there at once."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return grad, *(torch.empty_like(parameter) for parameter in ctx.saved_tensors)


class _Unit(nn.Module):
    """As many parameters as a block has, and no work."""

    def __init__(self, size: int) -> None:
        super().__init__()
        for index in range(UNIT_TENSORS):
            self.register_parameter(f"p{index}", nn.Parameter(torch.zeros(size // UNIT_TENSORS // 8 + 1, 8)))

    def forward(self, value: Tensor) -> Tensor:
        return _Idle.apply(value, *self.parameters())


def _unit(size: int, mesh: DeviceMesh) -> Spent:
    """What FSDP2 takes for one unit of `size` elements: forward its gather, backward its reduction."""
    model = nn.Sequential(*(_Unit(size) for _ in range(NUM_UNITS)))
    for unit in model:
        fully_shard(unit, mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)
    if shares_memory(mesh.get_group()):
        use_shared_memory(model, mesh.get_group())
    value = _fresh(1)
    found = spent(_through(lambda: model(value)))
    return Spent(*(seconds / NUM_UNITS for seconds in found))
