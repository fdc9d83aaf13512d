"""Memory of one rank of a training run, estimated from its settings. No torch here."""

import math
from dataclasses import asdict, dataclass

from puna.llama.config import LlamaConfig
from puna.plan.fsdp import Sharding, peak_unsharded
from puna.plan.llama import kept_bytes, units
from puna.train.config import TrainConfig

MASTER_BYTES = 4
CHUNK_BYTES, MIN_CHUNK = 1 << 26, 512  # as in puna/llama/loss.py, which needs torch


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, by what they are for."""

    parameters: int
    gradients: int
    optimizer: int
    average: int
    gathered: int
    exchanged: int
    activations: int
    logits: int
    backward: int
    update: int

    @property
    def total(self) -> int:
        """The sum. Not all of it is alive at one moment, but an allocator that has grown to hold each of these does not
        lay one into the holes of another; measured on CPUs, a rank holds the sum."""
        return sum(asdict(self).values())

    @property
    def transient(self) -> int:
        """What comes and goes within a forward and its backward."""
        return self.gathered + self.exchanged + self.activations + self.logits + self.backward


def estimate_memory(
    model: LlamaConfig,
    train: TrainConfig,
    *,
    num_ranks: int,
    shard: int,
    reshard: bool,
    accumulates: bool,
    averages: bool,
    compute_bytes: int,
    shares_memory: bool = False,
) -> Memory:
    """Memory of a rank of `num_ranks`, each copy of the model cut over `shard` of them (F).

    With N parameters (padded to multiples of F), in float32: parameters and gradients 4 N / F each; AdamW 8 N / F, Muon
    4 N / F for the matrices of the blocks; averaged weights 4 N / F. FSDP keeps gathered, in the compute dtype, the
    root and the two largest neighbouring blocks, or everything without resharding; and gradients that are not reduced
    yet: those of the root and one block, or with accumulation 4 N. Activations: `puna.plan.llama.kept_bytes` in the
    compute dtype; with recompute, a block's input (full) and its matrix products (selective), and one whole block.
    Logits: the loss's chunk. Backward: gradients inside a block's feed-forward, and with accumulation the newest
    gradient of a table before it is added. Update: Muon's orthogonal matrices. Allocator slack and the code itself are
    not in it.

    accumulates: whether a step has several micro-batches. shares_memory: whether collectives go through shared memory,
    of which a rank touches its own slabs and its part of the others'.
    """
    all_units = units(model, "root")
    whole = sum(unit.elements(shard) for unit in all_units)
    own, root, block = whole // shard, all_units[-1].elements(shard), all_units[0].elements(shard)
    sharding = Sharding(shard, reshard="inner" if reshard else "none", encloses=True, param_bytes=compute_bytes)
    alone = num_ranks == 1 and compute_bytes == MASTER_BYTES
    unreduced = whole * MASTER_BYTES if accumulates else (root + block) * compute_bytes
    return Memory(
        parameters=own * MASTER_BYTES,
        gradients=own * MASTER_BYTES + (0 if alone else unreduced),
        optimizer=_moments(model, train, own),
        average=own * MASTER_BYTES if averages else 0,
        gathered=0 if alone else peak_unsharded(all_units, sharding) * compute_bytes,
        exchanged=_slabs(root, block, shard) if shares_memory else 0,
        activations=_activations(model, train, compute_bytes),
        logits=_logits(model, train, compute_bytes),
        backward=_backward(model, train, accumulates, compute_bytes),
        update=_update(model, train, shard),
    )


def _slabs(root: int, block: int, shard: int) -> int:
    """Two slabs, used in turn, each as large as the largest gradient that a rank has put there."""
    touched = 1 + (shard - 1) / shard
    return int(2 * MASTER_BYTES * max(root, block) * touched)


def _update(model: LlamaConfig, train: TrainConfig, shard: int) -> int:
    """Under Muon the updates of all matrices of the blocks, before and after they are made orthogonal, and what the
    largest needs for it; sharded, what is sent and received too."""
    if train.optimizer == "adamw":
        return 0
    shapes = [shape for unit in units(model, "root")[:-1] for shape in unit.shapes if len(shape) == 2]
    copies = 2 if shard == 1 else 6
    largest = max(math.prod(shape) for shape in shapes)
    return MASTER_BYTES * (copies * sum(math.prod(shape) for shape in shapes) // shard + 3 * largest)


def _moments(model: LlamaConfig, train: TrainConfig, own: int) -> int:
    """Two moments a parameter; under Muon one for the matrices of the blocks."""
    if train.optimizer != "muon":
        return 2 * MASTER_BYTES * own
    gains = 2 * model.dim * model.num_layers
    matrices = sum(unit.elements() for unit in units(model, "root")[:-1]) - gains
    return 2 * MASTER_BYTES * own - MASTER_BYTES * round(matrices * own / model.num_parameters)


def _activations(model: LlamaConfig, train: TrainConfig, compute_bytes: int) -> int:
    def kept(num_layers: int) -> int:
        layers = model.model_copy(update={"num_layers": num_layers})
        return kept_bytes(layers, train.micro_batch, train.seq_len) * compute_bytes // 4

    if train.recompute == "none":
        return kept(model.num_layers)
    query, key = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    products = 2 * model.dim + 2 * query + 2 * key + 2 * model.ffn_dim if train.recompute == "selective" else 0
    per_layer = train.micro_batch * train.seq_len * (model.dim + products) * compute_bytes
    return kept(1) + model.num_layers * per_layer


def _logits(model: LlamaConfig, train: TrainConfig, compute_bytes: int) -> int:
    """One chunk in float32, and in the compute dtype twice more where that is another."""
    rows = min(train.micro_batch * train.seq_len, chunk_rows(model.vocab_size))
    return rows * model.vocab_size * (4 if compute_bytes == 4 else 4 + 2 * compute_bytes)


def _backward(model: LlamaConfig, train: TrainConfig, accumulates: bool, compute_bytes: int) -> int:
    """Gradients of gate, of up and of their product; and of a table."""
    inner = 3 * train.micro_batch * train.seq_len * model.ffn_dim * compute_bytes
    return inner + (MASTER_BYTES * model.vocab_size * model.dim if accumulates else 0)


def chunk_rows(vocab_size: int) -> int:
    """Tokens of one chunk of the loss."""
    return max(MIN_CHUNK, CHUNK_BYTES // (4 * vocab_size))
