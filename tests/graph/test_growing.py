"""A graph that is added to, and a run that goes on from another: old rows stay bit for bit where they are to."""

import json
import sys

import numpy as np
import pytest

from puna import cli, recipe, run
from puna.errors import CheckpointError, DataError, RecipeError
from puna.graph.graph import Graph
from puna.graph.importing import import_graph
from puna.graph.ranking import rank
from puna.graph.trained import load
from puna.train.metrics import read_events

FLAGS = [
    "--run.num_threads", "1", "--graph.dim", "8", "--graph.operator", "diagonal", "--graph.batch_edges", "40",
    "--graph.num_batch_negs", "10", "--graph.num_uniform_negs", "10", "--run.tensorboard", "false", "--graph.n3", "0",
    "--checkpoint.every", "100", "--eval.every", "0", "--eval.tokens", "0", "--graph.init_scale", "0.1",
]  # fmt: skip
NEW = {"n3", "n17", "n42"}


def train(folder, data, *words, epochs=15):
    flags = [*FLAGS, "--graph.epochs", str(epochs), "--data.path", str(data), "--run.dir", str(folder), *words]
    run.train(recipe.load("graph-small", flags))
    found, graph = recipe.load(folder).recipe.graph, Graph.open(data)
    return load(folder, found, graph)[0]


@pytest.fixture(scope="module")
def grown(planted, tmp_path_factory):
    """Folder with `old` (without three nodes), a run on it, and `new`, to which these and a relation were added."""
    folder = tmp_path_factory.mktemp("grown")
    lines = (planted.folder.parent / "train.tsv").read_text().splitlines()
    is_new = [bool(NEW & set(line.split("\t")[::2])) for line in lines]
    old = [line for line, new in zip(lines, is_new, strict=True) if not new]
    added = [line for line, new in zip(lines, is_new, strict=True) if new]
    test, added = added[::5], [line for n, line in enumerate(added) if n % 5]
    added += ["n1\tknows\tn2", old[0]]
    for name, rows in (("old", old), ("added", added), ("test", test)):
        (folder / f"{name}.tsv").write_text("".join(f"{row}\n" for row in rows))
    import_graph({"train": folder / "old.tsv"}, folder / "old")
    files = {"train": folder / "added.tsv", "test": folder / "test.tsv"}
    import_graph(files, folder / "new", add=folder / "old")
    train(folder / "first", folder / "old", "--graph.num_partitions", "2")
    return folder


def rows(scorer, count):
    return scorer.vectors(np.arange(count))


@pytest.mark.parametrize("parts", [1, 3])
def test_frozen_rows_stay_bit_for_bit_and_new_ones_are_learnt(grown, tmp_path, parts):
    old, new = Graph.open(grown / "old"), Graph.open(grown / "new")
    first = load(grown / "first", recipe.load(grown / "first").recipe.graph, old)[0]
    words = ["--graph.start", str(grown / "first"), "--graph.freeze", "true", "--graph.num_partitions", str(parts)]
    before = train(tmp_path / "begun", grown / "new", *words, "--graph.lr", "1e-12", epochs=1)
    after = train(tmp_path / "second", grown / "new", *words)
    np.testing.assert_array_equal(rows(after, old.num_nodes), rows(first, old.num_nodes))
    for mine, others in zip(after.relations, first.relations, strict=True):
        np.testing.assert_array_equal(mine.table[:2], others.table)
    assert (after.relations[0].table[2] != 1).all()
    fresh = rows(before, new.num_nodes)[old.num_nodes :]
    assert (rows(after, new.num_nodes)[old.num_nodes :] != fresh).any(axis=1).all()
    edges = new.edges("test")
    ranks = [rank(scorer, edges).figures()["filtered"]["mr"] for scorer in (before, after)]
    assert ranks[1] < 0.8 * ranks[0]
    steps = [event for event in read_events(tmp_path / "second") if event["event"] == "step"]
    added = sum(
        1 for line in (grown / "added.tsv").read_text().splitlines() if NEW & set(line.split()) or "knows" in line
    )
    assert steps[-1]["tokens"] == 15 * added


def test_without_freeze_everything_goes_on(grown, tmp_path):
    """The first step begins at the old vectors and sums, and moves them."""
    old = Graph.open(grown / "old")
    first = load(grown / "first", recipe.load(grown / "first").recipe.graph, old)[0]
    after = train(tmp_path / "second", grown / "new", "--graph.start", str(grown / "first"), epochs=1)
    moved = np.abs(rows(after, old.num_nodes) - rows(first, old.num_nodes)).max(axis=1)
    assert (moved > 0).all()
    assert moved.max() < 0.5
    assert len(list(read_events(tmp_path / "second"))) > 1


def test_a_frozen_run_resumes_exactly(grown, tmp_path):
    words = ["--graph.start", str(grown / "first"), "--graph.freeze", "true", "--graph.num_partitions", "3"]
    whole = train(tmp_path / "whole", grown / "new", *words, epochs=2)
    train(tmp_path / "cut", grown / "new", *words, "--checkpoint.every", "4", "--checkpoint.keep", "9", epochs=2)
    for path in (tmp_path / "cut" / "checkpoints").iterdir():
        if path.name != "step-00000008":
            for file in sorted(path.rglob("*"), reverse=True):
                file.unlink() if file.is_file() else file.rmdir()
            path.rmdir()
    again = train(tmp_path / "cut", grown / "new", *words, "--checkpoint.every", "4", epochs=2)
    assert any(event["event"] == "resume" for event in read_events(tmp_path / "cut"))
    np.testing.assert_array_equal(rows(again, again.graph.num_nodes), rows(whole, whole.graph.num_nodes))


def test_what_a_run_cannot_begin_with(grown, planted, tmp_path):
    start = ["--graph.start", str(grown / "first")]
    with pytest.raises(DataError, match=r"do not go on from those that .*first was trained on"):
        train(tmp_path / "a", planted.folder, *start)
    with pytest.raises(RecipeError, match=r"graph.dim is 16, but 8 in .*first"):
        train(tmp_path / "b", grown / "new", *start, "--graph.dim", "16")
    with pytest.raises(CheckpointError, match="holds no run"):
        train(tmp_path / "c", grown / "new", "--graph.start", str(tmp_path / "none"))
    with pytest.raises(RecipeError, match=r"graph.freeze is set, but there is no graph.start"):
        train(tmp_path / "d", grown / "new", "--graph.freeze", "true")
    with pytest.raises(RecipeError, match=r"graph.max_norm shortens vectors"):
        train(tmp_path / "e", grown / "new", *start, "--graph.freeze", "true", "--graph.max_norm", "1")


def test_adding_as_typed(grown, tmp_path, monkeypatch, capsys):
    words = [
        "graph",
        "import",
        "--train",
        str(grown / "added.tsv"),
        "--add",
        str(grown / "old"),
        "--out",
        str(tmp_path / "g"),
    ]
    monkeypatch.setattr(sys, "argv", ["puna", *words, "--json"])
    with pytest.raises(SystemExit):
        cli.main()
    assert json.loads(capsys.readouterr().out)["num_new_nodes"] == 3
