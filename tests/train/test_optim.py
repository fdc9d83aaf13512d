"""Optimisers, sharded and not; averaged weights."""

import numpy as np
import pytest
import torch
import toys
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from puna.train import mesh
from puna.train.config import TrainConfig
from puna.train.optim import Average, Muon, adamw, make_optimizers, optimizer_tensors, orthogonalize


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 4)
        self.block = nn.Linear(4, 6)
        self.norm = nn.RMSNorm(6)
        self.out = nn.Linear(6, 4, bias=False)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.out(self.norm(self.block(self.embed(tokens)))))


def test_matrices_decay_gains_do_not_and_a_tied_matrix_comes_once() -> None:
    model = Tied()
    groups = adamw(model.parameters(), TrainConfig(weight_decay=0.3)).param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(decays) == 5
    assert [decays[id(p)] for p in model.parameters()] == [0.3, 0.3, 0.0, 0.0, 0.3]


def test_fused_adamw_is_the_recipe() -> None:
    """Two steps by hand (Loshchilov and Hutter 2019, algorithm 2)."""
    p = nn.Parameter(torch.tensor([[0.5, -2.0]], dtype=torch.float64))
    optimizer = adamw([p], TrainConfig(lr=0.1, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.2))
    x, m, v = p.detach().numpy().copy(), np.zeros((1, 2)), np.zeros((1, 2))
    for t in (1, 2):
        g = np.array([[0.3 * t, -1.0]])
        p.grad = torch.from_numpy(g.copy())
        optimizer.step()
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        x = x - 0.1 * 0.2 * x - 0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-3)
    np.testing.assert_allclose(p.detach().numpy(), x, rtol=1e-12)


def test_muon_takes_the_block_matrices_and_adamw_the_rest() -> None:
    model = Tied()
    picked = make_optimizers(model, TrainConfig(optimizer="muon"), is_block_matrix=lambda n, p: n in {"block.weight"})
    assert [p.shape for p in picked["muon"].param_groups[0]["params"]] == [(6, 4)]
    assert sum(len(group["params"]) for group in picked["adamw"].param_groups) == 4
    assert picked["muon"].param_groups[0]["lr"] == 0.02
    with pytest.raises(ValueError, match=r"Muon takes matrices, not shapes \[\(6,\)\]"):
        Muon([model.norm.weight], lr=1)


@pytest.mark.parametrize("shape", [(8, 8), (8, 24), (24, 8)])
def test_newton_schulz_brings_singular_values_near_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    matrix = torch.randn(shape)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    near = orthogonalize(matrix)
    values = torch.linalg.svdvals(near)
    assert 0.6 < values.min() < values.max() < 1.3
    aligned = left.T @ near @ right.T
    assert (aligned - aligned.diag().diag()).abs().max() < 1e-3, "singular vectors are kept"


def muon_steps(how: str) -> list[np.ndarray]:
    """Parameters after three steps on five matrices (more than ranks, rows that do not divide by them)."""
    torch.manual_seed(2)
    model = nn.Sequential(*(nn.Linear(i, o, bias=False) for i, o in ((6, 9), (9, 3), (3, 5), (5, 8), (8, 2))))
    if how != "plain":
        devices = init_device_mesh("cpu", (2, 2), mesh_dim_names=("r", "s")) if how == "hybrid" else None
        fully_shard(model, mesh=devices)
    optimizer = Muon(model.parameters(), lr=0.1, weight_decay=0.1)
    for step in range(3):
        inputs = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        model(inputs.chunk(mesh.world_size())[mesh.rank()]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    parameters = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return [p.detach().numpy() for p in parameters]


@pytest.mark.parametrize("how", ["full", "hybrid"])
def test_sharded_muon_equals_muon(how: str, ranks: object) -> None:
    wanted = muon_steps("plain")
    for result in ranks(muon_steps, how):
        for one, other in zip(result, wanted, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_muon_is_torchs_muon_in_the_same_dtype() -> None:
    torch.manual_seed(4)
    ours, theirs = (nn.Parameter(torch.randn(6, 10, generator=torch.Generator().manual_seed(1))) for _ in range(2))
    one = Muon([ours], lr=0.1, weight_decay=0.1, dtype=torch.bfloat16)
    other = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1, momentum=0.95)
    for _ in range(3):
        ours.grad = torch.randn(6, 10)
        # torch's momentum is an average, ours a sum: a factor that the orthogonalisation removes.
        theirs.grad = ours.grad.clone()
        one.step()
        other.step()
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_state_made_for_a_load_is_the_state_before_the_first_step(kind: str) -> None:
    results = []
    for touched in (False, True):
        torch.manual_seed(3)
        model = toys.network(2, dropout=0.0)
        optimizers = make_optimizers(model, TrainConfig(optimizer=kind, lr=0.01))
        names = {p: n for n, p in model.named_parameters()}
        if touched:
            before = [p.detach().clone() for p in model.parameters()]
            for optimizer in optimizers.values():
                assert all(not tensor.any() for tensor in optimizer_tensors(optimizer, names).values())
            assert all(torch.equal(a, p) for a, p in zip(before, model.parameters(), strict=True))
            assert all(p.grad is None for p in model.parameters())
        for _ in range(3):
            model(torch.randn(4, toys.WIDTH, generator=torch.Generator().manual_seed(1))).square().sum().backward()
            for optimizer in optimizers.values():
                optimizer.step()
                optimizer.zero_grad()
        results.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_averages() -> None:
    p = nn.Linear(1, 1, bias=False)
    values = [1.0, 2.0, 6.0]
    mean, ema = Average({"m": p}, "mean"), Average({"m": p}, "ema", decay=0.75)
    for value in values:
        with torch.no_grad():
            p.weight.fill_(value)
        mean.update()
        ema.update()
    assert float(mean.tensors()["m.weight"]) == pytest.approx(3.0)
    assert float(ema.tensors()["m.weight"]) == pytest.approx(0.75 * (0.75 * 1 + 0.25 * 2) + 0.25 * 6)
    with mean.swapped():
        assert p.weight.item() == pytest.approx(3.0)
    assert p.weight.item() == 6.0


def test_before_the_first_update_the_average_is_the_weights_themselves() -> None:
    p = nn.Linear(1, 1, bias=False)
    average = Average({"m": p}, "mean")
    with torch.no_grad():
        p.weight.fill_(5.0)
    with average.swapped():
        assert p.weight.item() == 5.0
