"""What `puna check` and `puna plan graph` say of a graph run before it starts."""

from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape

from puna.graph import budget
from puna.graph.config import GraphConfig, num_bytes
from puna.graph.graph import Graph
from puna.graph.names import names_of
from puna.train.disk import size
from puna.train.out_of_memory import limit_bytes

NUM_SAMPLES = 3


def inspect(config: GraphConfig, graph: Graph, num_workers: int, evaluates: bool) -> dict[str, Any]:
    """The plan of `budget.plan`, what of memory is available and whether it fits, types, splits, some training edges by
    name.

    Raises RecipeError where graph.memory is too little, DataError where an edge has a number that is out of range.
    """
    sizes = budget.Sizes.of(graph)
    config = budget.fitted(config, sizes, num_workers, evaluates)
    told = budget.plan(config, sizes, num_workers, evaluates)
    available = num_bytes(config.memory) if config.memory else limit_bytes()
    told["memory"] |= {"available": available, "fits": told["memory"]["total"] <= available}
    splits = {name: facts["edges"] for name, facts in graph.splits.items()}
    types = {kind.name: kind.num_nodes for kind in graph.types}
    return told | {"types": types, "splits": splits, "samples": samples(graph)}


def samples(graph: Graph) -> list[dict[str, str]]:
    """The first, a middle and the last training edge, by name; every number of every split has been looked at."""
    for split in graph.splits:
        for _ in graph.pieces(split):
            pass
    edges = graph.edges("train")
    places = np.unique(np.linspace(0, len(edges) - 1, NUM_SAMPLES).astype(int))
    chosen = edges.take(places)
    relations, found = graph.relation_names(), []
    for h, r, t in zip(chosen.heads.tolist(), chosen.relations.tolist(), chosen.tails.tolist(), strict=True):
        head, tail = (graph.folder / graph.types[kind].file for kind in graph.ends[r])
        found.append({"head": names_of(head, [h])[h], "relation": relations[r], "tail": names_of(tail, [t])[t]})
    return found


def show(found: dict[str, Any], console: Console) -> None:
    """Print what `puna check` found of a graph recipe as a page."""
    splits = ", ".join(f"{count:,} {name}" for name, count in found["splits"].items())
    console.print(f"[bold]{escape(found['run'])}[/]  {found['task']} by {found['num_workers']} workers")
    types = ", ".join(f"{count:,} {name}" for name, count in found["types"].items())
    nodes = f"{found['num_nodes']:,} nodes" + (f" ({types})" if len(found["types"]) > 1 else "")
    console.print(escape(f"{nodes}, {found['num_relations']:,} relations; edges: {splits}"))
    memory = found["memory"]
    console.print(escape(budget.sentence(found, size(memory["available"]))) + "\n")
    for use, taken in memory.items():
        if use not in ("available", "fits") and taken:
            console.print(f"{use:<12} {taken / 1e6:>10,.1f} MB")
    if not memory["fits"]:
        console.print(f"[bold red]This is more than {size(memory['available'])}.[/] Set --memory.")
    console.print()
    for sample in found["samples"]:
        console.print(f"{sample['head']}  {sample['relation']}  {sample['tail']}", markup=False)
