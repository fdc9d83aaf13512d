"""What a run's exchange came to: ratio, bound, class and bytes by table, over time; accuracy beside another run."""

from pathlib import Path
from typing import Any

from puna.errors import CheckpointError
from puna.train.metrics import read_events

SIDES = ("forward", "backward")


def report(run: Path, beside: Path | None = None) -> dict[str, Any]:
    """Of the newest record: tables (name, class, bound, ratio and bytes both ways) and ratios over all of them; of all
    records bytes over time; held-out figures, and with `beside`, a run without compression, what they differ by.

    Raises CheckpointError where a folder holds no run, or `run` no record of an exchange.
    """
    events = _events(run)
    records = [event for event in events if event["event"] == "exchange"]
    if not records:
        raise CheckpointError(
            f"{run} has no record of an exchange",
            "Train on several processes (or with exchange.local), for at least exchange.record_every steps.",
        )
    last = records[-1]
    found: dict[str, Any] = {
        "run": str(run),
        "step": last["step"],
        "wires": dict(zip(SIDES, last["wires"], strict=True)),
        "ratio": _ratios(last["tables"]),
        "heldout": _figures(events),
        "tables": [table | {"ratio": _ratios([table])} for table in last["tables"]],
        "over_time": [
            {"step": record["step"], "ratio": _ratios(record["tables"]), "bytes": _bytes(record["tables"])}
            for record in records
        ],
    }
    if beside:
        raw = _figures(_events(beside))
        found["beside"] = {"run": str(beside), "heldout": raw}
        found["difference"] = {name: found["heldout"][name] - raw[name] for name in raw if name in found["heldout"]}
    return found


def lines(found: dict[str, Any]) -> list[str]:
    """The same as a table."""
    head = f"{'table':<16} {'class':<6} {'bound':>8} {'forward':>8} {'backward':>9} {'bytes':>12}"
    rows = [
        f"{table['name']:<16} {table['class']:<6} {table['bound']:>8.4f} {table['ratio']['forward']:>7.1f}x "
        f"{table['ratio']['backward']:>8.1f}x {int(table['forward_bytes'] + table['backward_bytes']):>12,}"
        for table in found["tables"]
    ]
    ratio = found["ratio"]
    told = [f"step {found['step']:,}, {found['wires']['forward']} forward, {found['wires']['backward']} backward"]
    told += [f"all tables: {ratio['forward']:.2f}x forward, {ratio['backward']:.2f}x backward", head, *rows]
    told += [f"held-out {name} {value:.5f}" for name, value in found["heldout"].items()]
    return told + [f"{name} {value:+.5f} beside the other run" for name, value in found.get("difference", {}).items()]


def _events(run: Path) -> list[dict[str, Any]]:
    events = read_events(run)
    if not events:
        raise CheckpointError(f"{run} holds no run", "Give a folder that `puna train` has written.")
    return events


def _figures(events: list[dict[str, Any]]) -> dict[str, float]:
    last: dict[str, Any] = next((event for event in reversed(events) if event["event"] == "eval"), {})
    return {name: last[name] for name in ("auc", "loss", "ne", "calibration") if name in last}


def _bytes(tables: list[dict[str, Any]]) -> dict[str, float]:
    return {name: sum(table[f"{name}_bytes"] for table in tables) for name in ("plain", *SIDES)}


def _ratios(tables: list[dict[str, Any]]) -> dict[str, float]:
    total = _bytes(tables)
    return {side: total["plain"] / total[side] if total[side] else 1.0 for side in SIDES}
