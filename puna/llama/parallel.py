"""How a Llama is spread: recompute, compile, shard, in that order, beside the model and never inside it.

1. Recompute wraps a block's forward, so that what is compiled and sharded is the wrapped block.
2. Compile takes each block alone: one graph serves every layer.
3. FSDP2 takes each block as one unit (one all-gather, one reduce-scatter), then the rest (Llama 3, section 3.3.2;
   PyTorch FSDP, section 3). What it costs is counted by `puna lab fsdp`, and predicted by `puna.plan.fsdp`.
"""

from functools import partial
from itertools import pairwise
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from puna.errors import ShardingError
from puna.llama.model import Llama
from puna.train.casting import cast_in_forward
from puna.train.sharding import refuse_shared

Layout = Literal["root", "ends"]
Prefetch = Literal["none", "backward", "both"]

KEPT_BY_SELECTIVE = frozenset(
    {
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten.bmm.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.puna.causal_products.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
    }
)


def spread(
    model: Llama,
    mesh: DeviceMesh | None,
    *,
    dtype: torch.dtype,
    recompute: Literal["none", "selective", "full"] = "none",
    compile: bool = False,
    reshard_after_forward: bool = True,
    reshard_last: bool = False,
    layout: Layout = "root",
    prefetch: Prefetch = "backward",
    reduce_dtype: torch.dtype = torch.float32,
    offload: bool = False,
) -> None:
    """Recompute, compile and shard `model` in place, over the data-parallel `mesh` (None: not sharded).

    reshard_after_forward: free each unit after its forward (full shard) or not (grad-op); reshard_last: the last one
    too, which backward needs at once. layout: see `units`. prefetch: gather the next unit early never, in backward
    (PyTorch's default), or in forward too. reduce_dtype: of gradients on the wire. offload: shards live on the CPU.
    Raises ShardingError for a parameter of two units, ValueError for recompute below float32 without a mesh: what runs
    again in backward is outside of `cast_in_forward`.
    """
    if mesh is None and dtype != torch.float32 and recompute != "none":
        raise ValueError(f"recompute {recompute} in {dtype} needs a mesh, be it of one process")
    for block in model.model.layers.values():
        if recompute != "none":
            _recompute(block, selective=recompute == "selective")
        if compile:
            block.compile()
    if mesh is None:
        if dtype != torch.float32:
            cast_in_forward(model, dtype)
        return
    parts = units(model, layout)
    refuse_shared(parts)
    pinned = mesh.device_type != "cpu"
    shard = partial(
        fully_shard,
        mesh=mesh,
        mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduce_dtype),
        offload_policy=CPUOffloadPolicy(pin_memory=pinned) if offload else OffloadPolicy(),
    )
    *inner, last = parts.values()
    for modules in inner:
        shard(modules, reshard_after_forward=reshard_after_forward)
    shard(last, reshard_after_forward=reshard_after_forward and reshard_last)
    if model not in last:
        shard(model, reshard_after_forward=False)
    _prefetch(parts, prefetch, encloses=model in last)


def units(model: Llama, layout: Layout) -> dict[str, list[nn.Module]]:
    """Modules of each FSDP unit, in the order of the forward.

    root: each block; the rest belongs to the root, gathered throughout a step, as tied embeddings ask for. ends:
    embedding, each block, last norm and head, so that neither end is gathered for longer than it is used.
    Raises ShardingError for "ends" with tied embeddings.
    """
    blocks: dict[str, list[nn.Module]] = {f"layers.{name}": [block] for name, block in model.model.layers.items()}
    if layout == "root":
        return {**blocks, "root": [model]}
    if model.config.tie_embeddings:
        raise ShardingError(
            "model.embed_tokens.weight of FSDP unit embedding is also the head's, in unit head (tied embeddings)",
            'Take layout "root", in which both belong to one unit.',
        )
    return {"embedding": [model.model.embed_tokens], **blocks, "head": [model.model.norm, model.lm_head]}


def _prefetch(parts: dict[str, list[nn.Module]], prefetch: Prefetch, *, encloses: bool) -> None:
    firsts = [cast(FSDPModule, modules[0]) for modules in parts.values()]
    if prefetch == "none":
        for module in firsts:
            module.set_modules_to_backward_prefetch([module])  # itself is there already; no list would be the default
    if prefetch == "both":
        order = [firsts[-1], *firsts[:-1]] if encloses else firsts
        for module, following in pairwise(order):
            module.set_modules_to_forward_prefetch([following])


def _recompute(block: nn.Module, *, selective: bool) -> None:
    again = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    if selective:
        again = partial(again, context_fn=partial(create_selective_checkpoint_contexts, _keep_products))
    block.forward = again  # type: ignore[method-assign]


def _keep_products(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT_BY_SELECTIVE else CheckpointPolicy.PREFER_RECOMPUTE
