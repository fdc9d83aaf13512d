"""Device-hours that were published beside those of the planner, failures included.

    python bench/planner_hours.py

Only for Llama 3.1 405B is the layout published. For the others the number of devices is varied and the fastest layout
found is taken: what comes out is the least that the planner would have said, not what was done.
"""

import json
from dataclasses import dataclass, replace

from puna.plan import hardware, workload
from puna.plan.constants import load
from puna.plan.describe import hours
from puna.plan.goodput import goodput
from puna.plan.layout import Case, Layout
from puna.plan.search import search

FITTED = replace(load(), draws=())


@dataclass(frozen=True)
class Published:
    """A pre-training run: hours on its model card or in its paper, and what is known of how. power: W, where capped."""

    name: str
    model: str
    gpu: str
    seq_len: int
    batch_tokens: int
    tokens: float
    hours: float
    source: str
    known: str
    sizes: tuple[int, ...] = (512, 1024, 2048)
    power: float = 0.0
    layout: tuple[tuple[str, object], ...] = ()


LLAMA_2 = "arXiv 2307.09288, table 2"
LLAMA_3 = "model card of Llama 3"
LLAMA_31 = "model card of Llama 3.1"
BATCH = "batch, length, tokens, accelerator"
RUNS = (
    Published("LLaMA 65B", "llama-65b", "a100-80", 2048, 4_194_304, 1.4e12, 1_022_362, "arXiv 2302.13971, table 15",
              f"{BATCH}, 2,048 devices", (2048,)),
    Published("Llama 2 7B", "llama2-7b", "a100-80", 4096, 4_194_304, 2e12, 184_320, LLAMA_2, BATCH),
    Published("Llama 2 13B", "llama2-13b", "a100-80", 4096, 4_194_304, 2e12, 368_640, LLAMA_2, BATCH),
    Published("Llama 2 34B", "llama2-34b", "a100-80", 4096, 4_194_304, 2e12, 1_038_336, LLAMA_2, f"{BATCH}, 350 W",
              power=350.0),
    Published("Llama 2 70B", "llama2-70b", "a100-80", 4096, 4_194_304, 2e12, 1_720_320, LLAMA_2, BATCH),
    Published("Llama 3 8B", "llama3-8b", "meta-24k", 8192, 16_777_216, 15e12, 1.3e6, LLAMA_3, BATCH,
              (2048, 8192, 16384)),
    Published("Llama 3 70B", "llama3-70b", "meta-24k", 8192, 16_777_216, 15e12, 6.4e6, LLAMA_3, BATCH,
              (2048, 8192, 16384)),
    Published("Llama 3.1 8B", "llama3.1-8b", "meta-24k", 8192, 16_777_216, 15e12, 1.46e6, LLAMA_31, BATCH,
              (2048, 8192, 16384)),
    Published("Llama 3.1 70B", "llama3.1-70b", "meta-24k", 8192, 16_777_216, 15e12, 7.0e6, LLAMA_31, BATCH,
              (2048, 8192, 16384)),
    Published("Llama 3.1 405B", "llama3.1-405b", "meta-24k", 8192, 16_777_216, 15.6e12, 30.84e6, LLAMA_31,
              "the layout (arXiv 2407.21783, table 4)", (16384,),
              layout=(("tp", 8), ("pp", 16), ("vp", 8), ("sharding", "zero2"), ("keeps_gated", False))),
)  # fmt: skip
LLAMA_65B = workload.Transformer(80, 8192, 22016, 64, 64, 32000, name="llama-65b")


def predicted(run: Published, gpus: int) -> dict[str, float | str]:
    """Hours, and their error, on so many devices."""
    cluster = hardware.cluster(run.gpu, gpus)
    if run.power:
        cluster = replace(cluster, gpu=replace(cluster.gpu, full_power=cluster.gpu.power, power=run.power))
    model = LLAMA_65B if run.model == LLAMA_65B.name else workload.find(run.model)
    base = Layout(global_batch=run.batch_tokens // run.seq_len, seq_len=run.seq_len, stack="pytorch-eager")
    if run.layout:
        settings = dict(run.layout)
        layout = replace(base, dp=gpus // (settings["tp"] * settings["pp"]), **settings)  # type: ignore[operator, arg-type]
    else:
        layout = search(model, cluster, base, FITTED).layouts[0]
    took = hours(Case(model, cluster, layout), FITTED, run.tokens)["gpu_hours"] / goodput(gpus)["share_that_trains"]
    cut = f"tp {layout.tp} pp {layout.pp} {layout.sharding} micro-batch {layout.micro_batch}"
    return {"gpus": gpus, "hours": round(took), "error_pct": round(100 * (took / run.hours - 1), 1), "layout": cut}


def main() -> None:
    """Print a table in Markdown, and its figures as one line of JSON."""
    found = {run.name: [predicted(run, gpus) for gpus in run.sizes] for run in RUNS}
    print("| run | published hours | source | known | predicted, by number of devices |")
    print("|---|---|---|---|---|")
    for run in RUNS:
        cells = "; ".join(f"{row['gpus']:,}: {row['hours']:,} ({row['error_pct']:+} %)" for row in found[run.name])
        print(f"| {run.name} | {run.hours:,.0f} | {run.source} | {run.known} | {cells} |")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
