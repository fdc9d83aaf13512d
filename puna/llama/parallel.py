"""How a Llama is spread: recompute, compile, shard, in that order, beside the model and never inside it.

1. Recompute wraps a block's forward, so that what is compiled and sharded is the wrapped block.
2. Compile takes each block alone: one graph serves every layer.
3. FSDP2 takes each block as one unit (one all-gather, one reduce-scatter), then the root: embedding, last norm, head
   (Llama 3, section 3.3.2; PyTorch FSDP, section 3).
"""

from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from puna.llama.model import Llama

KEPT_BY_SELECTIVE = frozenset(
    {
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten.bmm.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
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
) -> None:
    """Recompute, compile and shard `model` in place, over the data-parallel `mesh` (None: not sharded, float32)."""
    for block in model.model.layers.values():
        if recompute != "none":
            _recompute(block, selective=recompute == "selective")
        if compile:
            block.compile()
    if mesh is None:
        return
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in model.model.layers.values():
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def _recompute(block: nn.Module, *, selective: bool) -> None:
    again = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    if selective:
        again = partial(again, context_fn=partial(create_selective_checkpoint_contexts, _keep_products))
    block.forward = again  # type: ignore[method-assign]


def _keep_products(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT_BY_SELECTIVE else CheckpointPolicy.PREFER_RECOMPUTE
