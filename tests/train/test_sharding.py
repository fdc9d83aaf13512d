"""Mistakes in sharding are told before anything is trained."""

import re

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from puna.errors import ShardingError
from puna.train import mesh
from puna.train.config import MeshConfig, RunConfig
from puna.train.sharding import refuse_early, refuse_shared


def pair() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))


def parts(model: nn.Sequential) -> dict[str, list[nn.Module]]:
    return {"first": [model[0]], "second": [model[1][0]], "root": [model]}


def test_units_that_share_nothing_pass() -> None:
    refuse_shared(parts(pair()))


def test_a_parameter_of_two_units_is_named_in_both() -> None:
    model = pair()
    model[1][0].weight = model[0].weight
    words = re.escape(
        "weight of FSDP unit first and weight of unit second are one parameter. Put the modules that share"
    )
    with pytest.raises(ShardingError, match=words):
        refuse_shared(parts(model))


def test_a_parameter_of_a_unit_and_of_the_unit_around_it() -> None:
    model = pair()
    model[1][1].bias = model[0].bias
    with pytest.raises(ShardingError, match=r"bias of FSDP unit first and 1\.1\.bias of unit root are one"):
        refuse_shared(parts(model))


def test_a_module_of_two_units() -> None:
    shared = nn.Linear(4, 4)
    blocks = [nn.Sequential(shared), nn.Sequential(nn.Tanh(), shared)]
    with pytest.raises(ShardingError, match=r"0\.weight of FSDP unit a and 1\.weight of unit b"):
        refuse_shared({"a": blocks[:1], "b": blocks[1:]})


def test_sharing_inside_one_unit_is_fine() -> None:
    """The lowest unit that holds both users owns a shared parameter."""
    model = pair()
    model[1][1].weight = model[1][0].weight
    refuse_shared({"first": [model[0]], "root": [model]})
    refuse_shared({"first": [model[0]], "both": [model[1][0], model[1][1]], "root": [model]})


def test_an_optimiser_made_before_sharding() -> None:
    with mesh.open_mesh(RunConfig(device="cpu"), MeshConfig()):
        model = pair()
        early = torch.optim.AdamW(model.parameters())
        refuse_early({"model": model}, {"adamw": early})
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        late = torch.optim.AdamW(model.parameters())
        refuse_early({"model": model}, {"adamw": late})
        words = "optimiser adamw holds 6 of 6 parameters that no module has: it was made before the model was sharded"
        with pytest.raises(ShardingError, match=words + r"\. Make the optimiser after sharding"):
            refuse_early({"model": model}, {"adamw": early})


def test_an_optimiser_over_two_modules() -> None:
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = torch.optim.SGD([*one.parameters(), *other.parameters()], lr=0.1)
    refuse_early({"one": one, "other": other}, {"sgd": optimizer})
    with pytest.raises(ShardingError, match="holds 2 of 4 parameters"):
        refuse_early({"one": one}, {"sgd": optimizer})
