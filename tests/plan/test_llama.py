"""A plan's units are the model's, and so is their number of parameters."""

import pytest

from puna.llama.config import LlamaConfig
from puna.llama.hub import build
from puna.llama.parallel import units as modules
from puna.plan.llama import kept_bytes, units
from puna.recipe import load

CONFIG = LlamaConfig(num_layers=3, dim=24, ffn_dim=40, num_heads=4, num_kv_heads=2, head_dim=6, vocab_size=50)
TIED = CONFIG.model_copy(update={"tie_embeddings": True})


@pytest.mark.parametrize(("config", "layout"), [(CONFIG, "root"), (CONFIG, "ends"), (TIED, "root")])
def test_units_are_those_of_the_model(config: LlamaConfig, layout: str) -> None:
    planned = units(config, layout)
    parts = modules(build(config), layout)
    assert [unit.name for unit in planned] == list(parts)
    for unit, part in zip(planned, parts.values(), strict=True):
        shapes = [tuple(p.shape) for module in part for p in module.parameters()]
        if unit.name == "root":
            shapes = [tuple(p.shape) for name, p in part[0].named_parameters() if ".layers." not in name]
        assert sorted(unit.shapes) == sorted(shapes), unit.name
    assert sum(unit.elements() for unit in planned) == config.num_parameters


def test_a_published_model() -> None:
    config = load("llama3-8b", []).recipe.model
    assert sum(unit.elements() for unit in units(config, "ends")) == 8_030_261_248


def test_what_is_kept_grows_with_tokens_and_layers() -> None:
    one, two = (kept_bytes(CONFIG.model_copy(update={"num_layers": n}), 2, 16) for n in (1, 2))
    assert (two - one) % (4 * 2 * 16) == 0
    assert kept_bytes(CONFIG, 4, 16) > 1.9 * kept_bytes(CONFIG, 2, 16) - 4 * 50 * 24
