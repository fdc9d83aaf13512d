"""Fixtures shared by every test."""

import os
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

COMPILING = ("tests/graph/", "tests/recsys/")
"""Rooms whose kernels are compiled on first use: one process compiles them, not several at once."""

LONG = (*COMPILING, "tests/system/", "tests/test_walk.py", "tests/train/test_health_shards.py", "tests/lab/")
"""Begun first, so that at the end no process is left with one of them while the others have nothing to do."""


class ByFile(LoadScopeScheduling):
    """Where tests run in several processes, those of a file stay together, and those of a compiling room."""

    def _split_scope(self, nodeid: str) -> str:
        return next((room for room in COMPILING if nodeid.startswith(room)), nodeid.split("::")[0])


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of real data sets; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("PUNA_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data folder at {folder}; set PUNA_TEST_DATA")
    return folder
