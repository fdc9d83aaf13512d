"""Fixtures shared by every test."""

import os
from pathlib import Path

import pytest

COMPILING = ("graph", "recsys")
"""Rooms whose kernels are compiled on first use: one process compiles them, not several at once."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where tests run in several processes, those of a file stay together, and those of a compiling room.

    First, because xdist's own hook reads the mark.
    """
    for item in items:
        place = item.path.relative_to(Path(__file__).parent)
        group = place.parts[0] if place.parts[0] in COMPILING else str(place)
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of real data sets; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("PUNA_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data folder at {folder}; set PUNA_TEST_DATA")
    return folder
