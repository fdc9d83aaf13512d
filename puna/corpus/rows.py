"""The documents of a built corpus."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from puna.corpus import cache
from puna.errors import DataError

REPORT = "corpus.json"
SPLITS = ("train", "heldout")


def read_report(corpus: Path) -> dict[str, Any]:
    """The content of corpus.json, after a look at the sizes of the files it names. Raises DataError."""
    report = cache.read_recipe(corpus / REPORT)
    if report is None:
        raise DataError(
            f"There is no corpus at {corpus} ({REPORT} is missing or not understood)",
            "Make it with `puna corpus build --source PATH --out DIR`.",
        )
    for name, facts in report["files"].items():
        if not cache.has_size(corpus / name, facts):
            problem = f"{corpus / name} is missing or was changed after it was written"
            raise DataError(problem, "Build the corpus again.")
    return report


def texts(corpus: Path, split: str) -> Iterator[str]:
    """The texts of one split, in order."""
    with open(corpus / f"{split}.jsonl", "rb") as file:
        for line in file:
            yield json.loads(line)["text"]
