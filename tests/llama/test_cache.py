import pytest
import torch

from puna.llama.attention import Mask
from puna.llama.cache import DenseCache
from puna.llama.config import LlamaConfig
from puna.llama.model import Llama

CONFIG = LlamaConfig(num_layers=3, dim=32, ffn_dim=48, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=61)


@pytest.fixture(scope="module")
def model():
    model = Llama(CONFIG).double()
    model.init_weights(1)
    for parameter in model.parameters():
        parameter.data.mul_(10 if parameter.dim() > 1 else 1)
    return model.requires_grad_(False)


def cache(rows, max_len=32):
    return DenseCache(rows, max_len, CONFIG, torch.float64, "cpu")


def test_prefill_and_single_steps_equal_the_whole_forward(model):
    tokens = torch.randint(0, 61, (2, 20))
    held = cache(2)
    steps = [model(tokens[:, :9], cache=held, positions=torch.arange(9))]
    steps += [model(tokens[:, at : at + 1], cache=held, positions=torch.tensor([at])) for at in range(9, 20)]
    torch.testing.assert_close(torch.cat(steps, 1), model(tokens), rtol=0, atol=1e-12)


def test_prompts_in_pieces_equal_the_whole_forward(model):
    tokens = torch.randint(0, 61, (2, 20))
    held = cache(2)
    pieces = [model(tokens[:, a:b], cache=held, positions=torch.arange(a, b)) for a, b in ((0, 7), (7, 8), (8, 20))]
    torch.testing.assert_close(torch.cat(pieces, 1), model(tokens), rtol=0, atol=1e-12)


def test_rows_of_different_lengths_decode_as_if_alone(model):
    """Prompts of 3, 11 and 6 tokens, padded on the right; every row then grows from its own end."""
    lengths, total = torch.tensor([3, 11, 6]), 8
    rows = [torch.randint(0, 61, (1, int(length) + total)) for length in lengths]
    prompts = torch.zeros(3, 11, dtype=torch.long)
    for prompt, row, length in zip(prompts, rows, lengths, strict=True):
        prompt[:length] = row[0, :length]
    held = cache(3)
    model(prompts, cache=held, positions=torch.arange(11))
    for step in range(total):
        positions = (lengths + step)[:, None]
        tokens = torch.cat([row[:, at] for row, at in zip(rows, positions, strict=True)])
        logits = model(tokens, cache=held, positions=positions)
        for row, at, got in zip(rows, positions, logits, strict=True):
            torch.testing.assert_close(got[0], model(row)[0, int(at)], rtol=0, atol=1e-12)


def test_bidirectional_prefix_in_the_prompt(model):
    tokens, mask = torch.randint(0, 61, (2, 12)), Mask(prefix=torch.tensor([4, 7]))
    held = cache(2)
    first = model(tokens[:, :8], cache=held, positions=torch.arange(8), mask=mask)
    rest = model(tokens[:, 8:], cache=held, positions=torch.arange(8, 12), mask=mask)
    torch.testing.assert_close(torch.cat((first, rest), 1), model(tokens, mask=mask), rtol=0, atol=1e-12)


def test_a_position_beyond_the_cache_is_refused(model):
    with pytest.raises(IndexError, match="position 4 is beyond the cache's max_len 4"):
        model(torch.zeros(1, 1, dtype=torch.long), cache=cache(1, max_len=4), positions=torch.tensor([4]))


def test_documents_are_refused(model):
    tokens = torch.zeros(1, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="one document a row"):
        model(tokens, cache=cache(1), positions=torch.arange(2), mask=Mask(documents=tokens))
