"""The paper's claims on overlap, in its settings."""

import pytest

from puna.lab import overlap

FOUND = {row["setting"]: row for row in overlap.overlap()["settings"]}


def named(words: str) -> dict:
    return next(row for name, row in FOUND.items() if words in name)


@pytest.mark.parametrize("ranks", [128, 192, 256, 384, 512])
def test_prefetch_gains_18_percent_at_gpt_175b(ranks: int) -> None:
    """Section 5.2: about 18 %, at every size of the cluster."""
    assert 0.12 <= overlap.compare(overlap.gpt_175b(ranks, 1))["prefetch_gain"] <= 0.24


def test_the_setting_reproduces_the_rate_it_was_derived_from() -> None:
    """173 TFLOPS a GPU at batch 1: with prefetch and limiter almost nothing but computation is left."""
    setting = overlap.gpt_175b(128, 1)
    busy = sum(unit.forward + unit.backward for unit in setting.units)
    step = overlap.run(setting, overlap.VARIANTS["as recommended"]).seconds
    assert 1 <= step / busy < 1.01


def test_the_limiter_caps_gathers_at_two_everywhere() -> None:
    for row in FOUND.values():
        assert row["variants"]["as recommended"]["gathers_in_flight"] == 2
        assert row["variants"]["no limiter"]["gathers_in_flight"] > 2


def test_the_limiter_does_nothing_where_computation_dominates() -> None:
    """RegNet's sign (section 5.3)."""
    assert abs(named("compute bound")["limiter_gain"]) < 0.01


def test_the_limiter_costs_where_the_wire_dominates() -> None:
    """DeepViT's sign (section 5.3); equal units are not enough for it."""
    assert -0.25 < named("wire bound, units of 1 and 2")["limiter_gain"] < -0.02
    assert abs(named("wire bound, equal units")["limiter_gain"]) < 0.02


@pytest.mark.parametrize("room", ["69 GB free", "8 GB free"])
def test_retries_appear_without_the_limiter_and_vanish_with_it(room: str) -> None:
    """T5's sign (section 5.3)."""
    row = named(room)
    assert row["variants"]["no limiter"]["num_retries"] > 0
    assert row["variants"]["as recommended"]["num_retries"] == 0
    assert row["limiter_gain"] > 0


def test_a_ring_takes_its_bytes_and_its_hops() -> None:
    assert overlap.ring_seconds(16e9, 16) == pytest.approx(8.4e-6 + 14 * 3.4e-6 + 14e-6 + 15e9 / 230e9)
