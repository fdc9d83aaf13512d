"""`puna graph import`: edge files stream into a graph folder. Memory: 128 bits a name and a few blocks of rows."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from puna.console import track
from puna.errors import DataError
from puna.graph.graph import COLUMNS, FORMAT_VERSION, MANIFEST, Graph, column_names
from puna.graph.names import Names
from puna.graph.read import Column, Rows, read
from puna.graph.walks import Walks, co_occurrences
from puna.train.hashed import Hashed, sha256_of

FIELDS = ("head", "relation", "tail", "weight")
ONLY_RELATION = "edge"
"""Name of the relation of edges that have none."""
LINKS = "links"
"""The split that holds the edges which walks went over."""
COPIED_BYTES = 8 << 20


@dataclass(frozen=True)
class _Form:
    """How rows are written."""

    columns: Sequence[str]
    delimiter: str | None
    header: bool

    @property
    def weighted(self) -> bool:
        return "weight" in self.columns


def import_graph(
    splits: Mapping[str, Path | str],
    out: Path | str,
    columns: Sequence[str] = ("head", "relation", "tail"),
    delimiter: str | None = None,
    header: bool = False,
    *,
    add: Path | str | None = None,
    walks: Walks | None = None,
) -> dict[str, Any]:
    """Write the edge files `splits` (train, valid, test) as a graph.

    columns: what the fields of a row are, of head, relation, tail, weight and - (left out). Nodes and relations are
    numbered as they are first met, train first. add: a graph whose nodes, relations and edges come first, with their
    numbers; it stays as it is. walks: the training edges become a split `links`, and those of `train` are nodes that
    stand near each other in walks over them, with counts as weights.

    Returns out, num_nodes, num_relations, edges by split, num_unseen (nodes that only valid or test have), and with add
    num_new_nodes. Raises DataError: a bad row (file and line), a weight that is no finite number, a relation that no
    training edge has, no edge, `out` holds a graph already.
    """
    _require_columns(columns)
    form = _Form(columns, delimiter, header)
    out, base = Path(out), Graph.open(add) if add else None
    if (out / MANIFEST).exists():
        raise DataError(f"{out} holds a graph already", "Name another folder with --out, or remove that one.")
    if base and any(facts["weighted"] != form.weighted for facts in base.splits.values()):
        has = "no weights" if form.weighted else "weights"
        raise DataError(f"{base.folder} has edges with {has}", "Give rows of the same kind, by --columns.")
    out.mkdir(parents=True, exist_ok=True)
    graph, num_unseen = _write(splits, out, form, base)
    if walks:
        graph = _walked(graph, walks)
    write_manifest(graph)
    told = {
        "out": str(out),
        "num_nodes": graph.num_nodes,
        "num_relations": graph.num_relations,
        "edges": {split: facts["edges"] for split, facts in graph.splits.items()},
        "num_unseen": num_unseen,
    }
    return told | ({"num_new_nodes": graph.num_nodes - base.num_nodes} if base else {})


def _write(splits: Mapping[str, Path | str], out: Path, form: _Form, base: Graph | None) -> tuple[Graph, int]:
    """All splits and names; the graph, without its manifest, and the nodes that training has not seen."""
    counts: dict[str, int] = {}
    files: dict[str, dict[str, Any]] = {}
    with (out / "nodes.txt").open("wb") as node_file, (out / "relations.txt").open("wb") as relation_file:
        if base:
            nodes = Names.of_file(base.folder / "nodes.txt", node_file)
            relations = Names.of_file(base.folder / "relations.txt", relation_file)
        else:
            nodes, relations = Names(node_file), Names(relation_file)
        trained = 0
        for split in [*(base.splits if base else ()), *sorted(splits, key=lambda name: name != "train")]:
            if split in counts:
                continue
            source = Path(splits[split]) if split in splits else None
            writer = _Split(split, out, form, base, nodes, relations)
            counts[split], written = writer.write(source)
            files |= written
            trained = trained or nodes.count
        _sync([node_file, relation_file])
    if not counts["train"]:
        raise DataError(f"{splits['train']} has no edge", "Give a file with edges.")
    for name in ("nodes.txt", "relations.txt"):
        files[name] = {"bytes": (out / name).stat().st_size, "sha256": sha256_of(out / name)}
    facts = {split: {"edges": count, "weighted": form.weighted} for split, count in counts.items()}
    added_to = [*base.added_to, base.version] if base else []
    return Graph(out, nodes.count, relations.count, facts, files, added_to), nodes.count - trained


def _require_columns(columns: Sequence[str]) -> None:
    named = [name for name in columns if name != "-"]
    unknown = [name for name in named if name not in FIELDS]
    if unknown or len(set(named)) != len(named) or not {"head", "tail"} <= set(named):
        raise DataError(
            f"the columns {','.join(columns)} do not describe an edge",
            "Name head and tail once each, with relation, weight and - (a field left out) where rows have them.",
        )


@dataclass(frozen=True)
class _Split:
    """One split, as it is written."""

    name: str
    out: Path
    form: _Form
    base: Graph | None
    nodes: Names
    relations: Names

    def write(self, source: Path | None) -> tuple[int, dict[str, dict[str, Any]]]:
        """Copy the base's edges, then stream those of a file; their number, and size and hash of what was written."""
        count = 0
        with ExitStack() as stack:
            raw = {
                name: stack.enter_context((self.out / f"{self.name}.{name}").open("wb"))
                for name in column_names(self.form.weighted)
            }
            hashed = {name: Hashed(file) for name, file in raw.items()}
            if self.base and self.name in self.base.splits:
                count = self.base.splits[self.name]["edges"]
                for name, file in hashed.items():
                    _copy(self.base.folder / f"{self.name}.{name}", file)
            if source:
                count += self._stream(source, hashed)
            _sync(raw.values())
        return count, {f"{self.name}.{name}": file.fingerprint for name, file in hashed.items()}

    def _stream(self, source: Path, files: Mapping[str, Hashed]) -> int:
        form, count = self.form, 0
        only = self.relations.numbers(_constant(ONLY_RELATION))[0] if "relation" not in form.columns else 0
        for rows in track(read(source, len(form.columns), form.delimiter, form.header), f"reading {source.name}"):
            fields = dict(zip(form.columns, rows.columns, strict=True))
            values: dict[str, npt.NDArray[Any]] = {
                "heads": self.nodes.numbers(fields["head"]),
                "tails": self.nodes.numbers(fields["tail"]),
                "relations": np.full(len(rows), only, np.int32),
            }
            if "relation" in fields:
                values["relations"] = self._relations(rows, fields["relation"])
            if "weight" in fields:
                values["weights"] = _weights(rows, fields["weight"])
            for name, file in files.items():
                file.write(np.ascontiguousarray(values[name], COLUMNS[name]))
            count += len(rows)
        return count

    def _relations(self, rows: Rows, column: Column) -> npt.NDArray[np.int32]:
        """Numbers of relations. Outside of train all of them are known: nothing would be learnt of another."""
        known = self.relations.count
        numbers = self.relations.numbers(column)
        if self.name != "train" and self.relations.count > known:
            row = int(np.flatnonzero(numbers >= known)[0])
            raise DataError(
                f"{rows.place(row)}: no training edge has the relation {column.text(row)!r}",
                "Leave the line out, or train on edges of that relation.",
            )
        return numbers


def _weights(rows: Rows, column: Column) -> npt.NDArray[np.float32]:
    weights = np.empty(len(rows), np.float32)
    for row in range(len(weights)):
        text = column.text(row)
        try:
            weights[row] = float(text)
        except ValueError:
            weights[row] = np.nan
        if not np.isfinite(weights[row]) or weights[row] < 0:
            raise DataError(
                f"{rows.place(row)}: the weight {text!r} is not a number from 0 on", "Mend or drop that line."
            )
    return weights


def _walked(graph: Graph, walks: Walks) -> Graph:
    """The graph with its training edges as `links`, and in their place what walks over them say."""
    hashed: dict[str, Hashed] = {}
    count = 0
    with ExitStack() as stack:
        for name in column_names(weighted=True):
            hashed[name] = Hashed(stack.enter_context((graph.folder / f"walked.{name}").open("wb")))
        for edges in co_occurrences(graph, walks):
            for name, file in hashed.items():
                file.write(np.ascontiguousarray(getattr(edges, name), COLUMNS[name]))
            count += len(edges)
        _sync(hashed.values())
    files = dict(graph.files)
    for name in column_names(weighted=False):
        files[f"{LINKS}.{name}"] = files[f"train.{name}"]
        os.replace(graph.folder / f"train.{name}", graph.folder / f"{LINKS}.{name}")
    for name, file in hashed.items():
        files[f"train.{name}"] = file.fingerprint
        os.replace(graph.folder / f"walked.{name}", graph.folder / f"train.{name}")
    splits = {"train": {"edges": count, "weighted": True}, LINKS: graph.splits["train"]}
    return replace(graph, splits={**graph.splits, **splits}, files=files)


def write_manifest(graph: Graph) -> None:
    """Write what a graph folder says of itself: from then on it is one."""
    manifest = {
        "format_version": FORMAT_VERSION,
        "num_nodes": graph.num_nodes,
        "num_relations": graph.num_relations,
        "splits": graph.splits,
        "files": graph.files,
    }
    if graph.added_to:
        manifest["added_to"] = graph.added_to
    _write_last(graph.folder / MANIFEST, json.dumps(manifest, indent=1).encode())


def _copy(path: Path, file: Hashed) -> None:
    with path.open("rb") as source:
        while data := source.read(COPIED_BYTES):
            file.write(data)


def _constant(name: str) -> Column:
    data = np.frombuffer(name.encode(), np.uint8)
    return Column(data, np.array([0]), np.array([len(data)]))


def _sync(files: Iterable[IO[bytes] | Hashed]) -> None:
    for file in files:
        file.flush()
        os.fsync(file.fileno())


def _write_last(path: Path, data: bytes) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        _sync([file])
    os.replace(temporary, path)
