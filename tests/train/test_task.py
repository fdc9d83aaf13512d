"""One optimiser step is the same step however it is cut: over ranks, over micro-batches, sharded or not."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import toys
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from puna.errors import DataError, NonFinite, ShardingError
from puna.train import mesh
from puna.train.optim import LossScale
from puna.train.task import Cursor, GradientTask, seed_step

STEPS = 20


class Task(toys.Regression):
    """Batches whose micro-batches have unequal weights, so that averaging means is not averaging tokens."""

    def __init__(self, how: str = "plain", num_micro: int = 1, **settings: object) -> None:
        self.num_micro = num_micro
        model = toys.network(3, dropout=0.0)
        shard(model, how)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        GradientTask.__init__(self, {"model": model}, {"adamw": optimizer}, **{"clip": 0.5} | settings)

    def unit(self, step: int) -> toys.Unit:
        ids = (np.arange(16) * 7 + step) % toys.SAMPLES
        inputs, targets = toys.samples(ids)
        weights = torch.arange(16) % 3 + (torch.arange(16) == 1)
        mine = torch.arange(16).reshape(self.num_micro, mesh.world_size(), -1)[:, mesh.rank()]
        batches = [toys.Batch(inputs[i], targets[i] * 1.0, int(weights[i].sum()), ids[i].tolist()) for i in mine]
        for batch, i in zip(batches, mine, strict=True):
            batch.phase = weights[i].float()[:, None]
        return toys.Unit(Cursor(step, step * 16), 16, batches)

    def loss_sum(self, batch: toys.Batch) -> torch.Tensor:
        return ((self.modules["model"](batch.inputs) - batch.targets).square() * batch.phase).sum()


def shard(model: nn.Module, how: str) -> None:
    if how == "plain":
        return
    devices = init_device_mesh("cpu", (2, 2), mesh_dim_names=("r", "s")) if how == "hybrid" else None
    for part in (model[0], model):
        fully_shard(part, mesh=devices, reshard_after_forward=how != "grad-op")


def trajectory(how: str, num_micro: int) -> tuple[list[float], list[float], list[np.ndarray]]:
    """Losses, gradient norms and final parameters of every step."""
    task = Task(how, num_micro)
    reports = [task.step(task.unit(step)) for step in range(STEPS)]
    parameters = [p.full_tensor() if isinstance(p, DTensor) else p for p in task.modules["model"].parameters()]
    figures = [report.loss for report in reports], [report.metrics["grad_norm"] for report in reports]
    return *figures, [p.detach().numpy() for p in parameters]


@pytest.fixture(scope="module")
def reference() -> tuple[list[float], list[float], list[np.ndarray]]:
    """The textbook: one process, one batch, mean over the weight, torch's own clipping."""
    task = Task()
    model, optimizer = task.modules["model"], task.optimizers["adamw"]
    losses, norms = [], []
    for step in range(STEPS):
        (batch,) = task.unit(step).batches
        loss = task.loss_sum(batch) / batch.weight
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms, [p.detach().numpy() for p in model.parameters()]


def assert_equal(one: object, other: object) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_micro", [1, 4])
def test_one_process_equals_the_textbook(num_micro: int, reference: object) -> None:
    assert_equal(trajectory("plain", num_micro), reference)


@pytest.mark.parametrize(
    ("how", "num_micro"), [("full", 1), ("full", 4), ("grad-op", 1), ("hybrid", 1), ("hybrid", 2), ("plain", 2)]
)
def test_four_processes_equal_the_textbook(how: str, num_micro: int, reference: object, ranks: object) -> None:
    for result in ranks(trajectory, how, num_micro):
        assert_equal(result, reference)


class Counting(TorchDispatchMode):
    """How often each collective is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, op: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        if op.namespace == "c10d":
            self.calls[op._opname] = self.calls.get(op._opname, 0) + 1
        return op(*args, **(kwargs or {}))


def count_collectives(how: str, num_micro: int) -> dict[str, int]:
    task = Task(how, num_micro)
    task.step(task.unit(0))
    with Counting() as counted:
        task.step(task.unit(1))
    return counted.calls


def test_only_the_last_micro_batch_reduces_gradients(ranks: object) -> None:
    once, thrice = ranks(count_collectives, "full", 1)[0], ranks(count_collectives, "full", 4)[0]
    assert once["_reduce_scatter_base_"] == thrice["_reduce_scatter_base_"] == 2, "one a unit"
    assert once["allreduce_"] == thrice["allreduce_"] == 2, "the weight before, the vote after"


def bad_step(where: int, how: str) -> tuple[str, bool]:
    """One rank's data is not finite; what every rank says, and whether its weights stayed."""
    task = Task(how, 2)
    before = [p.detach().clone() for p in task.modules["model"].parameters()]
    unit = task.unit(0)
    if mesh.rank() == where:
        unit.batches[1].targets[0] = math.nan
    try:
        task.step(unit)
    except NonFinite as error:
        same = all(torch.equal(a, b) for a, b in zip(before, task.modules["model"].parameters(), strict=True))
        return str(error), same
    return "", False


@pytest.mark.parametrize("how", ["full", "plain"])
def test_a_bad_loss_stops_all_ranks_before_a_weight_changes(how: str, ranks: object) -> None:
    said = ranks(bad_step, 2, how)
    ids = ", ".join(str(i) for i in (np.arange(16) * 7 % 64)[12:14])
    for text, same in said:
        assert text == (f"step 1 is not finite and was not taken; no weight changed. rank 2: the loss, samples {ids}")
        assert same


def test_a_bad_gradient_is_named() -> None:
    task = Task()
    weight = task.modules["model"][3].weight
    weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(NonFinite, match=r"step 1 .* rank 0: the gradient of model\.3\.weight, samples 0, 7, .* 8 more"):
        task.step(task.unit(0))


def empty_step() -> str:
    task = Task("full")
    unit = task.unit(0)
    unit.batches = [replace(batch, weight=0) for batch in unit.batches]
    try:
        task.step(unit)
    except DataError as error:
        return str(error)
    return ""


def test_a_step_without_targets_names_its_samples(ranks: object) -> None:
    for text in ranks(empty_step):
        assert text.startswith(
            "step 1 has no target token: samples 0, 7, 14, 21, 28, 35, 42, 49 and 8 more. Every token"
        )


def test_the_learning_rate_follows_tokens_at_the_middle_of_the_step() -> None:
    task = Task(learning_rate=lambda tokens: tokens / 1000)
    assert task.step(task.unit(0)).metrics["lr"] == pytest.approx(1e-2 * 8 / 1000)
    assert task.step(task.unit(5)).metrics["lr"] == pytest.approx(1e-2 * 88 / 1000)


def test_half_precision_parameters_are_refused() -> None:
    model = toys.network(1).bfloat16()
    optimizers = {"sgd": torch.optim.SGD(model.parameters(), lr=1)}
    with pytest.raises(TypeError, match=r"model\.0\.weight is torch\.bfloat16"):
        Half({"model": model}, optimizers)


class Half(toys.Regression):
    __init__ = GradientTask.__init__


def test_the_loss_scale_falls_at_an_overflow_and_grows_again() -> None:
    scale = LossScale(2.0**16, interval=3)
    task, plain = Task(loss_scale=scale), Task()
    overflows = task.modules["model"][3].weight.register_hook(lambda g: g * (math.inf if scale.scale > 2**14 else 1))
    before = [p.detach().clone() for p in task.modules["model"].parameters()]
    metrics = [task.step(task.unit(step)).metrics for step in (0, 1)]
    assert [m["loss_scale"] for m in metrics] == [2**16, 2**15]
    assert all(m["skipped"] == 1 and "grad_norm" not in m for m in metrics)
    assert all(torch.equal(a, b) for a, b in zip(before, task.modules["model"].parameters(), strict=True))
    overflows.remove()
    taken = [task.step(task.unit(step)) for step in (2, 3, 4, 5)]
    assert [r.metrics["loss_scale"] for r in taken] == [2**14, 2**14, 2**14, 2**15]
    wanted = [plain.step(plain.unit(step)) for step in (2, 3, 4, 5)]
    assert [r.loss for r in taken] == [r.loss for r in wanted], "a power of two leaves no trace"
    assert [r.metrics["grad_norm"] for r in taken] == [r.metrics["grad_norm"] for r in wanted]


class Overflowing(Task):
    """Rank 2's gradients are infinite, its loss is not."""

    def loss_sum(self, batch: toys.Batch) -> torch.Tensor:
        outputs = self.modules["model"](batch.inputs)
        if mesh.rank() == 2:
            outputs.register_hook(lambda grad: grad * math.inf)
        return (outputs - batch.targets).square().sum()


def overflow_on_one_rank() -> tuple[dict[str, float], bool]:
    task = Overflowing("full", loss_scale=LossScale())
    before = [p.to_local().clone() for p in task.modules["model"].parameters()]
    metrics = task.step(task.unit(0)).metrics
    same = all(torch.equal(a, p.to_local()) for a, p in zip(before, task.modules["model"].parameters(), strict=True))
    return metrics, same


def test_an_overflow_on_one_rank_skips_the_step_on_all(ranks: object) -> None:
    for metrics, same in ranks(overflow_on_one_rank):
        assert metrics["skipped"] == 1
        assert same


def test_at_scale_one_an_infinite_gradient_is_an_error() -> None:
    task = Task(loss_scale=LossScale(1.0))
    task.modules["model"][0].bias.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(NonFinite, match=r"gradient of model\.0\.bias"):
        task.step(task.unit(0))


def test_the_random_numbers_of_a_step_are_a_function_of_seed_unit_and_rank() -> None:
    def draw(*key: int) -> tuple[float, float]:
        seed_step(*key)
        return float(torch.rand(())), float(np.random.rand())

    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert len({draw(*key) for key in [(1, 2, 3), (0, 2, 3), (1, 1, 3), (1, 2, 0), (12, 3, 0)]}) == 5


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    early = torch.optim.SGD(toys.network(1).parameters(), lr=0.1)
    with pytest.raises(ShardingError, match="optimiser sgd holds 4 of 4 parameters that no module has"):
        GradientTask.__init__(Task.__new__(Task), {"model": toys.network(2)}, {"sgd": early})
