"""PyTorch-BigGraph's files: out and in again without a change, and mistakes by file and row."""

import json
import sys

import numpy as np
import pytest

from puna import cli, recipe, run
from puna.errors import DataError
from puna.graph.graph import Graph
from puna.graph.importing import import_graph
from puna.graph.trained import evaluate, export, load

h5py = pytest.importorskip("h5py")
pbg = pytest.importorskip("puna.graph.pbg")

FLAGS = [
    "--run.num_threads", "1", "--graph.dim", "8", "--graph.batch_edges", "40", "--graph.num_batch_negs", "10",
    "--graph.num_uniform_negs", "10", "--run.tensorboard", "false", "--graph.n3", "0", "--graph.epochs", "2",
    "--checkpoint.every", "100", "--eval.every", "0", "--eval.tokens", "0", "--graph.init_scale", "0.1",
]  # fmt: skip


def trained(planted, folder, *words):
    flags = [*FLAGS, "--data.path", str(planted.folder), "--run.dir", str(folder), *words]
    run.train(recipe.load("graph-small", flags))
    return load(folder, recipe.load(folder).recipe.graph, planted)[0]


@pytest.mark.parametrize(
    ("operator", "reciprocal", "parts"),
    [
        ("complex_diagonal", True, 2), ("translation", False, 1), ("affine", True, 1),
        pytest.param("linear", False, 3, marks=pytest.mark.slow),
        pytest.param("diagonal", True, 1, marks=pytest.mark.slow),
        pytest.param("none", False, 2, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_out_and_in_again(planted, tmp_path, operator, reciprocal, parts):
    """Edges, names, vectors and relations are the same, and so is every rank; nothing was unpickled."""
    words = ["--graph.operator", operator, "--graph.reciprocal", str(reciprocal).lower()]
    scorer = trained(planted, tmp_path / "run", *words, "--graph.num_partitions", str(parts))
    export(scorer, tmp_path / "theirs", "pbg")
    with h5py.File(tmp_path / "theirs" / "checkpoint" / f"embeddings_all_{parts - 1}.v1.h5", "a") as file:
        np.testing.assert_array_equal(file["embeddings"][...], scorer.view(parts - 1))
        file.create_dataset("optimizer/state_dict", data=np.frombuffer(b"cos\nsystem\n(S'false'\ntR.", "V1"))
    told = run.migrate_graph(tmp_path / "theirs" / "checkpoint" / "config.json", tmp_path / "ours", tmp_path)
    assert (told["num_nodes"], told["edges"]) == (60, {"train": 1200, "test": 100, "valid": 100})
    assert told["checkpoint"]["optimizer"].startswith("skipped")
    assert told["left_out"] == []
    graph = Graph.open(tmp_path / "ours" / "graph")
    kept = recipe.load(tmp_path / "ours" / "run").recipe.graph
    assert (kept.operator, kept.reciprocal, kept.num_partitions, kept.dim) == (operator, reciprocal, parts, 8)
    back, _ = load(tmp_path / "ours" / "run", kept, graph)
    place = [planted.names().index(name) for name in graph.names()]
    np.testing.assert_array_equal(back.vectors(np.arange(60)), scorer.vectors(np.array(place)))
    for split in ("train", "test"):
        edges = [(g.edges(split), g.names(), g.relation_names()) for g in (graph, planted)]
        named = [
            sorted((n[h], r[k], n[t]) for h, k, t in zip(e.heads, e.relations, e.tails, strict=True))
            for e, n, r in edges
        ]
        assert named[0] == named[1]
    for side, (mine, others) in enumerate(zip(back.relations, scorer.relations, strict=True)):
        np.testing.assert_array_equal(mine.table, others.table, err_msg=str(side))
    assert evaluate(back, "test")["filtered"]["mrr"] == pytest.approx(evaluate(scorer, "test")["filtered"]["mrr"])
    run.train(recipe.load(tmp_path / "ours" / "run", ["--graph.epochs", "2"]))


def test_the_layout_is_theirs(planted, tmp_path):
    scorer = trained(planted, tmp_path / "run", "--graph.num_partitions", "2")
    export(scorer, tmp_path / "out", "pbg")
    found = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file())
    names = [f"edges/{s}/edges_{i}_{j}.h5" for s in ("test", "train", "valid") for i in (0, 1) for j in (0, 1)]
    names += [
        f"entities/entity_{what}_all_{p}.{end}" for what, end in (("count", "txt"), ("names", "json")) for p in (0, 1)
    ]
    names += ["entities/dynamic_rel_count.txt", "entities/dynamic_rel_names.json", "checkpoint/checkpoint_version.txt"]
    names += ["checkpoint/config.json", "checkpoint/model.v1.h5"] + [
        f"checkpoint/embeddings_all_{p}.v1.h5" for p in (0, 1)
    ]
    assert found == sorted(names)
    with h5py.File(tmp_path / "out" / "checkpoint" / "model.v1.h5") as file:
        real = file["model/relations/0/operator/lhs/real"]
        assert (real.shape, real.attrs["state_dict_key"]) == ((2, 4), "lhs_operators.0.real")
        np.testing.assert_array_equal(real[...], scorer.relations[0].table[:, :4])
    with h5py.File(tmp_path / "out" / "edges" / "train" / "edges_0_1.h5") as file:
        assert file.attrs["format_version"] == 1
        assert {name: file[name].dtype for name in file} == dict.fromkeys(("lhs", "rhs", "rel"), np.dtype("i8"))


CONFIG = """
def get_torchbiggraph_config():
    config = dict(
        entity_path="data", edge_paths=["data/train", "data/test_edges"], checkpoint_path="model",
        entities={"all": {"num_partitions": 1}},
        relations=[{"name": "all_edges", "lhs": "all", "rhs": "all", "operator": "complex_diagonal"}],
        dynamic_relations=True, dimension=400, global_emb=False, comparator="dot", num_epochs=50,
        num_uniform_negs=1000, loss_fn="softmax", lr=0.1, regularization_coef=1e-3, eval_fraction=0,
    )
    return config
"""


def test_a_configuration_in_python(tmp_path):
    (tmp_path / "c.py").write_text(CONFIG)
    found = pbg.convert(pbg.read_config(tmp_path / "c.py"), tmp_path / "c.py")
    assert found.left_out == ["eval_fraction"]
    wanted = {
        "dim": 400, "operator": "complex_diagonal", "comparator": "dot", "loss": "softmax", "n3": 1e-3, "epochs": 50,
        "num_batch_negs": 50, "num_uniform_negs": 1000, "batch_edges": 1000, "lr": 0.1, "reciprocal": True,
        "init_scale": 1e-3, "max_norm": 0.0, "share_negs": 1, "bucket_order": "inside_out",
    }  # fmt: skip
    assert wanted.items() <= found.settings.items()


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("lr=0.1", "lr=make_rate()", r"c.py is no PyTorch-BigGraph configuration \(line 8 is no constant\)"),
        ("def get", "def got", r"no get_torchbiggraph_config"),
        ('"rhs": "all"', '"rhs": "other"', r"a relation names the type 'other'"),
        ('{"num_partitions": 1}', '{"num_partitions": 1, "dimension": 5}', "a dimension of its own for all"),
        ('{"num_partitions": 1}', '{"num_partitions": 1, "featurized": True}', "featurized entities"),
        ('[{"name"', '[{"name": "b", "operator": "none"}, {"name"', "the operators complex_diagonal, none"),
    ],
)
def test_configurations_that_cannot_be_carried_over(tmp_path, before, after, told):
    (tmp_path / "c.py").write_text(CONFIG.replace(before, after))
    with pytest.raises(DataError, match=told):
        pbg.convert(pbg.read_config(tmp_path / "c.py"), tmp_path / "c.py")


@pytest.mark.parametrize("whole", [[], ["person"], ["thing"]])
def test_types_out_and_in_again(planted, tmp_path, whole):
    """People and things, with names in common; one of the types in one partition, or none."""
    source = planted.folder.parent
    (tmp_path / "types.tsv").write_text("same\tperson\tthing\nother\tperson\tthing\n")
    files = {name: source / f"{name}.tsv" for name in ("train", "valid")}
    import_graph(files, tmp_path / "graph", types=tmp_path / "types.tsv")
    graph = Graph.open(tmp_path / "graph")
    words = ["--graph.num_partitions", "3", "--graph.reciprocal", "false", "--graph.operator", "translation"]
    scorer = trained(graph, tmp_path / "run", *words, "--graph.unpartitioned", json.dumps(whole))
    export(scorer, tmp_path / "theirs", "pbg")
    config = json.loads((tmp_path / "theirs" / "checkpoint" / "config.json").read_text())
    parts = {name: 1 if name in whole else 3 for name in ("person", "thing")}
    assert config["entities"] == {name: {"num_partitions": number} for name, number in parts.items()}
    assert [(r["name"], r["lhs"], r["rhs"]) for r in config["relations"]] == [
        (name, "person", "thing") for name in graph.relation_names()
    ]
    found = {path.name for path in (tmp_path / "theirs" / "edges" / "train").iterdir()}
    assert found == {f"edges_{i}_{j}.h5" for i in range(parts["person"]) for j in range(parts["thing"])}
    told = run.migrate_graph(tmp_path / "theirs" / "checkpoint" / "config.json", tmp_path / "ours", tmp_path)
    assert told["types"] == graph.type_counts
    kept = recipe.load(tmp_path / "ours" / "run").recipe.graph
    assert kept.unpartitioned == tuple(whole)
    back, _ = load(tmp_path / "ours" / "run", kept, Graph.open(tmp_path / "ours" / "graph"))
    for kind in range(2):
        names = graph.names(kind)
        place = np.array([names.index(name) for name in back.graph.names(kind)])
        np.testing.assert_array_equal(back.vectors(np.arange(len(names)), kind), scorer.vectors(place, kind))
    assert evaluate(back, "valid")["filtered"]["mrr"] == pytest.approx(evaluate(scorer, "valid")["filtered"]["mrr"])
    assert evaluate(back, "train")["raw"]["mrr"] == pytest.approx(evaluate(scorer, "train")["raw"]["mrr"])


def test_damage_is_told_by_file_and_row(planted, tmp_path, monkeypatch, capsys):
    scorer = trained(planted, tmp_path / "run", "--graph.num_partitions", "2")
    export(scorer, tmp_path / "out", "pbg")
    config = tmp_path / "out" / "checkpoint" / "config.json"
    with h5py.File(tmp_path / "out" / "edges" / "train" / "edges_0_1.h5", "a") as file:
        file["rhs"][4] = 30
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["puna", "graph", "migrate", str(config), "--out", "a"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    assert "edges_0_1.h5, row 5: rhs is 30, out of range: there are 30" in capsys.readouterr().err
    with h5py.File(tmp_path / "out" / "edges" / "train" / "edges_0_1.h5", "a") as file:
        file["rhs"][4] = 29
        file.attrs["format_version"] = 2
    with pytest.raises(DataError, match=r"edges_0_1.h5 holds no edges of format 1"):
        run.migrate_graph(config, tmp_path / "b", tmp_path)
    (tmp_path / "out" / "entities" / "entity_names_all_1.json").write_text(json.dumps(["x"]))
    with pytest.raises(DataError, match=r"60 entities are counted, but 31 have names"):
        run.migrate_graph(config, tmp_path / "c", tmp_path)
