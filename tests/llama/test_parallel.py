"""Where FSDP's units begin and end, and what cannot be cut so."""

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from puna.errors import ShardingError
from puna.llama.config import LlamaConfig
from puna.llama.model import Llama
from puna.llama.parallel import spread, units
from puna.train import mesh
from puna.train.config import MeshConfig, RunConfig
from puna.train.mesh import Mesh

CONFIG = LlamaConfig(num_layers=3, dim=16, ffn_dim=24, num_heads=2, num_kv_heads=1, head_dim=8, vocab_size=40)
TOKENS = torch.arange(24).view(2, 12) % 40


@pytest.fixture(scope="module")
def place() -> Iterator[Mesh]:
    with mesh.open_mesh(RunConfig(device="cpu", num_threads=1), MeshConfig()) as place:
        yield place


def model(config: LlamaConfig = CONFIG) -> Llama:
    made = Llama(config)
    made.init_weights()
    return made


def gradients(made: Llama) -> dict[str, torch.Tensor]:
    loss = made(TOKENS, TOKENS.roll(-1, 1))
    loss.backward()
    found = {name: p.grad for name, p in made.named_parameters()}
    whole = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in found.items()}
    return {"loss": loss.detach(), **whole}


@pytest.mark.parametrize("layout", ["root", "ends"])
@pytest.mark.parametrize("prefetch", ["none", "backward", "both"])
@pytest.mark.parametrize("reshard", [(True, True), (True, False), (False, False)])
def test_no_layout_changes_a_gradient(place: Mesh, layout: str, prefetch: str, reshard: tuple[bool, bool]) -> None:
    made = model()
    spread(
        made,
        place.data_parallel,
        dtype=torch.float32,
        layout=layout,
        prefetch=prefetch,
        reshard_after_forward=reshard[0],
        reshard_last=reshard[1],
    )
    for _ in range(2):
        found, wanted = gradients(made), gradients(model())
        made.zero_grad()
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_units_are_in_the_order_of_the_forward() -> None:
    assert list(units(model(), "root")) == ["layers.0", "layers.1", "layers.2", "root"]
    assert list(units(model(), "ends")) == ["embedding", "layers.0", "layers.1", "layers.2", "head"]


def test_explicit_prefetch_names_the_next_unit(place: Mesh) -> None:
    for layout in ("root", "ends"):
        made = model()
        spread(made, place.data_parallel, dtype=torch.float32, layout=layout, prefetch="both")
        firsts = [part[0] for part in units(made, layout).values()]
        order = firsts if layout == "ends" else [firsts[-1], *firsts[:-1]]
        assert all(isinstance(module, FSDPModule) for module in firsts)
        for module, following in pairwise(order):
            assert module._get_fsdp_state()._states_to_forward_prefetch == [following._get_fsdp_state()]


def test_tied_embeddings_belong_to_one_unit(place: Mesh) -> None:
    tied = model(CONFIG.model_copy(update={"tie_embeddings": True}))
    spread(tied, place.data_parallel, dtype=torch.float32)
    again = model(CONFIG.model_copy(update={"tie_embeddings": True}))
    words = r"model\.embed_tokens\.weight of FSDP unit embedding is also the head's.*Take layout \"root\""
    with pytest.raises(ShardingError, match=words):
        spread(again, place.data_parallel, dtype=torch.float32, layout="ends")


def test_blocks_that_share_a_parameter_are_refused(place: Mesh) -> None:
    made = model()
    made.model.layers["2"].mlp.up_proj.weight = made.model.layers["0"].mlp.up_proj.weight
    words = r"mlp\.up_proj\.weight of FSDP unit layers\.0 and mlp\.up_proj\.weight of unit layers\.2 are one parameter"
    with pytest.raises(ShardingError, match=words):
        spread(made, place.data_parallel, dtype=torch.float32)


def test_tied_by_hand_is_refused_where_the_ends_are_units(place: Mesh) -> None:
    made = model()
    made.lm_head.weight = made.model.embed_tokens.weight
    spread(made, None, dtype=torch.float32, layout="ends")
    with pytest.raises(ShardingError, match=r"weight of FSDP unit embedding and weight of unit head are one"):
        spread(made, place.data_parallel, dtype=torch.float32, layout="ends")
    spread(made, place.data_parallel, dtype=torch.float32)


def test_offload_keeps_shards_on_the_cpu(place: Mesh) -> None:
    made = model()
    spread(made, place.data_parallel, dtype=torch.float32, offload=True)
    found, wanted = gradients(made), gradients(model())
    torch.testing.assert_close(found["lm_head.weight"], wanted["lm_head.weight"])


@pytest.mark.parametrize("tied", [False, True])
def test_casts_in_a_forward_are_the_mixed_precision_of_one_rank(place: Mesh, tied: bool) -> None:
    config = CONFIG.model_copy(update={"tie_embeddings": tied})
    cast, sharded = model(config), model(config)
    spread(cast, None, dtype=torch.bfloat16)
    spread(sharded, place.data_parallel, dtype=torch.bfloat16)
    before = dict(cast.named_parameters())
    for _ in range(2):
        found, wanted = gradients(cast), gradients(sharded)
        for name, value in wanted.items():
            assert (found[name] - value).abs().max() < 0.01 * value.abs().max(), name
        assert {value.dtype for value in found.values()} == {torch.float32}
    assert all(p is before[name] for name, p in cast.named_parameters())
    exact = gradients(model(config))["loss"]
    assert 0 < (gradients(cast)["loss"] - exact).abs() < 0.01 * exact


def test_a_forward_that_fails_leaves_the_parameters() -> None:
    made = model()
    spread(made, None, dtype=torch.bfloat16)
    with pytest.raises(IndexError):
        made(torch.tensor([[40]]))
    assert all(isinstance(p, torch.nn.Parameter) for p in made.parameters())
    assert len(list(made.parameters())) == len(list(model().parameters()))


def test_casts_and_recompute_do_not_go_together() -> None:
    with pytest.raises(ValueError, match=r"recompute full in .* needs a mesh"):
        spread(model(), None, dtype=torch.bfloat16, recompute="full")
