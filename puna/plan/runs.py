"""Published runs: a CSV of measured jobs becomes cases; what a source leaves unstated is imputed by rules of this file.

The rules see the configuration of a row, never its speed.
"""

import codecs
import csv
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import cast

import numpy as np

from puna.errors import UserError
from puna.plan import hardware
from puna.plan.fits import ROOM
from puna.plan.footprint import footprint
from puna.plan.layout import SCHEDULES, STACKS, Attention, Case, Layout, Recompute, Sharding, Stack, columns
from puna.plan.workload import PlanError, Transformer, find

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


STAND_INS = {"A800": "a100-80", "H800": "h100-sxm", "GH200": "h200"}
"""Accelerators that differ from another of the table in their links or memory alone."""
KIND_OF_STACK = (
    (r"jax|xla|maxtext|pax|t5x", "jax-xla"),
    (r"megatron|nemo|mcore|deepspeed|nanotron|colossal|internevo|paddle|primus|mindspeed", "megatron"),
    (r"compil", "pytorch-compiled"),
    (r"oneflow", "oneflow"),
    (r"", "pytorch-eager"),
)
SAME_PRECISION = (
    (r"nvfp4|fp4", "nvfp4"),
    (r"mx.?fp8|fp8.?mx|mxfp", "mxfp8"),
    (r"fp8|float8|e4m3|hybrid", "fp8"),
    (r"bf16|bfloat16", "bf16"),
    (r"fp16|float16|half", "fp16"),
    (r"fp32|float32", "fp32"),
)
SAME_RECOMPUTE = (
    (r"none|no|off|false|0", "none"),
    (r"selective.*|core.*|attention.*", "selective"),
    (r"full.*|uniform|block|all|yes|on|true|1", "full"),
)
SAME_SHARDING = (
    (r"none|no|off|false|0|ddp|zero-?0", "none"),
    (r"zero[- _]?1|1|dist.*opt.*|os", "zero1"),
    (r"zero[- _]?2|2|grad.?op", "zero2"),
    (r"zero[- _]?3|3|fsdp2?|full.?shard", "zero3"),
    (r"hsdp|hybrid.*", "hsdp"),
)
MOST = 1e12
"""Largest size that a row may have."""


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
    """What a file held: runs with a speed, runs that only have a memory, and why rows were left out."""

    runs: tuple[Run, ...]
    skipped: dict[str, int]
    broken: tuple[str, ...]
    untimed: tuple[Run, ...] = ()


def read(path: Path, kinds: tuple[str, ...] = ("dense",)) -> Runs:
    """Every row of those kinds with the full key and a speed, as cases.

    Text may be UTF-8, UTF-16 or of Windows, columns parted by commas, semicolons or tabs. Raises RunsError where the
    file is not there, is no table or lacks a column; a row that is no possible job is left out and named with its line
    in `broken`.
    """
    runs, untimed, skipped, broken = [], [], Counter[str](), []
    for line, row in _rows(path):
        reason = _left_out(row, kinds)
        try:
            if not reason:
                runs.append(_run(row, line))
            elif reason == NO_SPEED and row.get("peak_mem_gb"):
                untimed.append(_run(row, line))
        except (PlanError, hardware.HardwareError) as error:
            unknown = isinstance(error, hardware.HardwareError)
            reason = reason or ("unknown accelerator" if unknown else "broken row")
            broken.append(f"line {line} ({row.get('id')}): {error}")
        if reason:
            skipped[reason] += 1
    return Runs(tuple(runs), dict(skipped), tuple(broken), tuple(untimed))


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, str | None]]]:
    """Line and cells of every row, the names of columns in small letters."""
    try:
        text = _text(path.read_bytes())
    except OSError as error:
        raise RunsError(f"{path} cannot be read: {error.strerror}", "Give a CSV file.") from error
    head = text.partition("\n")[0]
    reader = csv.DictReader(StringIO(text, newline=""), delimiter=max(",;\t", key=head.count))
    try:
        names = [name.strip().lower() for name in reader.fieldnames or ()]
        missing = [key for key in ("id", "gpu", *KEY) if key not in names]
        if missing:
            raise RunsError(f"{path} has no column {', '.join(missing)}", "Name the columns in the first line.")
        reader.fieldnames = names
        for row in reader:
            yield reader.line_num, {key: _cell(value) for key, value in row.items() if isinstance(key, str)}
    except csv.Error as error:
        raise RunsError(f"{path} cannot be read: line {reader.line_num}: {error}", "Mend that line.") from error


def _text(data: bytes) -> str:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", errors="replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace")


def _cell(value: object) -> str | None:
    return value.strip() if isinstance(value, str) else None


NO_SPEED = "no speed"


MIXTURES = (
    (r"mixtral.*8x22b", "mixtral-8x22b"),
    (r"mixtral.*8x7b", "mixtral-8x7b"),
    (r"qwen3.*235b", "qwen3-235b-a22b"),
    (r"qwen3.*30b", "qwen3-30b-a3b"),
    (r"gpt.?oss.*120b", "gpt-oss-120b"),
    (r"gpt.?oss.*20b", "gpt-oss-20b"),
)
"""Public mixtures, whose rows state neither layers nor experts."""


def _mixture(row: Mapping[str, str | None]) -> Transformer | None:
    name = row.get("model") or ""
    known = next((model for pattern, model in MIXTURES if re.search(pattern, name, re.I)), None)
    return find(known) if known else None


def _left_out(row: Mapping[str, str | None], kinds: tuple[str, ...]) -> str:
    """Why a row is no run of those kinds with the full key and a speed; empty where it is one."""
    kind = (row.get("kind") or "dense").lower()
    if kind not in kinds:
        return f"kind {kind}"
    if kind == "moe" and _mixture(row) is None:
        return "mixture of unknown shape"
    key = [name for name in KEY if kind != "moe" or name not in ("layers", "hidden")]
    if not all(row.get(name) for name in key):
        return "incomplete key"
    return "" if row.get("tokens_per_s_per_gpu") or row.get("iter_time_s") else NO_SPEED


def _run(row: Mapping[str, str | None], line: int) -> Run:
    case = case_of(row)
    columns([case])  # which refuses a number format that the accelerator lacks
    name = row.get("id") or f"line {line}"
    memory = _number(row, "peak_mem_gb", math.nan)
    if memory <= 0:
        raise PlanError(f"peak_mem_gb is {memory}", "Give a number above 0, or nothing.")
    return Run(name, name.partition("-")[0], case, _seconds(row, case), memory)


def _seconds(row: Mapping[str, str | None], case: Case) -> float:
    """Of an iteration; NaN where the row states none."""
    seconds, rate = _number(row, "iter_time_s", math.nan), _number(row, "tokens_per_s_per_gpu", math.nan)
    for key, value in (("iter_time_s", seconds), ("tokens_per_s_per_gpu", rate)):
        if value <= 0:
            raise PlanError(f"{key} is {row.get(key)}", "Give a number above 0, or nothing.")
    tokens = case.layout.global_batch * case.layout.seq_len
    return tokens / (rate * case.cluster.gpus) if math.isnan(seconds) else seconds


def case_of(row: Mapping[str, str | None]) -> Case:
    """A row as a case. Raises PlanError or HardwareError where the row is not a job that could be."""
    model = _model(row)
    cluster = _cluster(row)
    layout = _layout(row, model, cluster)
    if layout.dp * layout.tp * layout.pp * layout.cp != cluster.gpus:
        layout = replace(layout, dp=max(1, cluster.gpus // (layout.tp * layout.pp * layout.cp)))
    case = Case(model, cluster, layout)
    stated = bool(_word(row, "zero_or_fsdp", SAME_SHARDING)) or layout.attention == "unfused"
    if not stated and _needs([replace(case, layout=replace(layout, recompute="full"))])[0] > _room(case):
        case = replace(case, layout=replace(layout, sharding="zero3"))
    return case if _word(row, "recompute", SAME_RECOMPUTE) else _lightest_recompute(case)


def _needs(cases: list[Case]) -> np.ndarray:
    return footprint(columns(cases))["total"]


def _room(case: Case) -> float:
    return ROOM * case.cluster.gpu.memory * 1e9


def _number(row: Mapping[str, str | None], key: str, default: float) -> float:
    text = row.get(key)
    if not text:
        return default
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise PlanError(f"{key} is {text!r}", "Give a number.")
    return number


def _count(row: Mapping[str, str | None], key: str, default: int) -> int:
    number = _number(row, key, default)
    if number != int(number) or not 1 <= number <= MOST:
        raise PlanError(f"{key} is {row.get(key)}", f"Give a whole number from 1 to {MOST:.0e}.")
    return int(number)


def _word(row: Mapping[str, str | None], key: str, same: Sequence[tuple[str, str]]) -> str:
    """What a cell says, in the words of `Layout`; empty where it says nothing."""
    text = row.get(key) or ""
    found = next((word for pattern, word in same if text and re.fullmatch(pattern, text, re.I)), "")
    if text and not found:
        raise PlanError(f"{key} is {text!r}", f"Choose one of {', '.join(word for _, word in same)}, or nothing.")
    return found


def _model(row: Mapping[str, str | None]) -> Transformer:
    name = row.get("model") or ""
    mixture = _mixture(row) if (row.get("kind") or "").lower() == "moe" else None
    if mixture:
        return mixture
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
    if stand_in := next((other for word, other in STAND_INS.items() if re.search(rf"\b{word}", name, re.I)), None):
        return hardware.find(stand_in)
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
    stated = row.get("stack") or "pytorch-eager"
    stack: Stack = cast(Stack, stated if stated in STACKS else _stack_like(stated))
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
    recompute = cast(Recompute, _word(row, "recompute", SAME_RECOMPUTE) or "none")
    sharding = cast(Sharding, _word(row, "zero_or_fsdp", SAME_SHARDING) or _sharding(stack, flash))
    precision = _precision(row)
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
        ep=_count(row, "ep", 1),
        frozen=(row.get("kind") or "").lower() == "lora",
        micro_batch=micro,
        seq_len=seq_len,
        sharding=sharding,
        shard_group=int(group[1]) if group else 0,
        recompute=recompute,
        precision=precision or ("bf16" if modern else "fp16"),
        attention=attention,
        stack=stack,
        schedule=schedule,
        sequence_parallel=flash or recompute != "full",
        overlaps_gradients=modern,
        overlaps_tensor=_overlaps_tensor(notes, stack, cluster.gpu, flash),
        reduce_bytes=_reduce_bytes(notes, stack, modern, precision or "bf16"),
    )  # fmt: skip


def _stack_like(words: str) -> str:
    return next(kind for pattern, kind in KIND_OF_STACK if re.search(pattern, words, re.I))


def _precision(row: Mapping[str, str | None]) -> str:
    text = row.get("precision") or ""
    found = next((word for pattern, word in SAME_PRECISION if re.search(pattern, text, re.I)), "")
    if text and not found:
        raise PlanError(f"precision is {text!r}", f"Choose one of {', '.join(word for _, word in SAME_PRECISION)}.")
    return found


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
