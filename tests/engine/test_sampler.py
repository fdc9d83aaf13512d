import pytest
import torch

from puna.engine.sampler import logprobs, sample

PROBABILITIES = torch.tensor([0.1, 0.5, 0.15, 0.25])


def draws(temperature: float, top_p: float, count: int = 4000) -> torch.Tensor:
    """Share of each token over evenly spread uniforms."""
    uniforms = [(i + 0.5) / count for i in range(count)]
    logits = PROBABILITIES.log().expand(count, -1)
    return torch.bincount(sample(logits, uniforms, temperature, top_p), minlength=4) / count


def test_temperature_zero_is_greedy():
    assert sample(torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]]), [0.99, 0.99], 0, 1).tolist() == [1, 0]


def test_the_whole_distribution():
    assert torch.allclose(draws(1.0, 1.0), PROBABILITIES, atol=1e-3)


def test_temperature_divides_the_logits():
    expected = torch.softmax(PROBABILITIES.log() / 0.5, -1)
    assert torch.allclose(draws(0.5, 1.0), expected, atol=1e-3)


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (0.0, [0, 1, 0, 0]),
        (0.49, [0, 1, 0, 0]),
        (0.5, [0, 2 / 3, 0, 1 / 3]),  # the mass before the second token is 0.5, which does not exceed 0.5
        (0.6, [0, 2 / 3, 0, 1 / 3]),
        (0.8, [0, 5 / 9, 1.5 / 9, 2.5 / 9]),
        (0.95, [0.1, 0.5, 0.15, 0.25]),
    ],
)
def test_top_p_drops_what_comes_after_the_mass(top_p, expected):
    assert torch.allclose(draws(1.0, top_p), torch.tensor(expected, dtype=torch.float32), atol=1e-3)


def test_a_token_without_probability_is_never_drawn():
    logits = torch.tensor([[0.0, float("-inf"), float("-inf")]])
    assert sample(logits, [1 - 2**-53], 1.0, 1.0).tolist() == [0]


def test_rows_do_not_touch_each_other():
    logits, uniforms = torch.randn(16, 50, generator=torch.Generator().manual_seed(0)), [i / 16 for i in range(16)]
    alone = [sample(logits[i : i + 1], uniforms[i : i + 1], 0.7, 0.9).item() for i in range(16)]
    assert sample(logits, uniforms, 0.7, 0.9).tolist() == alone


def test_logprobs_of_the_drawn_and_the_best():
    chosen, top = logprobs(PROBABILITIES.log()[None], torch.tensor([2]), 2, 4)
    assert chosen == pytest.approx([torch.tensor(0.15).log().item()])
    assert [i for i, _ in top[0]] == [1, 3]
    assert logprobs(PROBABILITIES.log()[None], torch.tensor([2]), 1, 3)[1][0][0][0] == 1
    assert [p for _, p in top[0]] == pytest.approx(torch.tensor([0.5, 0.25]).log().tolist())
