"""A graph on disk: names, and edges as columns of whole numbers. `graph.json` is written last, by rename.

DIR/graph.json                 counts, types, splits, SHA-256 of each file; a folder without it is no graph
DIR/nodes.txt, relations.txt   a name a line; its number is its line
DIR/nodes.TYPE.txt             in place of nodes.txt where nodes have types: each type counts from 0
DIR/features.TYPE.txt          names of features, where the nodes of a type are bags of them
DIR/bags.TYPE.offsets .features    where each node's features begin (int64), and all of them (int32)
DIR/SPLIT.heads .relations .tails   little-endian int32, an edge each; SPLIT.weights: float32, where edges have them
DIR/buckets/SPLIT-P/           the same columns in the order of P x P buckets, with offsets.npy; made when needed
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from puna.errors import DataError
from puna.graph.names import read_names
from puna.sparse.folder import check_sizes, read_manifest

FORMAT_VERSION = 2
"""Of graphs whose nodes have types; others have 1, and can be read by a Puna without types."""
ONLY_TYPE = "node"
"""The type of nodes that were given none."""
MANIFEST = "graph.json"
HOW = "Make it with `puna graph import --train FILE --out DIR`."
COLUMNS = {"heads": np.dtype("<i4"), "relations": np.dtype("<i4"), "tails": np.dtype("<i4"), "weights": np.dtype("<f4")}
ENDS = ("heads", "tails")
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
class NodeType:
    """A type of nodes: users, items. file: where the names of its nodes are. num_features: 0 where each node has a
    vector of its own, and is no bag of features."""

    name: str
    num_nodes: int
    file: str = "nodes.txt"
    num_features: int = 0

    @property
    def num_rows(self) -> int:
        """Vectors of the type."""
        return self.num_features or self.num_nodes


@dataclass(frozen=True)
class Bags:
    """Features of each node of a type: those of node n are features[offsets[n]:offsets[n + 1]], one at least."""

    offsets: npt.NDArray[np.int64]  # (N + 1,)
    features: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.offsets) - 1


Pair = tuple[int, int]
"""The types that a relation leads from and to, by number."""


@dataclass(frozen=True)
class Graph:
    """An imported graph; edges are mapped, not read. num_nodes: of all types; numbers of a type's nodes begin at 0."""

    folder: Path
    num_nodes: int
    num_relations: int
    splits: dict[str, dict[str, Any]] = field(repr=False)  # by name: edges, weighted
    files: dict[str, dict[str, Any]] = field(repr=False)  # by name: bytes, sha256
    added_to: list[dict[str, Any]] = field(default_factory=list, repr=False)  # versions that this one grew from
    type_counts: dict[str, int] = field(default_factory=dict, repr=False)  # nodes by type; none: they have no types
    relation_types: list[Pair] = field(default_factory=list, repr=False)  # by relation, where nodes have types
    feature_counts: dict[str, int] = field(default_factory=dict, repr=False)  # features, of types that are bags of them

    @classmethod
    def open(cls, folder: Path | str) -> "Graph":
        """Raises DataError where the folder holds no graph, one of a newer format, or a file of another size."""
        folder = Path(folder)
        graph = read_manifest(folder / MANIFEST, "graph", HOW, FORMAT_VERSION, lambda raw: cls._of(folder, raw))
        check_sizes(folder, graph.files)
        return graph

    @classmethod
    def _of(cls, folder: Path, raw: dict[str, Any]) -> "Graph":
        return cls(
            folder,
            raw["num_nodes"],
            raw["num_relations"],
            raw["splits"],
            raw["files"],
            raw.get("added_to", []),
            raw.get("types", {}),
            [(head, tail) for head, tail in raw.get("relation_types", [])],
            raw.get("features", {}),
        )

    @property
    def is_typed(self) -> bool:
        """Whether nodes were given types."""
        return bool(self.type_counts)

    @property
    def types(self) -> list[NodeType]:
        """Types by number; one where nodes were given none."""
        if not self.is_typed:
            return [NodeType(ONLY_TYPE, self.num_nodes)]
        return [
            NodeType(name, count, names_file(name), self.feature_counts.get(name, 0))
            for name, count in self.type_counts.items()
        ]

    @cached_property
    def bags(self) -> list[Bags | None]:
        """By type: its nodes' features, or None where they have vectors of their own. Raises DataError: damaged."""
        return [self._bags(kind) if kind.num_features else None for kind in self.types]

    def _bags(self, kind: NodeType) -> Bags:
        stem = self.folder / f"bags.{kind.name}"
        bags = Bags(np.fromfile(f"{stem}.offsets", "<i8"), np.fromfile(f"{stem}.features", "<i4"))
        ordered = len(bags) == kind.num_nodes and bags.offsets[0] == 0 and bags.offsets[-1] == len(bags.features)
        if not ordered or (np.diff(bags.offsets) < 1).any():
            raise DataError(f"{stem}.offsets is damaged: not every node has features", "Import the graph again.")
        if bags.features.min() < 0 or bags.features.max() >= kind.num_features:
            raise DataError(f"{stem}.features has a number that is no feature's", "Import the graph again.")
        return bags

    @property
    def counts(self) -> list[int]:
        """Nodes of each type."""
        return [kind.num_nodes for kind in self.types]

    @cached_property
    def ends(self) -> npt.NDArray[np.int64]:
        """(R, 2): the types that each relation leads from and to."""
        if not self.is_typed:
            return np.zeros((self.num_relations, 2), np.int64)
        return np.array(self.relation_types, np.int64).reshape(-1, 2)

    @cached_property
    def pairs(self) -> list[Pair]:
        """What types relations join, each pair once, in order."""
        return sorted({(int(head), int(tail)) for head, tail in self.ends})

    @cached_property
    def pair_of(self) -> npt.NDArray[np.int64]:
        """(R,): each relation's place in `pairs`."""
        return np.array([self.pairs.index((int(head), int(tail))) for head, tail in self.ends], np.int64)

    def type_number(self, name: str) -> int:
        """A type's number. Raises DataError where there is none of that name."""
        names = [kind.name for kind in self.types]
        if name not in names:
            raise DataError(f"{self.folder} has no type {name!r}", f"Its types are {', '.join(names)}.")
        return names.index(name)

    @property
    def version(self) -> dict[str, Any]:
        """What tells it from other versions of a graph that grows: num_nodes, num_relations, nodes (SHA-256), and
        where nodes have types, types (nodes of each)."""
        counts = {"num_nodes": self.num_nodes, "num_relations": self.num_relations}
        if not self.is_typed:
            return counts | {"nodes": self.files["nodes.txt"]["sha256"]}
        hashes = {kind.name: self.files[kind.file]["sha256"] for kind in self.types}
        return counts | {"nodes": hashes, "types": dict(self.type_counts)}

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
            edges = Edges(**{n: self.checked(self.folder / f"{split}.{n}", n, start, stop) for n in names})
            for name in ENDS:
                path = self.folder / f"{split}.{name}"
                self.require_type(getattr(edges, name), edges.relations, name, path, start)
            yield edges

    def num_pieces(self, split: str) -> int:
        """How many `pieces` there are."""
        return -(-self.split(split)["edges"] // READ_ROWS)

    def checked(self, path: Path, name: str, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows of a column, read. Raises DataError where one is no number of this graph's nodes or relations, or no
        number at all (file and row)."""
        column = np.fromfile(path, COLUMNS[name], stop - start, offset=start * COLUMNS[name].itemsize)
        bound = {"relations": self.num_relations, "weights": np.inf}.get(name, max(self.counts))
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

    def require_type(self, column: Any, relations: Any, name: str, path: Path, start: int) -> None:
        """Raise DataError where a number is none of the type that its relation has there (file and row). name: heads or
        tails. start: rows of the file before these."""
        if not self.is_typed:
            return
        kinds = self.ends[relations, ENDS.index(name)]
        bad = np.flatnonzero(column >= np.array(self.counts)[kinds])
        if len(bad):
            kind = self.types[kinds[bad[0]]]
            raise DataError(
                f"{path}, row {start + bad[0] + 1:,}: {name} has the number {column[bad[0]]:,}, but there are "
                f"{kind.num_nodes:,} nodes of the type {kind.name}",
                "Import the graph again.",
            )

    def names(self, kind: int = 0) -> list[str]:
        """Names of a type's nodes by number."""
        found = self.types[kind]
        return read_names(self.folder / found.file, found.num_nodes)

    def relation_names(self) -> list[str]:
        """Relations' names by number."""
        return read_names(self.folder / "relations.txt", self.num_relations)


def names_file(name: str) -> str:
    """The file that holds the names of a type's nodes."""
    return f"nodes.{name}.txt"


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
