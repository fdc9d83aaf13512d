"""How far the planner is from published runs, by source: as fitted, and with each source left out.

    python bench/planner_accuracy.py runs.csv

The second column is what the fit kept beside its constants; `puna plan fit runs.csv` makes it anew.
"""

import sys
from pathlib import Path

from puna.plan.constants import about, load
from puna.plan.runs import read
from puna.plan.validate import validate


def main(path: Path) -> None:
    """Print a table in Markdown."""
    figures, _ = validate(read(path), load())
    out = about()["leave_one_source_out"]
    print("| source | runs | median % | p90 % | mean % | left out: median % | left out: in the 80 % interval |")
    print("|---|---|---|---|---|---|---|")
    for name, entry in figures["by_source"].items():
        other = out["by_source"][name]
        print(
            f"| {name} | {entry['n']} | {entry['median_abs_pct_error']} | {entry['p90_abs_pct_error']} | "
            f"{entry['mean_signed_pct_error']:+} | {other['median_abs_pct_error']} | {other['interval_coverage_80']} |"
        )
    for words, table in (("as fitted", figures), ("each source left out", out)):
        print(
            f"\n{words}, without vts: median {table['median_abs_pct_error_without_vts']} %, 90th percentile "
            f"{table['p90_abs_pct_error_without_vts']} %, mean {table['mean_signed_pct_error_without_vts']:+} %, "
            f"source-balanced {table['source_balanced_median_without_vts']} %, in the 80 % interval "
            f"{table['interval_coverage_80_without_vts']} %"
        )
    print(f"\nmemory: median {figures['memory']['median_abs_pct_error']} % over {figures['memory']['n']} runs")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
