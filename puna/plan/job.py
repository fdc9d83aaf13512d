"""A job from names, flags or a recipe's settings; and a found layout back as a recipe."""

import json
import math
from dataclasses import replace
from typing import Any

from puna.llama.config import LlamaConfig
from puna.plan import hardware, workload
from puna.plan.layout import Case, Layout, Sharding
from puna.plan.workload import PlanError, Transformer
from puna.train.config import MeshConfig, TrainConfig

BATCH_TOKENS = {"llama3-405b": (8192, 16_777_216), "llama3.1-405b": (8192, 16_777_216)}
USUAL = (4096, 4_194_304)


def usual_layout(
    model: Transformer, cluster: hardware.Cluster, seq_len: int | None, batch_tokens: int | None
) -> Layout:
    """Sequence length and batch of a model where they are not given: as published for it, else 4,096 and 4M tokens."""
    usual_seq, usual_batch = BATCH_TOKENS.get(model.name, USUAL)
    seq_len, batch_tokens = seq_len or usual_seq, batch_tokens or usual_batch
    if batch_tokens % seq_len:
        raise PlanError(
            f"a batch of {batch_tokens} tokens is not whole sequences of {seq_len}",
            f"Take {math.ceil(batch_tokens / seq_len) * seq_len} tokens.",
        )
    return Layout(global_batch=batch_tokens // seq_len, seq_len=seq_len, dp=cluster.gpus)


def of_recipe(
    model: LlamaConfig, train: TrainConfig, mesh: MeshConfig, cluster: hardware.Cluster
) -> tuple[Transformer, Layout]:
    """What a recipe trains and how, on a cluster. dtype "auto" is bf16 where the device multiplies that faster."""
    shape = Transformer(
        model.num_layers, model.dim, model.ffn_dim, model.num_heads, model.num_kv_heads, model.vocab_size,
        tied=model.tie_embeddings,
    )  # fmt: skip
    replicas = mesh.dp_replicate
    sharding: Sharding = "hsdp" if replicas > 1 else "zero3" if mesh.reshard_after_forward else "zero2"
    layout = Layout(
        global_batch=max(1, train.batch_tokens // train.seq_len),
        seq_len=train.seq_len,
        dp=cluster.gpus,
        micro_batch=train.micro_batch,
        sharding=sharding,
        shard_group=cluster.gpus // replicas if replicas > 1 else 0,
        recompute=train.recompute,
        precision=_dtype(train.dtype, cluster.gpu),
        stack="pytorch-compiled" if train.compile else "pytorch-eager",
    )
    return shape, layout


def _dtype(asked: str, gpu: hardware.Gpu) -> str:
    if asked != "auto":
        return asked
    return "bf16" if gpu.flops.get("bf16", 0) > gpu.flops.get("fp32", 0) else "fp32"


def build(model: Transformer, cluster: hardware.Cluster, base: Layout, changes: dict[str, Any]) -> Case:
    """A job with some settings changed; dp fills the cluster unless given. Raises PlanError where sizes do not fit."""
    layout = replace(base, **{key: value for key, value in changes.items() if value is not None})
    if changes.get("dp") is None:
        cut = layout.tp * layout.pp * layout.cp
        if cut < 1 or cluster.gpus % cut:
            raise PlanError(
                f"tp {layout.tp} x pp {layout.pp} x cp {layout.cp} does not divide {cluster.gpus} GPUs",
                "Choose degrees whose product divides the GPUs.",
            )
        layout = replace(layout, dp=cluster.gpus // cut)
    layout.check(model, cluster)
    return Case(model, cluster, layout)


def by_name(name: str) -> Transformer:
    """A model by its name; the nearest is named where there is none."""
    return workload.find(name)


TRAINED = ("fp32", "bf16", "fp16")
"""Number formats that the trainer computes in."""


def trainable(layout: Layout) -> bool:
    """Whether this package trains it: data parallelism with sharded parameters, or one process, in a format it has."""
    alone = layout.dp * layout.tp * layout.pp * layout.cp * layout.ep == 1
    along = layout.tp == layout.pp == layout.cp == layout.ep == 1 and layout.sharding in ("zero2", "zero3", "hsdp")
    return (alone or along) and layout.precision in TRAINED


def emit(base: str, layout: Layout, num_processes: int) -> str:
    """A recipe that trains `base` in this layout, `num_processes` of it on each machine.

    Raises PlanError for axes and number formats that the trainer does not have.
    """
    if layout.precision not in TRAINED:
        raise PlanError(f"the trainer does not compute in {layout.precision}", f"Search in {', '.join(TRAINED)}.")
    for axis in ("tp", "pp", "cp"):
        if getattr(layout, axis) > 1:
            raise PlanError(
                f"the trainer has no {axis} axis, and this layout has {axis} {getattr(layout, axis)}",
                "Search with --trainable.",
            )
    replicas = layout.dp // layout.shard_group if layout.shard_group else 1
    return "\n".join(
        (
            f"extends = {json.dumps(base)}",
            "",
            "[run]",
            f"num_processes = {num_processes}",
            "",
            "[train]",
            f"batch_tokens = {layout.global_batch * layout.seq_len}",
            f"seq_len = {layout.seq_len}",
            f"micro_batch = {layout.micro_batch}",
            f'recompute = "{layout.recompute}"',
            f'dtype = "{layout.precision}"',
            f"compile = {str(layout.stack == 'pytorch-compiled').lower()}",
            "",
            "[mesh]",
            f"dp_replicate = {replicas}",
            f"reshard_after_forward = {str(layout.sharding in ('zero3', 'hsdp')).lower()}",
            "",
        )
    )
