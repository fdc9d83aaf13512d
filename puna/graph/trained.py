"""A trained run, read again: ranks on a split, exported tables, nearest nodes, a beginning for another run."""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from puna.console import track
from puna.errors import CheckpointError, DataError, RecipeError
from puna.graph import scores
from puna.graph.config import GraphConfig, Sampling
from puna.graph.graph import Graph
from puna.graph.growing import Start
from puna.graph.layout import Layout
from puna.graph.names import names_of, number_of, stream_names
from puna.graph.partitions import Table, name_of
from puna.graph.ranking import EVAL_NODES, Scorer, draw_all, rank
from puna.graph.task import fresh_relations, relation_tensors
from puna.train import checkpoint
from puna.train.metrics import read_events
from puna.train.task import Json, Rows, State, Tensors

TSV_ROWS = 1 << 16
FORMS = ("tsv", "parquet", "npy", "pbg")
SHAPES = ("dim", "operator", "reciprocal")
"""Settings in which a run and the one that it begins with agree."""


def load(run: Path, config: GraphConfig, graph: Graph, step: int | None = None) -> tuple[Scorer, int]:
    """A checkpoint's model and its step; the newest where `step` is None. Vectors stay on disk until they are read.

    Raises CheckpointError: none there, damaged, or of another shape; DataError: the graph has other nodes.
    """
    scorer, _, step = _load(run, config, graph, step)
    return scorer, step


def _load(run: Path, config: GraphConfig, graph: Graph, step: int | None) -> tuple[Scorer, Table, int]:
    layout = Layout.of(config, graph.types)
    table = Table(run, config, layout, key=0)
    relations = fresh_relations(config, graph.num_relations)
    state: State = {
        "nodes": Rows(table.vectors),
        "nodes.adagrad": Rows(table.sums),
        "best": Json(dict, lambda best: None),
    }
    if relations[0].table.size:
        state["relations"] = Tensors(lambda: relation_tensors(relations))
    manifest = checkpoint.load(run, state, step)
    held = sum(len(table.view(part)) for part in layout.partitions if name_of(part) in table.vectors)
    if held != sum(layout.counts):
        raise DataError(
            f"{run} has vectors of {held:,} nodes, but {graph.folder} has {sum(layout.counts):,}",
            "Name the graph that it was trained on with --data, or train until every partition was visited.",
        )
    return Scorer(config, graph, table.view, relations), table, manifest.cursor.units


def begin_with(run: Path, theirs: GraphConfig, ours: GraphConfig, graph: Graph) -> Start:
    """What a run by `ours` on `graph` begins with: the newest checkpoint of a run by `theirs` on it, or on a graph that
    it was added to.

    Raises RecipeError (their vectors have another form), DataError (their graph is none that this one grew from),
    CheckpointError.
    """
    here, there = ours.model_dump(), theirs.model_dump()
    for key in SHAPES:
        if here[key] != there[key]:
            raise RecipeError(
                f"graph.{key} is {here[key]!r}, but {there[key]!r} in {run}, which graph.start names",
                f"Set graph.{key} to that.",
            )
    begun = [event for event in read_events(run) if event["event"] == "start"]
    if not begun:
        raise CheckpointError(f"{run} has no record of a start", "Name a run that `puna train` has made.")
    version = begun[-1].get("version")
    if version not in (graph.version, *graph.added_to):
        raise DataError(
            f"the nodes of {graph.folder} do not go on from those that {run} was trained on",
            "Make the graph with `puna graph import --add` and the graph of that run.",
        )
    counts = {"num_nodes": version["num_nodes"], "num_relations": version["num_relations"]}
    known = replace(graph, **counts, type_counts=version.get("types", {}))
    scorer, table, _ = _load(run, theirs, known, None)
    return Start(scorer, lambda part: table.sums.read(name_of(part), mapped=True), ours.freeze)


def evaluate(
    scorer: Scorer,
    split: str,
    limit: int = 0,
    by_relation: bool = False,
    candidates: int = 0,
    sampling: Sampling = "prevalence",
    seed: int = 0,
) -> dict[str, Any]:
    """Ranks of a split's edges, or the first `limit`: num_edges, filtered, raw, and (by_relation) relations.

    candidates: rank among so many drawn nodes instead of all (see `draw_candidates`).
    """
    edges = scorer.graph.edges(split)
    if not len(edges):
        raise DataError(f"the split {split} of {scorer.graph.folder} has no edge", "Evaluate another split.")
    edges = edges.take(slice(limit or len(edges)))
    drawn = draw_all(scorer.graph, edges, candidates, sampling, seed) if candidates else None
    ranks = rank(scorer, edges, drawn)
    relations = {"relations": ranks.by_relation(scorer.graph.relation_names())} if by_relation else {}
    among = {"candidates": candidates, "sampling": sampling, "seed": seed} if candidates else {}
    return among | ranks.figures() | relations


def export(scorer: Scorer, out: Path, form: str) -> dict[str, Any]:
    """Write vectors and relation parameters to the new folder `out`; form: tsv, parquet, npy or pbg.

    tsv: nodes.tsv (name, then numbers) and relations.tsv (name, side, operator, then numbers). npy: nodes.npy (in the
    order of nodes.txt), relations.SIDE.npy, the names beside them. pbg: PyTorch-BigGraph's files. Where nodes have
    types: nodes.TYPE in place of nodes.
    Returns out, form, num_nodes, num_relations, bytes.
    """
    if out.exists():
        raise DataError(f"{out} is already there", "Name another folder with --out.")
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write: dict[str, Callable[[Scorer, Path], None]] = {"tsv": _tsv, "parquet": _parquet, "npy": _npy, "pbg": _pbg}
    write[form](scorer, partial)
    os.replace(partial, out)
    return {
        "out": str(out),
        "form": form,
        "num_nodes": scorer.graph.num_nodes,
        "num_relations": scorer.graph.num_relations,
        "bytes": sum(path.stat().st_size for path in out.rglob("*") if path.is_file()),
    }


def neighbors(scorer: Scorer, name: str, count: int, type_name: str | None = None) -> dict[str, Any]:
    """The `count` nodes of its type whose vectors score highest with the node `name` by the comparator (a dot is made a
    cosine). type_name: of the node, where several types have one of that name.

    Raises DataError: no such node, no such type, a name of several types.
    """
    graph = scorer.graph
    kind, number = _find(graph, name, type_name)
    comparator = "cos" if scorer.config.comparator == "dot" else scorer.config.comparator
    code, file = scores.CODES[comparator], graph.folder / graph.types[kind].file
    own = _prepared(code, scorer.vectors(np.array([number]), kind))
    best: list[tuple[float, int]] = []
    for first, step, piece in scorer.pieces(kind, EVAL_NODES):
        candidates = _prepared(code, piece)
        values = np.empty(len(candidates), np.float32)
        scores.score_pairs(code, 0, np.broadcast_to(own, candidates.shape).copy(), candidates, values)
        top = np.argpartition(-values, min(count, len(values) - 1))[: count + 1]
        best += [(float(values[row]), first + int(row) * step) for row in top]
    found = [(value, node) for value, node in sorted(best, reverse=True) if node != number][:count]
    names = names_of(file, [node for _, node in found])
    told = {"node": name, "type": graph.types[kind].name} if graph.is_typed else {"node": name}
    return told | {"comparator": comparator, "neighbors": [{"name": names[n], "score": v} for v, n in found]}


def _find(graph: Graph, name: str, type_name: str | None) -> tuple[int, int]:
    """A node's type and number."""
    kinds = range(len(graph.types)) if type_name is None else [graph.type_number(type_name)]
    numbers = {kind: number_of(graph.folder / graph.types[kind].file, name) for kind in kinds}
    found = [(kind, number) for kind, number in numbers.items() if number >= 0]
    if not found:
        files = " and ".join(graph.types[kind].file for kind in kinds)
        raise DataError(f"{graph.folder} has no node named {name!r}", f"Names are as in its {files}.")
    if len(found) > 1:
        named = ", ".join(graph.types[kind].name for kind, _ in found)
        problem = f"the types {named} of {graph.folder} each have a node named {name!r}"
        raise DataError(problem, "Say which with --type.")
    return found[0]


def _prepared(code: int, vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    copy = np.array(vectors)
    scores.prepare(code, 0, copy, np.empty(len(copy), np.float32))
    return copy


def _nodes(scorer: Scorer, kind: int) -> Iterator[tuple[list[str], npt.NDArray[np.float32]]]:
    """Names and vectors of a type's nodes in the order of their numbers, some at a time."""
    start, found = 0, scorer.graph.types[kind]
    pieces = stream_names(scorer.graph.folder / found.file, TSV_ROWS)
    for names in track(pieces, "exporting", -(-found.num_nodes // TSV_ROWS)):
        yield names, scorer.vectors(np.arange(start, start + len(names)), kind)
        start += len(names)


def _stems(graph: Graph) -> list[str]:
    """What the files of each type's nodes are called, without their ending."""
    return [kind.file.removesuffix(".txt") for kind in graph.types]


def _sides(scorer: Scorer) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    for side, relations in zip(("tail", "head"), scorer.relations, strict=False):
        yield side, relations.table


def _tsv(scorer: Scorer, out: Path) -> None:
    for kind, stem in enumerate(_stems(scorer.graph)):
        with _text(out / f"{stem}.tsv") as file:
            for names, vectors in _nodes(scorer, kind):
                for name, vector in zip(names, vectors, strict=True):
                    file.write("\t".join([name, *(f"{x:.9g}" for x in vector)]) + "\n")
    with _text(out / "relations.tsv") as file:
        for side, table in _sides(scorer):
            for name, row in zip(scorer.graph.relation_names(), table, strict=True):
                file.write("\t".join([name, side, scorer.config.operator, *(f"{x:.9g}" for x in row)]) + "\n")


def _parquet(scorer: Scorer, out: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def table(columns: dict[str, Any], vectors: npt.NDArray[np.float32]) -> Any:
        flat = pa.array(np.ascontiguousarray(vectors).ravel())
        return pa.table(columns | {"vector": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])})

    for kind, stem in enumerate(_stems(scorer.graph)):
        empty = table({"name": pa.array([], pa.string())}, np.empty((0, scorer.config.dim), np.float32))
        with pq.ParquetWriter(out / f"{stem}.parquet", empty.schema) as writer:
            for own, vectors in _nodes(scorer, kind):
                writer.write_table(table({"name": own}, vectors))
    names = scorer.graph.relation_names()
    for side, parameters in _sides(scorer):
        if parameters.size:
            pq.write_table(table({"name": names}, parameters), out / f"relations.{side}.parquet")


def _npy(scorer: Scorer, out: Path) -> None:
    for kind, stem in enumerate(_stems(scorer.graph)):
        shape = (scorer.graph.counts[kind], scorer.config.dim)
        vectors = np.lib.format.open_memmap(out / f"{stem}.npy", "w+", np.float32, shape)
        start = 0
        for _, piece in _nodes(scorer, kind):
            vectors[start : start + len(piece)] = piece
            start += len(piece)
        vectors.flush()
    for side, table in _sides(scorer):
        np.save(out / f"relations.{side}.npy", table)
    for name in (*(kind.file for kind in scorer.graph.types), "relations.txt"):
        shutil.copyfile(scorer.graph.folder / name, out / name)


def _pbg(scorer: Scorer, out: Path) -> None:
    from puna.graph import pbg

    pbg.export(scorer, out)


def _text(path: Path) -> IO[str]:
    return path.open("w", encoding="utf-8", errors="surrogateescape")
