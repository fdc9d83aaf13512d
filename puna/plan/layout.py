"""How a job is laid out over a cluster, and many jobs as columns of numbers that are estimated together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from puna.plan.hardware import Cluster
from puna.plan.workload import PlanError, Transformer, Vision

Sharding = Literal["none", "zero1", "zero2", "zero3", "hsdp"]
Recompute = Literal["none", "selective", "full"]
Stack = Literal["pytorch-eager", "pytorch-compiled", "megatron", "jax-xla", "oneflow"]
Attention = Literal["unfused", "flash-1", "flash", "cudnn"]
Schedule = Literal["1f1b", "zb-1p", "zb-2p"]
STACKS: tuple[Stack, ...] = ("pytorch-eager", "pytorch-compiled", "megatron", "jax-xla", "oneflow")
SHARDINGS: tuple[Sharding, ...] = ("none", "zero1", "zero2", "zero3", "hsdp")
RECOMPUTES: tuple[Recompute, ...] = ("none", "selective", "full")
SCHEDULES: tuple[Schedule, ...] = ("1f1b", "zb-1p", "zb-2p")
FIRST_FLASH = 0.6
"""Rate of the first FlashAttention and its Triton form over the second's (Dao 2023, figures 4 to 6: 1.3 to 2 times)."""
PRECISIONS = ("fp32", "fp16", "bf16", "fp8", "mxfp8", "nvfp4")


@dataclass(frozen=True)
class Layout:
    """Sizes of the mesh and how the work is cut; experts are spread over `ep` of the dp x cp ranks.

    shard_group: ranks that share one copy of what is sharded; 0: all of dp x cp (a node's under hsdp). recompute
    "selective": attention's core under megatron, jax and oneflow, half of a block under pytorch. recompute_share: of
    the blocks, those that are recomputed. overlaps_gradients:
    gradient and parameter traffic of zero1 or none runs beside compute. overlaps_tensor: chunks of tensor-parallel
    traffic run beside their matrix products. keeps_gated: the product of gate and up is kept for backward; false where
    a fused kernel makes it again (xFormers' SwiGLU). frozen: the decoder's own weights have no gradient; adapters of
    low rank, whose work is not counted, or what makes it see, are trained.
    """

    global_batch: int
    dp: int = 1
    tp: int = 1
    pp: int = 1
    vp: int = 1
    cp: int = 1
    ep: int = 1
    micro_batch: int = 1
    seq_len: int = 4096
    sharding: Sharding = "zero1"
    shard_group: int = 0
    recompute: Recompute = "none"
    recompute_share: float = 1.0
    precision: str = "bf16"
    attention: Attention = "flash"
    stack: Stack = "pytorch-compiled"
    schedule: Schedule = "1f1b"
    sequence_parallel: bool = True
    overlaps_gradients: bool = True
    overlaps_tensor: bool = False
    reduce_bytes: int = 4
    keeps_gated: bool = True
    frozen: bool = False

    def check(self, model: Transformer, cluster: Cluster) -> None:
        """Raise PlanError where sizes do not divide what they cut."""
        sizes = ("dp", "tp", "pp", "vp", "cp", "ep", "micro_batch", "seq_len", "global_batch")
        for key in sizes:
            if getattr(self, key) < 1:
                raise PlanError(f"{key} is {getattr(self, key)}", "Give a whole number of at least 1.")
        if self.dp * self.tp * self.pp * self.cp != cluster.gpus:
            raise PlanError(
                f"dp {self.dp} x tp {self.tp} x pp {self.pp} x cp {self.cp} is not {cluster.gpus} GPUs",
                f"Set dp to {max(1, cluster.gpus // (self.tp * self.pp * self.cp))}, or other degrees.",
            )
        _divides("tp", self.tp, "heads", model.heads)
        _divides("cp", self.cp, "seq_len", self.seq_len)
        _divides("ep", self.ep, "experts", max(1, model.experts))
        _divides("ep", self.ep, "dp x cp", self.dp * self.cp)
        _divides("dp x micro_batch", self.dp * self.micro_batch, "global_batch", self.global_batch)
        if self.pp * self.vp > model.layers + 2:
            raise PlanError(
                f"pp {self.pp} x vp {self.vp} is more than the model's {model.layers} layers", "Lower pp or vp."
            )


def _divides(name: str, size: int, of: str, whole: int) -> None:
    if whole % size:
        divisors = [n for n in range(1, whole + 1) if whole % n == 0]
        near = min(divisors, key=lambda n: abs(n - size))
        raise PlanError(f"{name} {size} does not divide {of} {whole}", f"Set {name} to {near}, the nearest that does.")


@dataclass(frozen=True)
class Case:
    """One job: what is trained, on what, how."""

    model: Transformer
    cluster: Cluster
    layout: Layout


class Columns(dict[str, np.ndarray]):
    """Many jobs, one array a quantity; attribute access for the formulas."""

    def __getattr__(self, name: str) -> np.ndarray:
        return self[name]

    def take(self, index: np.ndarray) -> "Columns":
        """The jobs of an index or a mask."""
        return Columns({key: value[index] for key, value in self.items()})


def columns(cases: Sequence[Case]) -> Columns:
    """The columns of some jobs. Rates are bytes/s and FLOP/s; sizes as in Layout."""
    table = [_numbers(case) for case in cases]
    return Columns({key: np.array([row[key] for row in table], dtype=float) for key in table[0]} if table else {})


def _numbers(case: Case) -> dict[str, float]:
    model, cluster, layout = case.model, case.cluster, case.layout
    gpu = cluster.gpu
    dense = {
        "L": model.layers, "h": model.hidden, "f": model.ffn, "a": model.heads, "kv": model.kv_heads,
        "V": model.vocab, "gated": model.gated, "tied": model.tied,
        "E": model.experts, "act": model.active, "fe": model.expert_ffn, "q": model.heads * model.head_dim,
    } | _sight(model.vision)  # fmt: skip
    wide = layout.precision if layout.precision in ("fp16", "fp32") else "bf16"
    device = {
        "peak": gpu.peak(layout.precision) * 1e12, "peak16": gpu.peak(wide) * 1e12, "achievable": gpu.achievable,
        "bw": gpu.bandwidth * 1e12, "link": gpu.link * 1e9, "net": cluster.network_gbps * 1e9 / 8,
        "node": min(cluster.gpus_per_node, cluster.gpus), "domain": cluster.domain, "sm": gpu.processors,
        "throttle": gpu.throttle, "capacity": gpu.memory * 1e9, "power": gpu.power, "n": cluster.gpus,
    }  # fmt: skip
    cut = {key: getattr(layout, key) for key in ("dp", "tp", "pp", "vp", "cp", "ep", "reduce_bytes")}
    cut |= {
        "b": layout.micro_batch, "B": layout.global_batch, "s": layout.seq_len,
        "zero": (0, 1, 2, 3, 3)[SHARDINGS.index(layout.sharding)], "shard": _shard(layout, cluster),
        "rc": RECOMPUTES.index(layout.recompute),
        "redone": layout.recompute_share if layout.recompute != "none" else 0.0,
        "flash": layout.attention != "unfused", "stack": STACKS.index(layout.stack),
        "zb": SCHEDULES.index(layout.schedule), "sp": layout.sequence_parallel, "overlap": layout.overlaps_gradients,
        "tp_overlap": layout.overlaps_tensor, "low": PRECISIONS.index(layout.precision) >= 3,
        "full_precision": layout.precision == "fp32", "frozen": layout.frozen, "keeps": layout.keeps_gated,
        "fused_share": {"flash-1": FIRST_FLASH * gpu.ampere_attention, "flash": gpu.ampere_attention}.get(
            layout.attention, 1.0
        ),
    }  # fmt: skip
    return dense | device | cut


def _sight(vision: Vision | None) -> dict[str, float]:
    """What makes a decoder see; zeros where nothing does."""
    keys = ("cross_layers", "image_tokens", "tile", "layers", "hidden", "ffn", "heads", "features")
    return {f"see_{key}": getattr(vision, key) if vision else 0.0 for key in keys}


def _shard(layout: Layout, cluster: Cluster) -> int:
    """Ranks that share one copy of what is sharded."""
    ranks = layout.dp * layout.cp
    if layout.shard_group:
        return min(layout.shard_group, ranks)
    if layout.sharding == "hsdp":
        return min(ranks, max(1, cluster.gpus_per_node // layout.tp))
    return 1 if layout.sharding == "none" else ranks
