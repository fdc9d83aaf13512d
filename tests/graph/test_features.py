"""Nodes that are bags of features: their vectors are means, their gradients go to the features."""

import numpy as np
import pytest

from puna.errors import DataError, RecipeError
from puna.graph.config import GraphConfig
from puna.graph.graph import Graph
from puna.graph.importing import import_graph
from puna.graph.tables import EPSILON
from puna.graph.task import GraphTask
from puna.graph.trained import export, load, neighbors
from puna.train.config import CheckpointConfig, EvalConfig, LoopConfig, RunConfig, ScheduleConfig
from puna.train.loop import Run
from puna.train.task import Cursor

USERS, ITEMS = 40, 30
SMALL = {
    "dim": 8, "operator": "diagonal", "epochs": 2, "batch_edges": 40, "num_batch_negs": 10, "num_uniform_negs": 10,
    "num_prevalence_negs": 5, "init_scale": 0.1,
}  # fmt: skip
TYPES = "buys\tuser\titem\nknows\tuser\tuser\n"


def make(folder, features):
    """Users buy items of their parity and know users of it; features: lines of the file."""
    rng, lines = np.random.default_rng(0), set()
    while len(lines) < 500:
        user, item, other = rng.integers(USERS), rng.integers(ITEMS), rng.integers(USERS)
        if user % 2 == item % 2:
            lines.add(f"n{user}\tbuys\tn{item}\n")
        if user % 2 == other % 2:
            lines.add(f"n{user}\tknows\tn{other}\n")
    lines = sorted(lines)
    rng.shuffle(lines)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", lines[:420]), ("valid", lines[420:])):
        (folder / f"{name}.tsv").write_text("".join(part))
    (folder / "types.tsv").write_text(TYPES)
    (folder / "features.tsv").write_text("".join(features))
    splits = {name: folder / f"{name}.tsv" for name in ("train", "valid")}
    told = import_graph(splits, folder / "graph", types=folder / "types.tsv", features=folder / "features.tsv")
    return Graph.open(folder / "graph"), told


def words_of(item):
    """Its parity, and two words that tell little."""
    return [f"item\tn{item}\t{word}\n" for word in (f"parity{item % 2}", f"third{item % 3}", f"word{item % 7}")]


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    features = [line for item in range(ITEMS + 6) for line in words_of(item)]
    return make(tmp_path_factory.mktemp("features"), features)[0]


def task_of(graph, run, **values):
    config = GraphConfig(**(SMALL | values))
    return GraphTask(config, ScheduleConfig(decay="constant"), graph, run, num_threads=1, eval_edges=80)


def loop(run):
    found = RunConfig(dir=str(run), tensorboard=False)
    return LoopConfig(run=found, checkpoint=CheckpointConfig(every=1000), eval=EvalConfig(every=0, tokens=80))


def bags_of(graph, kind):
    bags = graph.bags[kind]
    return [bags.features[bags.offsets[n] : bags.offsets[n + 1]] for n in range(len(bags))]


def test_features_are_read_and_nodes_may_have_no_edge(shop):
    kind = shop.type_number("item")
    assert (shop.types[kind].num_nodes, shop.types[kind].num_features) == (ITEMS + 6, 12)
    names = (shop.folder / "features.item.txt").read_text().split()
    got = {name: sorted(names[f] for f in bag) for name, bag in zip(shop.names(kind), bags_of(shop, kind), strict=True)}
    assert got == {f"n{n}": sorted(line.split()[2] for line in words_of(n)) for n in range(ITEMS + 6)}
    assert shop.bags[shop.type_number("user")] is None


@pytest.mark.parametrize("values", [{}, {"num_partitions": 3}])
def test_vectors_are_means(shop, tmp_path, values):
    task = task_of(shop, tmp_path, **values)
    kind, scorer = shop.type_number("item"), task.scorer()
    wanted = np.stack([scorer.features(kind)[bag].mean(0) for bag in bags_of(shop, kind)])
    np.testing.assert_allclose(scorer.vectors(np.arange(ITEMS + 6), kind), wanted, rtol=1e-6)
    pieces = list(scorer.pieces(kind, 7))
    np.testing.assert_array_equal(np.concatenate([piece for *_, piece in pieces]), scorer.vectors(np.arange(36), kind))
    assert [first for first, *_ in pieces] == list(range(0, 36, 7))


def test_one_feature_a_node_is_a_vector_a_node(tmp_path):
    """Bit for bit: the same run, with its rows under other names."""
    features = [f"item\tn{item}\tf{item}\n" for item in range(ITEMS)] + [
        f"user\tn{user}\tf{user}\n" for user in range(USERS)
    ]
    bagged, told = make(tmp_path / "bags", features)
    assert told["features"] == {"item": ITEMS, "user": USERS}
    plain_folder = tmp_path / "plain"
    splits = {name: tmp_path / "bags" / f"{name}.tsv" for name in ("train", "valid")}
    import_graph(splits, plain_folder, types=tmp_path / "bags" / "types.tsv")
    plain = Graph.open(plain_folder)
    tasks = [task_of(graph, tmp_path / str(n)) for n, graph in enumerate((bagged, plain))]
    for kind in range(2):
        rows = np.array([bag[0] for bag in bags_of(bagged, kind)])
        span = tasks[0].table.layout.span(kind, 0)
        (part,) = tasks[0].table.take([(0, 0)])[:1]
        part.vectors[span][rows] = tasks[1].scorer().vectors(np.arange(len(rows)), kind)
    for first, second in zip(tasks[0].units(Cursor()), tasks[1].units(Cursor()), strict=True):
        assert tasks[0].step(first).loss == tasks[1].step(second).loss
    for kind, count in enumerate(plain.counts):
        found = [task.scorer().vectors(np.arange(count), kind) for task in tasks]
        np.testing.assert_array_equal(found[0], found[1])


def test_a_step_goes_to_the_features_by_their_shares(shop, tmp_path, monkeypatch):
    """Row-wise Adagrad on the sum over slots of gradient / features of the slot's node, by a loop."""
    task = task_of(shop, tmp_path, epochs=1)
    from puna.graph import task as module

    checked, bags = [], bags_of(shop, shop.type_number("item"))

    class Spy(module.Worker):
        def _scatter(self, head_part, tail_part, rates):
            if tail_part.bags is None or checked:
                return super()._scatter(head_part, tail_part, rates)
            half, dim = len(self.rows) // 2, self.config.dim
            wanted, total = tail_part.vectors.astype(float), np.zeros((len(tail_part.vectors), dim))
            for row, grad in zip(self.rows[half:], self.grads[half:].numpy(), strict=True):
                if row >= 0:
                    np.add.at(total, bags[row], grad.astype(float) / len(bags[row]))
            square = (total**2).mean(1)
            moved = square > 0
            wanted[moved] -= rates.nodes * total[moved] / (np.sqrt(square[moved])[:, None] + EPSILON)
            bad = super()._scatter(head_part, tail_part, rates)
            np.testing.assert_allclose(tail_part.vectors, wanted, rtol=1e-4, atol=1e-6)
            checked.append(moved.sum())
            return bad

    monkeypatch.setattr(module, "Worker", Spy)
    task.step(next(task.units(Cursor())))
    assert checked[0] > 6


def test_what_has_no_edge_is_learnt_from_its_features(shop, tmp_path):
    """Items without an edge come to lie beside those of their parity; the run is read again and exported."""
    task = task_of(shop, tmp_path / "run", num_partitions=2, epochs=40)
    before = task.evaluate("heldout")["mr"]
    Run(task, tmp_path / "run", loop(tmp_path / "run")).go()
    assert task.evaluate("heldout")["mr"] < 0.8 * before
    scorer, _ = load(tmp_path / "run", task.config, shop)
    kind = shop.type_number("item")
    np.testing.assert_array_equal(scorer.vectors(np.arange(36), kind), task.scorer().vectors(np.arange(36), kind))
    near = [row["name"] for row in neighbors(scorer, "n32", 5, "item")["neighbors"]]
    assert all(int(name[1:]) % 2 == 0 for name in near)
    export(scorer, tmp_path / "out", "npy")
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "nodes.item.npy"), scorer.vectors(np.arange(36), kind))
    with pytest.raises(DataError, match="bags of features, which are not written for PyTorch-BigGraph"):
        export(scorer, tmp_path / "pbg", "pbg")


@pytest.mark.parametrize(
    ("features", "told"),
    [
        (["item\tn0\tred\n"], r"has no feature of 29 nodes of the type item"),
        (["item\tn0\tred\n", "shop\tn0\tred\n"], r"features.tsv, line 2: no relation has the type 'shop'"),
        (["item\tn0\n"], r"features.tsv, line 1 has 2 fields where 3 were expected"),
    ],
)
def test_mistakes_in_features(tmp_path, features, told):
    with pytest.raises(DataError, match=told):
        make(tmp_path, features)
    assert not (tmp_path / "graph" / "graph.json").exists()


def test_what_features_do_not_go_with(shop, tmp_path):
    source = shop.folder.parent
    files = {"train": source / "train.tsv"}
    with pytest.raises(DataError, match="but nodes have no types"):
        import_graph(files, tmp_path / "a", features=source / "features.tsv")
    with pytest.raises(DataError, match="features cannot be added to"):
        import_graph(files, tmp_path / "b", add=shop.folder)
    for key, value in (("all_negs", True), ("max_norm", 1.0)):
        with pytest.raises(RecipeError, match=rf"graph.{key} is set, but the nodes of item are bags of features"):
            task_of(shop, tmp_path / "run", **{key: value})
    bags = shop.bags[shop.type_number("item")]
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in shop.folder.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    (np.r_[bags.offsets[:-2], bags.offsets[[-1, -1]]]).tofile(copy / "bags.item.offsets")
    with pytest.raises(DataError, match=r"bags.item.offsets is damaged: not every node has features"):
        _ = Graph.open(copy).bags
