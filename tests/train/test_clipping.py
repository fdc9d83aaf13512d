"""ZClip and SPAM's clipping: where they act, where they must not, and alone in a plain loop."""

import json
import math
import random

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from puna.train.clipping import SpamClip, ZClip
from puna.train.trend import Trend


def warmed(zclip: ZClip, steps: int = 200) -> ZClip:
    draw = random.Random(1)
    for _ in range(steps):
        zclip.limit(1 + draw.gauss(0, 0.05))
    return zclip


def test_the_average_begins_with_the_plain_one_of_the_first_norms() -> None:
    trend = Trend(warmup=4)
    for value in (1.0, 2.0, 3.0):
        trend.add(value)
    assert (trend.ready, trend.z(100.0)) == (False, 0.0)
    trend.add(6.0)
    assert (trend.mean, trend.variance) == (3.0, 3.5)
    trend.add(5.0)
    mean = 0.97 * 3 + 0.03 * 5
    assert trend.mean == pytest.approx(mean)
    assert trend.variance == pytest.approx(0.97 * 3.5 + 0.03 * (5 - mean) ** 2)


def test_zclip_brings_an_unusual_norm_down() -> None:
    zclip = warmed(ZClip())
    mean, deviation = zclip.trend.mean, zclip.trend.deviation
    z = (3.0 - mean) / (deviation + 1e-6)
    assert z > 20
    limit = zclip.limit(3.0)
    assert limit == pytest.approx(mean + 2.5 * deviation * (2.5 / z))
    assert zclip.trend.mean == pytest.approx(0.97 * mean + 0.03 * limit), (
        "the average saw the norm that was let through"
    )


def test_zclip_leaves_usual_norms_and_slow_drifts_alone() -> None:
    zclip = warmed(ZClip())
    assert zclip.limit(zclip.trend.mean + 2.4 * zclip.trend.deviation) == math.inf
    assert zclip.limit(0.2) == math.inf, "a small norm is never clipped"
    drifting = ZClip()
    draw = random.Random(1)
    limits = [drifting.limit((1 + 0.002 * step) * (1 + draw.gauss(0, 0.1))) for step in range(400)]
    assert sum(limit < math.inf for limit in limits) < 400 * 0.05


def test_zclip_knows_nothing_in_its_warmup_and_from_norms_that_are_not_finite() -> None:
    zclip = ZClip()
    assert [zclip.limit(norm) for norm in [1.0] * 24 + [1e6]] == [math.inf] * 25
    known = warmed(ZClip())
    before = known.state()
    assert [known.limit(math.nan), known.limit(math.inf)] == [math.inf] * 2
    assert known.state() == before


def test_zclip_scales_gradients_in_a_plain_loop() -> None:
    p = nn.Parameter(torch.zeros(4))
    zclip = warmed(ZClip())
    p.grad = torch.full((4,), 3.0)
    allowed = warmed(ZClip()).limit(6.0)
    assert zclip([p]) == 6.0
    assert float(p.grad.norm()) == pytest.approx(allowed, rel=1e-4)
    p.grad = torch.full((4,), 0.5)
    assert zclip([p]) == 1.0
    assert torch.equal(p.grad, torch.full((4,), 0.5)), "a usual norm is left to the bit"
    assert zclip([p], max_norm=0.1) == 1.0
    assert float(p.grad.norm()) == pytest.approx(0.1, rel=1e-4)


def test_zclip_goes_on_from_its_state() -> None:
    zclip, other = warmed(ZClip()), ZClip()
    other.restore(json.loads(json.dumps(zclip.state())))
    assert [zclip.limit(norm) for norm in (3.0, 1.0, 1.3)] == [other.limit(norm) for norm in (3.0, 1.0, 1.3)]


def sharded_zclip() -> tuple[float, list[float]]:
    torch.manual_seed(0)
    model = nn.Linear(4, 6)
    fully_shard(model)
    zclip = warmed(ZClip())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    norm = zclip(model.parameters())
    return norm, [float(p.grad.full_tensor().norm()) for p in model.parameters()]


def test_zclip_sees_the_whole_norm_of_sharded_gradients(ranks: object) -> None:
    allowed = warmed(ZClip()).limit(math.sqrt(30))
    for norm, (weight, bias) in ranks(sharded_zclip):
        assert norm == pytest.approx(math.sqrt(30))
        assert math.hypot(weight, bias) == pytest.approx(allowed, rel=1e-4)


# --- SPAM -------------------------------------------------------------------------------------------------------------


def spam_run(
    steps: int, *, grad: float = 1.0, lr: float = 1e-3, **settings: int
) -> tuple[nn.Parameter, object, SpamClip]:
    p = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([p], lr=lr, betas=(0.9, 0.999), weight_decay=0.0)
    spam = SpamClip(optimizer, **settings)
    for _ in range(steps):
        p.grad = torch.tensor([grad, -grad, 0.0])
        optimizer.step()
    return p, optimizer, spam


def test_spam_clips_a_coordinate_far_beyond_its_second_moment() -> None:
    p, optimizer, _ = spam_run(100)
    v = optimizer.state[p]["exp_avg_sq"].clone()
    p.grad = torch.tensor([500.0, 1.0, 0.0])
    optimizer.step()
    most = math.sqrt(5000 * float(v[0]))
    assert most < 30
    assert torch.allclose(p.grad, torch.tensor([most, 1.0, 0.0])), "one coordinate is clipped, its neighbour is not"


def test_spam_leaves_usual_gradients_alone_to_the_bit() -> None:
    torch.manual_seed(3)
    plain, clipped = (nn.Parameter(torch.zeros(64)) for _ in range(2))
    optimizers = [torch.optim.AdamW([p], lr=1e-2) for p in (plain, clipped)]
    spam = SpamClip(optimizers[1])
    for _ in range(300):
        plain.grad = torch.randn(64)
        clipped.grad = plain.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(plain, clipped)
    assert spam.steps == 300


def test_spam_does_not_clip_while_the_second_moment_is_young_or_unknown() -> None:
    p, optimizer, _ = spam_run(10)
    p.grad = torch.tensor([500.0, 1.0, 0.0])
    optimizer.step()
    assert float(p.grad[0]) == 500.0, "in the first steps"
    p, optimizer, _ = spam_run(100)
    p.grad = torch.tensor([1.0, 1.0, 7.0])
    optimizer.step()
    assert float(p.grad[2]) == 7.0, "it never saw a gradient"


def test_spam_begins_the_moments_anew_by_the_clock_and_warms_up_again() -> None:
    p, optimizer, spam = spam_run(50, interval=50, rewarm=10)
    assert spam.rate == pytest.approx(0.01)
    before = p.detach().clone()
    p.grad = torch.tensor([1.0, -1.0, 0.0])
    optimizer.step()
    assert int(optimizer.state[p]["step"]) == 1
    moved = (p.detach() - before)[0]
    assert float(moved) == pytest.approx(-1e-3 * 0.01, rel=1e-2), "Adam's first step again, at 1 % of the rate"
    assert optimizer.param_groups[0]["lr"] == 1e-3, "between steps the rate is the user's"
    rates = []
    for _ in range(12):
        rates.append(spam.rate)
        optimizer.step()
    expected = [1 - 0.99 * 0.5 * (1 + math.cos(math.pi * since / 10)) for since in range(1, 10)]
    assert rates == pytest.approx([*expected, 1.0, 1.0, 1.0])


def test_spam_goes_on_from_its_state_and_can_be_taken_out() -> None:
    _, _, spam = spam_run(60, interval=50)
    p, optimizer, other = spam_run(0, interval=50)
    other.restore(json.loads(json.dumps(spam.state())))
    assert other.rate == spam.rate < 1
    other.close()
    p.grad = torch.ones(3)
    optimizer.step()
    assert other.steps == 60
