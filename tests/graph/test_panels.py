"""A graph run's report: held-out ranks, swaps, a map of the nodes."""

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from puna import cli, recipe, run
from puna.graph.panels import nodes, project, ranks, sample, swaps
from puna.report import read

sys.path.append(str(Path(__file__).parents[1]))
from html_page import Page

FLAGS = [
    "--run.num_threads", "1", "--run.tensorboard", "false", "--graph.dim", "8", "--graph.operator", "diagonal",
    "--graph.batch_edges", "40", "--graph.num_batch_negs", "10", "--graph.num_uniform_negs", "10",
    "--graph.epochs", "2", "--graph.n3", "0", "--checkpoint.every", "4", "--eval.every", "4", "--eval.tokens", "50",
]  # fmt: skip


def trained(graph, folder, *words):
    run.train(recipe.load("graph-small", [*FLAGS, "--data.path", str(graph.folder), "--run.dir", str(folder), *words]))
    return read(folder)


def test_a_page_with_ranks_swaps_and_a_map(planted, tmp_path, monkeypatch, capsys):
    records = trained(planted, tmp_path / "r", "--graph.num_partitions", "3")
    monkeypatch.setattr(sys, "argv", ["puna", "report", str(tmp_path / "r")])
    with pytest.raises(SystemExit):
        cli.main()
    text = Path(capsys.readouterr().out.strip()).read_text()
    page = Page(text)
    assert all(title in page.text for title in ("Held-out ranks", "Swaps", "Map of the nodes"))
    assert "could not be drawn" not in page.text
    scored = [event["mrr"] for event in records.of("eval") if "mrr" in event]
    assert len(scored) >= 4
    assert f"MRR: {scored[-1]:.4g}" in text.replace("&#x27;", "'")
    assert "partitions read: " in swaps(records)
    drawn = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="3"><title>(n\d+)</title>', nodes(records))
    assert sorted(name for *_, name in drawn) == sorted(planted.names())
    assert "60 of 60 nodes" in nodes(records)


def test_what_is_not_there_is_said(planted, tmp_path):
    records = trained(planted, tmp_path / "r", "--eval.every", "0", "--eval.tokens", "0")
    assert "One partition: nothing is swapped." in swaps(records)
    assert "No held-out edge was ranked" in ranks(records)
    shutil.rmtree(tmp_path / "r" / "checkpoints")
    assert "There is no checkpoint yet." in nodes(records)


def test_the_map_keeps_what_differs_most():
    """Two groups of directions in 20 dimensions come to lie apart along the first axis, whatever their lengths."""
    rng = np.random.default_rng(0)
    centres = np.eye(20)[[0] * 50 + [1] * 50]
    vectors = (centres + 0.05 * rng.normal(size=(100, 20))) * rng.uniform(0.1, 10, size=(100, 1))
    places, shares = project(vectors.astype("f4"))
    first, second = places[:50, 0], places[50:, 0]
    assert max(first.min(), second.min()) > min(first.max(), second.max())
    assert shares[0] > 0.8 > 0.2 > shares[1]
    np.testing.assert_allclose(project(vectors[:, :1].astype("f4"))[0][:, 1], 0, atol=1e-6)


def test_the_map_samples_types_in_proportion():
    assert len(sample(60, 60)) == 60
    assert [len(sample(count, 100_000)) for count in (3, 10_000, 89_997)] == [1, 90, 810]
    chosen = sample(10_000, 100_000)
    assert (chosen[0], chosen[-1]) == (0, 9_999)
