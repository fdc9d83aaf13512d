"""Curves over consumed tokens, against the numbers of the papers."""

import math

import pytest

from puna.errors import RecipeError
from puna.train.config import ScheduleConfig, TrainConfig
from puna.train.schedule import Schedule

M = 10**6


def make(tokens: int = 1000, **settings: object) -> Schedule:
    return Schedule(ScheduleConfig(**settings), TrainConfig(tokens=tokens))


def test_llama_3_405b_rate() -> None:
    """Peak 8e-5, linear warm-up of 8,000 steps, cosine to 8e-7 over 1,200,000 steps (Llama 3, section 3.4.1)."""
    step = 16 * M
    schedule = make(1_200_000 * step, warmup_tokens=8_000 * step, decay="cosine", final_ratio=0.01)

    def rate(steps: float) -> float:
        return 8e-5 * schedule.learning_rate(steps * step)

    assert rate(0) == 0
    assert rate(4_000) == pytest.approx(4e-5)
    assert rate(8_000) == pytest.approx(8e-5)
    middle = (8_000 + 1_200_000) / 2
    assert rate(middle) == pytest.approx((8e-5 + 8e-7) / 2)
    quarter = 8_000 + (1_200_000 - 8_000) / 4
    assert rate(quarter) == pytest.approx(8e-7 + 0.5 * (8e-5 - 8e-7) * (1 + math.cos(math.pi / 4)))
    assert rate(1_200_000) == pytest.approx(8e-7)
    assert rate(1_300_000) == pytest.approx(8e-7)


def test_llama_3_405b_batches() -> None:
    """4M tokens at 4,096; after 252M tokens 8M at 8,192; after 2.87T tokens 16M."""
    schedule = Schedule(
        ScheduleConfig(batch_stages=((252 * M, 8 * M), (2_870_000 * M, 16 * M)), seq_stages=((252 * M, 8_192),)),
        TrainConfig(tokens=15_600_000 * M, batch_tokens=4 * M, seq_len=4_096),
    )
    places = (0, 252 * M - 1, 252 * M, 2_870_000 * M - 1, 2_870_000 * M, 15_000_000 * M)
    assert [schedule.batch_tokens(t) for t in places] == [4 * M, 4 * M, 8 * M, 8 * M, 16 * M, 16 * M]
    assert [schedule.seq_len(t) for t in places] == [4_096, 4_096, 8_192, 8_192, 8_192, 8_192]


def test_llama_2_rate() -> None:
    """Cosine, 2,000 warm-up steps, last rate 10 % of the peak (Llama 2, section 2)."""
    step = 4 * M
    schedule = make(500_000 * step, warmup_tokens=2_000 * step, decay="cosine", final_ratio=0.1)
    assert schedule.learning_rate(1_000 * step) == pytest.approx(0.5)
    assert schedule.learning_rate(2_000 * step) == 1
    assert schedule.learning_rate(500_000 * step) == pytest.approx(0.1)


def test_linear_to_zero_after_a_hold() -> None:
    schedule = make(1000, decay="linear", final_ratio=0.0, decay_start=0.6, warmup_tokens=100)
    values = [schedule.learning_rate(t) for t in (50, 100, 600, 700, 900, 1000)]
    assert values == pytest.approx([0.5, 1, 1, 0.75, 0.25, 0])


def test_constant_holds_to_the_end() -> None:
    assert [make(decay="constant").learning_rate(t) for t in (0, 500, 1000)] == [1, 1, 1]


def test_averaging_begins_at_its_share() -> None:
    schedule = make(1000, average="mean", average_from=0.9)
    assert [schedule.averages(t) for t in (0, 899, 900, 1000)] == [False, False, True, True]
    assert not make(1000, average="none", average_from=0.0).averages(1000)


def test_a_warm_up_longer_than_the_run_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"warmup_tokens 1,000 is not below train.tokens 1,000. Lower"):
        make(1000, warmup_tokens=1000)


@pytest.mark.parametrize("stages", [((10, 1), (10, 2)), ((20, 1), (10, 2)), ((10, 0),), ((-1, 4),)])
@pytest.mark.parametrize("key", ["batch_stages", "seq_stages"])
def test_stages_out_of_order_are_refused(key: str, stages: object) -> None:
    with pytest.raises(RecipeError, match=rf"schedule.{key} is \[\[.*Give pairs \(from token, value\) with rising"):
        make(1000, **{key: stages})
