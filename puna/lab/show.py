"""What the lab found, as tables: each figure beside the formula it should be."""

from collections.abc import Iterable
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from puna.console import out


def show(tables: Iterable[Table], *notes: str) -> None:
    """Print tables, then notes, on stdout."""
    console = out()
    for table in tables:
        console.print(table)
    for note in notes:
        console.print(note, soft_wrap=True)


def counted(result: dict[str, Any]) -> None:
    """Print the result of `puna.lab.fsdp.count`."""
    model = result["model"]
    heading = (
        f"Llama of {result['num_parameters']:,} parameters: {model['num_layers']} layers, width {model['dim']}, "
        f"vocabulary {model['vocab_size']:,}; {result['batch']} x {result['seq_len']} tokens a rank and micro-step"
    )
    notes = [_built(run) for run in result["runs"]]
    legend = (
        "N units; M bytes of all parameters, m of the last unit's, as gathered; G of gradients, as reduced (M where "
        "both have one dtype); F shard ranks; R replicas. A figure that is not what its formula says shows both."
    )
    show([_runs(run) for run in result["runs"]], heading, *notes, legend)


def _runs(run: dict[str, Any]) -> Table:
    table = Table(title=f"{run['processes']} processes", box=SIMPLE_HEAD)
    for name in ("", "N", "F x R", "all-gathers", "reduce-scatters", "all-reduces", "bytes sent a rank"):
        table.add_column(name, justify="right" if name else "left")
    for name in ("elements gathered at most", "states + units + kept", "step"):
        table.add_column(name, justify="right")
    for row in run["rows"]:
        table.add_row(*_cells(row))
    return table


def _cells(row: dict[str, Any]) -> Iterable[str]:
    formula = formulas(row)
    yield row["case"]
    yield str(row["num_units"])
    yield f"{row['shard']} x {row['replicas']}"
    for key in ("all_gathers", "reduce_scatters", "all_reduces", "bytes", "peak_unsharded"):
        yield _beside(row, key, formula[key])
    yield _memory(row)
    yield f"{1e3 * row['step_seconds']:.1f} ms"


def _beside(row: dict[str, Any], key: str, formula: str) -> str:
    measured, predicted = row["measured"][key], row["predicted"][key]
    if measured != predicted:
        return f"{measured:,.0f}, not {predicted:,.0f} = {formula}"
    return f"{measured:,.0f} = {formula}" if measured else "0"


def _memory(row: dict[str, Any]) -> str:
    measured, predicted = row["measured"]["memory_bytes"], row["predicted"]["memory_bytes"]
    return "" if predicted is None else f"{measured / 1e6:.2f} MB ({measured / predicted - 1:+.1%})"


def formulas(row: dict[str, Any]) -> dict[str, str]:
    """The formula behind each predicted figure of a row, in the symbols of the legend."""
    kept = row["accumulate"] == "kept"
    gathered, reduced = (1 if kept else row["num_micro"]), (row["num_micro"] if row["accumulate"] == "reduced" else 1)
    around = "root + " if row["encloses"] else ""
    most = "largest" if row["prefetch"] == "none" else "two neighbours"
    return {
        "all_gathers": _times(gathered, {"all": "2N", "inner": "2N-1", "none": "N"}[row["reshard"]]),
        "reduce_scatters": _times(reduced, "N"),
        "all_reduces": _times(reduced, "N"),
        "bytes": _sent(row, gathered, reduced),
        "peak_unsharded": "all" if row["reshard"] == "none" else around + most,
    }


def _sent(row: dict[str, Any], gathered: int, reduced: int) -> str:
    models = {"all": "2M", "inner": "2M-m", "none": "M"}[row["reshard"]]
    whole = {"all": "3M", "inner": "3M-m", "none": "2M"}[row["reshard"]]
    one_dtype, once = row["param_bytes"] == row["reduce_bytes"], gathered == reduced
    size = _times(gathered, whole) if one_dtype and once else f"{_times(gathered, models)}+{_times(reduced, 'G')}"
    ring = f"{size} (F-1)/F" if size in ("3M", "2M") else f"({size}) (F-1)/F"
    return " + ".join([ring] * (row["shard"] > 1) + ["2G/F (R-1)/R"] * (row["replicas"] > 1))


def _times(count: int, what: str) -> str:
    return what if count == 1 else f"{count}({what})"


def _built(run: dict[str, Any]) -> str:
    built = {key: value / 1e6 for key, value in run["deferred"].items() if key != "same_weights"}
    same = "the same weights" if run["deferred"]["same_weights"] else "OTHER weights"
    return (
        f"{run['processes']} processes, built on the meta device: {built['deferred_peak_bytes']:.2f} MB at the peak "
        f"(predicted: {built['bound_bytes']:.2f} MB); "
        f"whole first: {built['whole_first_peak_bytes']:.2f} MB; {same}."
    )


def simulated(result: dict[str, Any]) -> None:
    """Print the result of `puna.lab.overlap.overlap`."""
    table = Table(title="simulated: prefetch in backward, at most 2 gathers in flight")
    table.add_column("", no_wrap=True)
    for name in ("step", "prefetch gains", "limiter gains", "in flight (free)", "retries (free)", "reserved (free)"):
        table.add_column(name, justify="right", no_wrap=True)
    for found in result["settings"]:
        usual, free = found["variants"]["as recommended"], found["variants"]["no limiter"]
        pairs = [f"{usual[key]} ({free[key]})" for key in ("gathers_in_flight", "num_retries")]
        memory = f"{usual['peak_bytes'] / 1e9:.1f} GB ({free['peak_bytes'] / 1e9:.1f} GB)"
        gains = [f"{found[key]:+.1%}" for key in ("prefetch_gain", "limiter_gain")]
        table.add_row(found["setting"], f"{1e3 * usual['step_seconds']:,.0f} ms", *gains, *pairs, memory)
    show([table], "free: without the limiter. A gain is what the rate of steps with it has over that without it.")
