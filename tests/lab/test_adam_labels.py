"""Labels of divergence: the rule, held against curves whose label is plain."""

import numpy as np
import pytest

from puna.lab.adam_labels import auc, loss_z, norm_z, onsets

NOISE = np.random.default_rng(0).normal(0, 0.1, 400)


def curve(**changes: float) -> np.ndarray:
    """Three nats and noise, with `s120=5.0` for a loss of 5 at step 120."""
    losses = 3 + NOISE
    for key, value in changes.items():
        losses[int(key[1:])] = value
    return losses


def test_noise_does_not_diverge() -> None:
    assert onsets(curve()) == []


def test_three_high_losses_in_a_row_are_an_onset_at_the_first() -> None:
    assert onsets(curve(s150=5.0, s151=5.0, s152=5.0)) == [150]


def test_two_in_a_row_are_none() -> None:
    assert onsets(curve(s150=5.0, s151=5.0, s153=5.0)) == []


def test_high_losses_do_not_raise_what_they_are_measured_by() -> None:
    """Where the losses of the run itself were among the hundred before, the third would be judged by the first two."""
    losses = np.r_[np.full(100, 3.0), 3.1, 3.2, 3.3]
    losses[:100:2] += 0.01
    assert onsets(losses) == [100]


def test_six_deviations_are_the_border() -> None:
    before = np.r_[np.full(50, 2.0), np.full(50, 4.0)]  # median 3, median absolute deviation 1
    above, below = (np.r_[before, np.full(3, 3 + k * 1.4826)] for k in (6.01, 5.99))
    assert (onsets(above), onsets(below)) == ([100], [])


def test_a_loss_that_is_not_finite_is_an_onset_at_once() -> None:
    assert onsets(curve(s30=float("nan"))) == [30]
    assert onsets(curve(s150=float("inf"))) == [150]


def test_before_a_hundred_losses_there_is_no_label() -> None:
    assert onsets(curve(s90=9.0, s91=9.0, s92=9.0)) == []


def test_onsets_of_one_time_are_one_event() -> None:
    twice = {f"s{step}": 6.0 for step in (150, 151, 152, 300, 301, 302)}
    assert onsets(curve(**twice)) == [150]


def test_z_of_losses_and_norms_rise_with_a_spike_alone() -> None:
    losses = loss_z(curve(s200=5.0))
    assert int(np.argmax(losses)) == 200
    assert losses[200] > 15
    norms = norm_z(1 + np.abs(NOISE) + 20 * (np.arange(400) == 250))
    assert int(np.argmax(norms)) == 250
    assert norms[:25].max() == 0


@pytest.mark.parametrize(
    ("high", "low", "area"),
    [([2, 3], [0, 1], 1.0), ([0, 1], [2, 3], 0.0), ([1, 1], [1, 1], 0.5), ([1, 3], [0, 2], 0.75), ([], [1], None)],
)
def test_area_is_how_often_a_diverging_score_is_the_higher(high: list[int], low: list[int], area: float | None) -> None:
    assert auc(high, low) == area


def test_an_infinite_score_is_the_highest() -> None:
    assert auc([np.inf], [5.0]) == 1.0
