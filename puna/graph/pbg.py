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
from dataclasses import dataclass
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
from puna.graph.graph import COLUMNS, Graph, column_names
from puna.graph.importing import write_manifest
from puna.graph.partitions import Table
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

    entity: str
    partitions: int
    relations: Sequence[str]  # names, or none where a file has them
    operator: str
    dynamic: bool
    settings: dict[str, Any]  # of GraphConfig
    left_out: list[str]  # keys that have no counterpart


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
    if len(entities) != 1:
        raise _unsupported(path, f"{len(entities)} entity types ({', '.join(entities)})", "one")
    ((entity, facts),) = entities.items()
    if facts.get("featurized"):
        raise _unsupported(path, "featurized entities", "plain ones")
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
    settings["num_partitions"] = facts["num_partitions"]
    settings["all_negs"] = any(relation.get("all_negs", False) for relation in relations)
    settings["share_negs"] = 1
    left_out = sorted(key for key in raw if key not in SAME and key not in PLACES)
    names = [] if found["dynamic_relations"] else [relation["name"] for relation in relations]
    dynamic = bool(found["dynamic_relations"])
    return Config(entity, facts["num_partitions"], names, settings["operator"], dynamic, settings, left_out)


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
    """Entity lists and edges as a graph: node i of partition p comes after those of partitions before it.

    edges: folders by split. Raises DataError: a file is missing, an index is out of range (file and row), a name with a
    line break.
    """
    out.mkdir(parents=True, exist_ok=True)
    counts = [_number(entities / f"entity_count_{config.entity}_{part}.txt") for part in range(config.partitions)]
    starts = np.concatenate([[0], np.cumsum(counts)])
    parts = [_json(entities / f"entity_names_{config.entity}_{part}.json") for part in range(config.partitions)]
    _write_names(out / "nodes.txt", (name for names in parts for name in names), int(starts[-1]))
    names = _json(entities / "dynamic_rel_names.json") if config.dynamic else list(config.relations)
    _write_names(out / "relations.txt", iter(names), len(names))
    files: dict[str, dict[str, Any]] = {}
    splits = {}
    for split, folder in edges.items():
        count, weighted, written = _edges(config, folder, out, split, starts, len(names))
        splits[split] = {"edges": count, "weighted": weighted}
        files |= written
    for name in ("nodes.txt", "relations.txt"):
        files[name] = {"bytes": (out / name).stat().st_size, "sha256": sha256_of(out / name)}
    graph = Graph(out, int(starts[-1]), len(names), splits, files)
    write_manifest(graph)
    return graph


def _edges(
    config: Config, folder: Path, out: Path, split: str, starts: npt.NDArray[np.int64], num_relations: int
) -> tuple[int, bool, dict[str, dict[str, Any]]]:
    """One folder of edges_i_j.h5 as columns: how many, whether they have weights, size and hash of what was written."""
    buckets = list(product(range(config.partitions), repeat=2))
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
        for (i, j), path in track(list(zip(buckets, paths, strict=True)), f"reading {folder.name}"):
            bounds = {"lhs": starts[i + 1] - starts[i], "rel": num_relations, "rhs": starts[j + 1] - starts[j]}
            file = stack.enter_context(h5py.File(path, "r"))
            for piece in _pieces(file, path, bounds, weighted):
                heads, tails = piece["lhs"] + starts[i], piece["rhs"] + starts[j]
                values = {"heads": heads, "relations": piece["rel"], "tails": tails, "weights": piece.get("weight")}
                for name, hashed in files.items():
                    hashed.write(np.ascontiguousarray(values[name], COLUMNS[name]))
                count += len(heads)
            file.close()
        for handle in raw.values():
            handle.flush()
            os.fsync(handle.fileno())
    return count, weighted, {f"{split}.{name}": hashed.fingerprint for name, hashed in files.items()}


def _pieces(file: Any, path: Path, bounds: Mapping[str, int], weighted: bool) -> Iterator[dict[str, npt.NDArray]]:
    """Rows of one file, some at a time, all of them in range."""
    if file.attrs.get("format_version") != FORMAT_VERSION or not set(bounds) <= set(file):
        raise DataError(f"{path} holds no edges of format {FORMAT_VERSION}", "Import them with PyTorch-BigGraph again.")
    for start in range(0, len(file["lhs"]), ROWS):
        piece = {name: file[name][start : start + ROWS] for name in [*bounds, *(["weight"] if weighted else [])]}
        for name, bound in bounds.items():
            bad = np.flatnonzero((piece[name] < 0) | (piece[name] >= bound))
            if len(bad):
                raise DataError(
                    f"{path}, row {start + bad[0] + 1:,}: {name} is {piece[name][bad[0]]:,}, out of range: there are "
                    f"{bound:,}",
                    "The entity lists are of another import, or the file is damaged.",
                )
        yield piece


def import_checkpoint(config: Config, folder: Path, graph: Graph, settings: GraphConfig, run: Path) -> dict[str, Any]:
    """The checkpoint in `folder` as that of a run, at step 0. Returns version, num_nodes, optimizer (what became of).

    Raises DataError: no checkpoint, another number of rows.
    """
    version = _number(folder / "checkpoint_version.txt")
    paths = [folder / f"embeddings_{config.entity}_{part}.v{version}.h5" for part in range(config.partitions)]
    missing = next((path for path in (*paths, folder / f"model.v{version}.h5") if not path.is_file()), None)
    if missing:
        raise DataError(f"there is no {missing}", "Give a folder with a whole checkpoint.")
    table, relations = Table(run, settings, graph.num_nodes, 0), fresh_relations(settings, graph.num_relations)
    with ExitStack() as stack:
        model = stack.enter_context(h5py.File(folder / f"model.v{version}.h5", "r"))
        tables = [stack.enter_context(h5py.File(path, "r"))["embeddings"] for path in paths]
        if sum(map(len, tables)) != graph.num_nodes:
            has = f"{sum(map(len, tables)):,} vectors for {graph.num_nodes:,} nodes"
            raise DataError(f"{folder} has {has}", "Give its own entity lists.")
        shift = _global(model, config, settings.dim)
        _fill_relations(model, config, relations)
        for part in track(range(settings.num_partitions), "writing partitions"):
            vectors = np.concatenate(list(_strided(tables, part, settings.num_partitions))) + shift
            table.vectors.put(str(part), vectors.astype(np.float32))
            table.sums.put(str(part), np.zeros(len(vectors), np.float32))
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


def _global(model: Any, config: Config, dim: int) -> npt.NDArray[np.float32]:
    """What is added to every vector: PBG's global embedding of the type, if it has one."""
    name = f"model/entities/{config.entity}/global_embedding"
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

    Partition p of a run is partition p there, row by row.
    """
    config, graph = scorer.config, scorer.graph
    if config.operator not in PARAMETERS:
        raise DataError(f"PyTorch-BigGraph has no operator {config.operator}", "Export another form.")
    theirs = _config_of(config, graph, out.with_name(out.name.removesuffix(".partial")))
    pbg = Config(ENTITY, config.num_partitions, theirs["relations"], config.operator, config.reciprocal, {}, [])
    _export_entities(graph, pbg, out / "entities")
    for split in graph.splits:
        _export_edges(Buckets.open(graph, split, config.num_partitions), out / "edges" / split)
    folder = out / "checkpoint"
    folder.mkdir(parents=True)
    for part in range(config.num_partitions):
        with h5py.File(folder / f"embeddings_{ENTITY}_{part}.v1.h5", "w") as file:
            file.attrs["format_version"] = FORMAT_VERSION
            file.create_dataset("embeddings", data=scorer.view(part))
    with h5py.File(folder / "model.v1.h5", "w") as file:
        file.attrs["format_version"] = FORMAT_VERSION
        _export_relations(file, pbg, scorer)
    (folder / "config.json").write_text(json.dumps(theirs, indent=1))
    (folder / "checkpoint_version.txt").write_text("1")


def _config_of(config: GraphConfig, graph: Graph, out: Path) -> dict[str, Any]:
    settings = config.model_dump()
    theirs = {key: settings[ours] for key, ours in SAME.items()}
    theirs |= {key: theirs[key] or None for key in ("max_norm", "relation_lr")}
    if theirs["bucket_order"] == "buffered":
        theirs["bucket_order"] = "inside_out"
    names = [RELATION] if config.reciprocal else graph.relation_names()
    relation = {"lhs": ENTITY, "rhs": ENTITY, "operator": config.operator, "all_negs": config.all_negs}
    return theirs | {
        "entity_path": str(out / "entities"),
        "edge_paths": [str(out / "edges" / split) for split in graph.splits],
        "checkpoint_path": str(out / "checkpoint"),
        "entities": {ENTITY: {"num_partitions": config.num_partitions}},
        "relations": [{"name": name, **relation} for name in names],
        "global_emb": False,
    }


def _export_entities(graph: Graph, config: Config, folder: Path) -> None:
    folder.mkdir(parents=True)
    names, parts = graph.names(), config.partitions
    for part in range(parts):
        count = partition_rows(graph.num_nodes, parts, part)
        (folder / f"entity_count_{ENTITY}_{part}.txt").write_text(str(count))
        (folder / f"entity_names_{ENTITY}_{part}.json").write_text(json.dumps(names[part::parts]))
    if config.dynamic:
        (folder / "dynamic_rel_count.txt").write_text(str(graph.num_relations))
        (folder / "dynamic_rel_names.json").write_text(json.dumps(graph.relation_names()))


def _export_edges(buckets: Buckets, folder: Path) -> None:
    folder.mkdir(parents=True)
    for i, j in product(range(buckets.num_partitions), repeat=2):
        edges = buckets.rows((i, j))
        with h5py.File(folder / f"edges_{i}_{j}.h5", "w") as file:
            file.attrs["format_version"] = FORMAT_VERSION
            for name, column in (("lhs", edges.heads), ("rhs", edges.tails), ("rel", edges.relations)):
                file.create_dataset(name, data=column.astype(np.int64))
            if edges.weights is not None:
                file.create_dataset("weight", data=edges.weights)


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
