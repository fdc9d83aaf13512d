"""Published runs: a CSV of measured jobs becomes cases; what a source leaves unstated is imputed by rules of this file.

The rules see the configuration of a row, never its speed.
"""

import csv
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from puna.errors import UserError
from puna.plan import hardware
from puna.plan.fits import ROOM
from puna.plan.footprint import footprint
from puna.plan.layout import RECOMPUTES, SCHEDULES, SHARDINGS, STACKS, Attention, Case, Layout, columns
from puna.plan.workload import PlanError, Transformer

KEY = ("layers", "hidden", "seq_len", "gpus", "tp", "pp", "global_batch_seqs")
GATED_FAMILIES = re.compile(r"llama|mistral|mixtral|qwen|yi-|internlm|olmo|gemma|deepseek", re.I)
VOCABULARIES = (
    (r"llama[-_ ]?3", 128256),
    (r"llama|mistral|mixtral", 32000),
    (r"yi-", 64000),
    (r"gemma", 256000),
    (r"qwen", 151936),
    (r"nemotron-?4|nemotron", 256000),
)
FAMILIES = (
    "GB300",
    "GB200",
    "B300",
    "B200",
    "H200",
    "H100",
    "A100",
    "V100",
    "MI355X",
    "MI325X",
    "MI300X",
    "MI250X",
    "L40S",
)
FLASH_FREE = ("V100", "A100", "A800")


class RunsError(UserError):
    """A CSV of runs that cannot be read."""


@dataclass(frozen=True)
class Run:
    """One published measurement. seconds: one iteration; memory: peak GB as reported, or NaN."""

    id: str
    source: str
    case: Case
    seconds: float
    memory: float = math.nan


@dataclass(frozen=True)
class Runs:
    """What a file held: runs, and why rows were left out."""

    runs: tuple[Run, ...]
    skipped: dict[str, int]
    broken: tuple[str, ...]


def read(path: Path, kinds: tuple[str, ...] = ("dense",)) -> Runs:
    """Every row of those kinds with the full key and a speed, as cases.

    Raises RunsError where the file is not there or has none of the columns; a broken row is left out and named with
    its line in `broken`.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [key for key in ("id", "gpu", *KEY) if key not in (reader.fieldnames or ())]
            if missing:
                raise RunsError(f"{path} has no column {missing[0]}", "Name the columns in the first line.")
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RunsError(f"{path} cannot be read: {error}", "Give a CSV file.") from error
    runs, skipped, broken = [], Counter[str](), []
    for line, row in rows:
        reason = _left_out(row, kinds)
        if reason:
            skipped[reason] += 1
            continue
        try:
            runs.append(_run(row))
        except (PlanError, hardware.HardwareError, ValueError) as error:
            skipped["broken row"] += 1
            broken.append(f"line {line} ({row.get('id')}): {error}")
    return Runs(tuple(runs), dict(skipped), tuple(broken))


def _left_out(row: Mapping[str, str | None], kinds: tuple[str, ...]) -> str:
    """Why a row is no dense run with the full key and a speed; empty where it is one."""
    kind = row.get("kind") or "dense"
    if kind not in kinds:
        return f"kind {kind}"
    if not all(row.get(key) for key in KEY):
        return "incomplete key"
    return "" if row.get("tokens_per_s_per_gpu") or row.get("iter_time_s") else "no speed"


def _run(row: Mapping[str, str | None]) -> Run:
    case = case_of(row)
    return Run(
        id=row["id"] or "",
        source=(row["id"] or "").partition("-")[0],
        case=case,
        seconds=_seconds(row, case),
        memory=_number(row, "peak_mem_gb", math.nan),
    )


def _seconds(row: Mapping[str, str | None], case: Case) -> float:
    tokens = case.layout.global_batch * case.layout.seq_len
    rate = _number(row, "tokens_per_s_per_gpu", 0.0)
    seconds = _number(row, "iter_time_s", 0.0) or tokens / (rate * case.cluster.gpus)
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"an iteration of {seconds} s")
    return seconds


def case_of(row: Mapping[str, str | None]) -> Case:
    """A row as a case. Raises PlanError, HardwareError or ValueError where the row is not a job that could be."""
    model = _model(row)
    cluster = _cluster(row)
    layout = _layout(row, model, cluster)
    if layout.dp * layout.tp * layout.pp * layout.cp != cluster.gpus:
        layout = replace(layout, dp=max(1, cluster.gpus // (layout.tp * layout.pp * layout.cp)))
    case = Case(model, cluster, layout)
    stated = bool(row.get("zero_or_fsdp")) or layout.attention == "unfused"
    if not stated and _needs([replace(case, layout=replace(layout, recompute="full"))])[0] > _room(case):
        case = replace(case, layout=replace(layout, sharding="zero3"))
    return case if row.get("recompute") else _lightest_recompute(case)


def _needs(cases: list[Case]) -> np.ndarray:
    return footprint(columns(cases))["total"]


def _room(case: Case) -> float:
    return ROOM * case.cluster.gpu.memory * 1e9


def _number(row: Mapping[str, str | None], key: str, default: float) -> float:
    text = row.get(key)
    return float(text) if text else default


def _count(row: Mapping[str, str | None], key: str, default: int) -> int:
    number = _number(row, key, default)
    if number != int(number) or number < 1:
        raise PlanError(f"{key} is {row.get(key)}", "Give a whole number of at least 1.")
    return int(number)


def _model(row: Mapping[str, str | None]) -> Transformer:
    name = row.get("model") or ""
    hidden = _count(row, "hidden", 1)
    heads = _count(row, "heads", max(1, hidden // 128))
    ffn = _count(row, "ffn", 4 * hidden)
    vocab = next((size for pattern, size in VOCABULARIES if re.search(pattern, name, re.I)), 51200)
    gated = ffn != 4 * hidden or GATED_FAMILIES.search(name) is not None
    kv_heads = _count(row, "kv_heads", heads)
    vocab = _count(row, "vocab", vocab)
    return Transformer(_count(row, "layers", 1), hidden, ffn, heads, kv_heads, vocab, gated, not gated, name)


def _cluster(row: Mapping[str, str | None]) -> hardware.Cluster:
    gpu = _gpu(row.get("gpu") or "")
    gpus = _count(row, "gpus", 1)
    node = _count(row, "gpus_per_node", min(8, gpu.domain))
    return hardware.Cluster(gpu, gpus, node, _number(row, "internode_gbps_per_gpu", 0.0))


def _gpu(name: str) -> hardware.Gpu:
    """The accelerator of a source's own wording: an alias, or the family it begins with and the memory it names."""
    known = hardware.gpus().values()
    aliases = {alias.lower(): gpu for gpu in known for alias in (gpu.name, *gpu.aliases)}
    for words in (name, name.partition(" (")[0]):
        if words.lower() in aliases:
            return aliases[words.lower()]
    family = next((word for word in FAMILIES if re.search(rf"\b{word}", name, re.I)), None)
    if family is None:
        return hardware.find(name)
    parts = [gpu for gpu in known if gpu.name.startswith(family.lower()) and not gpu.full_power]
    size = re.search(r"(\d+) ?GB", name)
    return min(parts or [hardware.find(family)], key=lambda gpu: abs(gpu.memory - float(size[1])) if size else 0.0)


def _layout(row: Mapping[str, str | None], model: Transformer, cluster: hardware.Cluster) -> Layout:
    """What the row states, and the rules for what it does not.

    Attention: unfused under megatron and oneflow on V100 and A100 and under jax for plain GPTs; else FlashAttention-2
    under pytorch, cuDNN's otherwise. Sharding: all states under pytorch, and where the optimiser's alone are too
    little; the optimiser under megatron with fused attention, nothing in older Megatron. Micro-batch: in a pipeline 1,
    under pytorch as many as stages; else the largest power of two that divides the rank's batch and holds at most
    16,384 tokens. Chunks of a stage: two under pytorch if the notes say interleaved; one a block under megatron if they
    do, or with fused attention where the micro-batches are a multiple of the stages; else one. Tensor-parallel
    traffic overlaps where the notes say asynchronous, and under megatron with fused attention on devices with 8-bit
    units.
    """
    notes = f"{row.get('notes') or ''} {row.get('source') or ''}"
    stack = row.get("stack") or "pytorch-eager"
    if stack not in STACKS:
        raise PlanError(f"stack is {stack!r}", f"Choose one of {', '.join(STACKS)}.")
    old = stack in ("megatron", "oneflow") and cluster.gpu.name.split("-")[0].upper() in FLASH_FREE
    attention = _attention(row.get("attention_impl") or "", stack, old or (stack == "jax-xla" and not model.gated))
    flash = attention != "unfused"
    tp, pp, cp = (_count(row, key, 1) for key in ("tp", "pp", "cp"))
    dp = _count(row, "dp", max(1, cluster.gpus // (tp * pp * cp)))
    batch, seq_len = _count(row, "global_batch_seqs", 1), _count(row, "seq_len", 1)
    torch = stack.startswith("pytorch")
    interleaved = re.search(r"interleaved", notes, re.I) is not None
    pieces = pp * (1 + interleaved) if torch else 0
    micro = _count(row, "micro_batch_seqs", _micro_batch(batch // dp or 1, seq_len, pp, pieces))
    recompute = row.get("recompute") or "none"
    if recompute not in RECOMPUTES:
        raise PlanError(f"recompute is {recompute!r}", f"Choose one of {', '.join(RECOMPUTES)}.")
    sharding = row.get("zero_or_fsdp") or _sharding(stack, flash)
    if sharding not in SHARDINGS:
        raise PlanError(f"zero_or_fsdp is {sharding!r}", f"Choose one of {', '.join(SHARDINGS)}.")
    group = re.search(r"zero1=(\d+)", notes)
    modern = flash or stack not in ("megatron", "oneflow")
    schedule = next((name for name in SCHEDULES if f"schedule {name}" in notes.lower()), SCHEDULES[0])
    return Layout(
        global_batch=batch,
        dp=dp,
        tp=tp,
        pp=pp,
        vp=_count(row, "vp", _chunks(model.layers, pp, batch // (dp * micro) or 1, stack, flash, interleaved)),
        cp=cp,
        micro_batch=micro,
        seq_len=seq_len,
        sharding=sharding,
        shard_group=int(group[1]) if group else 0,
        recompute=recompute,
        precision=row.get("precision") or ("bf16" if modern else "fp16"),
        attention=attention,
        stack=stack,
        schedule=schedule,
        sequence_parallel=flash or recompute != "full",
        overlaps_gradients=modern,
        overlaps_tensor=_overlaps_tensor(notes, stack, cluster.gpu, flash),
        reduce_bytes=_reduce_bytes(notes, stack, modern, row.get("precision") or "bf16"),
    )  # fmt: skip


def _attention(stated: str, stack: str, unfused: bool) -> Attention:
    if stated.startswith("unfused") or (not stated and unfused):
        return "unfused"
    if "triton" in stated or "flash-1" in stated:
        return "flash-1"
    return "flash" if stack.startswith("pytorch") and "cudnn" not in stated else "cudnn"


def _micro_batch(rank_batch: int, seq_len: int, pp: int, pieces: int) -> int:
    if pp > 1:
        return max(1, rank_batch // pieces) if pieces else 1
    sizes = [1 << n for n in range(8) if rank_batch % (1 << n) == 0 and (1 << n) * seq_len <= 16384]
    return max(sizes, default=1)


def _sharding(stack: str, flash: bool) -> str:
    if stack.startswith("pytorch"):
        return "zero3"
    return "zero1" if flash else "none"


def _chunks(layers: int, pp: int, micro_batches: int, stack: str, flash: bool, interleaved: bool) -> int:
    if pp == 1:
        return 1
    if stack.startswith("pytorch"):
        return 1 + interleaved
    if interleaved or (stack == "megatron" and flash and micro_batches % pp == 0):
        return max(1, round(layers / pp))
    return 1


def _reduce_bytes(notes: str, stack: str, modern: bool, precision: str) -> int:
    """Gradients travel in 16 bit under pytorch (FSDP's default), in pure, old fp16 and 8-bit runs, else in 32."""
    pure = "PURE" in notes
    torch = stack.startswith("pytorch") and "mode DEFAULT" not in notes
    return 2 if torch or pure or precision in ("fp8", "mxfp8", "nvfp4") or (not modern and precision != "bf16") else 4


def _overlaps_tensor(notes: str, stack: str, gpu: hardware.Gpu, flash: bool) -> bool:
    if re.search(r"no async TP|vanilla TP", notes):
        return False
    if re.search(r"async TP|TP comm overlap", notes, re.I):
        return True
    return stack == "megatron" and flash and "fp8" in gpu.flops


def _lightest_recompute(case: Case) -> Case:
    """Full recomputation of the least share of the blocks, in eighths, with which the footprint fits."""
    shares = [n / 8 for n in range(9)]
    options = [replace(case, layout=replace(case.layout, recompute="full", recompute_share=share)) for share in shares]
    options[0] = replace(case, layout=replace(case.layout, recompute="none"))
    needs = _needs(options)
    return next((option for option, need in zip(options, needs, strict=True) if need <= _room(case)), options[-1])
