"""The text model beside transformers' LlamaForCausalLM: same weights, same logits, and a change is noticed."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from puna.llama import attention, hub, rope
from puna.llama.cache import DenseCache
from puna.llama.config import LlamaConfig, RopeScaling
from puna.llama.model import Llama

transformers = pytest.importorskip("transformers")

SEQ_LEN = 2_048
BASE = LlamaConfig(
    num_layers=2, dim=64, ffn_dim=160, num_heads=4, num_kv_heads=2, head_dim=32, vocab_size=160, max_seq_len=4_096
)
STYLES = {
    "llama2": BASE.model_copy(update={"rope_theta": 10_000.0, "num_kv_heads": 4, "head_dim": 16}),
    "llama3": BASE,
    "llama3.1": BASE.model_copy(update={"rope_scaling": RopeScaling()}),
    "llama3.2": BASE.model_copy(update={"rope_scaling": RopeScaling(factor=32.0), "tie_embeddings": True}),
}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
"""Largest difference of two logits, as a share of the logits' standard deviation."""


def random_model(config: LlamaConfig, dtype: torch.dtype) -> Llama:
    """Weights wide enough that attention is uneven and logits deviate by 1 or more; gains that are not all 1."""
    model = Llama(config).to(dtype)
    model.init_weights(seed=5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.copy_(torch.linspace(0.5, 1.5, len(weight)))
            else:
                weight.mul_(8 if "embed" in name or "lm_head" in name else 6)
    return model.requires_grad_(False)


def random_tokens() -> Tensor:
    return torch.randint(BASE.vocab_size, (1, SEQ_LEN), generator=torch.Generator().manual_seed(3))


@cache
def reference_logits(style: str, dtype: torch.dtype) -> Tensor:
    """Logits of transformers with attention written out ("eager", so that no kernel is shared).

    Its float32 islands (norm, softmax, rotary tables) are float64 ones for a float64 model: while it is made and run,
    the name torch.float32 means float64.
    """
    model = random_model(STYLES[style], dtype)
    values = hub.config_to_hf(model.config) | {"attn_implementation": "eager"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float", dtype)
        patch.setattr(torch, "float32", dtype)
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values)).to(dtype)
        theirs.load_state_dict(model.state_dict(), strict=not model.config.tie_embeddings)
        theirs.tie_weights()
        with torch.no_grad():
            return theirs(random_tokens(), use_cache=False).logits


def assert_parity(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == theirs.dtype
    deviation = theirs.std().item()
    assert deviation >= 1, f"logits deviate by {deviation} only"
    difference = (ours - theirs).abs().max().item()
    assert difference <= TOLERANCE[ours.dtype] * deviation, f"logits differ by {difference / deviation} deviations"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("style", STYLES)
def test_logits_equal_those_of_transformers(style, dtype):
    model, tokens = random_model(STYLES[style], dtype), random_tokens()
    assert_parity(model(tokens), reference_logits(style, dtype))


def no_scaling(config: LlamaConfig) -> LlamaConfig:
    return config.model_copy(update={"rope_scaling": None})


def factor_8(config: LlamaConfig) -> LlamaConfig:
    return config.model_copy(update={"rope_scaling": RopeScaling(factor=8.0)})


def other_band(config: LlamaConfig) -> LlamaConfig:
    return config.model_copy(update={"rope_scaling": RopeScaling(high_freq_factor=3.9)})


def theta_up_1_percent(config: LlamaConfig) -> LlamaConfig:
    return config.model_copy(update={"rope_theta": config.rope_theta * 1.01})


def smaller_epsilon(config: LlamaConfig) -> LlamaConfig:
    return config.model_copy(update={"norm_eps": 1e-6})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize(
    ("style", "mutate"),
    [
        ("llama3.1", no_scaling),
        ("llama3.2", factor_8),
        ("llama3.1", other_band),
        ("llama2", theta_up_1_percent),
        ("llama3", theta_up_1_percent),
        ("llama3", smaller_epsilon),
        ("llama3.2", smaller_epsilon),
    ],
)
def test_parity_notices_another_configuration(style, mutate: Callable, dtype):
    model, tokens = random_model(STYLES[style], dtype), random_tokens()
    other = Llama(mutate(STYLES[style])).to(dtype).requires_grad_(False)
    other.load_state_dict(model.state_dict())
    with pytest.raises(AssertionError, match="logits differ by"):
        assert_parity(other(tokens), reference_logits(style, dtype))


def turned_in_adjacent_pairs(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = heads[..., ::2], heads[..., 1::2]
    cos, sin = cos[..., :16], sin[..., 16:]
    return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)


def with_interleaved_groups(flash: Callable) -> Callable:
    """Query head h on key head h % K in place of h // (H / K)."""

    def flash_otherwise(query: Tensor, key: Tensor, value: Tensor, *rules: object) -> tuple[Tensor, Tensor]:
        times = (1, query.shape[1] // key.shape[1], 1, 1)
        return flash(query, key.repeat(times), value.repeat(times), *rules)

    return flash_otherwise


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("mutation", ["adjacent pairs", "interleaved groups", "one key head swapped"])
def test_parity_notices_another_layout(mutation, dtype, monkeypatch):
    model, tokens = random_model(STYLES["llama3"], dtype), random_tokens()
    theirs = reference_logits("llama3", dtype)
    if mutation == "adjacent pairs":
        monkeypatch.setattr(rope, "_turned", turned_in_adjacent_pairs)
    elif mutation == "interleaved groups":
        monkeypatch.setattr(attention, "flash", with_interleaved_groups(attention.flash))
    else:
        weight = model.model.layers["1"].self_attn.k_proj.weight
        weight.copy_(weight.view(2, 32, 64).flip(0).reshape(64, 64))
    with pytest.raises(AssertionError, match="logits differ by"):
        assert_parity(model(tokens), theirs)


@pytest.mark.parametrize("style", STYLES)
def test_decoding_with_a_cache_equals_the_whole_forward_of_transformers(style):
    model, tokens = random_model(STYLES[style], torch.float32), random_tokens()
    cache = DenseCache(1, SEQ_LEN, model.config, torch.float32, "cpu")
    prompt = SEQ_LEN - 16
    pieces = [model(tokens[:, :prompt], cache=cache, positions=torch.arange(prompt))]
    for at in range(prompt, SEQ_LEN):
        pieces.append(model(tokens[:, at : at + 1], cache=cache, positions=torch.tensor([at])))
    assert_parity(torch.cat(pieces, 1), reference_logits(style, torch.float32))


@pytest.mark.parametrize("max_shard_bytes", [1 << 30, 100_000], ids=["one file", "shards"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("style", STYLES)
def test_out_through_transformers_and_in_again_is_bit_identical(style, dtype, max_shard_bytes, tmp_path: Path):
    state = random_model(STYLES[style], dtype).state_dict()
    hub.save(state, STYLES[style], tmp_path / "ours", bos=1, eos=[2], max_shard_bytes=max_shard_bytes)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert theirs.dtype == dtype
    assert theirs.generation_config.eos_token_id == [2]
    for name, weight in state.items():
        assert torch.equal(theirs.get_parameter(name), weight), name
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=max_shard_bytes)
    back = hub.load(tmp_path / "theirs")
    assert back.config == STYLES[style]
    assert back.model.state_dict().keys() == state.keys()
    for name, weight in back.model.state_dict().items():
        assert weight.dtype == dtype
        assert torch.equal(weight, state[name]), name


@pytest.mark.parametrize("style", STYLES)
def test_transformers_reads_the_configuration_as_it_writes_it(style, tmp_path: Path):
    config = transformers.LlamaConfig(**hub.config_to_hf(STYLES[style]))
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert hub.config_from_hf(written, "config.json") == STYLES[style]
