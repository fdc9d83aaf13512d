"""What must hold for every job and every cluster: bounds, monotony, conservation, units."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from puna.plan import collectives, describe, hardware, search, workload
from puna.plan.constants import load
from puna.plan.estimate import estimate
from puna.plan.footprint import footprint
from puna.plan.layout import Case, Columns, Layout, columns
from puna.plan.workload import PlanError

FITTED = replace(load(), draws=())
POWERS = st.sampled_from([1, 2, 4, 8])
MODELS = st.sampled_from(["llama2-7b", "llama3-70b", "gpt-1.3b", "mixtral-8x7b", "llama3.2-11b-vision"])
GPUS = st.sampled_from(["a100-40", "a100-80", "h100-sxm", "gb200", "mi300x", "l40s"])
few = settings(max_examples=8, deadline=None, derandomize=True)
some = settings(max_examples=25, deadline=None, derandomize=True)


@st.composite
def cases(draw: Any) -> Case:
    """Possible jobs of every kind."""
    model, gpu = workload.find(draw(MODELS)), draw(GPUS)
    tp, pp, cp, dp = draw(POWERS), draw(POWERS), draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 16, 64]))
    micro = draw(POWERS)
    layout = Layout(
        global_batch=dp * micro * pp * draw(POWERS),
        dp=dp, tp=tp, pp=pp, cp=cp,
        vp=draw(st.sampled_from([1, 2])) if pp > 1 else 1,
        ep=draw(st.sampled_from([1, 2])) if model.experts and dp * cp > 1 else 1,
        micro_batch=micro,
        seq_len=draw(st.sampled_from([2048, 8192])),
        sharding=draw(st.sampled_from(["none", "zero1", "zero2", "zero3", "hsdp"])),
        recompute=draw(st.sampled_from(["none", "selective", "full"])),
        attention=draw(st.sampled_from(["unfused", "flash", "cudnn"])),
        stack=draw(st.sampled_from(["pytorch-eager", "pytorch-compiled", "megatron", "jax-xla"])),
        overlaps_gradients=draw(st.booleans()),
        frozen=draw(st.booleans()),
    )  # fmt: skip
    case = Case(model, hardware.cluster(gpu, dp * tp * pp * cp), layout)
    layout.check(case.model, case.cluster)
    return case


@st.composite
def searches(draw: Any) -> tuple[Any, hardware.Cluster, Layout]:
    """Small jobs to search a layout for."""
    model = workload.find(draw(st.sampled_from(["gpt-1.3b", "llama3-8b", "llama2-13b"])))
    cluster = hardware.cluster(draw(st.sampled_from(["a100-40", "h100-sxm", "l40s"])), draw(st.sampled_from([8, 32])))
    return (
        model,
        cluster,
        Layout(global_batch=draw(st.sampled_from([32, 128])), seq_len=draw(st.sampled_from([2048, 8192]))),
    )


def seconds(c: Columns) -> float:
    """The step of one job under the constants that ship."""
    return float(estimate(c, FITTED.constants)["seconds"][0])


def scaled(case: Case, **factors: float) -> Case:
    """The job on an accelerator whose figures are so many times as large."""
    gpu = case.cluster.gpu
    changed = replace(gpu, **{key: getattr(gpu, key) * factor for key, factor in factors.items()})
    return replace(case, cluster=replace(case.cluster, gpu=changed))


@some
@given(cases(), st.sampled_from(["bandwidth", "link", "network"]), st.floats(1.01, 20))
def test_more_bandwidth_is_never_slower(case: Case, key: str, factor: float) -> None:
    assert seconds(columns([scaled(case, **{key: factor})])) <= seconds(columns([case])) * (1 + 1e-9)


@some
@given(cases(), st.floats(1.01, 20))
def test_faster_matrix_units_are_never_slower(case: Case, factor: float) -> None:
    c = columns([case])
    faster = Columns(c | {"peak": c.peak * factor, "peak16": c.peak16 * factor})
    assert seconds(faster) <= seconds(c) * (1 + 1e-9)


@few
@given(searches(), st.sampled_from(["bandwidth", "link", "network"]), st.floats(1.05, 10))
def test_more_bandwidth_never_makes_the_best_layout_slower(job: Any, key: str, factor: float) -> None:
    model, cluster, base = job
    found = search.search(model, cluster, base, FITTED)
    assume(found.num_fit)
    gpu = replace(cluster.gpu, **{key: getattr(cluster.gpu, key) * factor})
    better = search.search(model, replace(cluster, gpu=gpu), base, FITTED)
    assert better.num_fit == found.num_fit
    assert better.seconds[0] <= found.seconds[0] * (1 + 1e-9)


@few
@given(searches(), st.floats(1.01, 8))
def test_more_memory_is_never_less_feasible_nor_slower(job: Any, factor: float) -> None:
    model, cluster, base = job
    found = search.search(model, cluster, base, FITTED)
    gpu = replace(cluster.gpu, memory=cluster.gpu.memory * factor)
    larger = search.search(model, replace(cluster, gpu=gpu), base, FITTED)
    assert larger.num_fit >= found.num_fit
    if found.num_fit:
        assert larger.seconds[0] <= found.seconds[0]


@some
@given(cases())
def test_a_step_takes_longer_than_its_arithmetic(case: Case) -> None:
    """Of the stage that has most, its bubble included: the operations of every matrix over the peak."""
    layout, model = case.layout, case.model
    micro_batches = layout.global_batch // (layout.dp * layout.micro_batch)
    tokens = layout.micro_batch * layout.seq_len
    a_stage = (4 if layout.frozen else 6) * model.layers * model.active_matrices * tokens
    rounds = micro_batches + (layout.pp - 1) / layout.vp
    bound = rounds * a_stage / (layout.pp * layout.tp * layout.cp) / (case.cluster.gpu.peak("bf16") * 1e12)
    assert seconds(columns([case])) > bound


@some
@given(cases())
def test_a_step_takes_longer_than_its_tensor_traffic(case: Case) -> None:
    """Two sums forward, two backward a block, 2 (tp - 1) / tp of the bytes over the links; nothing hides them, so that
    the tensor part alone is that long."""
    layout, model = case.layout, case.model
    micro_batches = layout.global_batch // (layout.dp * layout.micro_batch)
    size = 2 * layout.micro_batch * layout.seq_len / layout.cp * model.hidden
    moved = micro_batches * model.layers / layout.pp * 4 * 2 * (layout.tp - 1) / layout.tp * size
    parts = estimate(columns([case]), FITTED.constants)
    assert parts["seconds"][0] > parts["tensor"][0] >= moved / (case.cluster.gpu.link * 1e9)


@some
@given(cases())
def test_a_step_takes_longer_than_its_gradients_between_nodes(case: Case) -> None:
    """What a node must send of the gradients, in 16 bit, over all of its network cards."""
    layout, cluster = replace(case.layout, tp=1, pp=1, vp=1, cp=1, ep=1, frozen=False), case.cluster
    layout = replace(layout, dp=cluster.gpus, global_batch=cluster.gpus * layout.micro_batch)
    nodes = cluster.gpus / cluster.domain
    assume(nodes > 1 and not case.model.experts)
    moved = 2 * case.model.layers * case.model.block_matrices * (1 - 1 / nodes)
    bound = moved / (cluster.domain * cluster.network_gbps * 1e9 / 8)
    assert seconds(columns([replace(case, layout=layout)])) > bound


@some
@given(cases())
def test_a_step_takes_longer_than_reading_its_weights(case: Case) -> None:
    """Forward and backward of every micro-batch read a stage's matrices, in 16 bit; the experts that have tokens."""
    layout, model = case.layout, case.model
    micro_batches = layout.global_batch // (layout.dp * layout.micro_batch)
    size = 2 * 2 * micro_batches * model.layers * model.active_matrices / (layout.pp * layout.tp * layout.ep)
    assert seconds(columns([case])) > size / (case.cluster.gpu.bandwidth * 1e12)


@some
@given(cases())
def test_the_parts_add_up_and_none_is_negative(case: Case) -> None:
    parts = estimate(columns([case]), FITTED.constants)
    total = parts.pop("seconds")[0]
    assert min(value[0] for value in parts.values()) >= 0
    assert sum(value[0] for value in parts.values()) == pytest.approx(total, rel=1e-6)
    need = footprint(columns([case]))
    whole = need.pop("total")[0]
    assert min(value[0] for value in need.values()) >= 0
    assert sum(value[0] for value in need.values()) == pytest.approx(whole, rel=1e-9)


@few
@given(cases())
def test_tokens_seconds_joules_and_money_are_of_one_step(case: Case) -> None:
    told = describe.describe(case, FITTED)
    tokens = case.layout.global_batch * case.layout.seq_len
    assert told["tokens_per_s_per_gpu"] * case.cluster.gpus * told["seconds"] == pytest.approx(tokens)
    assert told["tokens_per_joule"] * told["power_w"] * case.cluster.gpus * told["seconds"] == pytest.approx(tokens)
    hours = describe.hours(case, FITTED, 1e9 * tokens)["gpu_hours"]
    assert hours * 3600 == pytest.approx(1e9 * told["seconds"] * case.cluster.gpus)
    assert told["usd_per_billion_tokens"] * tokens == pytest.approx(hours * case.cluster.gpu.price)


@few
@given(searches())
def test_every_candidate_takes_the_whole_batch_once(job: Any) -> None:
    model, cluster, base = job
    for layout in search.candidates(model, cluster, base, ("bf16",)):
        assert layout.dp * layout.tp * layout.pp * layout.cp == cluster.gpus
        assert layout.global_batch % (layout.dp * layout.micro_batch) == 0
        assert (layout.global_batch, layout.seq_len) == (base.global_batch, base.seq_len)


@few
@given(cases(), st.floats(1e-3, 1e3))
def test_seconds_are_seconds(case: Case, unit: float) -> None:
    """All rates and all times told in another unit of time: the number of the step changes by that unit."""
    slow = replace(FITTED.constants, **{name: getattr(FITTED.constants, name) * unit for name in ("host", "step")})
    c = columns([case])
    rates = {key: c[key] / unit for key in ("peak", "peak16", "bw", "link", "net")}
    with pytest.MonkeyPatch.context() as patch:
        times = ("start", "ring", "ring_net", "tree", "tree_net")
        told = [
            replace(p, cap=p.cap / unit, **{name: getattr(p, name) * unit for name in times})
            for p in collectives.PROTOCOLS
        ]
        patch.setattr(collectives, "PROTOCOLS", tuple(told))
        patch.setattr("puna.plan.estimate.LAUNCH", 4e-6 * unit)
        patch.setattr("puna.plan.estimate.HANDOVER", 2e-5 * unit)
        other = float(estimate(Columns(c | rates), slow)["seconds"][0])
    assert other == pytest.approx(unit * seconds(c), rel=1e-6)


@few
@given(cases(), st.sampled_from(["dp", "tp", "pp", "micro_batch", "seq_len", "global_batch"]), st.integers(-3, 0))
def test_sizes_below_one_are_refused(case: Case, key: str, size: int) -> None:
    with pytest.raises(PlanError, match=f"{key} is {size}"):
        replace(case.layout, **{key: size}).check(case.model, case.cluster)


@few
@given(st.lists(cases(), min_size=2, max_size=6))
def test_jobs_together_are_each_alone(jobs: list[Case]) -> None:
    together = estimate(columns(jobs), FITTED.constants)["seconds"]
    assert together == pytest.approx(np.array([seconds(columns([job])) for job in jobs]), rel=1e-9)
