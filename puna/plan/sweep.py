"""The study's pictures for any model and accelerator: figures by number of devices, as JSON, HTML and PNG."""

import math
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from puna.chart import log_ticks, short, ticks
from puna.plan import hardware, png
from puna.plan.constants import Fitted
from puna.plan.describe import describe
from puna.plan.layout import Case, Layout
from puna.plan.search import search
from puna.plan.workload import PlanError, Transformer

SEQUENCES = 2
"""Sequences of a device under weak scaling."""
WIDTH, HEIGHT, EDGE = 640, 300, 56
PICTURES = (
    ("Tokens/s of one device", "tokens_per_s_per_gpu"),
    ("Model FLOPs utilisation", "mfu"),
    ("Exposed share of communication", "exposed"),
    ("Tokens a joule", "tokens_per_joule"),
)
COLOURS = ("#2563b8", "#bf5413", "#2b7f55")


def sweep(
    model: Transformer, gpu: str, sizes: Sequence[int], base: Layout, fitted: Fitted, batch: int | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Weak scaling (fully sharded, SEQUENCES a device), strong scaling (`batch` sequences), and the best layout."""
    quick = replace(fitted, draws=())
    batch = batch or base.global_batch
    found: dict[str, list[dict[str, Any]]] = {"weak": [], "strong": [], "best": []}
    for gpus in sizes:
        cluster = hardware.cluster(gpu, gpus)
        weak = replace(base, global_batch=SEQUENCES * gpus, dp=gpus, micro_batch=SEQUENCES, sharding="zero3")
        found["weak"].append(_row(describe(Case(model, cluster, weak), quick)))
        if batch % gpus == 0:
            strong = replace(weak, global_batch=batch, micro_batch=math.gcd(batch // gpus, SEQUENCES))
            found["strong"].append(_row(describe(Case(model, cluster, strong), quick)))
        try:
            best = search(model, cluster, replace(base, global_batch=SEQUENCES * gpus), quick)
        except PlanError:
            continue
        if best.num_fit:
            found["best"].append(_row(describe(Case(model, cluster, best.layouts[0]), quick)))
    return found


def _row(figures: dict[str, Any]) -> dict[str, Any]:
    keys = ("gpus", "seconds", "tokens_per_s_per_gpu", "mfu", "exposed", "power_w", "tokens_per_joule", "fits")
    cut = {key: figures["layout"][key] for key in ("dp", "tp", "pp", "cp", "micro_batch", "sharding", "recompute")}
    return {key: figures[key] for key in keys} | cut


def page(model: Transformer, gpu: str, found: dict[str, list[dict[str, Any]]]) -> str:
    """The pictures and the best layouts as one HTML page without script."""
    figures = "".join(f"<h2>{title}</h2>{_picture(found, key)}" for title, key in PICTURES)
    head = ("gpus", "tp", "pp", "cp", "dp", "micro_batch", "sharding", "recompute", "mfu")
    cells = [
        [short(row[k]) if isinstance(row[k], float) else escape(str(row[k])) for k in head] for row in found["best"]
    ]
    rows = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in cells)
    title = escape(f"{model.name} on {gpu}")
    return (
        f"<!doctype html><meta charset=utf-8><title>{title}</title><style>body{{font:15px system-ui;margin:2em auto;"
        "max-width:700px}td,th{padding:2px 10px;text-align:right}</style>"
        f"<h1>{title}</h1><p>weak: {SEQUENCES} sequences a device, fully sharded; strong: one batch for all; best: the "
        f"fastest layout found at the weak batch.</p>{figures}<h2>Best layout by scale</h2><table><tr>"
        f"{''.join(f'<th>{name}</th>' for name in head)}</tr>{rows}</table>\n"
    )


def _picture(found: dict[str, list[dict[str, Any]]], key: str) -> str:
    lines = _lines(found, key)
    points = [point for line in lines.values() for point in line]
    if not points:
        return "<p>nothing to draw</p>"
    low, high = min(x for x, _ in points), max(x for x, _ in points)
    marks = ticks(0, max(y for _, y in points), 5)

    def place(x: float, y: float) -> tuple[float, float]:
        across = math.log(x / low) / (math.log(high / low) or 1)
        return EDGE + across * (WIDTH - 2 * EDGE), HEIGHT - 30 - y / marks[-1] * (HEIGHT - 50)

    parts = []
    for mark in marks:
        _, y = place(low, mark)
        parts.append(f'<path d="M{EDGE} {y:.1f}H{WIDTH - EDGE}" stroke="#ddd"/>')
        parts.append(f'<text x="{EDGE - 6}" y="{y + 4:.1f}" text-anchor="end">{short(mark)}</text>')
    for x in [x for x in log_ticks(low, high) if low <= x <= high] or [low]:
        parts.append(f'<text x="{place(x, 0)[0]:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{short(x)}</text>')
    for colour, (name, line) in zip(COLOURS, lines.items(), strict=False):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line))
        x, y = place(*line[-1])
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{x + 4:.1f}" y="{y + 4:.1f}" fill="{colour}">{name}</text>')
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" font-size="12" role="img">{"".join(parts)}</svg>'


def _lines(found: dict[str, list[dict[str, Any]]], key: str) -> dict[str, list[tuple[float, float]]]:
    return {name: [(row["gpus"], row[key]) for row in rows if row[key]] for name, rows in found.items() if rows}


def write(model: Transformer, gpu: str, found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Write the pictures: as PNG where the name ends in .png, else as an HTML page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        path.write_bytes(png.charts([(title, _lines(found, key)) for title, key in PICTURES]))
    else:
        path.write_text(page(model, gpu, found), encoding="utf-8")
