"""The study's pictures for any model and accelerator: figures by number of devices, as JSON, HTML and PNG."""

import math
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

from puna.chart import short
from puna.plan import hardware, output
from puna.plan.constants import Fitted
from puna.plan.describe import describe
from puna.plan.layout import Case, Layout
from puna.plan.search import search
from puna.plan.workload import PlanError, Transformer

SEQUENCES = 2
"""Sequences of a device under weak scaling."""
SIZE = (6.4, 3.2)
"""Inches of one picture, of 100 pixels."""
PICTURES = (
    ("Tokens/s of one device", "tokens_per_s_per_gpu"),
    ("Model FLOPs utilisation", "mfu"),
    ("Exposed share of communication", "exposed"),
    ("Tokens a joule", "tokens_per_joule"),
)


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
    figures = "".join(_picture(found, title, key) for title, key in PICTURES)
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


def _picture(found: dict[str, list[dict[str, Any]]], title: str, key: str) -> str:
    """One picture as an SVG element."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    _draw(figure.add_subplot(), found, title, key)
    text = StringIO()
    with rc_context({"svg.hashsalt": title, "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return "<svg" + text.getvalue().partition("<svg")[2]


def _png(found: dict[str, list[dict[str, Any]]]) -> bytes:
    """All pictures, one below the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(SIZE[0], SIZE[1] * len(PICTURES)), dpi=100, layout="constrained")
    for place, (title, key) in zip(figure.subplots(len(PICTURES)), PICTURES, strict=True):
        _draw(place, found, title, key)
    picture = BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def _draw(place: Any, found: dict[str, list[dict[str, Any]]], title: str, key: str) -> None:
    """The lines of one figure over the number of devices, on matplotlib axes."""
    for name, line in _lines(found, key).items():
        place.plot(*zip(*line, strict=True), marker="o", label=name)
    place.set(title=title, xlabel="devices", xscale="log", ylim=(0, None))
    place.set_xticks(*zip(*_sizes(found).items(), strict=True), minor=False)
    place.minorticks_off()
    place.grid(alpha=0.3)
    place.legend()


def _sizes(found: dict[str, list[dict[str, Any]]]) -> dict[int, str]:
    return {row["gpus"]: f"{row['gpus']:,}" for rows in found.values() for row in rows}


def _lines(found: dict[str, list[dict[str, Any]]], key: str) -> dict[str, list[tuple[float, float]]]:
    return {name: [(row["gpus"], row[key]) for row in rows if row[key]] for name, rows in found.items() if rows}


def write(model: Transformer, gpu: str, found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Write the pictures: as PNG where the name ends in .png, else as an HTML page. Raises DataError."""
    output.write(path, _png(found) if path.suffix.lower() == ".png" else page(model, gpu, found))
