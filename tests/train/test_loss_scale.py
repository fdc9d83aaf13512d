"""fp16's loss scale over shards: the ranks agree on an overflow that one of them has in its shard alone."""

import math

import numpy as np
import torch
import toys
from torch.distributed.fsdp import fully_shard

from puna.train import mesh
from puna.train.optim import LossScale, local
from puna.train.task import Cursor, GradientTask

STEPS, BAD_STEP, BAD_RANK = 4, 1, 2


class Agreed(toys.Regression):
    """Full shard over four ranks; in one step one rank's shard of a gradient holds an infinity."""

    def __init__(self) -> None:
        self.num_units, self.num_micro, self.seed = STEPS, 1, 3
        model = toys.network(3, dropout=0.0)
        fully_shard(model[0])
        fully_shard(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        GradientTask.__init__(self, {"model": model}, {"sgd": optimizer}, loss_scale=LossScale())

    def accumulate(self, unit: toys.Unit, factor: float) -> list[torch.Tensor]:
        losses = super().accumulate(unit, factor)
        if (unit.cursor.units, mesh.rank()) == (BAD_STEP, BAD_RANK):
            local(self.modules["model"][0].weight.grad)[0, 0] = math.inf
        return losses


class Naive(Agreed):
    """Each rank looks at its own shards alone."""

    def _vote(self, losses: list[torch.Tensor], scale: float) -> tuple[float, float]:
        loss_sum, _ = super()._vote(losses, scale)
        grads = [local(p.grad) for p in self.modules["model"].parameters()]
        return loss_sum, math.sqrt(sum(float(grad.square().sum()) for grad in grads)) / scale


def trajectory(kind: str) -> tuple[list[float], list[bool], list[list[np.ndarray]]]:
    """Scale after each step, whether it was skipped, and all the weights before the first and after each step."""
    task = {"agreed": Agreed, "naive": Naive}[kind]()
    scales, skipped, weights = [], [], [whole(task)]
    for unit in task.units(Cursor()):
        skipped.append("skipped" in task.step(unit).metrics)
        scales.append(task.loss_scale.scale)
        weights.append(whole(task))
    return scales, skipped, weights


def whole(task: GradientTask) -> list[np.ndarray]:
    return [p.full_tensor().detach().numpy().copy() for p in task.modules["model"].parameters()]


def equal(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_an_overflow_in_one_ranks_shard_skips_the_step_on_all(ranks: object) -> None:
    for scales, skipped, weights in ranks(trajectory, "agreed"):
        assert scales == [2.0**16, 2.0**15, 2.0**15, 2.0**15]
        assert skipped == [False, True, False, False]
        assert equal(weights[BAD_STEP], weights[BAD_STEP + 1])
        assert not equal(weights[0], weights[1])


def test_scales_of_their_own_drive_the_ranks_apart(ranks: object) -> None:
    agreed, naive = ranks(trajectory, "agreed"), ranks(trajectory, "naive")
    assert [skipped[BAD_STEP] for _, skipped, _ in naive] == [rank == BAD_RANK for rank in range(4)]
    assert len({scales[-1] for scales, _, _ in naive}) == 2
    before, after = naive[0][2][BAD_STEP], naive[0][2][BAD_STEP + 1]
    rows = before[0].shape[0] // 4
    kept = slice(BAD_RANK * rows, (BAD_RANK + 1) * rows)
    assert np.array_equal(before[0][kept], after[0][kept]), "this rank skipped"
    assert not np.array_equal(before[0][:rows], after[0][:rows]), "the others did not: a model of two halves"
    last, wanted = naive[0][2][-1], agreed[0][2][-1]
    assert max(np.abs(a - b).max() for a, b in zip(last, wanted, strict=True)) > 1e-3
