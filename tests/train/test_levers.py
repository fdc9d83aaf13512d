"""What is done to single tensors for one step is exact under every implementation of Adam, and leaves no trace."""

import itertools

import pytest
import torch
from torch import nn
from torch.optim import Adam, AdamW, NAdam, Optimizer

from puna.train.actions import Knobs, Plan
from puna.train.levers import Levers, zero_moments
from puna.train.stable_adamw import StableAdamW

KINDS = [
    pytest.param(AdamW, {"foreach": False, "fused": False}, id="for-loop"),
    pytest.param(AdamW, {"foreach": True}, id="foreach"),
    pytest.param(AdamW, {"fused": True}, id="fused"),
    pytest.param(Adam, {"amsgrad": True}, id="amsgrad"),
    pytest.param(NAdam, {}, id="nadam"),
    pytest.param(StableAdamW, {"betas": (0.9, 0.95)}, id="stable"),
]


def make(kind: type[Optimizer], settings: dict, **own: float) -> tuple[dict[str, nn.Parameter], Optimizer]:
    """Three tensors in two groups; `own`: settings of tensor b, which is then in a group of its own."""
    torch.manual_seed(0)
    tensors = {name: nn.Parameter(torch.randn(5, 3)) for name in "abc"}
    groups = [{"params": [tensors["a"]]}, {"params": [tensors["b"]], **own}, {"params": [tensors["c"]], "lr": 3e-3}]
    if not own:
        groups = [{"params": [tensors["a"], tensors["b"]]}, groups[2]]
    return tensors, kind(groups, **{"lr": 1e-2, "weight_decay": 0.1} | settings)


def give_gradients(tensors: dict[str, nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in tensors.values():
        p.grad = torch.randn(5, 3, generator=generator)


@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_knobs_are_what_a_group_of_its_own_would_do(kind: type[Optimizer], settings: dict) -> None:
    tensors, optimizer = make(kind, settings)
    wanted, other = make(kind, settings, lr=1e-2 * 0.3, eps=1e-3)
    levers, groups = Levers(), optimizer.param_groups
    for step in range(5):
        for each in (tensors, wanted):
            give_gradients(each, step)
        levers.engage(optimizer, tensors, Plan(knobs={"b": Knobs(0.3, 1e-3)}))
        optimizer.step()
        levers.release(optimizer)
        other.step()
        assert optimizer.param_groups is groups
        assert [len(group["params"]) for group in groups] == [2, 1]
    assert all(torch.equal(tensors[name], wanted[name]) for name in "abc")


@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_a_skip_changes_no_tensor_and_no_moment(kind: type[Optimizer], settings: dict) -> None:
    tensors, optimizer = make(kind, settings)
    give_gradients(tensors, 0)
    optimizer.step()
    before = {name: p.detach().clone() for name, p in tensors.items()}
    moments = {(name, key): x.clone() for name, p in tensors.items() for key, x in optimizer.state[p].items()}
    give_gradients(tensors, 1)
    levers = Levers()
    levers.engage(optimizer, tensors, Plan(skip=True))
    optimizer.step()
    levers.release(optimizer)
    assert all(torch.equal(tensors[name], before[name]) for name in "abc")
    assert all(torch.equal(optimizer.state[tensors[name]][key], x) for (name, key), x in moments.items())
    optimizer.step()
    assert not any(torch.equal(tensors[name], before[name]) for name in "abc"), "and the next step is taken"


@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_a_reset_tensor_goes_on_as_a_new_one(kind: type[Optimizer], settings: dict) -> None:
    tensors, optimizer = make(kind, settings)
    levers = Levers()
    for step in range(4):
        give_gradients(tensors, step)
        optimizer.step()
    young, fresh = make(kind, settings)
    with torch.no_grad():
        for name in "abc":
            young[name].copy_(tensors[name])
    others = {name: tensors[name].detach().clone() for name in "ac"}
    for step in range(4, 8):
        give_gradients(tensors, step)
        give_gradients(young, step)
        levers.engage(optimizer, tensors, Plan(resets=("b",) if step == 4 else ()))
        optimizer.step()
        levers.release(optimizer)
        fresh.step()
    assert torch.equal(tensors["b"], young["b"])
    assert not any(torch.equal(tensors[name], young[name]) for name in "ac"), "the others kept their moments"
    assert not any(torch.equal(tensors[name], others[name]) for name in "ac")


def test_names_of_another_optimiser_are_left_to_it() -> None:
    tensors, optimizer = make(AdamW, {})
    levers = Levers()
    levers.engage(optimizer, {"a": tensors["a"]}, Plan(resets=("x",), knobs={"y": Knobs(0.5)}))
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 1]


def test_a_step_that_failed_leaves_the_groups_to_the_next() -> None:
    tensors, optimizer = make(AdamW, {})
    levers, groups = Levers(), optimizer.param_groups
    levers.engage(optimizer, tensors, Plan(skip=True))
    levers.engage(optimizer, tensors, Plan(knobs={"a": Knobs(0.5)}))
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1, 1]
    levers.release_all()
    assert optimizer.param_groups is groups
    levers.release(optimizer)
    assert optimizer.param_groups is groups


def test_tensor_rates_are_scaled_too() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = AdamW([p], lr=torch.tensor(0.1), fused=True, weight_decay=0.0)
    p.grad = torch.ones(2)
    levers = Levers()
    levers.engage(optimizer, {"p": p}, Plan(knobs={"p": Knobs(0.5)}))
    optimizer.step()
    assert p.tolist() == pytest.approx([0.95, 0.95])


def test_moments_that_were_never_made_are_zero_already() -> None:
    tensors, optimizer = make(AdamW, {})
    zero_moments(optimizer, tensors.values())
    assert not any(itertools.chain.from_iterable(optimizer.state.values()))
