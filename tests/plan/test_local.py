"""A step on this machine's CPU from timed kernels: with kernels whose cost is a formula, the step must be too."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from puna.llama.config import DataConfig, LlamaConfig
from puna.plan import hardware, job, local
from puna.plan.local import LocalJob, interpolate, predict, segments, step_seconds
from puna.plan.workload import PlanError
from puna.train.config import MeshConfig, TrainConfig
from puna.train.hardware import Hardware, Kernels, Table, default_path, write

MODEL = LlamaConfig(
    num_layers=3, dim=128, ffn_dim=256, num_heads=2, num_kv_heads=1, head_dim=64, vocab_size=1024, max_seq_len=256
)
TRAIN = TrainConfig(batch_tokens=1024, seq_len=256, micro_batch=2)
RATE, PASS, PAIR = 1e10, 1e-9, 1e-10
MATRICES = 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 256
SIZES = (64, 4096)


def product_table(factor: float) -> Table:
    cells = [factor * 2 * a * b * c / RATE for a in SIZES for b in SIZES for c in SIZES]
    return Table(axes=(SIZES,) * 3, seconds=cells)


def line(per_element: float) -> Table:
    return Table(axes=(SIZES,), seconds=[per_element * size for size in SIZES])


def square(per_pair: float) -> Table:
    return Table(axes=(SIZES, SIZES), seconds=[per_pair * a * a * b for a in SIZES for b in SIZES])


def kernels(num_processes: int = 1, num_threads: int = 2, host: float = 0.0, share: float = 1.0) -> Kernels:
    """Kernels that take a constant time an element or operation; whole blocks as their kernels say, and `host` more."""
    tables = {"product": product_table(1), "product_back": product_table(2)}
    tables |= {"attention": square(PAIR), "attention_back": square(2 * PAIR)}
    for name in ("norm", "turn", "gate", "norm_back", "turn_back", "gate_back", "add", "scale", "softmax", "adamw"):
        tables[name] = line(PASS)
    tables |= {"unit": line(3 * PASS), "unit_back": line(5 * PASS)}
    tables["fresh"] = line(7 * PASS)
    for name in ("lookup", "lookup_back"):
        tables[name] = Table(axes=(SIZES, (64, 1 << 22)), seconds=[PASS * a for a in SIZES for _ in SIZES])
    timed = Kernels(
        num_processes=num_processes,
        num_threads=num_threads,
        tables=tables,
        code_bytes=300_000_000,
        runtime_bytes=10,
        slack=0.5,
    )
    for recompute in ("none", "selective", "full"):
        alone = [(p.num_layers, local._alone(local.Times(timed), p, recompute)) for p in local.PROBES]
        tables[f"blocks_{recompute}"] = Table(axes=((1, 2),), seconds=[n * (host + share * one) for n, one in alone])
    return timed.model_copy(update={"tables": tables})


def machine(**changes: Any) -> Hardware:
    timed = (kernels(**changes), kernels(2, 1, **changes))
    return Hardware(
        num_cores=2, memory=8_000_000_000, kernels=timed, matrix_flops={"fp32": 1e11}, memory_bandwidth={"fp32": 1e10}
    )


def parts(train: TrainConfig = TRAIN, where: Hardware | None = None, **changes: Any) -> dict[str, float]:
    return step_seconds(LocalJob(MODEL, train, MeshConfig(), **changes), where or machine())


def test_times_are_a_power_law_between_and_proportional_beyond() -> None:
    table = Table(axes=((10, 1000),), seconds=(1.0, 100.0**1.5))
    assert interpolate(table, (10,)) == pytest.approx(1.0)
    assert interpolate(table, (100,)) == pytest.approx(10**1.5)
    assert interpolate(table, (1000,)) == pytest.approx(1000.0)
    assert interpolate(table, (4000,)) == pytest.approx(4000.0)
    assert interpolate(table, (1,)) == pytest.approx(10**-1.5)


def test_a_table_of_two_axes_runs_fastest_along_the_last() -> None:
    table = Table(axes=((1, 2), (1, 4, 16)), seconds=(1.0, 4.0, 16.0, 5.0, 20.0, 80.0))
    assert interpolate(table, (2, 4)) == pytest.approx(20.0)
    assert interpolate(table, (1, 8)) == pytest.approx(8.0)
    assert interpolate(table, (4, 32)) == pytest.approx(320.0)


def test_products_are_six_operations_a_weight_and_token() -> None:
    assert parts()["products"] == pytest.approx(6 * 3 * MATRICES * 1024 / RATE)


def test_attention_is_the_square_of_each_document_piece() -> None:
    rows = parts()["attention"]
    assert rows == pytest.approx(3 * PAIR * 3 * 4 * 256**2 * 128)
    assert parts(document_lengths=[128] * 40)["attention"] == pytest.approx(rows / 2)


def test_rows_cut_the_stream_of_documents() -> None:
    lengths = [100, 300, 400]
    found = segments(LocalJob(MODEL, TRAIN, MeshConfig(), document_lengths=lengths))
    assert [size for size, _ in found] == [32, 100, 112, 144, 156, 256]
    assert sum(size * count for size, count in found) == pytest.approx(512)


def test_pointwise_work_is_counted_by_elements() -> None:
    once = 2 * 128 + (128 + 64) + 256
    assert parts()["pointwise"] == pytest.approx(3 * 1024 * PASS * (2 * once + (2 + 5) * 128))
    assert parts()["embedding"] == pytest.approx(2 * 1024 * 128 * PASS)


def test_recompute_does_forward_again() -> None:
    plain, full = parts(), parts(TRAIN.model_copy(update={"recompute": "full"}))
    assert plain["recompute"] == 0
    pointwise = 3 * 1024 * PASS * (2 * 128 + 128 + 64 + 256 + 2 * 128)
    last = 3 * 1024 * (2 * 256 * 128 / RATE + 128 * PASS)
    assert full["recompute"] == pytest.approx(plain["products"] / 3 + plain["attention"] / 3 + pointwise - last)
    selective = parts(TRAIN.model_copy(update={"recompute": "selective"}))
    assert selective["recompute"] == pytest.approx(pointwise)


def test_what_blocks_take_beside_their_kernels_is_counted() -> None:
    found, plain = parts(where=machine(host=1e-3, share=1.2)), parts()
    assert found["host"] == pytest.approx(2 * 3 * 1e-3)
    for part in ("products", "loss", "embedding"):
        assert found[part] == pytest.approx(1.2 * plain[part])
    assert plain["host"] == pytest.approx(0, abs=1e-9)


def test_the_loss_and_the_optimizer() -> None:
    found = parts()
    head = 6 * 1024 * 128 * 1024 / RATE + 1024 * 1024 * PASS
    assert found["loss"] == pytest.approx(head + PASS * (1024 * 128 + 2 * 1024 * 128 + 2 * 1024 * 128))
    assert found["optimizer"] == pytest.approx(MODEL.num_parameters * PASS)
    assert parts(num_processes=2)["optimizer"] == pytest.approx(MODEL.num_parameters * PASS / 2)


def test_logits_beyond_mallocs_largest_threshold_are_mapped_anew() -> None:
    wide = MODEL.model_copy(update={"vocab_size": 20_000})
    found = step_seconds(LocalJob(wide, TRAIN, MeshConfig()), machine())["loss"]
    head = 6 * 1024 * 128 * 20_000 / RATE + 1024 * 20_000 * PASS
    ends = PASS * (1024 * 128 + 2 * 20_000 * 128 + 2 * 1024 * 128)
    assert found == pytest.approx(head + ends + 7 * PASS * 1024 * 20_000)


def test_muon_multiplies_the_blocks_matrices() -> None:
    found = parts(TRAIN.model_copy(update={"optimizer": "muon"}))
    assert found["optimizer"] > parts()["optimizer"]
    square = 128
    one = local._muon(local.Times(kernels()), square, square)
    assert one == pytest.approx(5 * 3 * 2 * square**3 / RATE + 8 * square**2 * PASS)


def test_sharding_gathers_twice_and_reduces_once() -> None:
    block, root = MATRICES + 2 * 128, 2 * 1024 * 128 + 128
    found = parts(num_processes=2)
    assert found["sharding"] == pytest.approx(PASS * (3 * (2 * 3 * block + root) + 5 * (3 * block + root)))
    kept = step_seconds(LocalJob(MODEL, TRAIN, MeshConfig(reshard_after_forward=False), 2), machine())
    assert kept["sharding"] == pytest.approx(PASS * (3 * (3 * block + root) + 5 * (3 * block + root)))
    assert parts()["sharding"] == pytest.approx(PASS * MODEL.num_parameters)


def test_micro_batches_are_those_of_one_rank() -> None:
    assert parts(num_processes=2)["products"] == pytest.approx(parts()["products"] / 2)


def test_threads_asked_for_must_have_been_timed() -> None:
    where = machine().model_copy(update={"kernels": (kernels(1, 1), kernels(1, 8), kernels(2, 4))})
    for threads in (1, 8):
        assert local.kernels_for(where, LocalJob(MODEL, TRAIN, MeshConfig(), 1, threads)).num_threads == threads
    with pytest.raises(PlanError, match=r"timed with 8 threads a process, the run has 4\. --run\.num_threads 8"):
        local.kernels_for(where, LocalJob(MODEL, TRAIN, MeshConfig(), 1, 4))


def test_where_all_cores_are_shared_out_the_nearest_threads_are_taken() -> None:
    where = machine().model_copy(update={"kernels": (kernels(1, 1), kernels(1, 8), kernels(2, 4)), "num_cores": 6})
    assert local.kernels_for(where, LocalJob(MODEL, TRAIN, MeshConfig())).num_threads == 8
    assert local.kernels_for(where, LocalJob(MODEL, TRAIN, MeshConfig(), 4)).num_processes == 2


def test_a_machine_without_timed_kernels_is_refused() -> None:
    with pytest.raises(PlanError, match=r"kernels were not timed on this machine\. Run `puna doctor`"):
        predict(LocalJob(MODEL, TRAIN, MeshConfig()), Hardware(num_cores=2))


def test_memory_is_the_exact_count_and_what_the_machine_adds() -> None:
    found = predict(LocalJob(MODEL, TRAIN, MeshConfig()), machine())
    assert found["memory"]["parameters"] == 4 * MODEL.num_parameters
    assert found["memory"]["runtime"] == 10
    assert found["memory"]["slack"] == round(0.5 * local.memory(LocalJob(MODEL, TRAIN, MeshConfig())).transient)
    assert found["growth_bytes"] == sum(found["memory"].values())
    assert found["low"] < found["seconds"] < found["high"]


def test_muons_updates_lie_in_the_allocators_holes() -> None:
    muon = TRAIN.model_copy(update={"optimizer": "muon"})
    counted = local.memory(LocalJob(MODEL, muon, MeshConfig()))
    for slack, expected in ((0.1, 0), (5.0, 5 * counted.transient - counted.update)):
        timed = tuple(one.model_copy(update={"slack": slack}) for one in machine().kernels)
        found = predict(LocalJob(MODEL, muon, MeshConfig()), machine().model_copy(update={"kernels": timed}))
        assert found["memory"]["slack"] == expected


def test_memory_of_several_processes_counts_what_they_share() -> None:
    told = local.memory(LocalJob(MODEL, TRAIN, MeshConfig(), 2))
    assert told.exchanged > 0
    sockets = local.memory(LocalJob(MODEL, TRAIN, MeshConfig(shared_memory=False), 2))
    assert (sockets.exchanged, sockets.gradients) == (0, told.gradients)
    many = TRAIN.model_copy(update={"batch_tokens": 2048})
    assert local.memory(LocalJob(MODEL, many, MeshConfig(), 2)).gradients > told.gradients


# --- of a recipe ----------------------------------------------------------------------------------------------------


@pytest.fixture
def entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hardware:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    write(machine(), default_path())
    return machine()


def here(gpu: str = "this-machine", gpus: int = 2, train: TrainConfig = TRAIN, **changes: Any) -> dict[str, Any] | None:
    cluster = hardware.cluster(gpu, gpus)
    case = job.build(*_recipe(train, cluster), changes)
    return local.here(case, MODEL, train, MeshConfig(), DataConfig(path="/nowhere"))


def _recipe(train: TrainConfig, cluster: hardware.Cluster) -> Any:
    shape, layout = job.of_recipe(MODEL, train, MeshConfig(), cluster)
    return shape, cluster, layout


def test_a_recipe_on_this_machine_is_put_together_from_its_kernels(entry: Hardware) -> None:
    expected = predict(LocalJob(MODEL, TRAIN, MeshConfig(), 2), entry)
    assert here() == expected
    changed = here(micro_batch=1, recompute="full")
    train = TRAIN.model_copy(update={"micro_batch": 1, "recompute": "full"})
    assert changed == predict(LocalJob(MODEL, train, MeshConfig(), 2), entry)


def test_what_the_kernels_do_not_cover_is_left_to_the_cluster_model(entry: Hardware) -> None:
    assert here("a100-80") is None
    assert here(tp=2) is None
    assert here(sharding="zero1") is None
    write(entry.model_copy(update={"matrix_flops": {"fp32": 1e11, "bf16": 2e11}}), default_path())
    assert here() is None
    write(entry.model_copy(update={"kernels": ()}), default_path())
    assert here(train=TRAIN.model_copy(update={"dtype": "fp32"})) is None


def test_figures_with_the_local_time_and_memory(entry: Hardware) -> None:
    found = here()
    assert found is not None
    memory = {"total": 1.0, "capacity": 8.0}
    before = {"seconds": 2 * found["seconds"], "gpus": 2, "memory_gb": memory, "mfu": 0.1, "model": "x"}
    before |= {"tokens_per_s_per_gpu": 10.0, "tflops_per_gpu": 1.0}
    after = local.overlay(before, found)
    assert (after["seconds"], after["mfu"], after["model"]) == (found["seconds"], 0.2, "x")
    assert after["memory_gb"]["code"] == 0.3
    assert after["memory_gb"]["total"] == pytest.approx((3e8 + found["growth_bytes"]) / 1e9)
    assert after["memory_gb"]["capacity"] == 4.0
    assert after["fits"]
    assert not local.overlay(before | {"memory_gb": memory | {"capacity": 0.5}}, found)["fits"]


def test_lengths_come_from_the_shards(tmp_path: Path) -> None:
    assert local.document_lengths(DataConfig(path=str(tmp_path))) is None
    np.save(tmp_path / "train-00000.offsets.npy", np.array([0, 5, 12]))
    np.arange(12, dtype="<u2").tofile(tmp_path / "train-00000.tokens")
    files = {path.name: {"bytes": path.stat().st_size} for path in sorted(tmp_path.iterdir())}
    split = {"files": list(files), "num_tokens": 12, "num_documents": 2, "num_bytes": 9}
    manifest = {"format_version": 1, "dtype": "uint16", "vocab_size": 12, "tokenizer_hash": "", "bos": 0, "eos": 1}
    (tmp_path / "shards.json").write_text(json.dumps(manifest | {"splits": {"train": split}, "files": files}))
    assert local.document_lengths(DataConfig(path=str(tmp_path))) == [5, 7]


def test_more_of_anything_is_never_faster() -> None:
    base = LocalJob(MODEL, TRAIN, MeshConfig())
    seconds = sum(step_seconds(base, machine()).values())
    for other in (
        replace(base, model=MODEL.model_copy(update={"num_layers": 4})),
        replace(base, model=MODEL.model_copy(update={"vocab_size": 2048})),
        replace(base, train=TRAIN.model_copy(update={"batch_tokens": 2048})),
        replace(base, train=TRAIN.model_copy(update={"recompute": "full"})),
    ):
        assert sum(step_seconds(other, machine()).values()) > seconds
