"""The memory estimate: by hand for a small model, and its parts as settings change."""

import pytest

from puna.llama import loss
from puna.llama.config import LlamaConfig
from puna.plan import memory
from puna.plan.llama import kept_bytes
from puna.plan.memory import estimate_memory
from puna.train.config import TrainConfig

MODEL = LlamaConfig(
    num_layers=4, dim=64, ffn_dim=128, num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=512, max_seq_len=256
)
BLOCK = 64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64
ROOT = 2 * 512 * 64 + 64
ALL = 4 * BLOCK + ROOT
PLAIN = {"num_ranks": 1, "shard": 1, "reshard": True, "accumulates": False, "averages": False, "compute_bytes": 4}


def estimate(train: TrainConfig | None = None, **changed: int | bool) -> memory.Memory:
    return estimate_memory(MODEL, train or TrainConfig(seq_len=128, micro_batch=2), **(PLAIN | changed))  # type: ignore[arg-type]


def test_one_process_in_float32():
    found = estimate()
    assert MODEL.num_parameters == ALL
    assert (found.parameters, found.gradients, found.optimizer) == (4 * ALL, 4 * ALL, 8 * ALL)
    assert (found.average, found.gathered) == (0, 0)
    assert found.activations == kept_bytes(MODEL, 2, 128)
    assert found.logits == 2 * 128 * 512 * 4
    assert found.backward == 4 * 3 * 2 * 128 * 128
    assert found.total == 16 * ALL + found.activations + found.logits + found.backward


def test_states_are_shared_and_gathered():
    found = estimate(num_ranks=4, shard=4)
    own = ALL // 4
    assert (found.parameters, found.optimizer) == (4 * own, 8 * own)
    assert found.gathered == 4 * (ROOT + 2 * BLOCK)
    assert found.gradients == 4 * own + 4 * (ROOT + BLOCK)
    assert estimate(num_ranks=4, shard=4, reshard=False).gathered == 4 * ALL
    assert estimate(num_ranks=4, shard=4, accumulates=True).gradients == 4 * own + 4 * ALL
    assert estimate(num_ranks=4, shard=4, compute_bytes=2).gathered == found.gathered // 2


def test_accumulation_holds_a_tables_newest_gradient():
    assert estimate(accumulates=True).backward - estimate().backward == 4 * 512 * 64


def test_averaged_weights():
    assert estimate(averages=True).total - estimate().total == 4 * ALL


def test_muon_keeps_one_moment_of_the_blocks_matrices():
    found = estimate(TrainConfig(seq_len=128, micro_batch=2, optimizer="muon"))
    assert found.optimizer == 8 * ALL - 4 * 4 * (BLOCK - 2 * 64)


def test_muon_makes_the_updates_of_all_matrices_at_once():
    muon = TrainConfig(seq_len=128, micro_batch=2, optimizer="muon")
    matrices = 4 * (BLOCK - 2 * 64)
    assert estimate().update == 0
    assert estimate(muon).update == 4 * (2 * matrices + 3 * 128 * 64)
    assert estimate(muon, num_ranks=2, shard=2).update == 4 * (6 * matrices // 2 + 3 * 128 * 64)


def test_shared_memory_holds_the_largest_gradient_twice_and_part_of_the_others():
    assert estimate(num_ranks=2, shard=2).exchanged == 0
    assert estimate(num_ranks=2, shard=2, shares_memory=True).exchanged == 2 * 4 * ROOT * 3 // 2
    assert estimate(num_ranks=4, shard=4, shares_memory=True).exchanged == 2 * 4 * ROOT * 7 // 4


def test_recompute_keeps_less():
    kept = [
        estimate(TrainConfig(seq_len=128, micro_batch=2, recompute=how)).activations
        for how in ("none", "selective", "full")
    ]
    assert kept[0] > kept[1] > kept[2]


@pytest.mark.parametrize("changed", [{"micro_batch": 4}, {"seq_len": 256}])
def test_activations_grow_with_tokens(changed):
    more = estimate(TrainConfig(**({"seq_len": 128, "micro_batch": 2} | changed)))
    fixed = 4 * 512 * 64
    assert more.activations - fixed == pytest.approx(2 * (estimate().activations - fixed), rel=0.01)


def test_chunks_are_the_losss():
    assert (memory.CHUNK_BYTES, memory.MIN_CHUNK) == (loss.CHUNK_BYTES, loss.MIN_CHUNK)
