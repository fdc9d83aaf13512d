"""`puna graph import`: edge files stream into a graph folder. Memory: 128 bits a name and a few blocks of rows."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from puna.console import track
from puna.errors import DataError
from puna.graph.graph import COLUMNS, FORMAT_VERSION, MANIFEST
from puna.graph.names import Names
from puna.graph.read import Column, Rows, read
from puna.train.hashed import Hashed, sha256_of

FIELDS = ("head", "relation", "tail", "weight")
ONLY_RELATION = "edge"
"""Name of the relation of edges that have none."""


def import_graph(
    splits: Mapping[str, Path | str],
    out: Path | str,
    columns: Sequence[str] = ("head", "relation", "tail"),
    delimiter: str | None = None,
    header: bool = False,
) -> dict[str, Any]:
    """Write the edge files `splits` (train, valid, test) as a graph. Returns out, num_nodes, num_relations, edges.

    columns: what the fields of a row are, of head, relation, tail, weight and - (left out). Nodes and relations are
    numbered as they are first met, train first. Raises DataError: a bad row (file and line), a weight that is no
    finite number, no edge, `out` holds a graph already.
    """
    _require_columns(columns)
    out = Path(out)
    if (out / MANIFEST).exists():
        raise DataError(f"{out} holds a graph already", "Name another folder with --out, or remove that one.")
    out.mkdir(parents=True, exist_ok=True)
    counts: dict[str, int] = {}
    files: dict[str, dict[str, Any]] = {}
    with (out / "nodes.txt").open("wb") as node_file, (out / "relations.txt").open("wb") as relation_file:
        nodes, relations = Names(node_file), Names(relation_file)
        if "relation" not in columns:
            relations.numbers(_constant(ONLY_RELATION))
        for split, path in splits.items():
            counts[split], written = _write_split(split, Path(path), out, columns, delimiter, header, nodes, relations)
            files |= written
        _sync([node_file, relation_file])
    if not counts["train"]:
        raise DataError(f"{splits['train']} has no edge", "Give a file with edges.")
    for name in ("nodes.txt", "relations.txt"):
        files[name] = {"bytes": (out / name).stat().st_size, "sha256": sha256_of(out / name)}
    weighted = "weight" in columns
    manifest = {
        "format_version": FORMAT_VERSION,
        "num_nodes": nodes.count,
        "num_relations": relations.count,
        "splits": {split: {"edges": count, "weighted": weighted} for split, count in counts.items()},
        "files": files,
    }
    _write_last(out / MANIFEST, json.dumps(manifest, indent=1).encode())
    return {"out": str(out), "num_nodes": nodes.count, "num_relations": relations.count, "edges": counts}


def _require_columns(columns: Sequence[str]) -> None:
    named = [name for name in columns if name != "-"]
    unknown = [name for name in named if name not in FIELDS]
    if unknown or len(set(named)) != len(named) or not {"head", "tail"} <= set(named):
        raise DataError(
            f"the columns {','.join(columns)} do not describe an edge",
            "Name head and tail once each, with relation, weight and - (a field left out) where rows have them.",
        )


def _write_split(
    split: str, path: Path, out: Path, columns: Sequence[str], delimiter: str | None, header: bool,
    nodes: Names, relations: Names,
) -> tuple[int, dict[str, dict[str, Any]]]:  # fmt: skip
    """Stream one file; its number of edges, and size and hash of what was written."""
    wanted = [name for name in COLUMNS if name != "weights" or "weight" in columns]
    with ExitStack() as stack:
        raw = {name: stack.enter_context((out / f"{split}.{name}").open("wb")) for name in wanted}
        hashed = {name: Hashed(file) for name, file in raw.items()}
        count = 0
        for rows in track(read(path, len(columns), delimiter, header), f"reading {path.name}"):
            fields = dict(zip(columns, rows.columns, strict=True))
            size = len(rows.columns[0].starts)
            values: dict[str, npt.NDArray[Any]] = {
                "heads": nodes.numbers(fields["head"]),
                "tails": nodes.numbers(fields["tail"]),
                "relations": relations.numbers(fields["relation"])
                if "relation" in fields
                else np.zeros(size, np.int32),
            }
            if "weight" in fields:
                values["weights"] = _weights(rows, fields["weight"])
            for name, file in hashed.items():
                file.write(np.ascontiguousarray(values[name], COLUMNS[name]))
            count += size
        _sync(raw.values())
    return count, {f"{split}.{name}": file.fingerprint for name, file in hashed.items()}


def _weights(rows: Rows, column: Column) -> npt.NDArray[np.float32]:
    weights = np.empty(len(column.starts), np.float32)
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


def _constant(name: str) -> Column:
    data = np.frombuffer(name.encode(), np.uint8)
    return Column(data, np.array([0]), np.array([len(data)]))


def _sync(files: Iterable[IO[bytes]]) -> None:
    for file in files:
        file.flush()
        os.fsync(file.fileno())


def _write_last(path: Path, data: bytes) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        _sync([file])
    os.replace(temporary, path)
