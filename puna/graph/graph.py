"""A graph on disk: names, and edges as columns of whole numbers. `graph.json` is written last, by rename.

DIR/graph.json                 counts, splits, SHA-256 of each file; a folder without it is no graph
DIR/nodes.txt, relations.txt   a name a line; its number is its line
DIR/SPLIT.heads .relations .tails   little-endian int32, an edge each; SPLIT.weights: float32, where edges have them
DIR/buckets/SPLIT-P/           the same columns in the order of P x P buckets, with offsets.npy; made when needed
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from puna.errors import DataError
from puna.graph.names import read_names

FORMAT_VERSION = 1
MANIFEST = "graph.json"
HOW = "Make it with `puna graph import --train FILE --out DIR`."
COLUMNS = {"heads": np.dtype("<i4"), "relations": np.dtype("<i4"), "tails": np.dtype("<i4"), "weights": np.dtype("<f4")}
READ_ROWS = 1 << 22


@dataclass(frozen=True)
class Edges:
    """Edges as numbers: (N,) each. weights: None where all are 1."""

    heads: npt.NDArray[np.int32]
    relations: npt.NDArray[np.int32]
    tails: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.heads)

    def take(self, index: Any) -> "Edges":
        """Some of them: by place, or a slice."""
        weights = None if self.weights is None else self.weights[index]
        return Edges(self.heads[index], self.relations[index], self.tails[index], weights)

    def pieces(self, rows: int = READ_ROWS) -> Iterator["Edges"]:
        """All of them, so many at a time."""
        for start in range(0, len(self), rows):
            yield self.take(slice(start, start + rows))


@dataclass(frozen=True)
class Graph:
    """An imported graph; edges are mapped, not read."""

    folder: Path
    num_nodes: int
    num_relations: int
    splits: dict[str, dict[str, Any]] = field(repr=False)  # by name: edges, weighted
    files: dict[str, dict[str, Any]] = field(repr=False)  # by name: bytes, sha256

    @classmethod
    def open(cls, folder: Path | str) -> "Graph":
        """Raises DataError where the folder holds no graph, one of a newer format, or a file of another size."""
        folder = Path(folder)
        path = folder / MANIFEST
        if not path.is_file():
            raise DataError(f"{folder} holds no graph: there is no {path}", HOW)
        try:
            raw = json.loads(path.read_bytes())
            version = raw["format_version"]
            graph = cls(folder, raw["num_nodes"], raw["num_relations"], raw["splits"], raw["files"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is damaged ({error})", "Import the graph again.") from None
        if version > FORMAT_VERSION:
            raise DataError(f"{path} has format {version}; this Puna reads {FORMAT_VERSION}", "Use a newer Puna.")
        for name, facts in graph.files.items():
            size = (folder / name).stat().st_size if (folder / name).is_file() else None
            if size != facts["bytes"]:
                found = "is missing" if size is None else f"has {size}"
                raise DataError(f"{folder / name} should have {facts['bytes']} bytes and {found}", "Import again.")
        return graph

    def edges(self, split: str) -> Edges:
        """Raises DataError where the graph has no such split."""
        if split not in self.splits:
            have = ", ".join(self.splits)
            raise DataError(f"{self.folder} has no split {split!r}; it has {have}", f"Import it with --{split} FILE.")
        return map_edges(self.folder, f"{split}.", self.splits[split]["weighted"])

    def names(self) -> list[str]:
        """Nodes' names by number."""
        return read_names(self.folder / "nodes.txt", self.num_nodes)

    def relation_names(self) -> list[str]:
        """Relations' names by number."""
        return read_names(self.folder / "relations.txt", self.num_relations)


def map_edges(folder: Path, prefix: str, weighted: bool) -> Edges:
    """Columns in a folder; a file of no bytes, which cannot be mapped, is an empty column."""
    columns: dict[str, Any] = {}
    for name, dtype in COLUMNS.items():
        if name != "weights" or weighted:
            path = folder / f"{prefix}{name}"
            columns[name] = np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)
    return Edges(**columns)
