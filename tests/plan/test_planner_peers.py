"""The comparison with other planners: what a row becomes for each, by hand, and what is no checkout."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from puna.plan import hardware, workload
from puna.plan.layout import Case, Layout

BENCH = Path(__file__).parents[2] / "bench"
GPT = workload.Transformer(24, 2048, 8192, 16, 16, 51200, gated=False)
MEGATRON = Layout(
    global_batch=64, dp=2, tp=4, pp=2, micro_batch=2, seq_len=2048, sharding="none", recompute="full",
    precision="fp16", attention="unfused", stack="megatron", sequence_parallel=False, overlaps_gradients=False,
)  # fmt: skip
ON_A100 = Case(GPT, hardware.cluster("a100-80", 16), MEGATRON)
LLAMA = Layout(
    global_batch=512, dp=64, micro_batch=4, sharding="zero3", precision="bf16", stack="pytorch-compiled",
    reduce_bytes=2,
)  # fmt: skip
ON_H100 = Case(workload.find("llama2-7b"), hardware.cluster("h100-sxm", 64), LLAMA)


@pytest.fixture(scope="module")
def peers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("planner_peers", BENCH / "planner_peers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["planner_peers"] = module
    spec.loader.exec_module(module)
    return module


def changed(case: Case, **values: object) -> Case:
    return replace(case, layout=replace(case.layout, **values))  # type: ignore[arg-type]


def test_calculon_by_hand(peers: ModuleType) -> None:
    job = peers.calculon(ON_A100)
    assert job.near == []
    assert job.inputs["system"] == "a100_80g"
    assert job.inputs["application"] == {
        "hidden": 2048, "feedforward": 8192, "seq_size": 2048, "attn_heads": 16, "attn_size": 128, "num_blocks": 24,
    }  # fmt: skip
    execution = job.inputs["execution"]
    sizes = ("num_procs", "tensor_par", "pipeline_par", "data_par", "batch_size", "microbatch_size")
    assert [execution[key] for key in sizes] == [16, 4, 2, 2, 64, 2]
    assert [execution[f"{axis}_par_net"] for axis in ("tensor", "data", "pipeline")] == [0, 0, 1]
    assert (execution["activation_recompute"], execution["tensor_par_comm_type"]) == ("full", "ar")
    assert execution["optimizer_sharding"] is False


def test_calculon_comes_near_to_sharded_parameters_and_gated_layers(peers: ModuleType) -> None:
    job = peers.calculon(ON_H100)
    assert job.near == ["sharded parameters as a sharded optimiser"]
    assert job.inputs["application"]["feedforward"] == 11008 * 3 // 2
    assert job.inputs["execution"]["optimizer_sharding"] is True
    assert job.inputs["system"] == "h100_80g_nvl8"


def test_sequence_parallel_and_selective_recomputation_for_calculon(peers: ModuleType) -> None:
    execution = peers.calculon(changed(ON_A100, sequence_parallel=True, recompute="selective")).inputs["execution"]
    assert (execution["tensor_par_comm_type"], execution["seq_par_ag_redo"]) == ("rs_ag", True)
    assert execution["activation_recompute"] == "attn_only"


def test_simumax_by_hand(peers: ModuleType) -> None:
    job = peers.simumax(ON_A100)
    assert job.near == []
    assert job.inputs["machine"] == {
        "measured": True, "num_per_node": 8, "tflops": 312.0, "tflops_fp8": 624.0, "memory_gbps": 2039.0,
        "link_gbps": 300.0, "network_gbps": 200.0,
    }  # fmt: skip
    strategy = job.inputs["strategy"]
    assert (strategy["micro_batch_num"], strategy["micro_batch_size"], strategy["world_size"]) == (16, 2, 16)
    assert (strategy["recompute_granularity"], strategy["recompute_layer_num"]) == ("full_block", 12)
    assert (strategy["attention_sparse_ratio"], strategy["use_flash_sdp"]) == (0.0, False)
    assert job.inputs["model"]["use_swiglu"] is False


def test_a_share_of_the_blocks_is_layers_for_simumax_and_all_or_none_for_the_others(peers: ModuleType) -> None:
    case = changed(ON_A100, recompute_share=0.25)
    assert peers.simumax(case).inputs["strategy"]["recompute_layer_num"] == 3
    near = ["a share of the blocks recomputed as all or none"]
    assert peers.calculon(case).near == peers.llm_analysis(case).near == near
    assert peers.calculon(case).inputs["execution"]["activation_recompute"] == "none"
    assert peers.llm_analysis(changed(case, recompute_share=0.5)).inputs["recomputation"] == "FULL"


def test_an_h100_has_no_operators_measured_for_simumax(peers: ModuleType) -> None:
    job = peers.simumax(ON_H100)
    assert job.near == ["an H100 by the default efficiency", "sharded parameters as a sharded optimiser"]
    assert job.inputs["machine"]["measured"] is False
    assert job.inputs["machine"]["network_gbps"] == 400.0


def test_llm_analysis_by_hand(peers: ModuleType) -> None:
    job = peers.llm_analysis(ON_A100)
    assert job.near == []
    assert (job.inputs["gpu"], job.inputs["dtype"], job.inputs["zero"]) == ("a100-sxm-80gb", "w16a16e16", "NONE")
    assert job.inputs["parallelism"] == {"tp_size": 4, "pp_size": 2, "dp_size": 1, "rdp_size": 2, "sp_size": 1}
    assert job.inputs["training"] == {
        "batch_size_per_gpu": 2, "global_batch_size": 64, "seq_len": 2048, "flash_attn": False,
    }  # fmt: skip
    sharded = peers.llm_analysis(ON_H100).inputs
    assert (sharded["zero"], sharded["parallelism"]["dp_size"], sharded["parallelism"]["rdp_size"]) == (
        "STAGE_3",
        64,
        1,
    )
    hybrid = peers.llm_analysis(changed(ON_H100, sharding="hsdp")).inputs
    assert (hybrid["parallelism"]["dp_size"], hybrid["parallelism"]["rdp_size"]) == (8, 8)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (changed(ON_A100, cp=2, dp=1), "context parallelism"),
        (changed(ON_A100, schedule="zb-2p"), "schedule zb-2p"),
        (Case(GPT, hardware.cluster("mi300x", 16), MEGATRON), "no mi300x"),
        (changed(ON_H100, precision="mxfp8"), "precision mxfp8"),
    ],
)
def test_what_no_peer_has_words_for(peers: ModuleType, case: Case, reason: str) -> None:
    for peer in peers.PEERS.values():
        with pytest.raises(peers.Inexpressible, match=reason):
            peer.inputs(case)


@pytest.mark.parametrize("name", ["calculon", "simumax", "llm-analysis"])
def test_a_folder_that_is_missing_or_another(peers: ModuleType, tmp_path: Path, name: str) -> None:
    nowhere = tmp_path / "nowhere"
    with pytest.raises(peers.PeerError, match=f"{nowhere} is no folder.*--{name}"):
        peers.main(["runs.csv", f"--{name}", str(nowhere)])
    with pytest.raises(
        peers.PeerError, match=f"{tmp_path} is no checkout of .*it has no {peers.PEERS[name].landmarks[0]}"
    ):
        peers.main(["runs.csv", f"--{name}", str(tmp_path)])


def test_a_peer_that_cannot_be_imported_is_named(peers: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "llm_analysis").mkdir()
    (tmp_path / "llm_analysis" / "__init__.py").write_text("import a_module_that_nobody_has\n")
    with pytest.raises(peers.PeerError, match=r"cannot run .*No module named 'a_module_that_nobody_has'.*--python"):
        peers.ask("llm-analysis", tmp_path, Path(sys.executable), [peers.llm_analysis(ON_A100)])


def test_the_peer_answers_each_job_or_refuses_it(peers: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "calculon"
    folder.mkdir()
    (tmp_path / "systems").mkdir()
    (tmp_path / "systems" / "a100_80g.json").write_text(json.dumps({"mem1": {"GiB": 80, "GBps": 2048}}))
    (folder / "__init__.py").touch()
    (folder / "system.py").write_text(
        "class System:\n    def __init__(self, table): self.room = table['mem1']['GiB']\n"
    )
    (folder / "llm.py").write_text(
        "class Llm:\n"
        "    def __init__(self, application, log): self.blocks = application['num_blocks']\n"
        "    class Application(dict): pass\n"
        "    class Execution:\n"
        "        @staticmethod\n"
        "        def from_json(table): return table\n"
        "    def compile(self, system, execution):\n"
        "        assert system.room > 1000\n"
        "        assert execution['tensor_par'] == 4, 'too wide'\n"
        "    def run(self, system): print('chatter')\n"
        "    def get_total_time(self): return self.blocks / 2\n"
    )
    wide = changed(ON_A100, tp=8, dp=1)
    told = peers.ask("calculon", tmp_path, Path(sys.executable), [peers.calculon(ON_A100), peers.calculon(wide)])
    assert told == [{"seconds": 12.0}, {"error": "AssertionError: too wide"}]


def rows(peers: ModuleType) -> object:
    return peers.Rows(
        peer=np.array([0.5, 0.5, 0.25, 1.0]),
        ours=np.array([1.1, 1.0, 0.9, 1.0]),
        left_out=np.array([1.2, 1.1, 0.8, 1.0]),
        gpu=np.array(["a100-80", "a100-80", "a100-80", "h100-sxm"]),
        source=np.array(["a", "a", "b", "b"]),
    )


def test_the_scalars_by_hand(peers: ModuleType) -> None:
    made = rows(peers)
    assert peers.scalars(made.peer, made.gpu) == {"a100-80": 2.0, "h100-sxm": 1.0}
    assert list(peers.scaled(made)) == [1.0, 1.0, 0.5, 1.0]
    assert list(peers.scaled_left_out(made)) == [2.0, 2.0, 0.5, 1.0]


def test_the_figures_by_hand(peers: ModuleType) -> None:
    told = peers.figures(rows(peers))
    assert told["rows"] == 4
    assert (told["median_pct"], told["scaled_median_pct"], told["scaled_left_out_median_pct"]) == (50.0, 0.0, 75.0)
    assert (told["ours_median_pct"], told["ours_left_out_median_pct"]) == (5.0, 15.0)
    assert told["ours_p90_pct"] == 10.0
    assert told["ours_below"] is False
    far = rows(peers)
    far.peer[:] = [0.5, 0.8, 0.3, 1.5]
    assert peers.figures(far.take(np.array([True, True, True, False])))["ours_below"] is True
