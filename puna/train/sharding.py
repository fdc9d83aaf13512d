"""Sharded tensors: this rank's part of them; mistakes that would train nothing, or fail far from their cause."""

import math
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from puna.errors import ShardingError

Units = Mapping[str, Sequence[nn.Module]]
"""Modules that FSDP takes as one unit, by name; a unit may enclose others, whose parameters are not its own."""


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; a plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_over(tensor: Tensor) -> int:
    """Number of ranks that one copy of the tensor is cut over."""
    if not isinstance(tensor, DTensor):
        return 1
    sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return math.prod(size for size, placement in sizes if placement.is_shard())


def refuse_shared(units: Units) -> None:
    """Raise ShardingError where two units have one parameter: each would free what the other still needs.

    PyTorch FSDP, section 7.2.2: a shared parameter belongs to the lowest unit that holds all its users.
    """
    borders = {module for modules in units.values() for module in modules}
    owners: dict[nn.Parameter, tuple[str, str]] = {}
    for unit, modules in units.items():
        for name, parameter in (own for module in modules for own in _own(module, borders)):
            owner, first = owners.setdefault(parameter, (unit, name))
            if owner != unit:
                raise ShardingError(
                    f"{first} of FSDP unit {owner} and {name} of unit {unit} are one parameter",
                    "Put the modules that share it into one unit, or give each its own parameter.",
                )


def refuse_early(modules: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer]) -> None:
    """Raise ShardingError for an optimiser that was made before the modules were sharded: it would step other tensors.

    PyTorch FSDP, section 4.1.
    """
    live = {parameter for module in modules.values() for parameter in module.parameters()}
    for name, optimizer in optimizers.items():
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if strangers := [parameter for parameter in held if parameter not in live]:
            raise ShardingError(
                f"optimiser {name} holds {len(strangers)} of {len(held)} parameters that no module has: "
                "it was made before the model was sharded",
                "Make the optimiser after sharding.",
            )


def _own(module: nn.Module, borders: set[nn.Module], prefix: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        yield prefix + name, parameter
    for name, child in module.named_children():
        if child not in borders:
            yield from _own(child, borders, f"{prefix}{name}.")
