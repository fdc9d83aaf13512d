"""Nodes of several types: names, negatives, partitions and candidates of each; some types are not cut."""

import json

import numpy as np
import pytest

from puna import recipe, run
from puna.errors import DataError, RecipeError
from puna.graph import budget, ranking
from puna.graph.buckets import Buckets
from puna.graph.config import GraphConfig
from puna.graph.graph import Edges, Graph
from puna.graph.importing import import_graph
from puna.graph.layout import WHOLE, Layout
from puna.graph.ranking import draw_all, rank
from puna.graph.task import GraphTask
from puna.graph.trained import export, load, neighbors
from puna.graph.walks import Walks
from puna.train import checkpoint
from puna.train.config import CheckpointConfig, EvalConfig, LoopConfig, RunConfig, ScheduleConfig
from puna.train.loop import Run
from puna.train.task import Cursor

USERS, ITEMS, COUNTRIES = 40, 30, 4
TYPES = "buys\tuser\titem\nlives\tuser\tcountry\nborders\tcountry\tcountry\nknows\tuser\tuser\n"
SMALL = {
    "dim": 8, "operator": "diagonal", "epochs": 2, "batch_edges": 40, "num_batch_negs": 10, "num_uniform_negs": 10,
    "num_prevalence_negs": 5, "init_scale": 0.1,
}  # fmt: skip
CUT = {"num_partitions": 3, "unpartitioned": ("country",)}
FLAGS = [
    "--run.num_threads", "1", "--graph.dim", "8", "--graph.operator", "diagonal", "--graph.batch_edges", "40",
    "--graph.num_batch_negs", "10", "--graph.num_uniform_negs", "10", "--run.tensorboard", "false", "--graph.n3", "0",
    "--checkpoint.every", "100", "--eval.every", "0", "--eval.tokens", "0", "--graph.init_scale", "0.1",
    "--graph.epochs", "2",
]  # fmt: skip


def lines_of(rng, count):
    """Users buy items of their parity, live in the country of their remainder and know others of it; a name is a node
    of each type that has it."""
    found = set()
    while len(found) < count:
        user, item, other = rng.integers(USERS), rng.integers(ITEMS), rng.integers(USERS)
        if user % 2 == item % 2:
            found.add(f"n{user}\tbuys\tn{item}\n")
        found.add(f"n{user}\tlives\tn{user % COUNTRIES}\n")
        if user % COUNTRIES == other % COUNTRIES:
            found.add(f"n{user}\tknows\tn{other}\n")
    found = sorted(found)
    rng.shuffle(found)
    return [f"n{n}\tborders\tn{(n + 1) % COUNTRIES}\n" for n in range(COUNTRIES)] + found


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Graph:
    folder = tmp_path_factory.mktemp("shop")
    lines = lines_of(np.random.default_rng(0), 560)
    (folder / "train.tsv").write_text("".join(lines[:460]))
    (folder / "valid.tsv").write_text("".join(lines[460:]))
    (folder / "types.tsv").write_text(TYPES)
    splits = {name: folder / f"{name}.tsv" for name in ("train", "valid")}
    import_graph(splits, folder / "graph", types=folder / "types.tsv")
    return Graph.open(folder / "graph")


def task_of(graph, run, start=None, **values):
    config = GraphConfig(**(SMALL | values))
    return GraphTask(config, ScheduleConfig(decay="constant"), graph, run, num_threads=1, eval_edges=90, start=start)


def loop(run, every=1):
    found = RunConfig(dir=str(run), tensorboard=False)
    return LoopConfig(run=found, checkpoint=CheckpointConfig(every=every), eval=EvalConfig(every=0, tokens=90))


def named(graph, edges):
    names, relations = [graph.names(kind) for kind in range(len(graph.types))], graph.relation_names()
    return [
        f"{names[graph.ends[r][0]][h]}\t{relations[r]}\t{names[graph.ends[r][1]][t]}\n"
        for h, r, t in zip(edges.heads, edges.relations, edges.tails, strict=True)
    ]


def tables(task):
    return [task.scorer().vectors(np.arange(count), kind) for kind, count in enumerate(task.graph.counts)]


def test_each_type_has_names_and_numbers_of_its_own(shop):
    assert {kind.name: kind.num_nodes for kind in shop.types} == {"country": 4, "user": 40, "item": 30}
    assert shop.num_nodes == 74
    assert named(shop, shop.edges("train")) == (shop.folder.parent / "train.tsv").read_text().splitlines(True)
    assert (shop.folder / "nodes.user.txt").read_text().count("n3\n") == 1
    assert (shop.folder / "nodes.item.txt").read_text().count("n3\n") == 1
    assert not (shop.folder / "nodes.txt").exists()


def test_a_graph_without_types_is_written_as_before(planted):
    manifest = json.loads((planted.folder / "graph.json").read_text())
    assert list(manifest) == ["format_version", "num_nodes", "num_relations", "splits", "files"]
    assert manifest["format_version"] == 1
    assert (planted.is_typed, planted.counts, planted.pairs) == (False, [60], [(0, 0)])


@pytest.mark.parametrize(
    ("types", "told"),
    [
        ("buys\tuser\titem\n", r"train.tsv, line 2: the relation 'likes' has no types"),
        ("buys\tuser\titem\nlikes\tuser\tan item\n", r"types.tsv, line 2: the type 'an item' is part of a file's name"),
        ("buys\tuser\titem\nbuys\tuser\tuser\n", r"types.tsv, line 2: 'buys' has a row before"),
        ("buys\tuser\n", r"types.tsv, line 1 has 2 fields where 3 were expected"),
    ],
)
def test_mistakes_in_types(tmp_path, types, told):
    (tmp_path / "train.tsv").write_text("a\tbuys\tb\na\tlikes\tb\n")
    (tmp_path / "types.tsv").write_text(types)
    with pytest.raises(DataError, match=told):
        import_graph({"train": tmp_path / "train.tsv"}, tmp_path / "g", types=tmp_path / "types.tsv")


def test_what_types_do_not_go_with(planted, shop, tmp_path):
    files = {"train": shop.folder.parent / "train.tsv"}
    types = shop.folder.parent / "types.tsv"
    with pytest.raises(DataError, match=r"the nodes of .* have no types"):
        import_graph(files, tmp_path / "a", add=planted.folder, types=types)
    with pytest.raises(DataError, match="walks go over nodes of one type"):
        import_graph(files, tmp_path / "b", walks=Walks(1), types=types)
    for names, told in ((("town",), "names 'town', but the graph's types are"), (shop.type_counts, "every type")):
        with pytest.raises(RecipeError, match=told):
            task_of(shop, tmp_path, num_partitions=2, unpartitioned=tuple(names))


def test_a_number_that_is_none_of_its_type_is_told_by_file_and_row(shop, tmp_path):
    """A user's number where a country stands: within the largest type, but not within its own."""
    copy = tmp_path / "graph"
    copy.mkdir()
    for path in shop.folder.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    tails, relations = (np.fromfile(copy / f"train.{name}", "<i4") for name in ("tails", "relations"))
    row = int(np.flatnonzero(relations == shop.relation_names().index("lives"))[7])
    tails[row] = 5
    tails.tofile(copy / "train.tails")
    task = task_of(Graph.open(copy), tmp_path / "run")
    with pytest.raises(DataError, match=rf"train.tails, row {row + 1}: tails has the number 5, .* 4 nodes of the type"):
        task._edges(next(task.units(Cursor())).share)
    with pytest.raises(DataError, match=rf"train.tails, row {row + 1}:"):
        task_of(Graph.open(copy), tmp_path / "run", num_partitions=2)


@pytest.mark.parametrize("reciprocal", [True, False])
@pytest.mark.parametrize("values", [{}, {"num_partitions": 3}, CUT, CUT | {"num_chunks": 2}])
def test_batches_are_of_two_types_and_draw_among_these(shop, tmp_path, values, reciprocal, monkeypatch):
    """Every edge once; rows, drawn rows and the pool are of its relation's types; whole types train as one part."""
    task = task_of(shop, tmp_path, reciprocal=reciprocal, epochs=1, **values)
    layout, seen = task.table.layout, []
    from puna.graph import task as module

    class Spy(module.Worker):
        def train(self, edges, pool, key, head_part, tail_part, sides, rates):
            out = super().train(edges, pool, key, head_part, tail_part, sides, rates)
            drawn = [side.drawn_rows.copy() for side in (self.heads, self.tails)]
            seen.append((edges, pool, (head_part, tail_part), drawn))
            return out

    monkeypatch.setattr(module, "Worker", Spy)
    got = []
    for unit in task.units(Cursor()):
        del seen[:]
        task.step(unit)
        for edges, pool, parts, drawn in seen:
            pair = {tuple(ends) for ends in shop.ends[edges.relations].tolist()}
            assert pair == {tuple(ends) for ends in shop.ends[pool.relations].tolist()}
            assert len(pair) == 1
            assert reciprocal or len(set(edges.relations.tolist())) == 1
            numbers = []
            for side, kind in enumerate(*pair):
                partition = WHOLE if layout.whole[kind] else unit.bucket[side]
                rows = layout.span(kind, partition)
                assert len(parts[side].vectors) == rows.stop - rows.start
                assert np.shares_memory(parts[side].vectors, task.table.view(partition)[rows])
                assert drawn[side].max() < len(parts[side].vectors)
                column = (edges.heads, edges.tails)[side]
                numbers.append(column * layout.step(kind) + max(0, partition) * (partition != WHOLE))
            if any(layout.whole[kind] for kind in next(iter(pair))):
                assert unit.bucket[0] == unit.bucket[1]
            if pair == {(0, 0)} and layout.whole[0]:
                assert parts[0] is parts[1]
            got += named(shop, Edges(numbers[0], edges.relations, numbers[1]))
    assert sorted(got) == sorted(named(shop, shop.edges("train")))


@pytest.mark.parametrize("reciprocal", [True, False])
def test_all_negatives_are_all_of_the_type(shop, tmp_path, reciprocal):
    """Vectors of nearly nothing score nearly 0, so that softmax costs the logarithm of as many nodes as there are."""
    values = {"reciprocal": reciprocal, "init_scale": 1e-6, "lr": 1e-9, "epochs": 1}
    task = task_of(shop, tmp_path, all_negs=True, **values)
    assert task.config.by_question == reciprocal
    told = task.step(next(task.units(Cursor()))).loss
    counts = np.array(shop.counts)[shop.ends[shop.edges("train").relations]]
    assert told == pytest.approx(np.log(counts).sum(axis=1).mean(), rel=1e-5)


def test_fresh_vectors_are_a_function_of_type_and_node(shop, tmp_path):
    whole, cut, some = (tables(task_of(shop, tmp_path, **v)) for v in ({}, {"num_partitions": 3}, CUT))
    for kind in range(3):
        np.testing.assert_array_equal(whole[kind], cut[kind])
        np.testing.assert_array_equal(whole[kind], some[kind])
    assert (whole[0] != whole[1][:4]).all()


def naive(scorer, edges, candidates=None):
    """Raw and filtered ranks by loops; candidates: {pair: (2, K)}."""
    graph, found = scorer.graph, tables_of(scorer)
    splits = [graph.edges(split) for split in graph.splits]
    known = {x for e in splits for x in zip(e.heads.tolist(), e.relations.tolist(), e.tails.tolist(), strict=True)}
    ranks = np.zeros((2, 2, len(edges)))
    for i in range(len(edges)):
        h, r, t = (int(column[i]) for column in (edges.heads, edges.relations, edges.tails))
        ends = graph.ends[r].tolist()
        for side in range(2):
            kind, true, given = ends[1 - side], (t, h)[side], found[ends[side]][(h, t)[side]]
            table = scorer.relations[side if scorer.config.reciprocal else 0].table[r].astype(float)
            values = found[kind].astype(float) @ (table * given)
            field = range(len(values)) if candidates is None else candidates[tuple(ends)][side].tolist()
            others = [n for n in field if n != true]
            new = [n for n in others if ((h, r, n) if side == 0 else (n, r, t)) not in known]
            for out, kept in zip(ranks, (others, new), strict=True):
                out[side, i] = 1 + sum(values[n] > values[true] for n in kept)
    return ranks


def tables_of(scorer):
    return [scorer.vectors(np.arange(count), kind) for kind, count in enumerate(scorer.graph.counts)]


@pytest.mark.parametrize("reciprocal", [True, False])
@pytest.mark.parametrize("values", [{}, CUT])
def test_ranks_are_among_the_nodes_of_the_type(shop, tmp_path, values, reciprocal, monkeypatch):
    monkeypatch.setattr(ranking, "EVAL_QUERIES", 8)
    monkeypatch.setattr(ranking, "EVAL_NODES", 7)
    task = task_of(shop, tmp_path, reciprocal=reciprocal, init_scale=1.0, **values)
    for side in task.relations:
        side.table[:] = np.random.default_rng(1).normal(size=side.table.shape)
    edges, scorer = shop.edges("valid").take(slice(25)), task.scorer()
    got = rank(scorer, edges)
    np.testing.assert_array_equal(np.stack([got.raw, got.filtered]), naive(scorer, edges))
    sizes = np.array(shop.counts)[shop.ends[edges.relations]].T
    np.testing.assert_array_equal(got.num_raw, sizes[::-1])
    for sampling in ("uniform", "prevalence"):
        drawn = draw_all(shop, edges, 20, sampling, seed=3)
        got = rank(scorer, edges, drawn)
        np.testing.assert_array_equal(np.stack([got.raw, got.filtered]), naive(scorer, edges, drawn))
        for pair, nodes in drawn.items():
            assert (nodes.max(axis=1) < np.array(shop.counts)[[pair[1], pair[0]]]).all()


@pytest.mark.parametrize("values", [{}, CUT])
def test_what_was_planted_is_learnt(shop, tmp_path, values):
    task = task_of(shop, tmp_path, **values, epochs=40)
    before = task.evaluate("heldout")["mr"]
    Run(task, tmp_path, loop(tmp_path, every=1000)).go()
    assert task.evaluate("heldout")["mr"] < 0.7 * before


def test_a_run_is_read_again_and_goes_on_bit_for_bit(shop, tmp_path):
    """With a type that is not cut: stopped at half, and from the checkpoint on in a fresh task."""
    whole = task_of(shop, tmp_path / "whole", **CUT, epochs=2)
    Run(whole, tmp_path / "whole", loop(tmp_path / "whole", every=9)).go()
    manifest = checkpoint.latest(tmp_path / "whole")
    assert set(manifest.rows["nodes"]) == {"0", "1", "2", "whole"}
    first = task_of(shop, tmp_path / "half", **CUT, epochs=2)
    half = sum(unit.epoch == 0 for unit in first.units(Cursor()))
    for unit in first.units(Cursor()):
        if unit.index < half:
            first.step(unit)
    checkpoint.save(tmp_path / "half", first.state(), Cursor(half), keep=1)
    again = task_of(shop, tmp_path / "half", **CUT, epochs=2)
    cursor = checkpoint.load(tmp_path / "half", again.state()).cursor
    for unit in again.units(cursor):
        again.step(unit)
    read, _ = load(tmp_path / "whole", whole.config, shop)
    for a, b, c in zip(tables(whole), tables(again), tables_of(read), strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)


def test_memory_counts_types(shop):
    sizes = budget.Sizes.of(shop)
    config = GraphConfig(**(SMALL | CUT))
    layout = Layout.of(config, shop.types)
    assert [layout.rows(part) for part in layout.partitions] == [24, 23, 23, 4]
    assert budget.memory(config, sizes, 1, False).partitions == (2 * 24 + 4) * (4 * 8 + 4)
    plain = GraphConfig(**(SMALL | {"num_partitions": 3}))
    assert budget.memory(plain, sizes, 1, False).partitions == 2 * 26 * (4 * 8 + 4)


def test_several_processes_refuse_a_type_that_is_not_cut(shop, puna):
    words = [*FLAGS, "--graph.num_partitions", "4", "--run.num_processes", "2", "--data.path", shop.folder]
    status, _, err = puna("train", "social", *words, "--graph.unpartitioned", '["country"]')
    assert status == 2
    assert "nodes of the type country are not cut into partitions; several processes cannot share them" in err
    assert "Train by one process (run.num_processes 1)" in err


@pytest.mark.slow
def test_several_processes_train_types_that_are_cut(shop, puna):
    words = [*FLAGS, "--graph.num_partitions", "4", "--data.path", shop.folder, "--graph.epochs", "12"]
    found = {}
    for count in (1, 2):
        status, _, err = puna("train", "social", *words, "--run.num_processes", count, "--run.dir", f"r{count}")
        assert status == 0, err
        status, out, err = puna("graph", "eval", f"r{count}", "--split", "valid", "--json")
        found[count] = json.loads(out)["filtered"]["mrr"]
    assert found[2] == pytest.approx(found[1], abs=0.1)
    assert found[2] > 0.2


def test_from_types_to_neighbours_by_the_verbs(shop, puna, tmp_path):
    source = shop.folder.parent
    words = ["--train", source / "train.tsv", "--valid", source / "valid.tsv", "--types", source / "types.tsv"]
    status, out, err = puna("graph", "import", *words, "--out", "g", "--json")
    assert (status, json.loads(out)["types"]) == (0, {"country": 4, "user": 40, "item": 30}), err
    flags = [*FLAGS, "--graph.num_partitions", "2", "--graph.unpartitioned", '["country"]']
    status, out, err = puna("check", "graph-small", "--data.path", "g", *flags, "--json")
    assert (status, json.loads(out)["types"]["item"]) == (0, 30), err
    status, _, err = puna("train", "graph-small", "--data.path", "g", "--run.dir", "r", *flags)
    assert status == 0, err
    figures = json.loads(puna("graph", "eval", "r", "--split", "valid", "--relations", "--json")[1])
    assert {record["relation"] for record in figures["relations"]} == {"buys", "lives", "knows"}
    status, _, err = puna("graph", "neighbors", "r", "n1")
    assert status == 2
    assert "the types country, user, item of g each have a node named 'n1'" in " ".join(err.split())
    found = json.loads(puna("graph", "neighbors", "r", "n1", "--type", "country", "--json")[1])
    assert (found["type"], len(found["neighbors"])) == ("country", 3)
    assert "has no type 'town'" in puna("graph", "neighbors", "r", "n1", "--type", "town")[2]
    assert json.loads(puna("graph", "neighbors", "r", "n39", "--json")[1])["type"] == "user"


def test_exported_tables_are_by_type(shop, tmp_path):
    task = task_of(shop, tmp_path / "run", **CUT, epochs=1)
    Run(task, tmp_path / "run", loop(tmp_path / "run", every=100)).go()
    scorer, _ = load(tmp_path / "run", task.config, shop)
    wanted = tables(task)
    for form in ("npy", "tsv", "parquet"):
        export(scorer, tmp_path / form, form)
    for kind, found in enumerate(shop.types):
        np.testing.assert_array_equal(np.load(tmp_path / "npy" / f"nodes.{found.name}.npy"), wanted[kind])
        rows = [row.split("\t") for row in (tmp_path / "tsv" / f"nodes.{found.name}.tsv").read_text().splitlines()]
        assert [row[0] for row in rows] == shop.names(kind)
        np.testing.assert_array_equal(np.array([row[1:] for row in rows], "f4"), wanted[kind])
    nearest = neighbors(scorer, "n2", 3, "item")["neighbors"]
    unit = wanted[2] / np.linalg.norm(wanted[2], axis=1, keepdims=True)
    names = shop.names(2)
    order = np.argsort(-(unit @ unit[names.index("n2")]))
    assert [row["name"] for row in nearest] == [names[n] for n in order[1:4]]


def test_a_graph_with_types_grows(shop, tmp_path):
    """Old numbers stay, a new relation may bring a new type, and frozen rows stay bit for bit."""
    (tmp_path / "new.tsv").write_text("n0\tbuys\tn99\nn77\tlives\tn0\nn0\twrites\tn5\n")
    (tmp_path / "types.tsv").write_text("writes\tuser\tbook\n")
    files = {"train": tmp_path / "new.tsv"}
    with pytest.raises(DataError, match="line 3: the relation 'writes' has no types"):
        import_graph(files, tmp_path / "bad", add=shop.folder)
    told = import_graph(files, tmp_path / "grown", add=shop.folder, types=tmp_path / "types.tsv")
    assert told["types"] == {"country": 4, "user": 41, "item": 31, "book": 1}
    grown = Graph.open(tmp_path / "grown")
    assert named(grown, grown.edges("train"))[:460] == named(shop, shop.edges("train"))
    words = [*FLAGS, "--graph.num_partitions", "2"]
    run.train(recipe.load("graph-small", [*words, "--data.path", str(shop.folder), "--run.dir", str(tmp_path / "a")]))
    words = [*FLAGS, "--graph.num_partitions", "3", "--graph.unpartitioned", '["country"]', "--graph.freeze", "true"]
    words += ["--graph.start", str(tmp_path / "a"), "--data.path", str(tmp_path / "grown")]
    run.train(recipe.load("graph-small", [*words, "--run.dir", str(tmp_path / "b")]))
    first, _ = load(tmp_path / "a", recipe.load(tmp_path / "a").recipe.graph, shop)
    after, _ = load(tmp_path / "b", recipe.load(tmp_path / "b").recipe.graph, grown)
    for old, new in zip(tables_of(first), tables_of(after), strict=False):
        np.testing.assert_array_equal(old, new[: len(old)])
    buckets = Buckets.open(grown, "train", 2, (shop.counts, shop.num_relations))
    assert buckets.offsets[-1] == 3


def test_walks_to_contexts(tmp_path):
    (tmp_path / "links.tsv").write_text("a\tb\nb\tc\nc\ta\n")
    files, columns = {"train": tmp_path / "links.tsv"}, ("head", "tail")
    told = import_graph(files, tmp_path / "g", columns, walks=Walks(3, contexts=True))
    assert told["types"] == {"node": 3, "context": 3}
    graph = Graph.open(tmp_path / "g")
    assert (graph.names(0), graph.names(1), graph.pairs) == (["a", "b", "c"], ["a", "b", "c"], [(0, 1)])
    alone = import_graph(files, tmp_path / "h", columns, walks=Walks(3))
    assert alone["edges"] == told["edges"]
    np.testing.assert_array_equal(graph.edges("train").tails, Graph.open(tmp_path / "h").edges("train").tails)
    task = task_of(graph, tmp_path / "run", operator="none", epochs=1)
    before = tables(task)
    Run(task, tmp_path / "run", loop(tmp_path / "run")).go()
    assert all((a != b).all() for a, b in zip(before, tables(task), strict=True))
