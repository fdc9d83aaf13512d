"""FSDP counted once for every test of the room, in processes that start quickly."""

import json
from typing import Any

import pytest
from processes import finish, start

from puna.lab.fsdp import work


@pytest.fixture(scope="session", params=[2, 4], ids=["2 processes", "4 processes"])
def counted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What rank 0 wrote for this number of processes, its rows by case."""
    folder = tmp_path_factory.mktemp("lab")
    out = folder / "result.json"
    codes = finish(start(work, str(out), "1", size=request.param, folder=folder))
    assert codes == [0] * request.param
    result = json.loads(out.read_text())
    return {**result, "rows": {row["case"]: row for row in result["rows"]}}
