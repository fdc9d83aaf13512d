"""The search: fast, right about what fits, and able to say why."""

import time
from dataclasses import replace

import pytest

from puna.plan import fits, hardware, job, search, workload
from puna.plan.constants import load
from puna.plan.layout import Case, Layout
from puna.plan.workload import PlanError

LARGEST = workload.find("llama3-405b")


@pytest.mark.parametrize("gpus", [8192, 16384])
def test_meta_s_layout_is_near_the_best_found_in_two_seconds(gpus: int) -> None:
    cluster = hardware.cluster("h100-sxm", gpus)
    base = job.usual_layout(LARGEST, cluster, None, None)
    began = time.process_time()
    told = search.report(LARGEST, cluster, base, load())
    assert time.process_time() - began < 2
    assert told["tried"] > 1000
    best = told["best"]
    assert best["fits"]
    theirs = told["published"]
    assert {key: theirs["layout"][key] for key in ("tp", "pp", "cp", "sharding", "recompute")} == {
        "tp": 8, "pp": 16, "cp": 1, "sharding": "zero2", "recompute": "none",
    }  # fmt: skip
    assert theirs["layout"]["dp"] == gpus // 128
    assert theirs["fits"]
    assert theirs["seconds"] <= 1.05 * best["seconds"]


@pytest.mark.parametrize("gpus", [8192, 16384])
def test_with_meta_s_kernels_the_term_that_differs_is_named(gpus: int) -> None:
    """With the gate's product made again, layouts fit on 16,384 that share tensor traffic with context parallelism."""
    cluster = hardware.cluster("h100-sxm", gpus)
    base = replace(job.usual_layout(LARGEST, cluster, None, None), keeps_gated=False)
    told = search.report(LARGEST, cluster, base, load())
    theirs, best = told["published"], told["best"]
    more = theirs["against_best"]
    assert more["step_time"] == pytest.approx(theirs["seconds"] / best["seconds"] - 1)
    assert more["step_time"] <= 0.05 or more["term"] == "tensor"
    differences = {name: abs(theirs["parts"][name] - best["parts"][name]) for name in best["parts"]}
    assert abs(more["seconds"]) == pytest.approx(max(differences.values()))
    assert f"most of it {more['term']}: {more['seconds']:+.3g} s" in "\n".join(search.lines(told))


def test_every_candidate_divides_what_it_cuts() -> None:
    cluster = hardware.cluster("h100-sxm", 64)
    model = workload.find("llama3-70b")
    base = Layout(global_batch=256, seq_len=32768)
    layouts = list(search.candidates(model, cluster, base, ("bf16", "fp8")))
    assert len({(x.dp, x.tp, x.pp, x.cp) for x in layouts}) > 10
    for layout in layouts:
        layout.check(model, cluster)


def test_the_found_layouts_are_sorted_and_those_that_do_not_fit_come_last() -> None:
    cluster = hardware.cluster("a100-40", 64)
    model = workload.find("llama2-13b")
    found = search.search(model, cluster, Layout(global_batch=256, seq_len=4096), load())
    room = fits.ROOM * 40e9
    fit = found.bytes <= room
    assert fit[: min(found.num_fit, len(fit))].all()
    assert (found.seconds[:50] == sorted(found.seconds[:50])).all()


def test_together_is_as_alone() -> None:
    cluster = hardware.cluster("h100-sxm", 64)
    model = workload.find("llama3-70b")
    found = search.search(model, cluster, Layout(global_batch=256, seq_len=8192), load(), ("bf16", "fp8"))
    for index in (0, 7, 100):
        alone = search.describe(Case(model, cluster, found.layouts[index]), load())
        assert alone["seconds"] == pytest.approx(found.seconds[index])
        assert alone["memory_gb"]["total"] == pytest.approx(found.bytes[index] / 1e9)


def test_what_would_flip_the_choice_does() -> None:
    cluster = hardware.cluster("h100-sxm", 2048)
    model = workload.find("llama2-7b")
    base = Layout(global_batch=2048, seq_len=4096)
    told = search.report(model, cluster, base, load())
    for flip in told["flips"]:
        assert (flip["tp"], flip["pp"], flip["dp"]) != tuple(told["best"]["layout"][key] for key in ("tp", "pp", "dp"))
    assert told["binding"]["term"] in told["best"]["parts"]


def test_what_does_not_fit_is_told_with_what_helps() -> None:
    cluster = hardware.cluster("a100-40", 8)
    layout = Layout(global_batch=64, dp=8, micro_batch=8, seq_len=4096, sharding="zero1", stack="pytorch-eager")
    case = Case(workload.find("llama2-13b"), cluster, layout)
    short = fits.shortfall(case)
    assert (short["capacity_gb"], short["usable_gb"]) == (40, fits.ROOM * 40)
    assert short["gap_gb"] == pytest.approx(short["need_gb"] - fits.ROOM * 40)
    assert sum(short["by_kind_gb"].values()) == pytest.approx(short["need_gb"])
    ways = fits.remedies(case, load())
    assert len(ways) == 3
    assert [way["device_time"] for way in ways] == sorted(way["device_time"] for way in ways)
    assert all(way["need_gb"] <= fits.ROOM * 40 for way in ways)
    words = fits.sentence(short, ways)
    assert f"needs {short['need_gb']:.1f} GB of 40.0 GB, of which 38.0 may be filled" in words
    for place, way in enumerate(ways, 1):
        assert f"({place}) {way['change']}: {way['device_time']:+.0%} device time" in words
    assert "instead of" in ways[0]["change"]


def test_twice_the_devices_in_half_the_time_are_no_bargain() -> None:
    """The price is what is paid, device time; not what is waited."""
    layout = Layout(global_batch=1024, dp=8, micro_batch=1, seq_len=4096, sharding="zero3", recompute="full")
    case = Case(workload.find("llama2-70b"), hardware.cluster("a100-80", 8), layout)
    ways = fits.remedies(case, load())
    more = [way for way in ways if "GPUs instead of 8" in way["change"]]
    assert more
    for way in more:
        assert way["step_time"] < -0.4
        assert way["device_time"] > way["step_time"] + 0.3


def test_what_fits_by_the_search_fits_by_the_estimate() -> None:
    """One bound for all: a layout is never found, and then refused."""
    cluster, model = hardware.cluster("a100-40", 32), workload.find("llama2-13b")
    found = search.search(model, cluster, Layout(global_batch=256, seq_len=4096), load())
    for place, layout in enumerate(found.layouts[found.num_fit - 15 : found.num_fit + 15], found.num_fit - 15):
        told = search.describe(Case(model, cluster, layout), replace(load(), draws=()))
        assert told["fits"] == (place < found.num_fit)
        assert (fits.shortfall(Case(model, cluster, layout))["gap_gb"] == 0) == told["fits"]


def test_where_no_single_setting_helps_two_do() -> None:
    cluster = hardware.cluster("a100-40", 16)
    case = Case(workload.find("llama2-70b"), cluster, Layout(global_batch=512, dp=16, seq_len=4096))
    ways = fits.remedies(case, load())
    assert ways
    assert all(" and " in way["change"] for way in ways)
    assert all(way["need_gb"] <= fits.ROOM * 40 for way in ways)


def test_nothing_fits_is_no_plan_but_a_shortfall() -> None:
    told = search.report(LARGEST, hardware.cluster("rtx4090", 8), Layout(global_batch=8, seq_len=4096), load())
    assert not told["fits"]
    assert told["shortfall"]["gap_gb"] > 0


def test_a_batch_that_no_device_count_divides_is_refused() -> None:
    with pytest.raises(PlanError, match="no layout of 7 GPUs divides"):
        search.search(workload.find("llama2-7b"), hardware.cluster("h100-sxm", 7), Layout(global_batch=4), load())


def test_a_trainable_layout_becomes_a_recipe_and_another_is_refused() -> None:
    cluster = hardware.cluster("h100-sxm", 16)
    base = Layout(global_batch=64, seq_len=4096)
    told = search.report(workload.find("llama3-8b"), cluster, base, load(), ("bf16",), job.trainable)
    best = Layout(**told["best"]["layout"])
    text = job.emit("llama3-8b", best, 8)
    assert 'extends = "llama3-8b"' in text
    assert "num_processes = 8" in text
    with pytest.raises(PlanError, match="no tp axis"):
        job.emit("llama3-8b", replace(base, tp=2), 8)
    with pytest.raises(PlanError, match="does not compute in fp8"):
        job.emit("llama3-8b", replace(best, precision="fp8"), 8)
    alone = search.search(
        workload.find("llama3.2-1b"), hardware.cluster("h100-sxm", 1), base, load(), ("bf16",), job.trainable
    )
    assert alone.layouts[0].sharding == "none"
