"""FSDP2's collectives through shared memory: what they give, beside the process group's own."""

import os

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from puna.errors import DeviceError
from puna.train import mesh, shared_memory
from puna.train.shared_memory import SharedMemory, map_slabs, shares_memory, use_shared_memory


def shared_parts():
    memory = SharedMemory(dist.group.WORLD)
    rank, seen = mesh.rank(), []
    handles = len(os.listdir("/proc/self/fd"))
    for length, dtype in ((3, torch.float32), (40_000, torch.float64), (5, torch.bfloat16), (50_000, torch.float32)):
        parts = memory.share(torch.full((length,), rank + 1, dtype=dtype))
        seen.append([(len(part), part.dtype == dtype, float(part.float().mean())) for part in parts])
    return seen, len(os.listdir("/proc/self/fd")) - handles


def test_every_rank_reads_every_part(ranks):
    for seen, handles in ranks(shared_parts):
        assert seen == [[(n, True, r + 1.0) for r in range(4)] for n in (3, 40_000, 5, 50_000)]
        assert handles == 0


def parts_of_two_calls():
    memory = SharedMemory(dist.group.WORLD)
    first = memory.share(torch.tensor([1.0 + mesh.rank()]))
    memory.share(torch.tensor([10.0]))
    return torch.cat(first).tolist()


def test_a_part_outlives_the_next_call(ranks):
    assert ranks(parts_of_two_calls) == [[1.0, 2.0, 3.0, 4.0]] * 4


def gradients(sizes, shared):
    """Local gradients of three linear layers, with dims that do not divide, after two steps."""
    devices = init_device_mesh("cpu", sizes, mesh_dim_names=("dp_replicate", "dp_shard"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(13, 7), nn.Linear(7, 5), nn.Linear(5, 3))
    data = devices if sizes[0] > 1 else devices["dp_shard"]
    for layer in model:
        fully_shard(layer, mesh=data)
    fully_shard(model, mesh=data)
    if shared:
        use_shared_memory(model, devices["dp_shard"].get_group())
    torch.manual_seed(mesh.rank())
    for _ in range(2):
        model(torch.randn(6, 13)).square().sum().backward()
    return [parameter.grad.to_local().tolist() for parameter in model.parameters()]


@pytest.mark.parametrize(("sizes", "tolerance"), [((2, 2), 0.0), ((1, 4), 1e-6)])
def test_gradients_are_those_of_the_process_group(ranks, sizes, tolerance):
    for ours, theirs in zip(ranks(gradients, sizes, True), ranks(gradients, sizes, False), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=tolerance, atol=tolerance)


def without_memory_on_rank_1():
    def refuse(*words, **named):
        raise OSError(12, "Cannot allocate memory")

    kept = torch.from_file
    if mesh.rank() == 1:
        torch.from_file = refuse
    try:
        found = map_slabs(dist.group.WORLD, 16), shares_memory(dist.group.WORLD)
        with pytest.raises(DeviceError, match=r"4,000 bytes of shared memory a rank cannot be had") as caught:
            SharedMemory(dist.group.WORLD).share(torch.zeros(1000))
    finally:
        torch.from_file = kept
    return found, str(caught.value)


def test_all_ranks_agree_where_one_cannot_map(ranks):
    for found, told in ranks(without_memory_on_rank_1):
        assert found == (None, False)
        assert "mesh.shared_memory to false" in told


def blind_rank_2():
    kept = torch.equal
    torch.equal = (lambda a, b: False) if mesh.rank() == 2 else kept
    try:
        return shares_memory(dist.group.WORLD)
    finally:
        torch.equal = kept


def test_memory_that_is_not_the_same_is_not_used(ranks):
    assert ranks(blind_rank_2) == [False] * 4
    assert shared_memory.TOKEN_BYTES >= 16


def test_ranks_of_one_machine_share_memory(ranks):
    assert ranks(shares) == [True] * 4


def shares():
    return shares_memory(dist.group.WORLD)
