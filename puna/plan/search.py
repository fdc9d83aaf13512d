"""The fastest layouts of a job that fit, and why: thousands of them are estimated at once."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from puna.plan.constants import Fitted
from puna.plan.describe import describe
from puna.plan.estimate import estimate
from puna.plan.fits import ROOM, remedies, shortfall
from puna.plan.footprint import footprint
from puna.plan.hardware import Cluster
from puna.plan.layout import SHARDINGS, Case, Columns, Layout, columns
from puna.plan.workload import PlanError, Transformer

CHANGES = (("network bandwidth x 2", {"net": 2.0}), ("network bandwidth / 2", {"net": 0.5}),
           ("memory x 1.5", {"capacity": 1.5}), ("memory / 1.5", {"capacity": 1 / 1.5}),
           ("fast links x 2", {"link": 2.0}), ("matrix rate x 2", {"peak": 2.0, "peak16": 2.0}))  # fmt: skip


PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    name: (
        "arXiv 2407.21783, table 4 and section 3.3.2; xFormers' SwiGLU",
        {"tp": 8, "pp": 16, "vp": 8, "micro_batch": 1, "sharding": "zero2", "keeps_gated": False},
    )
    for name in ("llama3-405b", "llama3.1-405b")
}
"""Layouts in which models were trained, with their source."""


@dataclass(frozen=True)
class Found:
    """Candidates, the fastest first, with seconds and bytes; those that do not fit are behind `num_fit`."""

    layouts: list[Layout]
    seconds: np.ndarray
    bytes: np.ndarray
    num_fit: int
    num_tried: int


def candidates(model: Transformer, cluster: Cluster, base: Layout, precisions: Sequence[str]) -> Iterator[Layout]:
    """Layouts whose sizes divide what they cut: dp x sharding x tp x pp x vp x cp x micro-batch x recompute x format.

    Of a mixture also the ranks that its experts are spread over. Tensor parallelism stays inside the fast links;
    context parallelism is tried from 16,384 tokens on.
    """
    tps = [
        n
        for n in _powers(min(cluster.domain, cluster.gpus, 16))
        if model.heads % n == 0 and model.kv_heads % min(n, model.kv_heads) == 0
    ]
    cps = [n for n in _powers(64) if base.seq_len % (2 * n) == 0 and (n == 1 or base.seq_len // n >= 4096)]
    for tp, cp in product(tps, cps):
        for pp in _stages(model.layers, cluster.gpus // (tp * cp)):
            if cluster.gpus % (tp * cp * pp):
                continue
            dp = cluster.gpus // (tp * cp * pp)
            if base.global_batch % dp:
                continue
            yield from _filled(replace(base, tp=tp, cp=cp, pp=pp, dp=dp), model, cluster, precisions)


def _filled(layout: Layout, model: Transformer, cluster: Cluster, precisions: Sequence[str]) -> Iterator[Layout]:
    rank_batch = layout.global_batch // layout.dp
    micros = [n for n in _powers(16) if rank_batch % n == 0]
    for micro, precision in product(micros, precisions):
        num = rank_batch // micro
        chunks = [v for v in _chunks(model.layers, layout.pp) if v == 1 or num % layout.pp == 0]
        for vp, recompute, (sharding, group), ep in product(
            chunks, ("none", "selective", "full"), _shardings(layout, cluster), _spreads(model, layout)
        ):
            yield replace(
                layout, micro_batch=micro, vp=vp, recompute=recompute, sharding=sharding, shard_group=group,
                precision=precision, ep=ep,
            )  # fmt: skip


def _spreads(model: Transformer, layout: Layout) -> list[int]:
    """Ranks that the experts of a mixture may be spread over."""
    ranks = layout.dp * layout.cp
    return [n for n in _powers(min(64, ranks)) if max(1, model.experts) % n == 0 and ranks % n == 0]


def _shardings(layout: Layout, cluster: Cluster) -> list[tuple[Any, int]]:
    if layout.dp * layout.cp == 1:
        return [("none", 0)]
    if layout.pp > 1:
        return [("zero1", 0), ("zero2", 0)]
    near = max(1, cluster.gpus_per_node // layout.tp)
    hybrid = [("hsdp", near)] if 1 < near < layout.dp * layout.cp else []
    return [("zero1", 0), ("zero2", 0), ("zero3", 0), *hybrid]


def _powers(most: int) -> list[int]:
    return [1 << n for n in range(most.bit_length()) if 1 << n <= most]


def _stages(layers: int, most: int) -> list[int]:
    return [n for n in range(1, min(layers, most, 64) + 1) if layers % n == 0 or (layers + 2) % n == 0]


def _chunks(layers: int, stages: int) -> list[int]:
    if stages == 1:
        return [1]
    whole = layers if layers % stages == 0 else layers + 2
    per_stage = whole // stages
    return [v for v in range(1, per_stage + 1) if per_stage % v == 0]


def search(
    model: Transformer,
    cluster: Cluster,
    base: Layout,
    fitted: Fitted,
    precisions: Sequence[str] = ("bf16",),
    allowed: Callable[[Layout], bool] = lambda layout: True,
) -> Found:
    """All candidates that are allowed, the fastest that fit first. Raises PlanError where there is none."""
    divided = list(candidates(model, cluster, base, precisions))
    layouts = [layout for layout in divided if allowed(layout)]
    if divided and not layouts:
        raise PlanError(
            f"none of the {len(divided)} layouts of {cluster.gpus} GPUs is one that this package trains",
            "Change the format, the batch or the number of GPUs, or search without --emit and --trainable.",
        )
    if not layouts:
        raise PlanError(
            f"no layout of {cluster.gpus} GPUs divides a batch of {base.global_batch} sequences",
            "Change the batch or the number of GPUs so that they share large factors.",
        )
    c = spread(model, cluster, layouts)
    need = footprint(c)["total"]
    fits = need <= ROOM * c.capacity
    seconds = estimate(c, fitted.constants)["seconds"]
    order = np.lexsort((seconds, ~fits))
    return Found(
        [layouts[i] for i in order[:400]], seconds[order[:400]], need[order[:400]], int(fits.sum()), len(layouts)
    )


def spread(model: Transformer, cluster: Cluster, layouts: Sequence[Layout]) -> Columns:
    """The columns of many layouts of one job: what they share is worked out once."""
    by_precision = {
        p: columns([Case(model, cluster, replace(layouts[0], precision=p))]) for p in {x.precision for x in layouts}
    }
    first = by_precision[layouts[0].precision]
    c = Columns({key: np.repeat(value, len(layouts)) for key, value in first.items()})
    for name, key in (
        ("tp", "tp"),
        ("cp", "cp"),
        ("pp", "pp"),
        ("dp", "dp"),
        ("vp", "vp"),
        ("ep", "ep"),
        ("micro_batch", "b"),
    ):
        c[key] = np.array([getattr(layout, name) for layout in layouts], dtype=float)
    c["rc"] = np.array([("none", "selective", "full").index(layout.recompute) for layout in layouts], dtype=float)
    c["redone"] = np.where(c["rc"] > 0, layouts[0].recompute_share, 0.0)
    c["zero"] = np.array([min(3, SHARDINGS.index(layout.sharding)) for layout in layouts], dtype=float)
    group = np.array([layout.shard_group for layout in layouts], dtype=float)
    c["shard"] = np.where(c["zero"] == 0, 1, np.where(group > 0, group, c.dp * c.cp))
    for key in ("peak", "peak16", "low", "full_precision"):
        c[key] = np.array([by_precision[layout.precision][key][0] for layout in layouts])
    return c


def report(
    model: Transformer,
    cluster: Cluster,
    base: Layout,
    fitted: Fitted,
    precisions: Sequence[str] = ("bf16",),
    allowed: Callable[[Layout], bool] = lambda layout: True,
) -> dict[str, Any]:
    """Best, runner-up, what binds, and what would flip the choice; or why nothing fits and what would help."""
    found = search(model, cluster, base, fitted, precisions, allowed)
    if not found.num_fit:
        case = Case(model, cluster, found.layouts[int(np.argmin(found.bytes))])
        return {
            "fits": False,
            "tried": found.num_tried,
            "shortfall": shortfall(case),
            "remedies": remedies(case, fitted),
        }
    best = describe(Case(model, cluster, found.layouts[0]), fitted)
    different = next(
        (
            i
            for i in range(1, min(found.num_fit, len(found.layouts)))
            if _degrees(found.layouts[i]) != _degrees(found.layouts[0])
        ),
        None,
    )
    runner_up = describe(Case(model, cluster, found.layouts[different]), fitted) if different else None
    return {
        "fits": True,
        "tried": found.num_tried,
        "num_fit": found.num_fit,
        "best": best,
        "runner_up": runner_up and runner_up | {"against_best": against(runner_up, best)},
        "published": _published(model, cluster, base, best, fitted),
        "binding": binding(best),
        "flips": flips(model, cluster, found, fitted),
    }


def _published(
    model: Transformer, cluster: Cluster, base: Layout, best: dict[str, Any], fitted: Fitted
) -> dict[str, Any] | None:
    """The layout in which the model was trained, on this cluster and batch, where it is known and possible."""
    if model.name not in PUBLISHED:
        return None
    source, settings = PUBLISHED[model.name]
    layout = replace(base, **settings, dp=max(1, cluster.gpus // (settings["tp"] * settings["pp"])))
    try:
        layout.check(model, cluster)
    except PlanError:
        return None
    figures = describe(Case(model, cluster, layout), fitted)
    return figures | {"source": source, "against_best": against(figures, best)}


def against(other: dict[str, Any], best: dict[str, Any]) -> dict[str, Any]:
    """What a plan takes more than the best: its share, and the term that differs most with its seconds."""
    terms = {name: seconds - best["parts"][name] for name, seconds in other["parts"].items()}
    name = max(terms, key=lambda term: abs(terms[term]))
    return {"step_time": other["seconds"] / best["seconds"] - 1, "term": name, "seconds": terms[name]}


def lines(told: dict[str, Any]) -> list[str]:
    """A report in words."""
    found = [f"{told['tried']} layouts tried, {told['num_fit']} fit"]
    for name in ("best", "runner_up", "published"):
        if plan := told[name]:
            cut = plan["layout"]
            sizes = " ".join(f"{key} {cut[key]}" for key in ("dp", "tp", "pp", "vp", "cp", "micro_batch"))
            found.append(
                f"{name.replace('_', '-')}: {sizes} {cut['sharding']} recompute {cut['recompute']} {cut['precision']}: "
                f"{plan['seconds']:.3g} s ({plan['low']:.3g} to {plan['high']:.3g}), "
                f"{plan['tokens_per_s_per_gpu']:,.0f} tokens/s/GPU, MFU {plan['mfu']:.1%}, "
                f"{plan['memory_gb']['total']:.0f} of {plan['memory_gb']['capacity']:.0f} GB"
            )
            if more := plan.get("against_best"):
                found[-1] += (
                    f"; {more['step_time']:+.1%} against the best, most of it {more['term']}: {more['seconds']:+.3g} s"
                )
    term = told["binding"]
    found.append(f"binds: {term['term']}, {term['seconds']:.3g} s, {term['share']:.0%} of the step")
    found += [
        f"{f['change']}: tp {f['tp']} pp {f['pp']} cp {f['cp']} dp {f['dp']} would be best, {f['seconds']:.3g} s"
        for f in told["flips"]
    ]
    return found


def _degrees(layout: Layout) -> tuple[int, ...]:
    return (layout.tp, layout.pp, layout.cp, layout.dp)


def binding(best: dict[str, Any]) -> dict[str, Any]:
    """The part of the step, beside the matrix products, that costs most."""
    parts = {name: value for name, value in best["parts"].items() if name != "products"}
    name = max(parts, key=lambda key: parts[key])
    full = best["memory_gb"]["total"] / best["memory_gb"]["capacity"]
    return {"term": name, "seconds": parts[name], "share": parts[name] / best["seconds"], "memory_share": full}


def flips(model: Transformer, cluster: Cluster, found: Found, fitted: Fitted) -> list[dict[str, Any]]:
    """Changes of the cluster under which another layout of the fastest few hundred would be best."""
    c = spread(model, cluster, found.layouts)
    need = footprint(c)["total"]
    told = []
    for name, factors in CHANGES:
        changed = Columns({key: value * factors.get(key, 1.0) for key, value in c.items()})
        seconds = np.where(need <= ROOM * changed.capacity, estimate(changed, fitted.constants)["seconds"], np.inf)
        first = int(np.argmin(seconds))
        if np.isfinite(seconds[first]) and _degrees(found.layouts[first]) != _degrees(found.layouts[0]):
            layout = found.layouts[first]
            told.append({"change": name, "tp": layout.tp, "pp": layout.pp, "cp": layout.cp, "dp": layout.dp,
                         "seconds": float(seconds[first])})  # fmt: skip
    return told
