"""How far other planners are from published runs, beside this one on the same rows.

    python bench/planner_peers.py runs.csv --calculon DIR --simumax DIR --llm-analysis DIR --python PYTHON

Each checkout may be left out. --python names an interpreter that has what the peers import (Calculon: pandas, psutil;
SimuMax: numpy, pandas, sympy, tabulate, matplotlib, tqdm, graphviz; llm-analysis: fire). A row becomes a job by the
same rules for all (puna/plan/runs.py), then a peer's inputs by one function a peer. "Own" rows are those that a peer
can say as they are; "near" adds those it can say with what it lacks replaced by the nearest it has. A row outside both
is skipped, counted by reason. Error = predicted over measured iteration time, less one.

As shipped; times one scalar a GPU type, fitted to the same rows or to those of other sources; ours as fitted, or by
constants that were fitted without the row's source. Those are fitted here, and SimuMax thinks a while about each row:
a quarter of an hour on one core.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from puna.console import track
from puna.errors import UserError
from puna.plan.constants import load
from puna.plan.fit import leave_one_source_out
from puna.plan.layout import Case, Layout, columns
from puna.plan.runs import Run, read
from puna.plan.validate import GRID

Inputs = dict[str, Any]


class PeerError(UserError):
    """A checkout that is not there or is not that peer's."""


class Inexpressible(Exception):
    """A job that a peer has no words for; the message says why."""


@dataclass
class Job:
    """What a peer is asked, and what of the row it could only come near to."""

    inputs: Inputs
    near: list[str] = field(default_factory=list)


def calculon(case: Case) -> Job:
    """Calculon's application, execution and system.

    It has two feed-forward matrices (three become two of the same size), as many key heads as heads, no fused
    attention, optimiser sharding alone, and recomputes all blocks or none. Axes fill a node in the order tp, dp, pp.
    Overlaps are off, as in its own validation: with them it is further off.
    """
    model, layout, cluster = case.model, case.layout, case.cluster
    near = _near(case)
    system = _one_of(case, {"a100": "a100_80g", "h100": "h100_80g_nvl8"})
    _no_sharded_parameters(layout, near)
    sequence = layout.sequence_parallel and layout.tp > 1
    recompute = {"none": "none", "selective": "attn_only", "full": "full"}[_all_or_none(layout, near)]
    execution = {
        "num_procs": cluster.gpus,
        "tensor_par": layout.tp,
        "pipeline_par": layout.pp,
        "data_par": layout.dp,
        "tensor_par_net": int(layout.tp > cluster.gpus_per_node),
        "data_par_net": int(layout.tp * layout.dp > cluster.gpus_per_node),
        "pipeline_par_net": int(cluster.gpus > cluster.gpus_per_node),
        "batch_size": layout.global_batch,
        "microbatch_size": layout.micro_batch,
        "datatype": "float8" if layout.precision == "fp8" else "float16",
        "fused_activation": False,
        "attention_type": "multihead",
        "activation_recompute": recompute,
        "pipeline_interleaving": layout.vp,
        "optimizer_sharding": layout.sharding != "none" and layout.dp > 1,
        "tensor_par_comm_type": "rs_ag" if sequence else "ar",
        "tensor_par_overlap": "none",
        "seq_par_ag_redo": sequence and recompute != "full",
        "data_par_overlap": False,
        "weight_offload": False,
        "activations_offload": False,
        "optimizer_offload": False,
        "training": True,
    }
    application = {
        "hidden": model.hidden,
        "feedforward": model.ffn * 3 // 2 if model.gated else model.ffn,
        "seq_size": layout.seq_len,
        "attn_heads": model.heads,
        "attn_size": model.hidden // model.heads,
        "num_blocks": model.layers,
    }
    return Job({"application": application, "execution": execution, "system": system}, near)


def simumax(case: Case) -> Job:
    """SimuMax's model, strategy and machine.

    It ships operators measured on an A100; an H100 gets their default efficiency. Its network is that of its switched
    system with the bandwidths of ours. Micro-batches are counted; sharding stops at the optimiser.
    """
    model, layout, cluster = case.model, case.layout, case.cluster
    near = _near(case)
    gpu = cluster.gpu
    family = _one_of(case, {"a100": "a100", "h100": "h100"})
    if family == "h100":
        near.append("an H100 by the default efficiency")
    _no_sharded_parameters(layout, near)
    ends = model.layers % layout.pp != 0 and (model.layers + 2) % layout.pp == 0
    per_stage = -(-model.layers // layout.pp)
    share = 0.5 if layout.recompute == "selective" and layout.stack.startswith("pytorch") else layout.recompute_share
    strategy = {
        "seq_len": layout.seq_len,
        "micro_batch_size": layout.micro_batch,
        "micro_batch_num": layout.global_batch // (layout.dp * layout.micro_batch),
        "dtype": "bf16",
        "fp8": layout.precision == "fp8",
        "world_size": cluster.gpus,
        "tp_size": layout.tp,
        "pp_size": layout.pp,
        "enable_sequence_parallel": layout.sequence_parallel and layout.tp > 1,
        "interleaving_size": layout.vp,
        "pp_comm_async": layout.vp == 1,
        "zero_state": int(layout.sharding != "none"),
        "grad_reduce_in_bf16": layout.reduce_bytes == 2,
        "account_for_embedding_in_pipeline_split": ends,
        "account_for_loss_in_pipeline_split": ends,
        "attention_sparse_ratio": 0.5 if layout.attention != "unfused" else 0.0,
        "use_flash_sdp": layout.attention != "unfused",
        "use_math_sdp": layout.attention == "unfused",
        "overlap_grad_reduce": layout.overlaps_gradients,
        "enable_recompute": layout.recompute != "none",
    }
    if layout.recompute == "selective" and not layout.stack.startswith("pytorch"):
        strategy |= {"recompute_granularity": "selective_recompute", "attn_recompute": True}
        strategy |= {"recompute_layer_num": per_stage}
    elif layout.recompute != "none":
        strategy |= {"recompute_granularity": "full_block", "recompute_layer_num": round(share * per_stage)}
    shape = {
        "model_type": "dense",
        "hidden_size": model.hidden,
        "head_num": model.heads,
        "kv_head_num": model.kv_heads,
        "head_size": model.hidden // model.heads,
        "intermediate_size": model.ffn,
        "layer_num": model.layers,
        "vocab_size": model.vocab,
        "use_swiglu": model.gated,
    }
    machine = {
        "measured": family == "a100",
        "num_per_node": cluster.gpus_per_node,
        "tflops": gpu.flops["bf16"],
        "tflops_fp8": gpu.flops.get("fp8", 2 * gpu.flops["bf16"]),
        "memory_gbps": round(1000 * gpu.bandwidth, 3),
        "link_gbps": gpu.link,
        "network_gbps": cluster.network_gbps / 8 * cluster.gpus_per_node,
    }
    return Job({"model": shape, "strategy": strategy, "machine": machine}, near)


def llm_analysis(case: Case) -> Job:
    """llm-analysis' training analysis, at the efficiencies its README advises (0.5 of the peak, 0.9 of the memory).

    Data-parallel ranks that gather no parameters are its replicas: it lets every sharded rank gather.
    """
    model, layout, cluster = case.model, case.layout, case.cluster
    near = _near(case)
    gpus = {"a100-40": "a100-sxm-40gb", "a100-80": "a100-sxm-80gb", "h100": "h100-sxm-80gb", "v100": "v100-sxm-16gb"}
    gpu = _one_of(case, gpus)
    recomputation = {"none": "NONE", "selective": "ATTN_COMPUTE", "full": "FULL"}[_all_or_none(layout, near)]
    zero = {"none": "NONE", "zero1": "STAGE_1", "zero2": "STAGE_2", "zero3": "STAGE_3", "hsdp": "STAGE_3"}
    sharded = {"none": 1, "zero1": 1, "hsdp": max(1, min(layout.dp, cluster.gpus_per_node // layout.tp))}
    ranks = sharded.get(layout.sharding, layout.dp)
    shape = {
        "name": "job",
        "num_layers": model.layers,
        "n_head": model.heads,
        "hidden_dim": model.hidden,
        "vocab_size": model.vocab,
        "max_seq_len": layout.seq_len,
        "num_key_value_heads": model.kv_heads,
        "ffn_embed_dim": model.ffn,
        "mlp_gated_linear_units": model.gated,
    }
    parallelism = {"tp_size": layout.tp, "pp_size": layout.pp, "dp_size": ranks, "rdp_size": layout.dp // ranks}
    training = {
        "batch_size_per_gpu": layout.micro_batch,
        "global_batch_size": layout.global_batch,
        "seq_len": layout.seq_len,
        "flash_attn": layout.attention != "unfused",
    }
    inputs = {
        "model": shape,
        "gpu": gpu,
        "dtype": "w8a8e16" if layout.precision == "fp8" else "w16a16e16",
        "parallelism": parallelism | {"sp_size": layout.tp if layout.sequence_parallel else 1},
        "efficiency": {"flops_efficiency": 0.5, "hbm_memory_efficiency": 0.9},
        "training": training,
        "recomputation": recomputation,
        "zero": zero[layout.sharding],
    }
    return Job(inputs, near)


def _near(case: Case) -> list[str]:
    """What no peer has. Raises Inexpressible for it; returns what each comes near to in the same way."""
    layout = case.layout
    if layout.cp > 1:
        raise Inexpressible("context parallelism")
    if layout.schedule != "1f1b":
        raise Inexpressible(f"schedule {layout.schedule}")
    if layout.precision not in ("fp16", "bf16", "fp8"):
        raise Inexpressible(f"precision {layout.precision}")
    near = []
    if case.cluster.gpu.full_power:
        near.append("a part with a power limit as the whole part")
    if layout.recompute == "selective" and layout.stack.startswith("pytorch"):
        near.append("half of the blocks recomputed, or attention alone")
    return near


def _no_sharded_parameters(layout: Layout, near: list[str]) -> None:
    if layout.sharding not in ("none", "zero1"):
        near.append("sharded parameters as a sharded optimiser")


def _all_or_none(layout: Layout, near: list[str]) -> str:
    """The kind of recomputation of a peer that has no share of the blocks."""
    if layout.recompute != "full" or layout.recompute_share == 1:
        return layout.recompute
    near.append("a share of the blocks recomputed as all or none")
    return "full" if layout.recompute_share >= 0.5 else "none"


def _one_of(case: Case, names: dict[str, str]) -> str:
    """The peer's name of a GPU. Raises Inexpressible where it has none."""
    gpu = case.cluster.gpu.name
    found = [value for prefix, value in names.items() if gpu.startswith(prefix)]
    if not found:
        raise Inexpressible(f"no {gpu}")
    return found[0]


@dataclass(frozen=True)
class Peer:
    """Where a peer comes from, what its checkout holds, and how a row becomes its inputs."""

    repository: str
    landmarks: tuple[str, ...]
    inputs: Callable[[Case], Job]


PEERS = {
    "calculon": Peer("calculon-ai/calculon", ("calculon/llm/llm.py", "systems/a100_80g.json"), calculon),
    "simumax": Peer("MooreThreads/SimuMax", ("simumax/core/perf_llm.py", "configs/system/a100_pcie.json"), simumax),
    "llm-analysis": Peer("cli99/llm-analysis", ("llm_analysis/analysis.py",), llm_analysis),
}


def check(name: str, checkout: Path) -> None:
    """Raise PeerError where the folder is missing or is not that peer's."""
    fix = f"Clone {PEERS[name].repository} and give its folder with --{name}."
    if not checkout.is_dir():
        raise PeerError(f"{checkout} is no folder", fix)
    for landmark in PEERS[name].landmarks:
        if not (checkout / landmark).is_file():
            raise PeerError(f"{checkout} is no checkout of {PEERS[name].repository}: it has no {landmark}", fix)


def ask(name: str, checkout: Path, python: Path, jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """The peer's answers, in order: {"seconds": ...} or {"error": ...}. Raises PeerError where it cannot be run."""
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "stderr"), "w+", encoding="utf-8") as errors:
        file = Path(folder, "jobs.json")
        file.write_text(json.dumps([job.inputs for job in jobs]), encoding="utf-8")
        command = [str(python), str(Path(__file__).with_name("run_peer.py")), name, str(checkout.resolve()), str(file)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8") as process:
            assert process.stdout is not None
            answers = [json.loads(line) for line in track(process.stdout, name, total=len(jobs))]
        errors.seek(0)
        if process.returncode or len(answers) != len(jobs):
            last = (errors.read().strip() or f"exit code {process.returncode}").splitlines()[-1]
            raise PeerError(
                f"{python} cannot run {checkout}: {last}", "Name a Python that has what it imports with --python."
            )
    return answers


@dataclass(frozen=True)
class Rows:
    """Some rows as arrays: predicted over measured time of the peer, of ours, and of ours without the row's source."""

    peer: np.ndarray
    ours: np.ndarray
    left_out: np.ndarray
    gpu: np.ndarray
    source: np.ndarray

    def take(self, mask: np.ndarray) -> "Rows":
        """The rows of a mask."""
        return Rows(*(value[mask] for value in (self.peer, self.ours, self.left_out, self.gpu, self.source)))


def scalars(ratio: np.ndarray, gpu: np.ndarray) -> dict[str, float]:
    """Of each GPU type the factor with the least sum of absolute log errors: the inverse of the median ratio."""
    return {str(name): float(1 / np.median(ratio[gpu == name])) for name in sorted(set(gpu))}


def scaled(rows: Rows) -> np.ndarray:
    """The peer's ratios times the scalar of each GPU type."""
    found = scalars(rows.peer, rows.gpu)
    return rows.peer * np.array([found[name] for name in rows.gpu])


def scaled_left_out(rows: Rows) -> np.ndarray:
    """The same with each source's scalar fitted to the other sources; as shipped where no other has that GPU type."""
    ratio = rows.peer.copy()
    for source in set(rows.source):
        inside = rows.source == source
        found = scalars(rows.peer[~inside], rows.gpu[~inside])
        ratio[inside] *= np.array([found.get(name, 1.0) for name in rows.gpu[inside]])
    return ratio


def figures(rows: Rows) -> dict[str, Any]:
    """Median and 90th percentile of the absolute error in per cent, of the peer and of ours, and who is below."""
    tables = {
        "": rows.peer,
        "scaled_": scaled(rows),
        "scaled_left_out_": scaled_left_out(rows),
        "ours_": rows.ours,
        "ours_left_out_": rows.left_out,
    }
    told: dict[str, Any] = {"rows": len(rows.peer)}
    for name, ratio in tables.items():
        size = 100 * np.abs(ratio - 1)
        told |= {
            f"{name}median_pct": round(float(np.median(size)), 2),
            f"{name}p90_pct": round(float(np.quantile(size, 0.9)), 2),
        }
    told["ours_below"] = all(
        told[f"ours_{left}{key}"] < min(told[key], told[f"scaled_{left}{key}"])
        for left in ("", "left_out_")
        for key in ("median_pct", "p90_pct")
    )
    return told | {"scalars": {name: round(value, 3) for name, value in scalars(rows.peer, rows.gpu).items()}}


def compare(
    name: str, checkout: Path, python: Path, runs: Sequence[Run], ours: np.ndarray, left_out: np.ndarray
) -> dict[str, Any]:
    """The figures of one peer: of its own rows, and under "near" of those it comes near to as well."""
    jobs: list[tuple[int, Job]] = []
    skipped, near = Counter[str](), Counter[str]()
    for index, run in enumerate(runs):
        try:
            jobs.append((index, PEERS[name].inputs(run.case)))
        except Inexpressible as reason:
            skipped[str(reason)] += 1
    answers = ask(name, checkout, python, [job for _, job in jobs])
    told = []
    for (index, job), answer in zip(jobs, answers, strict=True):
        if "error" in answer:
            skipped[f"it refuses: {answer['error']}"] += 1
            continue
        near.update(job.near)
        told.append((index, answer["seconds"], bool(job.near)))
    kept = np.array([row[0] for row in told])
    measured = np.array([runs[i].seconds for i in kept])
    rows = Rows(
        peer=np.array([row[1] for row in told]) / measured,
        ours=ours[kept] / measured,
        left_out=left_out[kept] / measured,
        gpu=np.array([runs[i].case.cluster.gpu.name for i in kept]),
        source=np.array([runs[i].source for i in kept]),
    )
    own, rest = ~np.array([row[2] for row in told]), rows.source != GRID
    return figures(rows.take(own)) | {
        "without_vts": figures(rows.take(own & rest)),
        "near": figures(rows),
        "near_without_vts": figures(rows.take(rest)),
        "came_near": dict(near.most_common()),
        "skipped": dict(skipped.most_common()),
    }


def table(peers: dict[str, dict[str, Any]]) -> str:
    """The figures in Markdown: median / 90th percentile."""
    columns = ("", "scaled_", "ours_", "scaled_left_out_", "ours_left_out_")
    heads = ("as shipped", "times a scalar", "ours", "times a scalar of other sources", "ours without the source")
    lines = ["| rows | number | " + " | ".join(heads) + " |", "|---" * (2 + len(heads)) + "|"]
    for name, entry in peers.items():
        for words, part in (
            ("own", entry),
            ("own without vts", entry["without_vts"]),
            ("near", entry["near"]),
            ("near without vts", entry["near_without_vts"]),
        ):
            cells = [f"{part[f'{c}median_pct']} / {part[f'{c}p90_pct']}" for c in columns]
            lines.append(f"| {name}, {words} | {part['rows']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> None:
    """Print a table, then JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="CSV of published runs")
    for name in PEERS:
        parser.add_argument(f"--{name}", type=Path, help=f"a checkout of {PEERS[name].repository}")
    parser.add_argument(
        "--python", type=Path, default=Path(sys.executable), help="the Python that has what the peers import"
    )
    given = vars(parser.parse_args(words))
    checkouts = {name: given[name.replace("-", "_")] for name in PEERS if given[name.replace("-", "_")]}
    for name, checkout in checkouts.items():
        check(name, checkout)
    runs = read(given["runs"]).runs
    ours = load().predict(columns([run.case for run in runs]))[0]
    left_out = leave_one_source_out(runs)
    peers = {n: compare(n, checkout, given["python"], runs, ours, left_out) for n, checkout in checkouts.items()}
    print(table(peers))
    print(json.dumps({"runs": len(runs), "peers": peers}))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
