"""What ranks of the TorchRec test do; a module of its own, so that processes can import it."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from puna.train.config import MeshConfig, RunConfig
from puna.train.mesh import open_mesh

ROWS, DIM, BATCH = (300, 40, 90), 8, 32


def train(out: str, how: str, arms: str) -> None:
    """Losses of four steps of TorchRec's EmbeddingBagCollection under each arm, and bytes sent by `compress`."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with open_mesh(RunConfig(device="cpu"), MeshConfig()):
        found = {name: _arm(how, bounds) for name, bounds in json.loads(arms).items()}
        if dist.get_rank() == 0:
            Path(out).write_text(json.dumps(found))


def _arm(how: str, bounds: dict[str, float] | None) -> dict[str, Any]:
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from torchrec import EmbeddingBagCollection
    from torchrec.distributed import DistributedModelParallel
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
    from torchrec.distributed.planner.types import ParameterConstraints
    from torchrec.modules.embedding_configs import EmbeddingBagConfig
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    from puna.recsys.torchrec_dist import compress

    size, rank = dist.get_world_size(), dist.get_rank()
    names = [f"C{n}" for n in range(len(ROWS))]
    torch.manual_seed(0)
    tables = [
        EmbeddingBagConfig(name=f"t_{name}", embedding_dim=DIM, num_embeddings=rows, feature_names=[name])
        for name, rows in zip(names, ROWS, strict=True)
    ]
    bags = EmbeddingBagCollection(tables=tables, device=torch.device("cpu"))
    sharder = EmbeddingBagCollectionSharder(fused_params={"optimizer": EmbOptimType.EXACT_SGD, "learning_rate": 0.5})
    kinds = {
        t.name: ParameterConstraints(sharding_types=[how], compute_kernels=["fused"], min_partition=4) for t in tables
    }
    topology = Topology(world_size=size, compute_device="cpu")
    plan = EmbeddingShardingPlanner(topology=topology, constraints=kinds).collective_plan(
        bags, [sharder], dist.group.WORLD
    )
    model = DistributedModelParallel(bags, device=torch.device("cpu"), plan=plan, sharders=[sharder])
    exchanges = [] if bounds is None else compress(model, **bounds)
    draw = torch.Generator().manual_seed(1 + rank)
    losses = []
    for _ in range(4):
        lengths = torch.randint(0, 4, (len(ROWS) * BATCH,), generator=draw, dtype=torch.int32)
        per = lengths.view(len(ROWS), BATCH).sum(dim=1)
        ids = torch.cat([torch.randint(0, r, (int(n),), generator=draw) for r, n in zip(ROWS, per, strict=True)])
        vectors = model(KeyedJaggedTensor(names, ids, lengths=lengths)).values()
        target = torch.randn(vectors.shape, generator=draw)
        loss = (vectors - target).square().mean()
        loss.backward()
        losses.append(loss.item())
    sent = [exchange.sent.sent + exchange.returned.sent for exchange in exchanges]
    plain = [exchange.sent.plain + exchange.returned.plain for exchange in exchanges]
    return {"losses": losses, "sent": sum(sent), "plain": sum(plain)}
