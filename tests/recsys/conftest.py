"""Small clicks with a planted truth; four processes with one process group."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from ranks import Ranks

from puna.recsys.clicks import Clicks
from puna.recsys.generator import generate
from puna.recsys.wires import Block, make_wire

ROWS = (700, 3, 40, 300, 9)


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Clicks:
    """Five tables, four dense features, 8,192 samples to train on and 2,048 to test on."""
    folder = tmp_path_factory.mktemp("planted") / "clicks"
    generate(folder, samples=8192, test=2048, rows=ROWS, num_dense=4, spread=2.0, seed=1, num_threads=1)
    return Clicks.open(folder)


@pytest.fixture(scope="session")
def bagged(tmp_path_factory: pytest.TempPathFactory) -> Clicks:
    """The same with bags of up to five, three and two ids in three of the tables."""
    folder = tmp_path_factory.mktemp("bagged") / "clicks"
    words = {"hots": (5, 1, 3, 1, 2), "num_dense": 4, "spread": 2.0, "seed": 1, "num_threads": 1}
    generate(folder, samples=8192, test=2048, rows=ROWS, **words)
    return Clicks.open(folder)


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """`ranks(function, *arguments)` gives the results by rank."""
    pool = Ranks(tmp_path_factory.mktemp("ranks"), 4)
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def compiled() -> None:
    """The codec's kernels on disk, so that four processes do not compile them at once."""
    wire, block = make_wire("bounded"), Block(60, 4, 0.02, 0.02, 1)
    rows = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    for ids in (None, np.arange(60)):
        known = replace(block, ids=ids)
        wire.decode([known], wire.encode([known], [rows], True), [np.empty_like(rows)])
