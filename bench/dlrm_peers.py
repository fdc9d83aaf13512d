"""Trains with a peer, in the peer's own Python; `dlrm_speed.py` runs this. Nothing of Puna is imported.

    PYTHON bench/dlrm_peers.py dlrm --folder CHECKOUT --dtype fp32 --batch 2048
    PYTHON bench/dlrm_peers.py torchrec --dtype bf16 --batch 2048

Batches are made before the clock starts. The last line on stdout is JSON: samples_per_s and cpu_ms (of a step), and
with --clicks, a folder of clicks, instead auc on its test split after one pass over its train split in order.
"""

import argparse
import contextlib
import importlib.machinery
import json
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROWS = (
    1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27, 14992, 5461306, 10, 5652,
    2173, 4, 7046547, 18, 15, 286181, 105, 142572,
)  # fmt: skip
DIM, NUM_BATCHES, LR = 16, 8, 0.1

Sample = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""dense (B, 13), ids (26, B), labels (B, 1)."""


def sizes(args: argparse.Namespace) -> list[int]:
    """Rows of each table."""
    return [min(count, args.max_rows) for count in ROWS]


def made(args: argparse.Namespace) -> list[Sample]:
    """A few batches with ids by Zipf's law, exponent 1.05."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(NUM_BATCHES):
        ids = []
        for size in sizes(args):
            values = (1 + rng.random(args.batch) * ((size + 1) ** -0.05 - 1)) ** (1 / -0.05)
            ids.append(np.minimum(values.astype(np.int64) - 1, size - 1))
        dense = torch.from_numpy(rng.normal(size=(args.batch, 13)).astype(np.float32))
        labels = torch.from_numpy((rng.random((args.batch, 1)) < 0.25).astype(np.float32))
        found.append((dense, torch.from_numpy(np.stack(ids)), labels))
    return found


def read(args: argparse.Namespace, split: str) -> Iterator[Sample]:
    """Batches of a folder of clicks, in order; the last one of the test split is shorter."""
    folder = Path(args.clicks)
    facts = json.loads((folder / "clicks.json").read_bytes())
    first, end = facts["splits"][split]
    dense = np.memmap(folder / "dense", "<f4", "r", shape=(facts["samples"], 13))
    ids = np.memmap(folder / "ids", "<i4", "r", shape=(facts["samples"], len(ROWS)))
    labels = np.memmap(folder / "labels", "u1", "r")
    last = end if split == "test" else first + (end - first) // args.batch * args.batch
    for start in range(first, last, args.batch):
        part = slice(start, min(start + args.batch, last))
        yield (
            torch.from_numpy(np.array(dense[part])),
            torch.from_numpy(np.array(ids[part]).T.astype(np.int64)),
            torch.from_numpy(np.array(labels[part], np.float32)[:, None]),
        )


def autocast(args: argparse.Namespace) -> Any:
    """bf16 by autocast, or nothing."""
    return torch.autocast("cpu", torch.bfloat16) if args.dtype == "bf16" else contextlib.nullcontext()


def dlrm(args: argparse.Namespace) -> tuple[Callable[[Sample], None], Callable[[Sample], torch.Tensor]]:
    """The reference: dlrm_s_pytorch.py's model, its loss, torch's SGD on sparse gradients."""
    sys.path.insert(0, args.folder)
    for name in ("sklearn", "sklearn.metrics", "mlperf_logger"):  # for its scores and logs, which are not used
        if name not in sys.modules:
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
    sys.modules["sklearn"].metrics = sys.modules["sklearn.metrics"]  # type: ignore[attr-defined]
    warnings.simplefilter("ignore")
    from dlrm_s_pytorch import DLRM_Net

    np.random.seed(0)
    pairs = 27 * 26 // 2
    top = np.array([DIM + pairs, 512, 256, 1])
    model = DLRM_Net(DIM, np.array(sizes(args)), np.array([13, 512, 256, 64, 16]), top, "dot", sigmoid_top=len(top) - 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)
    loss = torch.nn.BCELoss(reduction="mean")

    def forward(sample: Sample) -> torch.Tensor:
        offsets = torch.arange(len(sample[0])).repeat(len(ROWS), 1)
        with autocast(args):
            return model(sample[0], offsets, sample[1])

    def step(sample: Sample) -> None:
        optimizer.zero_grad()
        loss(forward(sample).float(), sample[2]).backward()
        optimizer.step()

    return step, forward


def torchrec(args: argparse.Namespace) -> tuple[Callable[[Sample], None], Callable[[Sample], torch.Tensor]]:
    """TorchRec: fused table-batched embeddings with SGD in their backward, its DLRM, torch's SGD on the networks."""
    warnings.simplefilter("ignore")
    import os

    import torch.distributed as dist
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from torchrec import EmbeddingBagCollection
    from torchrec.distributed import DistributedModelParallel
    from torchrec.distributed.embedding_types import EmbeddingComputeKernel
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
    from torchrec.distributed.planner.types import ParameterConstraints
    from torchrec.models.dlrm import DLRM, DLRMTrain
    from torchrec.modules.embedding_configs import EmbeddingBagConfig
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29000 + os.getpid() % 1000)}
    dist.init_process_group("gloo", rank=0, world_size=1)
    names = [f"C{n}" for n in range(len(ROWS))]
    tables = [
        EmbeddingBagConfig(name=f"t_{name}", embedding_dim=DIM, num_embeddings=size, feature_names=[name])
        for name, size in zip(names, sizes(args), strict=True)
    ]
    bags = EmbeddingBagCollection(tables=tables, device=torch.device("meta"))
    model = DLRMTrain(DLRM(bags, 13, [512, 256, 64, DIM], [512, 256, 1], dense_device=torch.device("cpu")))
    constraints = {
        table.name: ParameterConstraints(compute_kernels=[EmbeddingComputeKernel.FUSED.value]) for table in tables
    }
    sharder = EmbeddingBagCollectionSharder(
        fused_params={"optimizer": EmbOptimType.EXACT_SGD, "learning_rate": args.lr}
    )
    plan = EmbeddingShardingPlanner(
        topology=Topology(world_size=1, compute_device="cpu"), constraints=constraints
    ).collective_plan(model, [sharder], dist.group.WORLD)
    whole = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=[sharder])
    dense = [p for name, p in whole.named_parameters() if "embedding_bags" not in name]
    optimizer = torch.optim.SGD(dense, lr=args.lr)

    class Batch:
        def __init__(self, sample: Sample) -> None:
            lengths = torch.ones(sample[1].numel(), dtype=torch.int32)
            self.dense_features, self.labels = sample[0], sample[2][:, 0]
            self.sparse_features = KeyedJaggedTensor(names, sample[1].reshape(-1), lengths=lengths)

    kept: dict[int, Batch] = {}

    def batch(sample: Sample) -> Batch:
        return kept.setdefault(id(sample), Batch(sample))

    def step(sample: Sample) -> None:
        optimizer.zero_grad()
        with autocast(args):
            loss, _ = whole(batch(sample))
        loss.backward()
        optimizer.step()

    def forward(sample: Sample) -> torch.Tensor:
        return whole(Batch(sample))[1][1]

    return step, forward


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve, of scores without ties."""
    ranks = np.empty(len(scores))
    ranks[np.argsort(scores, kind="stable")] = np.arange(1, len(scores) + 1)
    clicked = labels > 0.5
    num = int(clicked.sum())
    return float((ranks[clicked].sum() - num * (num + 1) / 2) / (num * (len(labels) - num)))


def main() -> None:
    """Time, or train and score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=["dlrm", "torchrec"])
    parser.add_argument("--folder", default="")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--max-rows", type=int, default=200_000)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--clicks", default="")
    parser.add_argument("--lr", type=float, default=LR)
    args = parser.parse_args()
    torch.manual_seed(0)
    step, forward = {"dlrm": dlrm, "torchrec": torchrec}[args.peer](args)
    if args.clicks:
        for sample in read(args, "train"):
            step(sample)
        with torch.no_grad():
            pairs = [(forward(sample).float().reshape(-1), sample[2].reshape(-1)) for sample in read(args, "test")]
        scores, labels = (torch.cat(parts).numpy() for parts in zip(*pairs, strict=True))
        print(json.dumps({"auc": auc(scores, labels)}))
        return
    batches = made(args)
    for n in range(args.warmup):
        step(batches[n % NUM_BATCHES])
    began, spent = time.perf_counter(), time.process_time()
    for n in range(args.steps):
        step(batches[n % NUM_BATCHES])
    seconds, spent = time.perf_counter() - began, time.process_time() - spent
    print(json.dumps({"samples_per_s": args.batch * args.steps / seconds, "cpu_ms": 1e3 * spent / args.steps}))


if __name__ == "__main__":
    main()
