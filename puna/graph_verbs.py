"""`puna graph`: parse, call one function, print. What it needs is imported inside the verbs."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from puna.verbs import as_json, print_figures

if TYPE_CHECKING:
    from puna.graph.ranking import Scorer

run_folder = click.argument("run", type=click.Path(path_type=Path))
of_step = click.option("--step", type=int, help="Checkpoint of that step; the newest where not given.")
of_graph = click.option("--data", type=click.Path(path_type=Path), help="The graph; the run's own where not given.")


@click.group()
def graph() -> None:
    """Graph embeddings: import, eval, export, neighbors. Training is `puna train` with a graph recipe.

    \b
    Example:  puna graph import --train train.tsv --test test.tsv --out graph
              puna train graph-small --data.path graph --run.dir runs/graph
              puna graph eval runs/graph --split test --json
    """


@graph.command("import")
@click.option("--train", required=True, type=click.Path(path_type=Path), help="Edges to train on.")
@click.option("--valid", type=click.Path(path_type=Path), help="Edges to look at while training.")
@click.option("--test", type=click.Path(path_type=Path), help="Edges for `puna graph eval`.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option(
    "--columns",
    default="head,relation,tail",
    show_default=True,
    help="What the fields of a line are: head, relation, tail, weight, - (left out).",
)
@click.option("--delimiter", help="What parts the fields  [default: a comma in .csv, else a tab]")
@click.option("--header", is_flag=True, help="The first line of each file names its columns.")
@click.option("--add", type=click.Path(path_type=Path), help="A graph whose nodes, relations and edges come first.")
@click.option(
    "--types", type=click.Path(path_type=Path), help="Rows of relation, type of its heads, type of its tails."
)
@click.option("--features", type=click.Path(path_type=Path), help="Rows of type, node, feature: nodes as bags.")
@click.option("--walks", type=click.IntRange(1), help="Random walks from each node, in place of the training edges.")
@click.option("--walk-length", default=40, show_default=True, type=click.IntRange(2), help="Nodes of a walk.")
@click.option(
    "--window", default=10, show_default=True, type=click.IntRange(1), help="How far apart nodes of a walk meet."
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Seed of the walks.")
@click.option("--contexts", is_flag=True, help="Walks lead to a second table, of contexts, as in skip-gram.")
@as_json
def graph_import(
    train: Path, valid: Path | None, test: Path | None, out: Path, columns: str, delimiter: str | None, header: bool,
    add: Path | None, types: Path | None, features: Path | None, walks: int | None, walk_length: int, window: int,
    seed: int, contexts: bool, as_json: bool,
) -> None:  # fmt: skip
    """Edge files to a graph folder.

    TSV, CSV or Parquet, plain or as .gz, .xz, .zst, .bz2; they stream, so that memory holds names' hashes and no edges.
    With --add the numbers of a graph stay, and it stays itself; with --walks nodes that stand near each other in random
    walks become edges with a count as weight. With --types nodes are of different kinds: each type has names, numbers
    and negatives of its own, and a relation leads from one type to another.

    \b
    Example:  puna graph import --train train.txt.xz --valid valid.txt.xz --test test.txt.xz --out graph
              puna graph import --train follows.csv.gz --columns head,tail,weight --header --out graph
              puna graph import --train new.tsv --add graph --out grown
              puna graph import --train buys.tsv --types types.tsv --out shop
              puna graph import --train links.tsv --columns head,tail --walks 80 --contexts --out walked
    """
    from puna.graph.importing import import_graph
    from puna.graph.walks import Walks

    splits = {name: path for name, path in (("train", train), ("valid", valid), ("test", test)) if path}
    walked = Walks(walks, walk_length, window, seed, contexts) if walks else None
    figures = import_graph(
        splits, out, columns.split(","), delimiter, header, add=add, walks=walked, types=types, features=features
    )
    print_figures(figures, as_json)


@graph.command("eval")
@run_folder
@click.option("--split", default="test", show_default=True, help="Edges to rank.")
@click.option("--limit", default=0, help="Only the first so many of them  [default: all]")
@click.option("--relations", is_flag=True, help="Also a table by relation.")
@click.option(
    "--candidates", default=0, type=click.IntRange(0), help="Rank among so many drawn nodes  [default: among all]"
)
@click.option(
    "--sampling",
    default="prevalence",
    show_default=True,
    type=click.Choice(["uniform", "prevalence"]),
    help="Drawn evenly, or as often as nodes occur in training edges.",
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Seed of the candidates.")
@of_step
@of_graph
@as_json
def graph_eval(
    run: Path, split: str, limit: int, relations: bool, candidates: int, sampling: Any, seed: int, step: int | None,
    data: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Link prediction: ranks of true tails and heads among all nodes or drawn ones, filtered and raw.

    A rank is one more than the nodes that score higher, and half of those that score the same. Drawn candidates are a
    function of the graph and the seed: the same for every edge, every run and every number of partitions.

    \b
    Example:  puna graph eval runs/graph --split test --json
              puna graph eval runs/graph --candidates 10000 --sampling prevalence
    """
    from puna.console import out
    from puna.graph.trained import evaluate

    scorer, found = _load(run, data, step)
    figures = {"run": str(run), "step": found, "split": split} | evaluate(
        scorer, split, limit, relations, candidates, sampling, seed
    )
    table: Any = [] if as_json else figures.pop("relations", [])
    print_figures(figures, as_json)
    for record in table:
        out().print(
            f"{record['num_edges']:>8,}  mrr {record['mrr']:.3f}  hits10 {record['hits10']:.3f}  {record['relation']}",
            markup=False,
        )


@graph.command("export")
@run_folder
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write; must not exist.")
@click.option(
    "--to", "form", default="tsv", show_default=True, type=click.Choice(["tsv", "parquet", "npy", "pbg"]), help="Form."
)
@of_step
@of_graph
@as_json
def graph_export(run: Path, out: Path, form: str, step: int | None, data: Path | None, as_json: bool) -> None:
    """Vectors of nodes and parameters of relations, for other programs.

    \b
    Example:  puna graph export runs/graph --to parquet --out vectors
    """
    from puna.graph.trained import export

    print_figures(export(_load(run, data, step)[0], out, form), as_json)


@graph.command("migrate")
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write; must not exist.")
@click.option(
    "--root", default=".", show_default=True, type=click.Path(path_type=Path), help="What its paths are relative to."
)
@as_json
def graph_migrate(config: Path, out: Path, root: Path, as_json: bool) -> None:
    """PyTorch-BigGraph's files as a recipe, a graph and, where there is a checkpoint, a run.

    CONFIG is its Python file, of which nothing is run, or the config.json of a checkpoint. OUT gets recipe.toml, graph
    and run. Back again: puna graph export --to pbg.

    \b
    Example:  puna graph migrate fb15k_config.py --out fb15k
    """
    from puna.run import migrate_graph

    print_figures(migrate_graph(config, out, root), as_json)


@graph.command("neighbors")
@run_folder
@click.argument("node")
@click.option("--count", default=10, show_default=True, type=click.IntRange(1), help="How many.")
@click.option("--type", "type_name", help="The node's type, where several types have one of that name.")
@of_step
@of_graph
@as_json
def graph_neighbors(
    run: Path, node: str, count: int, type_name: str | None, step: int | None, data: Path | None, as_json: bool
) -> None:
    """The nodes of its type that are nearest to a node.

    By the run's comparator; a dot product is compared as a cosine, so that frequent nodes do not win by their length.

    \b
    Example:  puna graph neighbors runs/graph /m/027rn --count 5
    """
    from puna.graph.trained import neighbors

    figures = neighbors(_load(run, data, step)[0], node, count, type_name)
    if not as_json:
        figures = {found["name"]: found["score"] for found in figures["neighbors"]}
    print_figures(figures, as_json)


def _load(run: Path, data: Path | None, step: int | None) -> tuple["Scorer", int]:
    from puna.graph.graph import Graph
    from puna.graph.trained import load
    from puna.run import graph_run

    recipe = graph_run(run)
    return load(run, recipe.graph, Graph.open(data or recipe.data.path), step)
