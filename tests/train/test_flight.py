"""The newest collectives of a process, as the flight recorder has them."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from puna.train import flight, mesh


def recorded() -> tuple[list[str], bool]:
    """What this rank made of an exchange, a gathering to rank 0 and a scattering from it, after each other."""
    mesh.barrier()
    before = flight.calls()[-1].number
    mesh.agree([1.0, 2.0])
    dist.gather_object(mesh.rank(), [None] * 4 if mesh.rank() == 0 else None)
    dist.scatter_object_list([None], list(range(4)) if mesh.rank() == 0 else None)
    pieces = torch.zeros(4)
    dist.all_to_all_single(pieces, torch.ones(4))
    deadline = time.monotonic() + 10
    while any(call.waits for call in flight.calls()):  # the end of a collective is noted a little later
        assert time.monotonic() < deadline
    newest = [call for call in flight.calls() if call.number > before]
    assert {call.group for call in newest} == {newest[0].group}
    assert [call.number for call in newest] == list(range(before + 1, before + 1 + len(newest)))
    return [call.what for call in newest], newest[0].group.startswith("default_pg")


def test_ranks_that_do_the_same_tell_the_same(ranks: Any) -> None:
    """Also where they put in other shapes, as the rank that gathers or scatters does."""
    (first, world), *others = ranks(recorded)
    assert world
    assert others == [(first, True)] * 3
    assert any(what.startswith("all_reduce Double[2]") for what in first)
    assert "scatter" in first


def test_the_environment_switches_it_on_and_the_user_may_not_want_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DUMP_ON_TIMEOUT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "7")
    flight.switch_on(tmp_path)
    assert os.environ["TORCH_FR_BUFFER_SIZE"] == "7"
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == str(tmp_path / "watch" / "nccl-rank-")
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
