"""FSDP counted once for every test of the room, in processes that start quickly."""

import json
from typing import Any

import pytest
from processes import finish, start

from puna.lab.fsdp import work

FIRST = ("full shard, last unit too", "full shard", "grad-op")
FEW = {
    2: (*FIRST, "full shard, no prefetch", "3 micro-steps, last reduced"),
    4: (*FIRST, "hybrid, last unit too", "hybrid grad-op", "3 micro-steps, last reduced, grad-op kept"),
}
ALL = [pytest.param((size, ()), marks=pytest.mark.slow, id=f"{size} processes, all cases") for size in FEW]


@pytest.fixture(scope="session", params=[*(pytest.param(few, id=f"{few[0]} processes") for few in FEW.items()), *ALL])
def counted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What rank 0 wrote for this number of processes, its rows by case."""
    folder = tmp_path_factory.mktemp("lab")
    out = folder / "result.json"
    size, names = request.param
    codes = finish(start(work, str(out), "1", *names, size=size, folder=folder), seconds=180)
    assert codes == [0] * size
    result = json.loads(out.read_text())
    return {**result, "rows": {row["case"]: row for row in result["rows"]}}
