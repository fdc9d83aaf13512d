"""Planted corpora: documents of random words, and edits of them."""

import json
import random
from pathlib import Path

import pytest

WORDS = [f"{a}{b}{c}" for a in "bdklm" for b in ("a", "e", "io", "u") for c in ("n", "rt", "s", "")]


class Planter:
    """Writes documents into a folder; `words` draws a document, `edit` replaces some words of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.random = folder, random.Random(7)
        folder.mkdir()

    def words(self, count: int = 300) -> list[str]:
        return self.random.choices(WORDS, k=count)

    def edit(self, words: list[str], times: int) -> list[str]:
        """Replace evenly spread words by new ones."""
        places = range(self.random.randrange(5, len(words) // (times + 1)), len(words), len(words) // (times + 1))
        new = {place: f"edit{self.random.randrange(10**9)}" for place in places[:times]}
        return [new.get(i, word) for i, word in enumerate(words)]

    def plant(self, name: str, words: list[str], per_line: int = 12) -> str:
        lines = [" ".join(words[i : i + per_line]) for i in range(0, len(words), per_line)]
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")
        return name


@pytest.fixture
def planter(tmp_path) -> Planter:
    return Planter(tmp_path / "source")


def read_rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


@pytest.fixture
def rows():
    return read_rows
