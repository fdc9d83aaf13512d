"""A graph on disk: names, and edges as columns of whole numbers. `graph.json` is written last, by rename.

DIR/graph.json                 counts, splits, SHA-256 of each file; a folder without it is no graph
DIR/nodes.txt, relations.txt   a name a line; its number is its line
DIR/SPLIT.heads .relations .tails   little-endian int32, an edge each; SPLIT.weights: float32, where edges have them
DIR/buckets/SPLIT-P/           the same columns in the order of P x P buckets, with offsets.npy; made when needed
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from puna.errors import DataError
from puna.graph.names import read_names
from puna.sparse.folder import check_sizes, read_manifest

FORMAT_VERSION = 1
MANIFEST = "graph.json"
HOW = "Make it with `puna graph import --train FILE --out DIR`."
COLUMNS = {"heads": np.dtype("<i4"), "relations": np.dtype("<i4"), "tails": np.dtype("<i4"), "weights": np.dtype("<f4")}
READ_ROWS = 1 << 20


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


@dataclass(frozen=True)
class Graph:
    """An imported graph; edges are mapped, not read."""

    folder: Path
    num_nodes: int
    num_relations: int
    splits: dict[str, dict[str, Any]] = field(repr=False)  # by name: edges, weighted
    files: dict[str, dict[str, Any]] = field(repr=False)  # by name: bytes, sha256
    added_to: list[dict[str, Any]] = field(default_factory=list, repr=False)  # versions that this one grew from

    @classmethod
    def open(cls, folder: Path | str) -> "Graph":
        """Raises DataError where the folder holds no graph, one of a newer format, or a file of another size."""
        folder = Path(folder)
        path = folder / MANIFEST
        if not path.is_file():
            raise DataError(f"{folder} holds no graph: there is no {path}", HOW)
        graph = read_manifest(path, FORMAT_VERSION, lambda raw: cls._of(folder, raw), "Import the graph again.")
        check_sizes(folder, graph.files)
        return graph

    @classmethod
    def _of(cls, folder: Path, raw: dict[str, Any]) -> "Graph":
        counts = raw["num_nodes"], raw["num_relations"]
        return cls(folder, *counts, raw["splits"], raw["files"], raw.get("added_to", []))

    @property
    def version(self) -> dict[str, Any]:
        """What tells it from other versions of a graph that grows: num_nodes, num_relations, nodes (SHA-256)."""
        counts = {"num_nodes": self.num_nodes, "num_relations": self.num_relations}
        return counts | {"nodes": self.files["nodes.txt"]["sha256"]}

    def split(self, name: str) -> dict[str, Any]:
        """What is known of a split: edges, weighted. Raises DataError where the graph has no such split."""
        if name not in self.splits:
            have = ", ".join(self.splits)
            raise DataError(f"{self.folder} has no split {name!r}; it has {have}", f"Import it with --{name} FILE.")
        return self.splits[name]

    def edges(self, split: str) -> Edges:
        """A split's edges, mapped. Raises DataError where the graph has no such split."""
        return map_edges(self.folder, f"{split}.", self.split(split)["weighted"])

    def pieces(self, split: str, rows: int | None = None) -> Iterator[Edges]:
        """A split's edges read some at a time (READ_ROWS where not given). Raises DataError: a number out of range."""
        facts, rows = self.split(split), rows or READ_ROWS
        for start in range(0, facts["edges"], rows):
            stop = min(start + rows, facts["edges"])
            names = column_names(facts["weighted"])
            yield Edges(**{n: self.checked(self.folder / f"{split}.{n}", n, start, stop) for n in names})

    def num_pieces(self, split: str) -> int:
        """How many `pieces` there are."""
        return -(-self.split(split)["edges"] // READ_ROWS)

    def checked(self, path: Path, name: str, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows of a column, read. Raises DataError where one is no number of this graph's nodes or relations, or no
        number at all (file and row)."""
        column = np.fromfile(path, COLUMNS[name], stop - start, offset=start * COLUMNS[name].itemsize)
        bound = {"relations": self.num_relations, "weights": np.inf}.get(name, self.num_nodes)
        if len(column) and not (column.min() >= 0 and column.max() < bound):
            row = int(np.flatnonzero(~((column >= 0) & (column < bound)))[0])
            if name == "weights":
                raise DataError(
                    f"{path}, row {start + row + 1:,}: the weight is {column[row]}", "Import the graph again."
                )
            raise DataError(
                f"{path}, row {start + row + 1:,}: {name} has the number {column[row]:,}, but the graph has {bound:,} "
                f"{'relations' if name == 'relations' else 'nodes'}",
                "Import the graph again.",
            )
        return column

    def names(self) -> list[str]:
        """Nodes' names by number."""
        return read_names(self.folder / "nodes.txt", self.num_nodes)

    def relation_names(self) -> list[str]:
        """Relations' names by number."""
        return read_names(self.folder / "relations.txt", self.num_relations)


def column_names(weighted: bool) -> list[str]:
    """Columns that edges have."""
    return [name for name in COLUMNS if name != "weights" or weighted]


def map_edges(folder: Path, prefix: str, weighted: bool) -> Edges:
    """Columns in a folder; a file of no bytes, which cannot be mapped, is an empty column."""
    columns: dict[str, Any] = {}
    for name in column_names(weighted):
        path = folder / f"{prefix}{name}"
        columns[name] = np.memmap(path, COLUMNS[name], "r") if path.stat().st_size else np.empty(0, COLUMNS[name])
    return Edges(**columns)
