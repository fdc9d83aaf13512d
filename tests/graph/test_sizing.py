"""`--size auto`: settings from a graph's numbers of nodes and edges, beside what flags say."""

import json

import pytest

from puna import recipe
from puna.check import with_sizes
from puna.errors import RecipeError
from puna.graph.budget import Sizes
from puna.graph.config import GraphConfig
from puna.graph.sizing import sized

GB = 10**9
FAST = [
    "--graph.epochs", "1", "--run.num_threads", "1", "--run.tensorboard", "false", "--eval.tokens", "0", "--eval.every",
    "0",
]  # fmt: skip


@pytest.mark.parametrize(
    ("nodes", "edges", "wanted"),
    [
        (60, 1_200, {"dim": 32, "batch_edges": 100, "num_uniform_negs": 60, "epochs": 100, "num_partitions": 1}),
        (14_951, 483_142, {"dim": 128, "batch_edges": 1_000, "num_uniform_negs": 500, "epochs": 62}),
        (81_306, 1_342_310, {"dim": 128, "batch_edges": 2_700, "num_uniform_negs": 500, "epochs": 22}),
        (4_847_571, 68_993_773, {"dim": 200, "batch_edges": 5_000, "num_uniform_negs": 50, "epochs": 3}),
        (10_000_000, 100_000_000, {"dim": 100, "batch_edges": 5_000, "num_uniform_negs": 50, "epochs": 3}),
    ],
)
def test_the_rule(nodes, edges, wanted):
    found = sized(GraphConfig(), Sizes(nodes, 5, edges, weighted=False), 24 * GB, 2, False)
    assert wanted.items() <= found.items()
    GraphConfig(**found)


def test_partitions_follow_from_half_of_the_memory():
    sizes = Sizes(10_000_000, 1, 100_000_000, weighted=False)
    found = [sized(GraphConfig(), sizes, size, 2, False) for size in (64 * GB, 6 * GB, 3 * GB)]
    assert found[0]["num_partitions"] == 1
    assert 4 < found[1]["num_partitions"] < found[2]["num_partitions"]
    assert found[1]["bucket_order"] == "buffered"
    given = sized(GraphConfig(memory="3GB"), sizes, 64 * GB, 2, False)
    assert "num_partitions" not in given


def test_flags_stay_and_the_recipe_says_where_a_value_is_from(planted, capsys):
    loaded = recipe.load(
        "graph-small", ["--data.path", str(planted.folder), "--graph.size", "auto", "--graph.dim", "10"]
    )
    found = with_sizes(loaded)
    graph = found.recipe.graph
    assert (graph.dim, graph.batch_edges, graph.epochs, graph.size) == (10, 100, 100, "given")
    assert (found.origins["graph.dim"], found.origins["graph.epochs"]) == ("flag", "size auto")
    assert (graph.operator, found.origins["graph.operator"]) == ("complex_diagonal", "recipe graph-small")
    told = " ".join(capsys.readouterr().err.split())
    assert told.startswith("for 60 nodes and 1,200 edges: batch_edges 100, num_batch_negs 50, num_uniform_negs 60")
    plain = recipe.load("graph-small", ["--data.path", str(planted.folder)])
    assert with_sizes(plain) is plain
    with pytest.raises(RecipeError, match=r"batch_edges is 100, no multiple of graph.num_batch_negs 30"):
        with_sizes(recipe.load("graph-small", [*_of(planted), "--graph.num_batch_negs", "30"]))
    with pytest.raises(RecipeError, match=r"graph.size is 'auto', but task is pretrain"):
        recipe.load("tiny", ["--graph.size", "auto"])


def _of(graph):
    return ["--data.path", str(graph.folder), "--graph.size", "auto", "--graph.batch_edges", "100"]


def test_as_typed_and_typed_again(planted, tmp_path, puna):
    """The run keeps what was chosen; the same words go on with it, other words are refused."""
    words = ["graph-small", "--data.path", str(planted.folder), "--run.dir", "r", *FAST, "--size", "auto"]
    assert json.loads(puna("check", *words, "--json")[1])["num_partitions"] == 1
    assert json.loads(puna("plan", "graph", *words, "--json")[1])["num_nodes"] == 60
    status, _, err = puna("train", *words)
    assert status == 0, err
    kept = json.loads((tmp_path / "r" / "recipe.json").read_text())
    assert kept["graph.dim"] == {"value": 32, "layer": "size auto"}
    assert kept["graph.epochs"] == {"value": 1, "layer": "flag"}
    assert puna("train", *words)[0] == 0
    status, _, err = puna("train", *words, "--graph.dim", "8")
    assert status == 2
    assert "graph.dim is 32 there, 8 here" in err
