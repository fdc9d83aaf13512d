"""Detection of Adam's divergence on runs that chose no threshold, beside four rivals; and what saves a run.

    python bench/health.py --json                        the committed runs (bench/health_runs.json)
    python bench/health.py --runs FILE.json --json       runs of your own; settings: `puna lab adam --fields`
    python bench/health.py --rescue --json               the diverging ones again, under every remedy

Labels come from the loss alone (puna/lab/adam_labels.py). A run is a file in --out: what was done is not done again.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import machine
from rich.table import Table

from puna.console import out
from puna.lab import adam_rescue, adam_score, show
from puna.lab.adam_draw import drawn_list
from puna.lab.adam_spec import Job, read_specs
from puna.lab.adam_store import complete

LIST = Path(__file__).with_name("health_runs.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=LIST, help="a JSON list of runs (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/health"), help="folder of results (default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes, of one thread each (default: 1)")
    parser.add_argument("--rescue", action="store_true", help="train the diverging runs under every remedy too")
    parser.add_argument("--draw", action="store_true", help="draw the list anew by labels alone, write --runs")
    parser.add_argument("--json", action="store_true", help="print one line of JSON only")
    options = parser.parse_args()
    if options.draw:
        write_list(options.runs, options.out, options.workers)
        return
    specs = read_specs(options.runs)
    outcomes = [
        adam_score.outcome(r) for r in complete([Job(spec) for spec in specs], options.out, options.workers, "runs")
    ]
    result = adam_score.figures(outcomes)
    if options.rescue:
        diverging = [spec for spec, one in zip(specs, outcomes, strict=True) if one.diverging]
        result["rescue"] = adam_rescue.rescue(diverging, options.out, options.workers)
    result |= {"runs": [one.as_json() for one in outcomes]} | machine.facts()
    if not options.json:
        print_tables(result)
    print(json.dumps(result))


def write_list(path: Path, folder: Path, num_workers: int) -> None:
    """Draw runs seed by seed until each kind has as many of its label as the list wants."""
    specs = drawn_list(folder, num_workers)
    rows = [spec.model_dump(mode="json", exclude_defaults=True) for spec in specs]
    path.write_text("[\n" + ",\n".join("  " + json.dumps(row) for row in rows) + "\n]\n")
    print(json.dumps({"runs": len(rows), "file": str(path)}))


def print_tables(result: dict[str, Any]) -> None:
    """Detection by cause, areas, rescue."""
    table = Table(title="detection")
    for name in ("cause", "diverging", "detected", "median lead", "healthy", "false alarms"):
        table.add_column(name)
    for cause, row in [*result["by_cause"].items(), ("all", result)]:
        cells = (
            row[key] for key in ("num_diverging", "detected_pct", "median_lead_steps", "num_healthy", "false_alarm_pct")
        )
        table.add_row(cause, *("" if cell is None else f"{cell:g}" for cell in cells))
    show.show([table])
    for key, value in result.items():
        if key.startswith("auc"):
            out().print(f"{key}: {value}")
    for arm, row in result.get("rescue", {}).items():
        out().print(f"{arm}: {row}")


if __name__ == "__main__":
    main()
