"""Asks a peer's planner how long some jobs take, from its checkout and with its Python; `planner_peers.py` runs this.

    PYTHON bench/run_peer.py calculon CHECKOUT JOBS.json

JOBS holds a list of what the peer's mapping made; a line of JSON on stdout answers each: {"seconds": ...} or
{"error": ...}. Nothing of Puna is imported: the peer's environment need not have it.
"""

import contextlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

Job = dict[str, Any]
ROOM = 1_000_000


def calculon(checkout: Path) -> Callable[[Job], float]:
    """Its transformer on one of its systems, whose memory is widened: it refuses runs that did fit."""
    from calculon.llm import Llm
    from calculon.system import System

    log = logging.getLogger("calculon")

    def seconds(job: Job) -> float:
        table = json.loads((checkout / "systems" / f"{job['system']}.json").read_text(encoding="utf-8"))
        table["mem1"] |= {"GiB": ROOM}
        system = System(table)
        model = Llm(Llm.Application(job["application"]), log)
        model.compile(system, Llm.Execution.from_json(job["execution"]))
        model.run(system)
        return float(model.get_total_time())

    return seconds


def simumax(checkout: Path) -> Callable[[Job], float]:
    """Its model on the operators it measured on an A100, with the sizes and the network that the job names."""
    from simumax.core.config import ModelConfig, StrategyConfig, SystemConfig
    from simumax.core.perf_llm import PerfLLM

    systems = checkout / "configs" / "system"
    base = json.loads((systems / "a100_pcie.json").read_text(encoding="utf-8"))
    switched = json.loads((systems / "b200_bf16_ceperm.json").read_text(encoding="utf-8"))["networks"]

    def system(machine: Job) -> Job:
        table: Job = json.loads(json.dumps(base | {"networks": switched}))
        table["num_per_node"] = machine["num_per_node"]
        for name, op in table["accelerator"]["op"].items():
            op["tflops"] = machine["tflops_fp8" if name.startswith("fp8") else "tflops"]
            if not machine["measured"]:
                op.pop("accurate_efficient_factor", None)
        for op in table["accelerator"]["bandwidth"].values():
            op["gbps"] = machine["memory_gbps"]
        for name in ("low_intra_node", "high_intra_node"):
            table["networks"][name]["bandwidth"]["gbps"] = machine["link_gbps"]
        table["networks"]["inter_node"]["bandwidth"]["gbps"] = machine["network_gbps"]
        return table

    def seconds(job: Job) -> float:
        perf = PerfLLM()
        perf.configure(
            strategy_config=StrategyConfig(**job["strategy"]),
            model_config=ModelConfig(**job["model"]),
            system_config=SystemConfig.init_from_dict(system(job["machine"])),
        )
        perf.run_estimate()
        rate = perf.analysis_cost().data["throughput_per_accelerator"]
        strategy = perf.strategy
        return float(strategy.seq_len * strategy.global_batch_size / (rate * strategy.world_size))

    return seconds


def llm_analysis(checkout: Path) -> Callable[[Job], float]:
    """Its training analysis."""
    from llm_analysis import analysis, config

    analysis.logger.setLevel(logging.ERROR)

    def seconds(job: Job) -> float:
        found = analysis.LLMAnalysis(
            config.ModelConfig(**job["model"]),
            config.get_gpu_config_by_name(job["gpu"]),
            config.get_dtype_config_by_name(job["dtype"]),
            config.ParallelismConfig(**job["parallelism"]),
            **job["efficiency"],
        ).training(
            **job["training"],
            activation_recomputation=analysis.ActivationRecomputation[job["recomputation"]],
            ds_zero=analysis.DSZeRO[job["zero"]],
        )
        return float(found["latency_per_iter"])

    return seconds


PEERS = {"calculon": calculon, "simumax": simumax, "llm-analysis": llm_analysis}


def answer(ask: Callable[[Job], float], job: Job) -> Job:
    """Seconds, or the words with which the peer refuses; it may raise whatever it likes."""
    try:
        return {"seconds": ask(job)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}


def main(peer: str, checkout: Path, jobs: Path) -> None:
    """Answer every job; what the peer prints is dropped."""
    sys.path.insert(0, str(checkout))
    warnings.simplefilter("ignore")
    os.chdir(jobs.parent)
    answers = sys.stdout
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        ask = PEERS[peer](checkout)
        for job in json.loads(jobs.read_text(encoding="utf-8")):
            print(json.dumps(answer(ask, job)), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:4]))
