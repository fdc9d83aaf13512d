"""Folders of two real drop-in runs: one whose first layers stall and then burst, one without trouble."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

from stalling import STALL, train


@pytest.fixture(scope="session")
def stalled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 steps; the embedding and the first two layers stall, and get their gradients back at step 101."""
    return train(tmp_path_factory.mktemp("health") / "stalled", 150, STALL)


@pytest.fixture(scope="session")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 steps without trouble."""
    return train(tmp_path_factory.mktemp("health") / "quiet", 60, range(0))
