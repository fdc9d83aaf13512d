"""A small graph with two planted communities, imported; `puna` as typed."""

import sys

import numpy as np
import pytest

from puna import cli
from puna.graph.graph import Graph
from puna.graph.importing import import_graph

NUM_NODES = 60


@pytest.fixture(scope="session")
def planted(tmp_path_factory) -> Graph:
    """Two relations over two communities (even and odd nodes): `same` stays in one, `other` leads to the other."""
    folder = tmp_path_factory.mktemp("planted")
    rng = np.random.default_rng(0)
    lines = set()
    while len(lines) < 1400:
        h, t = rng.integers(NUM_NODES, size=2).tolist()
        lines.add(f"n{h}\t{'same' if h % 2 == t % 2 else 'other'}\tn{t}\n")
    lines = sorted(lines)
    rng.shuffle(lines)
    for name, part in (("train", lines[:1200]), ("valid", lines[1200:1300]), ("test", lines[1300:])):
        (folder / f"{name}.tsv").write_text("".join(part))
    import_graph({name: folder / f"{name}.tsv" for name in ("train", "valid", "test")}, folder / "graph")
    return Graph.open(folder / "graph")


@pytest.fixture
def puna(monkeypatch, capsys, tmp_path):
    """Runs a command in `tmp_path`, in this process: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["puna", *map(str, words)])
        try:
            cli.main()
            status = 0
        except SystemExit as left:
            status = left.code or 0
        return status, *capsys.readouterr()

    return run
