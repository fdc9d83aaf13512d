import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from puna.errors import DataError
from puna.evals.bits import batches, bits_per_byte, text, windows
from puna.llama.config import LlamaConfig
from puna.llama.model import Llama
from puna.llama.shards import Shards

BYTES = {"context": 16, "stride": 8, "progress": False}


@pytest.fixture(scope="module")
def heldout(shards_dir):
    return Shards(shards_dir, "heldout")


@pytest.fixture(scope="module")
def model(heldout):
    config = LlamaConfig(
        num_layers=2, dim=32, ffn_dim=48, num_heads=2, num_kv_heads=1, head_dim=16, vocab_size=heldout.vocab_size
    )
    model = Llama(config)
    model.init_weights(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # a model with opinions
    return model.double()


def one_at_a_time(model, shards, context, stride):
    """Every target on its own: the window that the protocol gives it, one forward for each."""
    nats = 0.0
    for d in range(shards.num_documents):
        tokens = torch.from_numpy(shards.document(d).astype("int64"))
        for target in range(1, len(tokens)):
            k = max(
                0, math.ceil((target - context) / stride)
            )  # the first window [k * stride, k * stride + context) with it
            history = tokens[k * stride : target]
            with torch.no_grad():
                nats += cross_entropy(model(history[None])[0, -1:], tokens[target : target + 1], reduction="sum").item()
    return nats


@pytest.mark.parametrize(("context", "stride"), [(1024, 512), (16, 16), (16, 8), (16, 5), (7, 1)])
def test_equals_one_target_at_a_time(model, heldout, context, stride):
    got = bits_per_byte(model, heldout, context=context, stride=stride, batch_tokens=256, progress=False)
    want = one_at_a_time(model, heldout, context, stride)
    assert got["nats_per_token"] * got["num_tokens"] == pytest.approx(want, rel=1e-9)
    assert got["num_tokens"] == heldout.num_tokens - heldout.num_documents
    assert got["bits_per_byte"] == pytest.approx(want / math.log(2) / heldout.num_bytes, rel=1e-9)


def test_batching_changes_nothing(model, heldout):
    figures = [bits_per_byte(model, heldout, **BYTES, batch_tokens=n)["bits_per_byte"] for n in (1, 40, 10**6)]
    assert figures == pytest.approx([figures[0]] * 3, rel=1e-12)


def test_more_history_tells_more_than_none(model, heldout):
    """The figure depends on the windows at all (else the comparison above could not fail)."""
    assert bits_per_byte(model, heldout, context=1, stride=1, progress=False)["bits_per_byte"] != pytest.approx(
        bits_per_byte(model, heldout, **BYTES)["bits_per_byte"], rel=1e-3
    )


def test_a_uniform_model_needs_log2_of_the_vocabulary(model, heldout):
    uniform = Llama(model.config)
    torch.nn.init.zeros_(uniform.lm_head.weight)
    got = bits_per_byte(uniform, heldout, **BYTES)
    tokens_per_byte = (heldout.num_tokens - heldout.num_documents) / heldout.num_bytes
    assert got["bits_per_byte"] == pytest.approx(math.log2(heldout.vocab_size) * tokens_per_byte, rel=1e-6)


def test_a_limit_takes_whole_documents(model, heldout):
    got = bits_per_byte(model, heldout, **BYTES, limit_tokens=10)
    assert got["num_tokens"] >= 10
    assert got["num_documents"] < heldout.num_documents
    assert got["num_tokens"] == sum(heldout.lengths[: got["num_documents"]] - 1)
    assert got["num_bytes"] == len(text(heldout, got["num_documents"]))
    whole = bits_per_byte(model, heldout, **BYTES)
    assert bits_per_byte(model, heldout, **BYTES, limit_tokens=10**9) == whole


def test_the_text_is_the_documents(heldout):
    assert len(text(heldout)) == heldout.num_bytes


def test_the_model_keeps_its_mode(model, heldout):
    model.train()
    bits_per_byte(model, heldout, **BYTES)
    assert model.training


@pytest.mark.parametrize("stride", [0, 17])
def test_a_stride_must_fit_the_context(model, heldout, stride):
    with pytest.raises(DataError, match=f"stride of {stride} tokens is not between 1 and the context of 16"):
        bits_per_byte(model, heldout, context=16, stride=stride)


@pytest.mark.parametrize(("context", "stride"), [(8, 8), (8, 3), (8, 1), (1, 1)])
def test_windows_score_each_token_once_with_enough_history(context, stride):
    for num_targets in range(40):
        scored = []
        for w in windows(0, num_targets, context, stride):
            assert 0 < w.length <= context
            assert w.num_seen >= (context - stride if w.start else 0)
            scored += range(w.start + w.num_seen, w.start + w.length)
        assert scored == list(range(num_targets))


def test_batches_hold_like_lengths_within_the_budget():
    pieces = [w for d, n in enumerate([3, 50, 7, 16, 1, 30]) for w in windows(d, n, 16, 8)]
    plan = list(batches(pieces, 40))
    assert sorted((w for batch in plan for w in batch), key=str) == sorted(pieces, key=str)
    assert all(len(batch) * batch[0].length <= 40 for batch in plan)
    assert len(plan) < len(pieces)
