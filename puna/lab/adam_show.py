"""What `puna lab adam` found, as tables."""

from collections.abc import Callable
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from puna.lab.adam_spec import RunSpec
from puna.lab.show import show


def fields() -> None:
    """Print the settings of a run."""
    table = _table("", "field", "default", "", "what")
    for name, field in RunSpec.model_fields.items():
        unit = str(field.json_schema_extra["unit"])  # type: ignore[index,call-overload]
        table.add_row(name, repr(field.default), unit, field.description)
    show([table])


def injection(result: dict[str, Any]) -> None:
    """Print spikes and shares of r."""
    table = _table(
        "stall and burst of the blocks",
        "seed",
        "spike (nats)",
        "onset",
        "alarm",
        "two peaks there",
        "one peak elsewhere",
    )
    for row in result["seeds"]:
        table.add_row(*(_cell(row[key]) for key in ("seed", "spike", "onset", "alarm", "two_peaks", "others_one_peak")))
    first = result["seeds"][0]
    shares = _table(f"shares of r left, centre, right; seed {first['seed']}", "layer", "before", "at the release")
    for layer in first["before"]:
        shares.add_row(layer, _share(first["before"][layer]), _share(first["after"][layer]))
    note = (
        f"{result['num_spikes_of_a_nat']} of {result['num_seeds']} spikes of 1 nat or more, "
        f"median {result['median_spike_nats']}; two peaks in {result['num_two_peaks']}, "
        f"alarm at the release in {result['num_alarms_at_release']}."
    )
    show([table, shares], note)


def _share(part: dict[str, float]) -> str:
    return " ".join(f"{part[key]:.2f}" for key in ("left", "centre", "right"))


def mitigation(result: dict[str, Any]) -> None:
    """Print losses by remedy."""
    table = _table(
        f"mean loss, {result['num_seeds']} seeds", "remedy", "before", "largest after", "+20 steps", "+80 steps"
    )
    for arm, row in result["arms"].items():
        table.add_row(arm, *(f"{row[key]:.2f}" for key in ("before", "largest", "after_20", "after_80")))
    show([table])


def search(result: dict[str, Any]) -> None:
    """Print what diverged by itself."""
    table = _table(
        f"no injection, {result['num_seeds']} seeds",
        "setting",
        "diverging",
        "onsets",
        "largest rise (nats)",
        "last loss",
    )
    for row in result["settings"]:
        onsets = ", ".join(map(_cell, row["onsets"]))
        table.add_row(
            row["setting"], str(row["num_diverging"]), onsets, f"{row['largest_rise_nats']:g}", f"{row['last_loss']:g}"
        )
    show([table])


def cases(result: dict[str, Any]) -> None:
    """Print statistics by case."""
    rows = result["cases"]
    table = _table(f"the embedding, {result['num_seeds']} seeds", "", *next(iter(rows.values())))
    for name, row in rows.items():
        table.add_row(name, *(f"{value:.4g}" for value in row.values()))
    show([table])


PRINTERS: dict[str, Callable[[dict[str, Any]], None]] = {
    "injection": injection, "mitigation": mitigation, "search": search, "scale": cases, "batch": cases,
}  # fmt: skip


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title or None, box=SIMPLE_HEAD)
    for name in columns:
        table.add_column(name)
    return table


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else f"{value:g}"
