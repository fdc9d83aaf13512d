"""PyTorch-BigGraph's files in and out: configuration, entity lists, edges and checkpoints in HDF5.

What it pickles, the optimiser's state, is never read: a run that goes on from such a checkpoint begins with fresh
Adagrad sums. The left operator of its dynamic relations is what guesses tails here, the right one what guesses heads;
other relations have the right one alone, as here.
"""

import ast
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from puna.console import track
from puna.errors import DataError
from puna.graph.buckets import Buckets, partition_rows
from puna.graph.config import GraphConfig
from puna.graph.graph import COLUMNS, Graph, Pair, column_names, names_file
from puna.graph.importing import TYPE_NAME, write_manifest
from puna.graph.layout import Layout
from puna.graph.partitions import Table, name_of
from puna.graph.ranking import Scorer
from puna.graph.task import fresh_relations, relation_tensors
from puna.graph.worker import Relations
from puna.train import checkpoint
from puna.train.hashed import Hashed, sha256_of
from puna.train.metrics import append_event
from puna.train.task import Cursor, Json, Rows, State, Tensors

ROWS = 1 << 20
FORMAT_VERSION = 1
ENTITY, RELATION = "all", "all_edges"
SAME = {
    "dimension": "dim", "init_scale": "init_scale", "max_norm": "max_norm", "comparator": "comparator", "bias": "bias",
    "loss_fn": "loss", "margin": "margin", "regularization_coef": "n3", "num_epochs": "epochs", "lr": "lr",
    "num_edge_chunks": "num_chunks", "bucket_order": "bucket_order", "batch_size": "batch_edges",
    "num_batch_negs": "num_batch_negs", "num_uniform_negs": "num_uniform_negs", "relation_lr": "relation_lr",
    "dynamic_relations": "reciprocal",
}  # fmt: skip
"""Keys of a configuration, and what the same is called here."""
DEFAULTS = {
    "init_scale": 1e-3, "max_norm": None, "comparator": "cos", "bias": False, "loss_fn": "ranking", "margin": 0.1,
    "regularization_coef": 0.0, "num_epochs": 1, "lr": 0.01, "num_edge_chunks": None, "bucket_order": "inside_out",
    "batch_size": 1000, "num_batch_negs": 50, "num_uniform_negs": 50, "relation_lr": None, "dynamic_relations": False,
    "global_emb": True,
}  # fmt: skip
PLACES = ("entities", "relations", "entity_path", "edge_paths", "checkpoint_path", "global_emb", "workers")
PARAMETERS = {
    "translation": ("translation",), "diagonal": ("diagonal",), "linear": ("linear_transformation",),
    "affine": ("linear_transformation", "translation"), "complex_diagonal": ("real", "imag"), "none": (),
}  # fmt: skip
"""Names of an operator's arrays, in the order in which they make up a row here. Those of all relations end in s."""


@dataclass(frozen=True)
class Config:
    """What of a configuration is carried over."""

    entities: Mapping[str, int]  # partitions of each type
    relations: Sequence[str]  # names, or none where a file has them
    pairs: Sequence[Pair]  # the types that each relation, or all where a file has them, leads from and to, by place
    operator: str
    dynamic: bool
    settings: dict[str, Any]  # of GraphConfig
    left_out: list[str]  # keys that have no counterpart

    def parts(self, side: int) -> int:
        """Rows (columns) of buckets: as many as the partitions of the type that has most of them on that side."""
        return max(list(self.entities.values())[pair[side]] for pair in self.pairs)


# --- configuration --------------------------------------------------------------------------------------------------


def read_config(path: Path) -> dict[str, Any]:
    """The dictionary of a configuration: JSON (config.json of a checkpoint) or Python, of which nothing is run.

    Raises DataError where it is neither, or not made of constants.
    """
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    try:
        if path.suffix == ".json":
            return json.loads(text)
        return _returned(ast.parse(text))
    except (ValueError, SyntaxError, StopIteration) as error:
        raise DataError(
            f"{path} is no PyTorch-BigGraph configuration ({str(error) or 'no get_torchbiggraph_config()'})",
            "Give its Python file, if its dictionary is made of constants, or config.json of a checkpoint.",
        ) from None


def _returned(tree: ast.Module) -> dict[str, Any]:
    function = next(
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "get_torchbiggraph_config"
    )
    names = {
        target.id: node.value
        for node in function.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    value = next(node.value for node in function.body if isinstance(node, ast.Return))
    return _constant(names[value.id] if isinstance(value, ast.Name) and value.id in names else value)


def _constant(node: Any) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        return {word.arg: _constant(word.value) for word in node.keywords}
    if isinstance(node, ast.Dict):
        return {_constant(key): _constant(value) for key, value in zip(node.keys, node.values, strict=True)}
    if isinstance(node, ast.List | ast.Tuple):
        return [_constant(item) for item in node.elts]
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise ValueError(f"line {node.lineno} is no constant") from None


def convert(raw: Mapping[str, Any], path: Path) -> Config:
    """A configuration in the terms of this package. Raises DataError for what cannot be carried over."""
    entities, relations = raw["entities"], raw["relations"]
    for name, facts in entities.items():
        if facts.get("featurized"):
            raise _unsupported(path, f"featurized entities ({name})", "plain ones")
        if facts.get("dimension") not in (None, raw["dimension"]):
            raise _unsupported(path, f"a dimension of its own for {name}", "one for all types")
        if len(entities) > 1 and not TYPE_NAME.fullmatch(name):
            raise DataError(f"{path}: the type {name!r} is part of a file's name", "Use letters, digits, _ and -.")
    names = list(entities)
    ends = [{end: relation.get(end, names[0]) for end in ("lhs", "rhs")} for relation in relations]
    unknown = [name for end in ends for name in end.values() if name not in names]
    if unknown:
        raise DataError(f"{path}: a relation names the type {unknown[0]!r}", f"The types are {', '.join(names)}.")
    operators = {relation.get("operator", "none") for relation in relations}
    if len(operators) != 1:
        raise _unsupported(path, f"the operators {', '.join(sorted(operators))}", "one for all relations")
    if any(relation.get("weight", 1.0) != 1.0 for relation in relations):
        raise _unsupported(path, "weights of relations", "weights of edges")
    if raw.get("disable_lhs_negs") or raw.get("disable_rhs_negs"):
        raise _unsupported(path, "negatives of one side only", "both sides")
    found = {**DEFAULTS, **raw}
    settings = {ours: found[theirs] for theirs, ours in SAME.items()}
    settings |= {key: settings[key] or 0.0 for key in ("max_norm", "relation_lr")}
    settings["num_chunks"] = settings["num_chunks"] or 1
    settings["operator"] = operators.pop()
    parts = {name: int(facts["num_partitions"]) for name, facts in entities.items()}
    settings["num_partitions"] = max(parts.values())
    if settings["num_partitions"] > 1:
        settings["unpartitioned"] = [name for name, number in parts.items() if number == 1]
    settings["all_negs"] = any(relation.get("all_negs", False) for relation in relations)
    settings["share_negs"] = 1
    left_out = sorted(key for key in raw if key not in SAME and key not in PLACES)
    pairs = [(names.index(end["lhs"]), names.index(end["rhs"])) for end in ends]
    dynamic = bool(found["dynamic_relations"])
    named = [] if dynamic else [relation["name"] for relation in relations]
    return Config(parts, named, pairs, settings["operator"], dynamic, settings, left_out)


def splits_of(paths: Sequence[str], root: Path) -> dict[str, Path]:
    """Folders of edges by split: what has valid or test in its name is that; the rest is train."""
    found: dict[str, Path] = {}
    for path in paths:
        name = next((split for split in ("valid", "test") if split in Path(path).name.lower()), "train")
        if name in found:
            raise DataError(f"{found[name]} and {path} are both edges of {name}", "Name one folder of each.")
        found[name] = root / path
    return dict(sorted(found.items(), key=lambda item: item[0] != "train"))


def _unsupported(path: Path, has: str, wanted: str) -> DataError:
    return DataError(f"{path} has {has}; Puna has {wanted} so far", "Such a model cannot be carried over.")


# --- in -------------------------------------------------------------------------------------------------------------


def import_graph(config: Config, entities: Path, edges: Mapping[str, Path], out: Path) -> Graph:
    """Entity lists and edges as a graph: node i of partition p comes after those of partitions before it, type by type.

    edges: folders by split. Raises DataError: a file is missing, an index is out of range (file and row), a name with a
    line break.
    """
    out.mkdir(parents=True, exist_ok=True)
    typed = len(config.entities) > 1
    starts: dict[str, npt.NDArray[np.int64]] = {}
    files: dict[str, dict[str, Any]] = {}
    kept = ["relations.txt"]
    for entity, parts in config.entities.items():
        counts = [_number(entities / f"entity_count_{entity}_{part}.txt") for part in range(parts)]
        starts[entity] = np.concatenate([[0], np.cumsum(counts)])
        lists = [_json(entities / f"entity_names_{entity}_{part}.json") for part in range(parts)]
        kept.append(names_file(entity) if typed else "nodes.txt")
        _write_names(out / kept[-1], (name for names in lists for name in names), int(starts[entity][-1]))
    names = _json(entities / "dynamic_rel_names.json") if config.dynamic else list(config.relations)
    _write_names(out / "relations.txt", iter(names), len(names))
    pairs = np.array(list(config.pairs) * (len(names) if config.dynamic else 1))
    splits = {}
    for split, folder in edges.items():
        count, weighted, written = _edges(config, folder, out, split, list(starts.values()), pairs)
        splits[split] = {"edges": count, "weighted": weighted}
        files |= written
    for name in kept:
        files[name] = {"bytes": (out / name).stat().st_size, "sha256": sha256_of(out / name)}
    held = {entity: int(own[-1]) for entity, own in starts.items()}
    graph = Graph(out, sum(held.values()), len(names), splits, files)
    if typed:
        graph = replace(graph, type_counts=held, relation_types=[(int(head), int(tail)) for head, tail in pairs])
    write_manifest(graph)
    return graph


def _edges(
    config: Config,
    folder: Path,
    out: Path,
    split: str,
    starts: Sequence[npt.NDArray[np.int64]],
    pairs: npt.NDArray[np.int64],
) -> tuple[int, bool, dict[str, dict[str, Any]]]:
    """One folder of edges_i_j.h5 as columns: how many, whether they have weights, size and hash of what was written.

    starts: by type, where the nodes of each partition begin. pairs: (R, 2), types of each relation.
    """
    buckets = list(product(range(config.parts(0)), range(config.parts(1))))
    paths = [folder / f"edges_{i}_{j}.h5" for i, j in buckets]
    missing = next((path for path in paths if not path.is_file()), None)
    if missing:
        raise DataError(f"there is no {missing}", "Name the folder of partitioned edges.")
    with h5py.File(paths[0], "r") as first:
        weighted = "weight" in first
    count = 0
    with ExitStack() as stack:
        raw = {name: stack.enter_context((out / f"{split}.{name}").open("wb")) for name in column_names(weighted)}
        files = {name: Hashed(file) for name, file in raw.items()}
        for bucket, path in track(list(zip(buckets, paths, strict=True)), f"reading {folder.name}"):
            firsts, sizes = _bounds(starts, bucket)
            file = stack.enter_context(h5py.File(path, "r"))
            for piece in _pieces(file, path, sizes, pairs, weighted):
                kinds = pairs[piece["rel"]].T
                heads, tails = piece["lhs"] + firsts[0, kinds[0]], piece["rhs"] + firsts[1, kinds[1]]
                values = {"heads": heads, "relations": piece["rel"], "tails": tails, "weights": piece.get("weight")}
                for name, hashed in files.items():
                    hashed.write(np.ascontiguousarray(values[name], COLUMNS[name]))
                count += len(heads)
            file.close()
        for handle in raw.values():
            handle.flush()
            os.fsync(handle.fileno())
    return count, weighted, {f"{split}.{name}": hashed.fingerprint for name, hashed in files.items()}


def _bounds(starts: Sequence[npt.NDArray[np.int64]], bucket: tuple[int, int]) -> tuple[npt.NDArray, npt.NDArray]:
    """For each side and type the first node of the bucket's partition and the nodes in it, (2, T) each; a type with one
    partition has that one in every bucket."""
    places = [[part if len(own) > 2 else 0 for own in starts] for part in bucket]
    first = [[own[min(p, len(own) - 1)] for p, own in zip(side, starts, strict=True)] for side in places]
    last = [[own[min(p + 1, len(own) - 1)] for p, own in zip(side, starts, strict=True)] for side in places]
    return np.array(first), np.array(last) - np.array(first)


def _pieces(
    file: Any, path: Path, sizes: npt.NDArray, pairs: npt.NDArray[np.int64], weighted: bool
) -> Iterator[dict[str, npt.NDArray]]:
    """Rows of one file, some at a time, all of them in range."""
    if file.attrs.get("format_version") != FORMAT_VERSION or not {"lhs", "rhs", "rel"} <= set(file):
        raise DataError(f"{path} holds no edges of format {FORMAT_VERSION}", "Import them with PyTorch-BigGraph again.")
    for start in range(0, len(file["lhs"]), ROWS):
        names = ["rel", "lhs", "rhs", *(["weight"] if weighted else [])]
        piece = {name: file[name][start : start + ROWS] for name in names}
        for name in names[:3]:
            bounds = np.full(len(piece["rel"]), len(pairs))
            if name != "rel":
                side = ("lhs", "rhs").index(name)
                bounds = sizes[side, pairs[piece["rel"], side]]
            bad = np.flatnonzero((piece[name] < 0) | (piece[name] >= bounds))
            if len(bad):
                raise DataError(
                    f"{path}, row {start + bad[0] + 1:,}: {name} is {piece[name][bad[0]]:,}, out of range: there are "
                    f"{bounds[bad[0]]:,}",
                    "The entity lists are of another import, or the file is damaged.",
                )
        yield piece


def import_checkpoint(config: Config, folder: Path, graph: Graph, settings: GraphConfig, run: Path) -> dict[str, Any]:
    """The checkpoint in `folder` as that of a run, at step 0. Returns version, num_nodes, optimizer (what became of).

    Raises DataError: no checkpoint, another number of rows.
    """
    version = _number(folder / "checkpoint_version.txt")
    paths = {
        entity: [folder / f"embeddings_{entity}_{part}.v{version}.h5" for part in range(parts)]
        for entity, parts in config.entities.items()
    }
    wanted = [path for own in paths.values() for path in own]
    missing = next((path for path in (*wanted, folder / f"model.v{version}.h5") if not path.is_file()), None)
    if missing:
        raise DataError(f"there is no {missing}", "Give a folder with a whole checkpoint.")
    layout = Layout.of(settings, graph.types)
    table, relations = Table(run, settings, layout, 0), fresh_relations(settings, graph.num_relations)
    with ExitStack() as stack:
        model = stack.enter_context(h5py.File(folder / f"model.v{version}.h5", "r"))
        tables = [[stack.enter_context(h5py.File(path, "r"))["embeddings"] for path in own] for own in paths.values()]
        held = [sum(map(len, own)) for own in tables]
        if held != graph.counts:
            has = f"{sum(held):,} vectors for {graph.num_nodes:,} nodes"
            raise DataError(f"{folder} has {has}", "Give its own entity lists.")
        shifts = [_global(model, entity, settings.dim) for entity in config.entities]
        _fill_relations(model, config, relations)
        for part in track(layout.partitions, "writing partitions"):
            pieces = [
                piece + shifts[kind]
                for kind, _ in layout.spans(part)
                for piece in _strided(tables[kind], max(part, 0), layout.step(kind))
            ]
            vectors = np.concatenate(pieces or [np.empty((0, settings.dim))]).astype(np.float32)
            table.vectors.put(name_of(part), vectors)
            table.sums.put(name_of(part), np.zeros(len(vectors), np.float32))
    state: State = {"nodes": Rows(table.vectors), "nodes.adagrad": Rows(table.sums)}
    state["best"] = Json(lambda: {"mrr": -1.0, "waited": 0}, lambda best: None)
    if relations[0].table.size:
        state["relations"] = Tensors(lambda: relation_tensors(relations))
    append_event(run, {"event": "start", "version": graph.version, "from": "PyTorch-BigGraph"})
    checkpoint.save(run, state, Cursor(), keep=1)
    return {"version": version, "num_nodes": graph.num_nodes, "optimizer": "skipped: it is a pickle, and none is read"}


def _strided(tables: Sequence[Any], part: int, parts: int) -> Iterator[npt.NDArray[np.float32]]:
    """Rows part, part + parts, .. of all tables, one after the other."""
    before = 0
    for table in tables:
        first = (part - before) % parts
        if first < len(table):
            yield table[first::parts]
        before += len(table)


def _global(model: Any, entity: str, dim: int) -> npt.NDArray[np.float32]:
    """What is added to every vector: PBG's global embedding of the type, if it has one."""
    name = f"model/entities/{entity}/global_embedding"
    return np.array(model[name], np.float32) if name in model else np.zeros(dim, np.float32)


def _fill_relations(model: Any, config: Config, relations: Sequence[Relations]) -> None:
    for side, mine in zip(("lhs", "rhs") if config.dynamic else ("rhs",), relations, strict=True):
        if config.dynamic:
            arrays = [model[_place(0, side, name)] for name in _names(config)]
            mine.table[:] = np.concatenate([np.array(a).reshape(len(a), -1) for a in arrays] or [mine.table], 1)
            continue
        for index in range(len(config.relations)):
            arrays = [np.array(model[_place(index, side, name)]).ravel() for name in _names(config)]
            mine.table[index] = np.concatenate(arrays) if arrays else mine.table[index]


def _names(config: Config) -> list[str]:
    names = PARAMETERS[config.operator]
    return [f"{name}s" if config.dynamic and config.operator != "complex_diagonal" else name for name in names]


def _place(index: int, side: str, name: str) -> str:
    return f"model/relations/{index}/operator/{side}/{name}"


# --- out ------------------------------------------------------------------------------------------------------------


def export(scorer: Scorer, out: Path) -> None:
    """Write a run and its graph as PyTorch-BigGraph's: OUT/entities, OUT/edges/SPLIT, OUT/checkpoint with its config.

    Partition p of a run is partition p there, type by type and row by row.
    """
    config, graph = scorer.config, scorer.graph
    if config.operator not in PARAMETERS:
        raise DataError(f"PyTorch-BigGraph has no operator {config.operator}", "Export another form.")
    if graph.feature_counts:
        problem = "nodes are bags of features, which are not written for PyTorch-BigGraph"
        raise DataError(problem, "Export another form.")
    if config.reciprocal and len(graph.pairs) > 1:
        raise DataError(
            "relations are reciprocal and lead from several types or to several; PyTorch-BigGraph's dynamic relations "
            "all lead from one type to one",
            "Train with graph.reciprocal false, or export another form.",
        )
    layout = scorer.layout
    names = [kind.name for kind in graph.types] if graph.is_typed else [ENTITY]
    entities = {name: 1 if layout.whole[kind] else config.num_partitions for kind, name in enumerate(names)}
    theirs = _config_of(config, graph, entities, out.with_name(out.name.removesuffix(".partial")))
    relations = [relation["name"] for relation in theirs["relations"]]
    ends = [(int(head), int(tail)) for head, tail in graph.ends]
    pairs = graph.pairs if config.reciprocal else ends
    pbg = Config(entities, relations, pairs, config.operator, config.reciprocal, {}, [])
    _export_entities(graph, pbg, out / "entities")
    for split in graph.splits:
        buckets = Buckets.open(graph, split, config.num_partitions, whole=layout.whole)
        _export_edges(buckets, pbg, out / "edges" / split)
    folder = out / "checkpoint"
    folder.mkdir(parents=True)
    for kind, name in enumerate(names):
        for place, part in enumerate(layout.homes(kind)):
            with h5py.File(folder / f"embeddings_{name}_{place}.v1.h5", "w") as file:
                file.attrs["format_version"] = FORMAT_VERSION
                file.create_dataset("embeddings", data=scorer.view(part, layout.span(kind, part)))
    with h5py.File(folder / "model.v1.h5", "w") as file:
        file.attrs["format_version"] = FORMAT_VERSION
        _export_relations(file, pbg, scorer)
    (folder / "config.json").write_text(json.dumps(theirs, indent=1))
    (folder / "checkpoint_version.txt").write_text("1")


def _config_of(config: GraphConfig, graph: Graph, entities: Mapping[str, int], out: Path) -> dict[str, Any]:
    settings = config.model_dump()
    theirs = {key: settings[ours] for key, ours in SAME.items()}
    theirs |= {key: theirs[key] or None for key in ("max_norm", "relation_lr")}
    if theirs["bucket_order"] == "buffered":
        theirs["bucket_order"] = "inside_out"
    names, types = [RELATION] if config.reciprocal else graph.relation_names(), list(entities)
    ends = [{"lhs": types[head], "rhs": types[tail]} for head, tail in graph.ends]
    relation = {"operator": config.operator, "all_negs": config.all_negs}
    return theirs | {
        "entity_path": str(out / "entities"),
        "edge_paths": [str(out / "edges" / split) for split in graph.splits],
        "checkpoint_path": str(out / "checkpoint"),
        "entities": {name: {"num_partitions": parts} for name, parts in entities.items()},
        "relations": [{"name": name, **end, **relation} for name, end in zip(names, ends, strict=False)],
        "global_emb": False,
    }


def _export_entities(graph: Graph, config: Config, folder: Path) -> None:
    folder.mkdir(parents=True)
    for kind, (entity, parts) in enumerate(config.entities.items()):
        names = graph.names(kind)
        for part in range(parts):
            count = partition_rows(len(names), parts, part)
            (folder / f"entity_count_{entity}_{part}.txt").write_text(str(count))
            (folder / f"entity_names_{entity}_{part}.json").write_text(json.dumps(names[part::parts]))
    if config.dynamic:
        (folder / "dynamic_rel_count.txt").write_text(str(graph.num_relations))
        (folder / "dynamic_rel_names.json").write_text(json.dumps(graph.relation_names()))


def _export_edges(buckets: Buckets, config: Config, folder: Path) -> None:
    """Bucket by bucket; where all types of a side have one partition, all its buckets are in the first one's files."""
    folder.mkdir(parents=True)
    every, num_parts = range(buckets.num_partitions), (config.parts(0), config.parts(1))
    for i, j in product(*map(range, num_parts)):
        sources = product(*([own] if parts > 1 else every for own, parts in zip((i, j), num_parts, strict=True)))
        edges = [buckets.rows((row, place)) for row, place in sources]
        with h5py.File(folder / f"edges_{i}_{j}.h5", "w") as file:
            file.attrs["format_version"] = FORMAT_VERSION
            for name, column in (("lhs", "heads"), ("rhs", "tails"), ("rel", "relations"), ("weight", "weights")):
                if column in column_names(buckets.weighted):
                    values = np.concatenate([getattr(piece, column) for piece in edges])
                    file.create_dataset(name, data=values if name == "weight" else values.astype(np.int64))


def _export_relations(file: Any, config: Config, scorer: Scorer) -> None:
    dim = scorer.config.dim
    sides = ("lhs", "rhs") if config.dynamic else ("rhs",)
    for side, mine in zip(sides, scorer.relations, strict=True):
        rows = [mine.table] if config.dynamic else list(mine.table[:, None])
        for index, table in enumerate(rows):
            start = 0
            for name in _names(config):
                shape = (dim, dim) if name.startswith("linear") else (dim // 2 if name in ("real", "imag") else dim,)
                size = int(np.prod(shape))
                array = table[:, start : start + size].reshape(len(table), *shape)
                place = file.create_dataset(_place(index, side, name), data=array if config.dynamic else array[0])
                place.attrs["state_dict_key"] = f"{side}_operators.{index}.{name}"
                start += size


# --- files ----------------------------------------------------------------------------------------------------------


def _number(path: Path) -> int:
    if not path.is_file():
        raise DataError(f"there is no {path}", "Give the folder as PyTorch-BigGraph wrote it.")
    return int(path.read_text())


def _json(path: Path) -> list[str]:
    if not path.is_file():
        raise DataError(f"there is no {path}", "Give the folder as PyTorch-BigGraph wrote it.")
    return json.loads(path.read_text())


def _write_names(path: Path, names: Iterator[str], count: int) -> None:
    written = 0
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        for name in names:
            if "\n" in str(name):
                raise DataError(f"the name {name!r} has a line break", "Names are one line.")
            file.write(f"{name}\n")
            written += 1
    if written != count:
        raise DataError(f"{count:,} entities are counted, but {written:,} have names", "Give the lists of one import.")
