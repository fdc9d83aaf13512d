"""One process group of four for every distributed test of the room, one of two; one thread a process."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from ranks import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Four processes, one process group: `ranks(function, *arguments)` gives the results by rank."""
    pool = Ranks(tmp_path_factory.mktemp("ranks"), 4)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Two processes, one process group; used as `ranks` is."""
    pool = Ranks(tmp_path_factory.mktemp("pair"), 2)
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
