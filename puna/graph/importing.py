"""`puna graph import`: edge files stream into a graph folder. Memory: 128 bits a name and a few blocks of rows."""

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from puna.console import track
from puna.errors import DataError
from puna.graph.graph import COLUMNS, FORMAT_VERSION, MANIFEST, ONLY_TYPE, Graph, Pair, column_names, names_file
from puna.graph.names import Names
from puna.graph.read import Column, Rows, read
from puna.graph.walks import Walks, co_occurrences
from puna.train.hashed import Hashed, sha256_of

FIELDS = ("head", "relation", "tail", "weight")
ONLY_RELATION = "edge"
"""Name of the relation of edges that have none."""
LINKS = "links"
"""The split that holds the edges which walks went over."""
CONTEXT = "context"
"""The type that walks lead to where contexts have a table of their own."""
TYPE_NAME = re.compile(r"[A-Za-z0-9_-]+")
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
    types: Path | str | None = None,
    features: Path | str | None = None,
) -> dict[str, Any]:
    """Write the edge files `splits` (train, valid, test) as a graph.

    columns: what the fields of a row are, of head, relation, tail, weight and - (left out). Nodes and relations are
    numbered as they are first met, train first. add: a graph whose nodes, relations and edges come first, with their
    numbers; it stays as it is. walks: the training edges become a split `links`, and those of `train` are nodes that
    stand near each other in walks over them, with counts as weights. types: a file with a row for each relation: its
    name, the type of its heads, the type of its tails; each type has names and numbers of its own. features: a file
    with rows of type, node, feature: the nodes of these types are bags of features.

    Returns out, num_nodes, num_relations, edges by split, num_unseen (nodes that only valid or test have), with add
    num_new_nodes, where nodes have types, types (nodes of each), and features (of types that have them). Raises
    DataError: a bad row (file and line), a weight that is no finite number, a relation that no training edge has or
    that has no types, a node without features where its type has any, no edge, `out` holds a graph already.
    """
    _require_columns(columns)
    form = _Form(columns, delimiter, header)
    out, base = Path(out), Graph.open(add) if add else None
    pairs = read_types(Path(types)) if types else None
    if base and types and not base.is_typed:
        raise DataError(f"the nodes of {base.folder} have no types", f"Leave {types} out, or import all of it anew.")
    if walks and (types or (base and base.is_typed)):
        given = types or (base and base.folder)
        raise DataError(f"walks go over nodes of one type, but {given} gives them types", "Leave one of the two out.")
    if features and not types:
        raise DataError(f"{features} gives types features, but nodes have no types", "Give them with --types.")
    if base and (features or base.feature_counts):
        raise DataError(f"features cannot be added to {base.folder}", "Import the whole graph at once.")
    if walks and walks.contexts and base:
        raise DataError(f"contexts cannot be added to {base.folder}", "Import the whole graph at once.")
    if (out / MANIFEST).exists():
        raise DataError(f"{out} holds a graph already", "Name another folder with --out, or remove that one.")
    if base and any(facts["weighted"] != form.weighted for facts in base.splits.values()):
        has = "no weights" if form.weighted else "weights"
        raise DataError(f"{base.folder} has edges with {has}", "Give rows of the same kind, by --columns.")
    out.mkdir(parents=True, exist_ok=True)
    graph, num_unseen = _write(splits, out, form, base, pairs, Path(features) if features else None)
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
    told |= {"num_new_nodes": graph.num_nodes - base.num_nodes} if base else {}
    told |= {"types": graph.type_counts} if graph.is_typed else {}
    return told | ({"features": graph.feature_counts} if features else {})


def read_types(path: Path) -> dict[str, tuple[str, str]]:
    """By relation, the types that it leads from and to. Raises DataError: a bad row, a relation named twice (file and
    line), a name that cannot be part of a file's name."""
    found: dict[str, tuple[str, str]] = {}
    for rows in read(path, 3):
        for n in range(len(rows)):
            relation, *kinds = (column.text(n) for column in rows.columns)
            bad = next((kind for kind in kinds if not TYPE_NAME.fullmatch(kind)), None)
            if bad is not None:
                raise DataError(
                    f"{rows.place(n)}: the type {bad!r} is part of a file's name", "Use letters, digits, _ and -."
                )
            if relation in found:
                raise DataError(f"{rows.place(n)}: {relation!r} has a row before", "Give each relation once.")
            found[relation] = kinds[0], kinds[1]
    return found


class _Nodes:
    """Names of nodes by type, and what types relations lead from and to; types come as their relations do."""

    def __init__(
        self, out: Path, base: Graph | None, pairs: Mapping[str, tuple[str, str]] | None, stack: ExitStack
    ) -> None:
        """pairs: of relations that are new; None: nodes have no types, or only those of the base. stack: what closes
        the files."""
        self.out, self.pairs, self.stack = out, pairs or {}, stack
        self.is_typed = pairs is not None or (base is not None and base.is_typed)
        self.names: dict[str, Names] = {}
        self.files: list[IO[bytes]] = []
        self.ends: list[Pair] = []
        if base:
            for kind in base.types:
                self.names[kind.name] = Names.of_file(base.folder / kind.file, self._open(kind.file))
            self.ends = [(int(head), int(tail)) for head, tail in base.ends]
        elif not self.is_typed:
            self.names[ONLY_TYPE] = Names(self._open("nodes.txt"))

    def _open(self, name: str) -> IO[bytes]:
        self.files.append(self.stack.enter_context((self.out / name).open("wb")))
        return self.files[-1]

    @property
    def count(self) -> int:
        """Nodes of all types."""
        return sum(names.count for names in self.names.values())

    def numbers(self, relations: npt.NDArray[np.int32], side: int, column: Column) -> npt.NDArray[np.int32]:
        """The numbers of a column's nodes, each within its type. side: 0 for heads, 1 for tails."""
        by_type = list(self.names.values())
        if not self.is_typed:
            return by_type[0].numbers(column)
        kinds = np.array(self.ends)[relations, side]
        out = np.empty(len(kinds), np.int32)
        for kind in np.unique(kinds):
            own = np.flatnonzero(kinds == kind)
            out[own] = by_type[kind].numbers(Column(column.data, column.starts[own], column.ends[own]))
        return out

    def learn(self, relations: npt.NDArray[np.int32], column: Column, rows: Rows) -> None:
        """Note the types of relations that are met for the first time. Raises DataError where one has none."""
        if not self.is_typed:
            return
        new, first = np.unique(relations, return_index=True)
        for row in first[new >= len(self.ends)]:
            name = column.text(row)
            if name not in self.pairs:
                raise DataError(
                    f"{rows.place(int(row))}: the relation {name!r} has no types",
                    "Give it a row of its name, the type of its heads and the type of its tails in the file --types.",
                )
            self.ends.append((self._number(self.pairs[name][0]), self._number(self.pairs[name][1])))

    def _number(self, name: str) -> int:
        if name not in self.names:
            self.names[name] = Names(self._open(names_file(name)))
        return list(self.names).index(name)

    def read_features(self, path: Path) -> dict[str, int]:
        """Write bags and names of features (see `puna.graph.graph`); how many features each type has. Raises DataError:
        a bad row, a type of no relation (file and line), a node without a feature."""
        kinds, found = Names(BytesIO()), dict[str, tuple[Names, list[npt.NDArray[np.int32]]]]()
        for rows in read(path, 3):
            numbers = kinds.numbers(rows.columns[0])
            for number in np.unique(numbers):
                own = np.flatnonzero(numbers == number)
                name = rows.columns[0].text(int(own[0]))
                if name not in self.names:
                    raise DataError(f"{rows.place(int(own[0]))}: no relation has the type {name!r}", "Mend the row.")
                if name not in found:
                    found[name] = Names(self._open(f"features.{name}.txt")), []
                bags, (features, pairs) = self.names[name], found[name]
                nodes, parts = (Column(c.data, c.starts[own], c.ends[own]) for c in rows.columns[1:])
                pairs.append(np.stack([bags.numbers(nodes), features.numbers(parts)]))
        for name, (_, pairs) in found.items():
            self._write_bags(name, np.concatenate(pairs, axis=1), path)
        return {name: features.count for name, (features, _) in found.items()}

    def _write_bags(self, name: str, pairs: npt.NDArray[np.int32], path: Path) -> None:
        nodes, features = pairs[:, np.argsort(pairs[0], kind="stable")]
        sizes = np.bincount(nodes, minlength=self.names[name].count)
        if not sizes.all():
            count = int((sizes == 0).sum())
            raise DataError(f"{path} has no feature of {count:,} nodes of the type {name}", "Give each node one.")
        for end, values in (("offsets", np.concatenate([[0], np.cumsum(sizes)])), ("features", features)):
            file = self._open(f"bags.{name}.{end}")
            file.write(np.ascontiguousarray(values, {"offsets": "<i8", "features": "<i4"}[end]).data)

    def counts(self) -> dict[str, int]:
        """Nodes by type; nothing where they have none."""
        return {name: names.count for name, names in self.names.items()} if self.is_typed else {}

    def synced(self) -> list[str]:
        """Files of names, once they are on disk."""
        _sync(self.files)
        return [Path(file.name).name for file in self.files]


def _write(
    splits: Mapping[str, Path | str],
    out: Path,
    form: _Form,
    base: Graph | None,
    pairs: Mapping[str, tuple[str, str]] | None,
    features: Path | None,
) -> tuple[Graph, int]:
    """All splits and names; the graph, without its manifest, and the nodes that training has not seen."""
    counts: dict[str, int] = {}
    files: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        nodes = _Nodes(out, base, pairs, stack)
        relation_file = stack.enter_context((out / "relations.txt").open("wb"))
        relations = Names.of_file(base.folder / "relations.txt", relation_file) if base else Names(relation_file)
        trained = 0
        for split in [*(base.splits if base else ()), *sorted(splits, key=lambda name: name != "train")]:
            if split in counts:
                continue
            source = Path(splits[split]) if split in splits else None
            writer = _Split(split, out, form, base, nodes, relations)
            counts[split], written = writer.write(source)
            files |= written
            trained = trained or nodes.count
        counted = nodes.read_features(features) if features else {}
        _sync([relation_file])
        names = nodes.synced()
    if not counts["train"]:
        raise DataError(f"{splits['train']} has no edge", "Give a file with edges.")
    for name in (*names, "relations.txt"):
        files[name] = {"bytes": (out / name).stat().st_size, "sha256": sha256_of(out / name)}
    facts = {split: {"edges": count, "weighted": form.weighted} for split, count in counts.items()}
    added_to = [*base.added_to, base.version] if base else []
    pairs_of = nodes.ends if nodes.is_typed else []
    graph = Graph(
        out, nodes.count, relations.count, facts, files, added_to, nodes.counts(), pairs_of, feature_counts=counted
    )
    return graph, nodes.count - trained


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
    nodes: _Nodes
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
        only = self.relations.numbers(_repeated(ONLY_RELATION, 1))[0] if "relation" not in form.columns else 0
        for rows in track(read(source, len(form.columns), form.delimiter, form.header), f"reading {source.name}"):
            fields = dict(zip(form.columns, rows.columns, strict=True))
            relations = np.full(len(rows), only, np.int32)
            if "relation" in fields:
                relations = self._relations(rows, fields["relation"])
            self.nodes.learn(relations, fields.get("relation") or _repeated(ONLY_RELATION, len(rows)), rows)
            values: dict[str, npt.NDArray[Any]] = {
                "heads": self.nodes.numbers(relations, 0, fields["head"]),
                "tails": self.nodes.numbers(relations, 1, fields["tail"]),
                "relations": relations,
            }
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
    graph = replace(graph, splits={**graph.splits, **splits}, files=files)
    return _with_contexts(graph) if walks.contexts else graph


def _with_contexts(graph: Graph) -> Graph:
    """The same edges from each node to its contexts, the same names once more."""
    files, names = dict(graph.files), (ONLY_TYPE, CONTEXT)
    facts = files.pop("nodes.txt")
    shutil.copyfile(graph.folder / "nodes.txt", graph.folder / names_file(CONTEXT))
    os.replace(graph.folder / "nodes.txt", graph.folder / names_file(ONLY_TYPE))
    files |= {names_file(name): facts for name in names}
    counts = dict.fromkeys(names, graph.num_nodes)
    pairs = [(0, 1)] * graph.num_relations
    return replace(graph, num_nodes=2 * graph.num_nodes, files=files, type_counts=counts, relation_types=pairs)


def write_manifest(graph: Graph) -> None:
    """Write what a graph folder says of itself: from then on it is one."""
    manifest: dict[str, Any] = {
        "format_version": FORMAT_VERSION if graph.is_typed else 1,
        "num_nodes": graph.num_nodes,
        "num_relations": graph.num_relations,
        "splits": graph.splits,
        "files": graph.files,
    }
    if graph.is_typed:
        manifest |= {"types": graph.type_counts, "relation_types": graph.relation_types}
    if graph.feature_counts:
        manifest["features"] = graph.feature_counts
    if graph.added_to:
        manifest["added_to"] = graph.added_to
    _write_last(graph.folder / MANIFEST, json.dumps(manifest, indent=1).encode())


def _copy(path: Path, file: Hashed) -> None:
    with path.open("rb") as source:
        while data := source.read(COPIED_BYTES):
            file.write(data)


def _repeated(name: str, count: int) -> Column:
    data = np.frombuffer(name.encode(), np.uint8)
    return Column(data, np.zeros(count, np.int64), np.full(count, len(data)))


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
