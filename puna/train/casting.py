"""Mixed precision of a module that no other process shares: parameters stay float32, a forward works on casts."""

from typing import Any

import torch
from torch import nn


def cast_in_forward(model: nn.Module, dtype: torch.dtype) -> None:
    """Within `model(...)` its parameters are casts to `dtype`, each made once; gradients arrive in the parameters'.

    What FSDP2's MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=float32) does on one process, without its copies.
    """
    kept: list[tuple[nn.Module, str, nn.Parameter]] = []

    def swap_in(module: nn.Module, args: tuple[Any, ...]) -> None:
        kept.extend((part, name, p) for part in module.modules() for name, p in part.named_parameters(recurse=False))
        casts: dict[nn.Parameter, Any] = {p: p.to(dtype) for p in {p: None for _, _, p in kept}}
        for part, name, p in kept:
            part._parameters[name] = casts[p]

    def swap_out(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        while kept:
            part, name, p = kept.pop()
            part._parameters[name] = p

    model.register_forward_pre_hook(swap_in)
    model.register_forward_hook(swap_out, always_call=True)
