"""The timeline: what must hold for every job, and figures that can be checked by hand."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.plan import collectives, hardware, workload
from puna.plan.constants import load
from puna.plan.estimate import estimate
from puna.plan.footprint import footprint
from puna.plan.layout import Case, Columns, Layout, columns
from puna.plan.workload import PlanError

POWERS = st.sampled_from([1, 2, 4, 8])


@st.composite
def cases(draw: Any) -> Case:
    """Jobs of every kind of layout."""
    model = workload.find(draw(st.sampled_from(["llama2-7b", "llama3-70b", "gpt-1.3b", "gpt3-175b"])))
    gpu = draw(st.sampled_from(["a100-80", "h100-sxm", "gb200", "mi300x"]))
    tp, pp, cp, dp = draw(POWERS), draw(POWERS), draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 16, 64]))
    micro = draw(POWERS)
    layout = Layout(
        global_batch=dp * micro * pp * draw(POWERS),
        dp=dp,
        tp=tp,
        pp=pp,
        vp=draw(st.sampled_from([1, 2])) if pp > 1 else 1,
        cp=cp,
        micro_batch=micro,
        seq_len=draw(st.sampled_from([2048, 8192])),
        sharding=draw(st.sampled_from(["zero1", "zero2", "zero3", "hsdp"])),
        recompute=draw(st.sampled_from(["none", "selective", "full"])),
        attention=draw(st.sampled_from(["unfused", "flash", "cudnn"])),
        stack=draw(st.sampled_from(["pytorch-eager", "pytorch-compiled", "megatron", "jax-xla"])),
        overlaps_gradients=draw(st.booleans()),
    )
    return Case(model, hardware.cluster(gpu, dp * tp * pp * cp), layout)


def seconds(c: Columns) -> float:
    """The step of one job under the constants that ship."""
    return float(estimate(c, load().constants)["seconds"][0])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(cases())
def test_twice_the_batch_is_at_most_twice_the_time(case: Case) -> None:
    c = columns([case])
    longer = Columns(c | {"B": c.B * 2})
    once, twice = seconds(c), seconds(longer)
    assert once < twice < 2.001 * once


@settings(max_examples=25, deadline=None, derandomize=True)
@given(cases())
def test_recomputation_costs_time_and_saves_memory(case: Case) -> None:
    none, full = (replace(case, layout=replace(case.layout, recompute=kind)) for kind in ("none", "full"))
    assert seconds(columns([full])) > seconds(columns([none]))
    inputs_are_whole = case.layout.stack == "megatron" and case.layout.micro_batch == 1
    need = [footprint(columns([job]))["activations"][0] for job in (none, full)]
    assert need[1] < need[0] * 2 or inputs_are_whole


def test_a_single_device_has_no_communication() -> None:
    layout = Layout(global_batch=8, micro_batch=2, sharding="none")
    parts = estimate(
        columns([Case(workload.find("llama2-7b"), hardware.cluster("h100-sxm", 1), layout)]), load().constants
    )
    for name in ("tensor", "context", "sharding", "gradients", "pipeline", "bubble"):
        assert parts[name][0] == 0


def test_the_bubble_of_a_pipeline_is_stages_less_one_over_micro_batches_and_chunks() -> None:
    """(p - 1) / (v m) of the ideal time (Narayanan et al. 2021), but for the head, which only the last stage has."""
    model = replace(workload.find("gpt3-175b"), vocab=8)
    for vp in (1, 3):
        layout = Layout(global_batch=64, dp=1, tp=8, pp=8, vp=vp, seq_len=2048, stack="megatron")
        parts = estimate(columns([Case(model, hardware.cluster("a100-80", 64), layout)]), load().constants)
        work = sum(parts[name][0] for name in ("products", "attention", "pointwise", "tensor", "recompute", "host"))
        assert parts["bubble"][0] / work == pytest.approx(7 / (vp * 64), rel=0.02)


def test_gathers_fall_as_one_over_nodes_and_sums_do_not() -> None:
    """The study's finding: rings pay a hop for every rank, trees for every doubling."""
    size, eight = np.array(float(4 << 20)), np.array(8.0)
    speeds = {}
    for name, call in (("gather", collectives.gather), ("sum", collectives.reduce_all)):
        times = [float(call(size, np.array(8.0 * n), eight, np.array(360e9), np.array(40e9), 2.0)) for n in (64, 256)]
        speeds[name] = times[0] / times[1]
    assert speeds["gather"] == pytest.approx(0.25, abs=0.05)
    assert speeds["sum"] > 0.7


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tp": 3, "dp": 1, "cp": 1, "pp": 1}, "tp 3 does not divide heads 32.*Set tp to"),
        ({"dp": 3}, "dp 3 x tp 1 x pp 1 x cp 1 is not"),
        ({"micro_batch": 0}, "micro_batch is 0"),
        ({"seq_len": -4}, "seq_len is -4"),
        ({"micro_batch": 3}, "dp x micro_batch 24 does not divide global_batch 64"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict[str, int], words: str) -> None:
    layout = replace(Layout(global_batch=64, dp=8), **changes)
    gpus = 3 if changes.get("tp") else 8
    with pytest.raises(PlanError, match=words):
        layout.check(workload.find("llama2-7b"), hardware.cluster("h100-sxm", gpus))


def test_an_unknown_model_names_the_nearest() -> None:
    with pytest.raises(PlanError, match="Did you mean llama3-405b"):
        workload.find("llama3-450b")


def test_a_sharded_optimiser_of_pytorch_broadcasts_in_turn_and_hides_none_of_it() -> None:
    def gradients(ranks: int, **values: object) -> float:
        layout = Layout(
            global_batch=8 * ranks, dp=ranks, micro_batch=2, seq_len=2048, stack="pytorch-eager", reduce_bytes=2
        )
        cluster = hardware.cluster("a100-80", ranks)
        case = Case(workload.find("llama2-7b"), cluster, replace(layout, **values))  # type: ignore[arg-type]
        return float(estimate(columns([case]), load().constants)["gradients"][0])

    few, many = gradients(64), gradients(1024)
    assert many > 3 * few
    assert gradients(1024, shard_group=8) < 1.1 * gradients(64, shard_group=8) < many / 3
    assert gradients(1024, stack="megatron") < many / 3
    assert gradients(64, stack="megatron") < 0.5 * few


def test_recomputation_leaves_out_the_last_product_where_the_framework_does() -> None:
    constants = replace(load().constants, megatron=1.0, compiled=1.0, jax=1.0)
    layout = Layout(global_batch=32, dp=8, micro_batch=4, seq_len=2048, sharding="none", recompute="full")

    def parts(stack: str) -> dict[str, np.ndarray]:
        case = Case(workload.find("gpt-5b"), hardware.cluster("a100-80", 8), replace(layout, stack=stack))  # type: ignore[arg-type]
        return estimate(columns([case]), constants)

    whole = parts("megatron")
    for stack in ("pytorch-compiled", "jax-xla"):
        saved = whole["recompute"] - parts(stack)["recompute"]
        # the second of two wide matrices is a third of a GPT block, its forward a third of its training
        assert 0.08 < saved[0] / whole["products"][0] < 0.13
    assert parts("oneflow")["recompute"][0] == pytest.approx(whole["recompute"][0])
