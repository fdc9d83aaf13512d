from itertools import pairwise

import pytest
import torch
from torch import nn

from puna.llama.attention import Mask
from puna.llama.config import LlamaConfig, RopeScaling
from puna.llama.hub import build
from puna.llama.model import Llama, LlamaScorer

CONFIG = LlamaConfig(num_layers=3, dim=32, ffn_dim=48, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=61)
TIED = CONFIG.model_copy(update={"tie_embeddings": True})
SIZES = {
    "llama2-7b": (6_738_415_616, (32, 4096, 11008, 32, 32, 128, 32_000)),
    "llama2-13b": (13_015_864_320, (40, 5120, 13824, 40, 40, 128, 32_000)),
    "llama2-70b": (68_976_648_192, (80, 8192, 28672, 64, 8, 128, 32_000)),
    "llama3-8b": (8_030_261_248, (32, 4096, 14336, 32, 8, 128, 128_256)),
    "llama3-70b": (70_553_706_496, (80, 8192, 28672, 64, 8, 128, 128_256)),
    "llama3-405b": (405_853_388_800, (126, 16384, 53248, 128, 8, 128, 128_256)),
    "llama3.2-1b": (1_235_814_400, (16, 2048, 8192, 32, 8, 64, 128_256)),
    "llama3.2-3b": (3_212_749_824, (28, 3072, 8192, 24, 8, 128, 128_256)),
}


def made(config=CONFIG, seed=1):
    model = Llama(config).double()
    model.init_weights(seed)
    return model


@pytest.fixture
def tokens():
    return torch.randint(0, 61, (2, 10))


@pytest.mark.parametrize("name", SIZES)
def test_parameters_of_the_published_sizes(name):
    count, sizes = SIZES[name]
    keys = ("num_layers", "dim", "ffn_dim", "num_heads", "num_kv_heads", "head_dim", "vocab_size")
    config = LlamaConfig(**dict(zip(keys, sizes, strict=True)), tie_embeddings="3.2" in name)
    assert config.num_parameters == count
    assert sum(parameter.numel() for parameter in build(config).parameters()) == count


def test_names_are_those_of_hugging_face():
    names = set(Llama(CONFIG).state_dict())
    block = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
             "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm")  # fmt: skip
    blocks = {f"model.layers.{index}.{part}.weight" for index in range(3) for part in block}
    assert names == blocks | {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert set(Llama(TIED).state_dict()) == names - {"lm_head.weight"}
    assert set(LlamaScorer(CONFIG).state_dict()) == names - {"lm_head.weight"} | {"score.weight"}


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
def test_loss_is_the_sum_over_counted_tokens_of_the_logits_cross_entropy(config, tokens):
    model = made(config)
    targets = tokens.roll(-1, 1)
    targets[:, -1] = -100
    whole = nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction="sum")
    total = model(tokens, targets)
    torch.testing.assert_close(total, whole)
    parameters = list(model.parameters())
    torch.testing.assert_close(torch.autograd.grad(total, parameters), torch.autograd.grad(whole, parameters))


def test_loss_and_logits_are_float32_for_bfloat16_models(tokens):
    model = made().bfloat16()
    assert model(tokens).dtype == model(tokens, tokens).dtype == torch.float32
    assert model.hidden(tokens).dtype == torch.bfloat16


def test_embeddings_in_place_of_tokens(tokens):
    model = made()
    assert torch.equal(model(embeddings=model.model.embed_tokens(tokens)), model(tokens))


def test_hidden_apart_from_the_head_and_a_trimmed_vocabulary(tokens):
    model = made()
    hidden = model.hidden(tokens)
    assert hidden.shape == (2, 10, 32)
    assert torch.equal(model.logits(hidden), model(tokens))
    rows = torch.tensor([7, 3])
    torch.testing.assert_close(model.logits(hidden, rows), model(tokens)[..., rows])


def test_state_after_k_blocks(tokens):
    model = made()
    states = [model.hidden(tokens, layer=k) for k in range(4)]
    assert torch.equal(states[0], model.model.embed_tokens(tokens))
    assert not any(torch.equal(a, b) for a, b in pairwise(states))
    assert torch.equal(model.model.norm(states[3]), model.hidden(tokens))


def test_hook_between_blocks_sees_and_replaces_the_state(tokens):
    model = made()
    seen = []

    def between(index, hidden):
        seen.append(index)
        return hidden + 1 if index == 2 else hidden

    changed = model.hidden(tokens, between=between, layer=3)
    assert seen == [0, 1, 2]
    state = model.hidden(tokens, layer=2) + 1
    stage = made()
    del stage.model.layers["0"], stage.model.layers["1"]
    assert torch.equal(stage.hidden(embeddings=state, layer=3), changed)


def test_stages_of_a_pipeline_make_the_whole(tokens):
    """Blocks keep their names, and so their weights, when others are dropped."""
    first, last = made(), made()
    del first.model.layers["2"], first.lm_head
    first.model.norm = nn.Identity()
    del last.model.layers["0"], last.model.layers["1"], last.model.embed_tokens
    assert torch.equal(last(embeddings=first.hidden(tokens)), made()(tokens))


def test_positions_shift_nothing_and_stretch_something(tokens):
    model = made()
    torch.testing.assert_close(model(tokens, positions=torch.arange(10) + 50), model(tokens))
    apart = model(tokens, positions=torch.arange(10).expand(2, 10) * 3)
    assert (apart - model(tokens)).abs().max() > 1e-6


def test_documents_of_a_row_are_as_if_alone(tokens):
    model = made()
    packed = model(tokens, mask=Mask(documents=torch.tensor([[0] * 4 + [1] * 6, [5] * 9 + [6]])))
    torch.testing.assert_close(packed[0, :4], model(tokens[:1, :4])[0])
    torch.testing.assert_close(packed[0, 4:], model(tokens[:1, 4:])[0])
    torch.testing.assert_close(packed[1, 9:], model(tokens[1:, 9:])[0])


def test_scorer_gives_one_float32_number_a_token(tokens):
    scorer = LlamaScorer(CONFIG)
    scorer.init_weights(2)
    scores = scorer(tokens)
    assert scores.shape == (2, 10)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores[:, :4], scorer(tokens[:, :4]))


def test_initial_weights_depend_on_seed_and_name_only():
    model, shallow = made(), made(CONFIG.model_copy(update={"rope_scaling": RopeScaling()}))
    for name, weight in shallow.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])
    other = made(seed=2).state_dict()
    assert all(torch.equal(weight, other[name]) == (weight.dim() == 1) for name, weight in model.state_dict().items())


def test_initial_weights_after_meta():
    model = build(TIED).to_empty(device="cpu")
    model.init_weights(4)
    state = model.state_dict()
    assert (state["model.norm.weight"] == 1).all()
    assert state["model.embed_tokens.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    writes = torch.cat([state[f"model.layers.{k}.mlp.down_proj.weight"].flatten() for k in range(3)])
    assert writes.std().item() == pytest.approx(0.02 / 6**0.5, rel=0.05)
