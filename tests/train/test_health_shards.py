"""The monitor on sharded models: what it sees and does is what one process sees and does."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from puna.train import mesh
from puna.train.adam_stats import held_here
from puna.train.config import HealthConfig
from puna.train.health import HealthMonitor

VOCABULARY, BATCH = 42, 16
STALLED = range(45)  # steps in which the gradients of the blocks are as good as nothing
NUM_STEPS = 60
SLOW = pytest.mark.slow


class Model(nn.Module):
    """Rows that do not divide by 4, more coordinates than a sample of 64, a weight and a gain of few."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(VOCABULARY, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.norm = nn.RMSNorm(8)
        self.lm_head = nn.Linear(8, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed_tokens(tokens)
        for layer in self.layers:
            hidden = hidden + layer(hidden).tanh()
        return self.lm_head(self.norm(hidden))


def sharded(how: str) -> Model:
    """fully: over all ranks; hybrid: 2 copies over 2 ranks each; columns: matrices cut on their second dim."""
    model = Model().double()
    if how == "plain":
        return model
    devices = init_device_mesh("cpu", (2, 2), mesh_dim_names=("r", "s")) if how == "hybrid" else None
    placed = (lambda p: Shard(0 if p.shape == (VOCABULARY, 8) else p.ndim - 1)) if how == "columns" else None
    for layer in model.layers:
        fully_shard(layer, mesh=devices, shard_placement_fn=placed)
    fully_shard(model, mesh=devices, shard_placement_fn=placed)
    return model


def course(how: str, act: bool, fail: int = -1, what: str = "") -> dict[str, Any]:
    """What a run with a stall and its release leaves behind. fail: rank whose monitor breaks, in its first record or
    in step 31."""
    model = sharded(how)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.95), eps=1e-8)
    config = HealthConfig(act=act, sample=64, record_every=7, surprise=10.0)

    def emit(record: dict[str, Any]) -> None:
        if fail == mesh.rank() and what == "record":
            raise OSError(28, "No space left on device")

    monitor = HealthMonitor(optimizer, model, config, emit=emit)
    statistics, parts = [], mesh.world_size() if how != "plain" else 1
    for step in range(NUM_STEPS):
        tokens = torch.randint(VOCABULARY // 2, (BATCH,), generator=torch.Generator().manual_seed(step))
        mine = tokens.chunk(parts)[mesh.rank()] if parts > 1 else tokens
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(mine), (mine + 1) % VOCABULARY).backward()
        if step in STALLED:
            for p in model.layers.parameters():
                p.grad.mul_(1e-9)
        if fail == mesh.rank() and what == "look" and step == 30:
            monitor._tracks[optimizer]._samplers[0].rule = None  # type: ignore[assignment]
        optimizer.step()
        if reading := monitor.reading:
            statistics.append({key: values.copy() for key, values in reading.statistics.items()})
    weights = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    monitor.close()
    return {
        "statistics": statistics,
        "records": list(monitor.records),
        "weights": [weight.detach().numpy() for weight in weights],
        "state": {name: tensor.numpy() for name, tensor in monitor.state_tensors().items()},
        "off": monitor.off_reason,
        "step": monitor.step,
    }


def of_kind(result: dict[str, Any], *kinds: str) -> list[dict[str, Any]]:
    return [record for record in result["records"] if record["event"] in kinds]


@pytest.mark.parametrize(
    ("group", "how"),
    [
        ("pair", "fully"),
        ("pair", "columns"),
        pytest.param("ranks", "fully", marks=SLOW),
        pytest.param("ranks", "hybrid", marks=SLOW),
        pytest.param("ranks", "columns", marks=SLOW),
    ],
)
def test_sharded_statistics_and_verdicts_are_those_of_one_process(
    group: str, how: str, request: pytest.FixtureRequest
) -> None:
    ranks = request.getfixturevalue(group)
    wanted = course("plain", act=False)
    assert [record["state"] for record in of_kind(wanted, "health_change")][-1] == "alarm"
    for result in ranks(course, how, False):
        for step, (one, other) in enumerate(zip(result["statistics"], wanted["statistics"], strict=True)):
            for key, values in other.items():
                np.testing.assert_allclose(one[key], values, rtol=1e-6, atol=1e-9, err_msg=f"{key} at step {step}")
        for one, other in zip(of_kind(result, "health_histogram"), of_kind(wanted, "health_histogram"), strict=True):
            assert one == other
        changes = [
            (r["step"], r["state"], [(e["rule"], e["tensor"]) for e in r["evidence"]])
            for r in of_kind(result, "health_change")
        ]
        assert changes == [
            (r["step"], r["state"], [(e["rule"], e["tensor"]) for e in r["evidence"]])
            for r in of_kind(wanted, "health_change")
        ]
        for name, values in wanted["state"].items():
            np.testing.assert_allclose(result["state"][name], values, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("group", "how"), [("pair", "fully"), *(pytest.param("ranks", how, marks=SLOW) for how in ("fully", "hybrid"))]
)
def test_sharded_actions_are_those_of_one_process(group: str, how: str, request: pytest.FixtureRequest) -> None:
    ranks = request.getfixturevalue(group)
    wanted = course("plain", act=True)
    actions = of_kind(wanted, "health_action")
    assert actions, "the controller acts on this course"
    for result in ranks(course, how, True):
        found = of_kind(result, "health_action")
        assert [(r["step"], r["level"], r["action"], r["tensor"]) for r in found] == [
            (r["step"], r["level"], r["action"], r["tensor"]) for r in actions
        ]
        for one, other in zip(found, actions, strict=True):
            for key in ("value", "threshold", "before", "after"):
                assert one[key] == (pytest.approx(other[key], rel=1e-6) if other[key] else other[key])
        for one, other in zip(result["weights"], wanted["weights"], strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("what", "step", "reason"), [("look", 31, "TypeError"), ("record", 1, "No space left")])
def test_one_rank_that_fails_switches_all_off_and_nobody_waits(what: str, step: int, reason: str, ranks: Any) -> None:
    wanted = course("plain", act=False)
    results = ranks(course, "fully", False, 2, what)
    assert [result["step"] for result in results] == [step] * 4
    assert reason in results[2]["off"]
    assert {results[rank]["off"] for rank in (0, 1, 3)} == {
        "the monitor of another rank has failed; that rank says why"
    }
    for result in results:
        for one, other in zip(result["weights"], wanted["weights"], strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)


def coordinates_of(
    shape: tuple[int, ...], axes: tuple[int, ...], placements: tuple[int, ...]
) -> tuple[list[int], list[float]]:
    """Places of the sample that this rank holds, and the values it finds there in a tensor of its own indices."""
    devices = init_device_mesh("cpu", axes)
    whole = torch.arange(float(np.prod(shape))).view(shape)
    tensor = distribute_tensor(whole, devices, [Shard(dim) for dim in placements])
    chosen = np.arange(0, whole.numel(), 3)
    places, index = held_here(tensor, chosen)
    return places.tolist(), tensor.to_local().reshape(-1)[torch.from_numpy(index)].tolist()


@pytest.mark.parametrize(
    ("shape", "axes", "placements"),
    [
        ((7, 5), (4,), (0,)),
        ((7, 5), (4,), (1,)),
        ((10, 6), (2, 2), (0, 1)),
        ((9,), (2, 2), (0, 0)),
        ((3, 4, 5), (4,), (2,)),
    ],
)
def test_every_coordinate_is_held_by_one_rank_and_found_there(
    shape: tuple[int, ...], axes: tuple[int, ...], placements: tuple[int, ...], ranks: Any
) -> None:
    results = ranks(coordinates_of, shape, axes, placements)
    chosen = np.arange(0, np.prod(shape), 3)
    places = [place for places, _ in results for place in places]
    assert sorted(places) == list(range(len(chosen)))
    for places, values in results:
        assert chosen[places].tolist() == values
