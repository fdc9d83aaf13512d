import math

import pytest
import torch

from puna.llama.config import LlamaConfig, RopeScaling
from puna.llama.rope import Rotary, inverse_frequencies

CPU = torch.device("cpu")


@pytest.mark.parametrize(("head_dim", "bands"), [(128, (29, 6, 29)), (64, (15, 3, 14))])
def test_scaling_of_llama_3_1_keeps_blends_and_divides_the_published_numbers_of_pairs(head_dim, bands):
    plain = LlamaConfig(head_dim=head_dim)
    longer = plain.model_copy(update={"rope_scaling": RopeScaling()})
    ratio = inverse_frequencies(plain, torch.float64, CPU) / inverse_frequencies(longer, torch.float64, CPU)
    kept, divided = (ratio - 1).abs() < 1e-12, (ratio - 8).abs() < 1e-12
    assert (int(kept.sum()), int((~kept & ~divided).sum()), int(divided.sum())) == bands
    assert ((ratio >= 1 - 1e-12) & (ratio <= 8 + 1e-12)).all()
    assert (ratio.diff() >= -1e-12).all()


def test_blended_frequency_is_the_formula_s():
    config = LlamaConfig(head_dim=128, rope_scaling=RopeScaling())
    frequency = 500_000.0 ** (-2 * 31 / 128)
    wave = 2 * math.pi / frequency
    assert 8192 / 4 < wave < 8192
    share = (8192 / wave - 1) / 3
    wanted = (1 - share) * frequency / 8 + share * frequency
    assert inverse_frequencies(config, torch.float64, CPU)[31].item() == pytest.approx(wanted, rel=1e-13)


def test_channel_i_turns_with_channel_i_plus_half():
    config = LlamaConfig(head_dim=4, rope_theta=100.0)
    heads = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    turned = Rotary.at(torch.tensor([5]), config, torch.float32).turn(heads).flatten()
    angles = torch.tensor([5.0, 0.5])
    pairs = torch.complex(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])) * torch.polar(torch.ones(2), angles)
    torch.testing.assert_close(turned, torch.cat((pairs.real, pairs.imag)))


def test_scores_depend_on_the_distance_only():
    config = LlamaConfig(head_dim=16)
    query, key = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64).unbind()

    def score(at_query, at_key):
        turned = (
            Rotary.at(torch.tensor([position]), config, torch.float64).turn(heads)
            for position, heads in ((at_query, query), (at_key, key))
        )
        return torch.mul(*turned).sum()

    torch.testing.assert_close(score(7, 3), score(107, 103))
    assert (score(7, 3) - score(8, 3)).abs() > 1e-6


def test_gradient_of_a_turn():
    config = LlamaConfig(head_dim=6)
    heads = torch.randn(2, 3, 2, 6, dtype=torch.float64, requires_grad=True)
    positions = torch.tensor([[0, 1, 2], [5, 6, 9]])
    assert torch.autograd.gradcheck(Rotary.at(positions, config, torch.float64).turn, heads)


def test_tables_are_float32_for_bfloat16_models():
    rotary = Rotary.at(torch.arange(3), LlamaConfig(), torch.bfloat16)
    assert rotary.cos.dtype == rotary.sin.dtype == torch.float32
    assert rotary.turn(torch.ones(1, 3, 2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
