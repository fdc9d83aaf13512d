"""Workloads that are no dense training: recommendation, graphs, answers; and the counts of the dense ones."""

from dataclasses import replace
from typing import Any

import pytest

from puna.plan import dlrm, graph, hardware, search, serving, workload
from puna.plan.constants import load
from puna.plan.describe import describe
from puna.plan.dlrm import Codec, Dlrm
from puna.plan.layout import Case, Layout
from puna.plan.workload import PlanError, Transformer, Vision

TERABYTE = Dlrm(
    rows=(
        9980333, 36084, 17217, 7378, 20134, 3, 7112, 1442, 61, 9758201, 1333352, 313829, 10, 2208, 11156, 122, 4, 970,
        14, 9994222, 7267859, 9946608, 415421, 12420, 101, 36,
    ),
    dim=64,
    bottom=(13, 512, 256, 64),
    top=(512, 512, 256, 1),
)  # fmt: skip
CLUSTER = hardware.Cluster(hardware.find("a100-40"), 32, 4, 50.0)


@pytest.mark.parametrize(
    ("name", "parameters", "within"),
    [("llama2-7b", 6.74e9, 0.001), ("llama2-13b", 13.0e9, 0.002), ("llama2-70b", 69.0e9, 0.001),
     ("llama3-8b", 8.03e9, 0.001), ("llama3-405b", 405e9, 0.003), ("gpt3-175b", 174.6e9, 0.003)],
)  # fmt: skip
def test_parameters_are_the_published_ones(name: str, parameters: float, within: float) -> None:
    assert workload.find(name).parameters == pytest.approx(parameters, rel=within)


def test_tokens_a_second_become_the_published_utilisation() -> None:
    """fms-fsdp: 9,600 tokens/s on an H100 are 46 %."""
    operations = workload.find("llama2-7b").flops_per_token(4096, causal=False)
    assert 9600 * operations / 989e12 == pytest.approx(0.46, abs=0.015)


def test_sizes_below_one_and_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(PlanError, match="layers is 0"):
        replace(workload.find("llama2-7b"), layers=0)
    with pytest.raises(PlanError, match="32 heads do not divide among 5"):
        Transformer(2, 64, 64, 32, 5, 64)


@pytest.mark.parametrize(("ratio", "published"), [(11.07, 1.356), (14.67, 1.382)])
def test_compression_gains_what_was_published(ratio: float, published: float) -> None:
    """Forward exchange 31.3 % of a step; Huffman at 200 and 58 GB/s; the exchange's rate is ours for 32 A100."""
    parts = dlrm.step(TERABYTE, CLUSTER, 2048, load().constants)
    rate = 26 * 2048 * 64 * 4 / 32 / parts["forward exchange"]
    assert dlrm.gain(0.313, Codec(ratio, 200e9, 58e9), rate) == pytest.approx(published, rel=0.02)


def test_the_parts_of_a_recommendation_step_add_up_and_a_codec_shrinks_one() -> None:
    plain = dlrm.step(TERABYTE, CLUSTER, 65536, load().constants)
    packed = dlrm.step(TERABYTE, CLUSTER, 65536, load().constants, Codec(14.67, 200e9, 58e9))
    assert sum(dlrm.shares(plain).values()) == pytest.approx(1)
    assert packed["forward exchange"] < plain["forward exchange"]
    assert packed["backward exchange"] == plain["backward exchange"]
    assert packed["seconds"] < plain["seconds"]
    assert TERABYTE.table_bytes / 2**30 == pytest.approx(11.7, abs=0.1)


def test_a_mixture_computes_what_is_active_and_holds_everything() -> None:
    model = workload.find("mixtral-8x7b")
    assert model.parameters == pytest.approx(46.7e9, rel=0.01)
    assert model.flops_per_token(1) / 6 == pytest.approx(12.8e9, rel=0.02)
    cluster = hardware.cluster("h100-sxm", 64)
    layout = Layout(global_batch=256, dp=64, micro_batch=2, ep=8, seq_len=4096)
    told = describe(Case(model, cluster, layout), load())
    dense = Transformer(32, 4096, 2 * 14336, 32, 8, 32000)
    like = describe(Case(dense, cluster, replace(layout, ep=1)), load())
    assert told["parts"]["experts"] > 0 == like["parts"]["experts"]
    assert told["parts"]["products"] == pytest.approx(like["parts"]["products"], rel=0.05)
    alone = describe(Case(model, cluster, replace(layout, ep=1)), load())
    assert alone["memory_gb"]["parameters"] > 4 * told["memory_gb"]["parameters"]


def seen(model: Transformer, **settings: Any) -> dict[str, Any]:
    """Figures of 64 H100 that train what makes a model see, 192 tokens of text a sequence."""
    layout = Layout(global_batch=1024, dp=64, micro_batch=8, seq_len=192, **{"frozen": True} | settings)
    return describe(Case(model, hardware.cluster("h100-sxm", 64), layout), load())


@pytest.mark.parametrize(
    ("name", "parameters", "sight"),
    [("llama3.2-11b-vision", 10.6e9, None), ("llama3.2-90b-vision", 88.8e9, None), ("llama3-405b-vision", None, 100e9)],
)
def test_models_that_see_have_the_published_parameters(name: str, parameters: float, sight: float) -> None:
    """Model card of Llama 3.2; "about 100B" for the 405B adapter (Llama 3, section 7.1)."""
    model = workload.find(name)
    if parameters:
        assert model.parameters == pytest.approx(parameters, rel=0.01)
    else:
        assert model.vision_parameters == pytest.approx(sight, rel=0.04)


def test_sight_is_counted_as_by_hand() -> None:
    """11B, one image of 1,601 patches, 128 tokens of text: encoder, keys and values on patches, the rest on text."""
    model = workload.find("llama3.2-11b-vision")
    assert model.vision
    model = replace(model, vision=replace(model.vision, image_tokens=1601, tile=1601))
    encoder = 40 * (4 * 1280**2 + 2 * 1280 * 5120) + 7680 * 4096
    keys = 2 * 4096 * 1024
    block = 2 * 4096**2 * 1.25 + 3 * 4096 * 14336
    by_hand = 1601 * (6 * encoder + 12 * 40 * 1601 * 1280) + 8 * (
        6 * 128 * (block - keys) + 6 * 1601 * keys + 12 * 128 * 1601 * 4096
    )
    text = workload.find("llama3.1-8b")
    assert 128 * (model.flops_per_token(128) - text.flops_per_token(128)) == pytest.approx(by_hand, rel=1e-9)


def test_sight_costs_time_and_memory_and_is_trained_alone() -> None:
    text, model = workload.find("llama3.1-8b"), workload.find("llama3.2-11b-vision")
    blind, sees, both = seen(text), seen(model), seen(model, frozen=False)
    assert blind["parts"]["vision"] == 0 < sees["parts"]["vision"]
    bound = 1024 * 192 * model._vision_flops(192) / 64 / 989e12
    assert sees["parts"]["vision"] > bound
    assert sees["seconds"] < both["seconds"]
    assert both["parts"]["products"] / sees["parts"]["products"] == pytest.approx(1.5, abs=0.1)
    assert sees["memory_gb"]["optimizer"] * 64 == pytest.approx(12 * model.vision_parameters / 1e9, rel=0.01)
    assert both["memory_gb"]["gradients"] - sees["memory_gb"]["gradients"] == pytest.approx(4 * 8.03, rel=0.01)
    spread = seen(replace(model, vision=replace(model.vision, image_tokens=1601, tile=1601)))  # type: ignore[type-var]
    assert spread["parts"]["vision"] < 0.5 * sees["parts"]["vision"]


def test_a_search_finds_where_to_train_sight() -> None:
    cluster, model = hardware.cluster("h100-sxm", 64), workload.find("llama3.2-90b-vision")
    found = search.search(model, cluster, Layout(global_batch=1024, seq_len=192, frozen=True), load())
    assert found.num_fit > 20
    assert found.layouts[0].frozen


def test_adapters_of_low_rank_take_two_thirds_of_the_operations() -> None:
    layout = Layout(global_batch=64, dp=8, micro_batch=1, seq_len=4096)
    whole, frozen = (
        describe(Case(workload.find("llama2-7b"), hardware.cluster("h100-sxm", 8), replace(layout, frozen=f)), load())
        for f in (False, True)
    )
    assert frozen["parts"]["products"] / whole["parts"]["products"] == pytest.approx(2 / 3, abs=0.02)
    assert frozen["parts"]["gradients"] == frozen["parts"]["optimizer"] == 0
    assert frozen["memory_gb"]["parameters"] == pytest.approx(2 * 6.74, rel=0.01)
    assert frozen["memory_gb"]["gradients"] == frozen["memory_gb"]["optimizer"] == 0
    model = workload.find("llama2-7b")
    matrices = model.layers * model.active_matrices + model.vocab * model.hidden
    assert model.flops_per_token(4096) - model.flops_per_token(4096, frozen=True) == pytest.approx(2 * matrices)
    per_token = frozen["tflops_per_gpu"] / frozen["tokens_per_s_per_gpu"] * 1e12
    assert per_token == pytest.approx(model.flops_per_token(4096, causal=False, frozen=True))


def test_a_sight_that_cannot_be_is_refused() -> None:
    with pytest.raises(PlanError, match="vision: image_tokens is 0"):
        Vision(8, image_tokens=0)


@pytest.mark.parametrize(
    ("name", "parameters", "active"),
    [("mixtral-8x22b", 141e9, 39e9), ("qwen3-30b-a3b", 30.5e9, 3.3e9), ("qwen3-235b-a22b", 235e9, 22e9),
     ("gpt-oss-20b", 20.9e9, 3.6e9), ("gpt-oss-120b", 116.8e9, 5.1e9)],
)  # fmt: skip
def test_mixtures_have_the_parameters_of_their_cards(name: str, parameters: float, active: float) -> None:
    model = workload.find(name)
    assert model.parameters == pytest.approx(parameters, rel=0.01)
    counted = model.layers * model.active_matrices + model.vocab * model.hidden
    assert counted == pytest.approx(active, rel=0.17)  # cards differ in whether they count the tables


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"active": 9}, "9 of them active"),
        ({"expert_ffn": 0}, "of width 0"),
        ({"experts": 0, "active": 0, "expert_ffn": 0}, "ffn is 0"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(changes: dict[str, int], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        replace(workload.find("mixtral-8x7b"), **changes)


def test_decoding_reads_weights_and_the_cache() -> None:
    model, cluster, k = workload.find("llama3-70b"), hardware.cluster("h100-sxm", 8), load().constants
    one = serving.serve(model, cluster, k, batch=1, prompt=1024, answer=256)
    many = serving.serve(model, cluster, k, batch=32, prompt=1024, answer=256)
    assert one.fits
    assert one.decode > model.parameters * 2 / 8 / 3.35e12
    assert one.decode < many.decode < 3 * one.decode
    assert many.tokens_per_s > 8 * one.tokens_per_s
    assert serving.cache_bytes(model, 1) == 2 * 80 * 8 * 128 * 2


def test_a_mixture_decodes_by_reading_what_its_tokens_need() -> None:
    model, cluster, k = workload.find("mixtral-8x7b"), hardware.cluster("h100-sxm", 8), load().constants
    dense = Transformer(32, 4096, 2 * 14336, 32, 8, 32000)
    one, like = (serving.serve(m, cluster, k, batch=1, prompt=16384, answer=64) for m in (model, dense))
    assert one.decode == pytest.approx(like.decode, rel=0.01)
    assert one.prefill == pytest.approx(like.prefill, rel=0.01)
    assert one.weight_bytes > 3 * like.weight_bytes
    many, as_many = (serving.serve(m, cluster, k, batch=8, prompt=512, answer=64) for m in (model, dense))
    assert many.decode > 1.5 * as_many.decode


@pytest.mark.parametrize(("changes", "words"), [({"batch": 0}, "batch is 0"), ({}, "more than the 8")])
def test_serving_refuses_what_cannot_be(changes: dict[str, int], words: str) -> None:
    gpus = 8 if changes else 16
    with pytest.raises(PlanError, match=words):
        serving.serve(
            workload.find("llama3-8b"), hardware.cluster("h100-sxm", gpus), load().constants,
            **{"batch": 1, "prompt": 8, "answer": 8} | changes,
        )  # fmt: skip


def test_partitions_trade_memory_for_reading() -> None:
    whole = graph.epoch(10**8, 10**9, 100, 1, edges_per_s=1e6, disk_bytes_per_s=1e9)
    cut = graph.epoch(10**8, 10**9, 100, 8, edges_per_s=1e6, disk_bytes_per_s=1e9)
    assert whole.swap == 0
    assert cut.memory_bytes == pytest.approx(whole.memory_bytes / 4)
    assert cut.train == whole.train
    assert cut.seconds > whole.seconds
