"""StableAdamW: AdamW where the second moment keeps up, a smaller step where it does not, the same on any sharding."""

import math

import numpy as np
import pytest
import torch
import toys
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from puna.train.config import TrainConfig
from puna.train.optim import make_optimizers, optimizer_tensors
from puna.train.stable_adamw import StableAdamW

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def pair(size: int = 1000) -> tuple[list[nn.Parameter], list[torch.optim.Optimizer]]:
    torch.manual_seed(0)
    start = torch.randn(size)
    parameters = [nn.Parameter(start.clone()) for _ in range(2)]
    return parameters, [StableAdamW([parameters[0]], **SETTINGS), torch.optim.AdamW([parameters[1]], **SETTINGS)]


def step(parameters: list[nn.Parameter], optimizers: list[torch.optim.Optimizer], grad: torch.Tensor) -> None:
    for p, optimizer in zip(parameters, optimizers, strict=True):
        p.grad = grad.clone()
        optimizer.step()


def test_it_is_adamw_where_the_second_moment_keeps_up() -> None:
    """A gradient that shrinks: g^2 is below v^ everywhere, so no update is clipped."""
    parameters, optimizers = pair()
    for i in range(40):
        step(parameters, optimizers, torch.randn(1000).sign() * 0.98**i)
    torch.testing.assert_close(*parameters, rtol=1e-5, atol=1e-6)


def test_a_burst_after_a_stall_is_clipped_by_its_rms() -> None:
    parameters, optimizers = pair()
    for _ in range(50):
        step(parameters, optimizers, 1e-3 * torch.randn(1000))
    before = [p.detach().clone() for p in parameters]
    v = optimizers[0].state[parameters[0]]["exp_avg_sq"].clone()
    burst = torch.randn(1000)
    step(parameters, optimizers, burst)
    seen = (0.99 * v + 0.01 * burst**2) / (1 - 0.99**51)
    rms = math.sqrt(float((burst**2 / seen).mean()))
    assert rms > 4
    moves = [(p - start).detach() for p, start in zip(parameters, before, strict=True)]
    torch.testing.assert_close(moves[0] * rms, moves[1], rtol=1e-3, atol=1e-6)


def test_the_first_step_is_adamws() -> None:
    parameters, optimizers = pair()
    step(parameters, optimizers, torch.randn(1000))
    torch.testing.assert_close(*parameters, rtol=1e-6, atol=1e-7)


def test_it_takes_a_closure_and_leaves_tensors_without_gradient_alone() -> None:
    p, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = StableAdamW([p, other], lr=0.1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2.0
    assert p.tolist() == pytest.approx([0.9, 0.9])
    assert other.tolist() == [1.0, 1.0]


def test_gradients_of_zero_change_nothing() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = StableAdamW([p], lr=0.1, eps=1e-30)
    p.grad = torch.zeros(3)
    optimizer.step()
    assert p.tolist() == [1.0, 1.0, 1.0]


def test_the_recipe_makes_it() -> None:
    model = toys.network(3)
    optimizers = make_optimizers(
        model, TrainConfig(optimizer="stable_adamw", lr=0.5, weight_decay=0.2, betas=(0.8, 0.9))
    )
    (optimizer,) = optimizers.values()
    assert (list(optimizers), type(optimizer)) == (["stable_adamw"], StableAdamW)
    assert [(group["weight_decay"], group["lr"], group["betas"]) for group in optimizer.param_groups] == [
        (0.2, 0.5, (0.8, 0.9)),
        (0.0, 0.5, (0.8, 0.9)),
    ]
    names = {p: name for name, p in model.named_parameters()}
    assert {key.rpartition(".")[2] for key in optimizer_tensors(optimizer, names)} == {"step", "exp_avg", "exp_avg_sq"}


def trajectory(how: str) -> list[np.ndarray]:
    """Weights after a burst; every rank has the whole gradient."""
    model = toys.network(3, width=10, dropout=0.0)
    if how != "plain":
        devices = init_device_mesh("cpu", (2, 2), mesh_dim_names=("r", "s")) if how == "hybrid" else None
        for part in (model[0], model):
            fully_shard(part, mesh=devices)
    optimizer = StableAdamW(model.parameters(), **SETTINGS)
    for i in range(30):
        inputs, targets = toys.samples((np.arange(16) * 7 + i) % toys.SAMPLES)
        loss = (model(inputs) - targets).square().mean() * (1e3 if i == 25 else 1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return [p.detach().numpy() for p in whole]


@pytest.mark.parametrize("how", ["full", "hybrid"])
def test_a_sharded_step_is_the_whole_one(how: str, ranks: object) -> None:
    reference = trajectory("plain")
    for weights in ranks(trajectory, how):
        for one, other in zip(reference, weights, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
