"""Mesh axes, devices, what ranks tell each other, the compute dtype."""

import pytest
import torch

from puna.errors import DeviceError, RecipeError
from puna.train import mesh
from puna.train.config import MeshConfig, RunConfig


def test_axes_stand_in_order_and_the_rest_is_sharded() -> None:
    assert list(mesh.axis_sizes(MeshConfig(), 8).items()) == [
        ("dp_replicate", 1),
        ("dp_shard", 8),
        ("pp", 1),
        ("cp", 1),
        ("tp", 1),
    ]
    assert mesh.axis_sizes(MeshConfig(dp_replicate=2), 8)["dp_shard"] == 4


@pytest.mark.parametrize(
    ("settings", "size", "words"),
    [
        ({"dp_replicate": 3}, 8, "the mesh dp_replicate 3 x dp_shard 2 does not multiply to the 8 processes"),
        ({"dp_replicate": 2, "dp_shard": 2}, 8, "the mesh dp_replicate 2 x dp_shard 2 does not multiply to the 8"),
        ({"dp_replicate": 4}, 2, "the mesh dp_replicate 4 does not multiply to the 2 processes"),
        ({"dp_shard": 2}, 1, "the mesh dp_shard 2 does not multiply to the 1 processes"),
    ],
)
def test_axes_that_do_not_multiply_are_refused(settings: dict[str, int], size: int, words: str) -> None:
    with pytest.raises(RecipeError, match=words + r".*Set mesh\.dp_replicate and mesh\.dp_shard so that"):
        mesh.axis_sizes(MeshConfig(**settings), size)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_that_is_absent_is_refused() -> None:
    with pytest.raises(
        DeviceError, match=r"CUDA device 0 was asked for but this machine shows 0. Set run.device to cpu"
    ):
        mesh.choose_device("cuda")
    assert mesh.choose_device("auto") == torch.device("cpu")


def test_a_single_process_is_a_mesh_of_one_and_leaves_nothing_behind() -> None:
    for _ in range(2):
        with mesh.open_mesh(RunConfig(device="cpu"), MeshConfig()) as place:
            assert str(place) == "1 x cpu [dp_replicate 1, dp_shard 1, pp 1, cp 1, tp 1]"
            assert place.data_parallel.size() == 1
            assert (mesh.rank(), mesh.world_size(), mesh.gather("x"), mesh.from_rank_0(3)) == (0, 1, ["x"], 3)
    with pytest.raises(KeyError), mesh.open_mesh(RunConfig(device="cpu"), MeshConfig()):
        raise KeyError
    assert not torch.distributed.is_initialized()


def told() -> tuple[object, ...]:
    mesh.barrier()
    mine = [float(mesh.rank()), 1.0]
    return mesh.agree(mine), mesh.agree(mine, "max"), mesh.gather(mesh.rank() * "x"), mesh.from_rank_0(mesh.rank() + 7)


def test_ranks_tell_each_other(ranks: object) -> None:
    assert ranks(told) == [([6.0, 4.0], [3.0, 1.0], ["", "x", "xx", "xxx"], 7)] * 4


def hybrid() -> tuple[object, ...]:
    sizes = mesh.axis_sizes(MeshConfig(dp_replicate=2), 4)
    devices = torch.distributed.device_mesh.init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=mesh.AXES)
    place = mesh.Mesh(torch.device("cpu"), mesh.rank(), 4, sizes, devices)
    return place.data_parallel.mesh_dim_names, place.data_parallel.mesh.tolist(), str(place)


def test_hybrid_shards_over_neighbours(ranks: object) -> None:
    names, places, shown = ranks(hybrid)[0]
    assert names == ("dp_replicate", "dp_shard")
    assert places == [[0, 1], [2, 3]]
    assert shown == "4 x cpu [dp_replicate 2, dp_shard 2, pp 1, cp 1, tp 1]"


@pytest.mark.parametrize(("fp32", "bf16", "wanted"), [(5e10, 8e8, torch.float32), (5e10, 1e11, torch.bfloat16)])
def test_auto_takes_the_faster_dtype_and_says_why(
    fp32: float, bf16: float, wanted: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = {torch.float32: fp32, torch.bfloat16: bf16}
    monkeypatch.setattr(mesh, "matrix_rate", lambda dtype, *words: rates[dtype])
    mesh._choose_compute.cache_clear()
    compute = mesh.choose_compute("auto", torch.device("cpu"))
    assert compute.dtype == wanted
    assert compute.peak_flops == rates[wanted]
    assert (
        f"auto chose {'fp32' if wanted == torch.float32 else 'bf16'}: matrices multiply at fp32 50 GFLOP/s, bf16 "
        in compute.reason
    )
    mesh._choose_compute.cache_clear()


def test_a_matrix_rate_is_measured() -> None:
    assert 1e8 < mesh.matrix_rate(torch.float32, torch.device("cpu"), 64, 128) < 1e15
    assert mesh.choose_compute("fp32", torch.device("cpu")).reason == "fp32 was asked for"
