"""Ranks that do not run the same thing are named, with what differs; ranks that do are left alone."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from puna.errors import RanksDiffer
from puna.train import divergence, mesh
from puna.train.divergence import FirstSteps, checksum, checksums, code_version
from puna.train.task import Cursor, Json, Tensors


def refused(act: Any, *words: Any) -> str:
    try:
        act(*words)
    except RanksDiffer as error:
        return str(error)
    return ""


def same_facts(folder: str, odd: int) -> str:
    facts = {"train.lr": 0.1 if mesh.rank() == odd else 0.3, "train.tokens": 9}
    if mesh.rank() == odd:
        facts["model.dim"] = 64
    return refused(divergence.require_same, Path(folder), facts, "at the start")


def test_another_recipe(ranks: Any, tmp_path: Path) -> None:
    assert ranks(same_facts, str(tmp_path), 9) == [""] * 4
    assert not (tmp_path / "hang.txt").exists()
    told = ranks(same_facts, str(tmp_path), 2)
    assert len(set(told)) == 1
    assert "the ranks differ at the start: rank 2 (trainer, process " in told[0]
    assert "model.dim is 64, and 'nothing' on ranks 0, 1, 3" in told[0]
    assert "train.lr is 0.1, and 0.3 on ranks 0, 1, 3" in told[0]
    assert "train.tokens" not in told[0]
    page = (tmp_path / "hang.txt").read_text(encoding="utf-8")
    assert "The ranks do not run the same thing, at the start:" in page
    assert "rank 3: trainer, process " in page


def samples(folder: str, odd: int) -> str:
    mine = [10 * mesh.rank(), 10 * mesh.rank() + 1]
    if mesh.rank() == odd:
        mine = [7, 1]
    return refused(divergence.require_disjoint, Path(folder), mine, "before step 3")


def test_samples_that_two_ranks_were_dealt(ranks: Any, tmp_path: Path) -> None:
    assert ranks(samples, str(tmp_path), 9) == [""] * 4
    told = ranks(samples, str(tmp_path), 3)
    assert "before step 3: rank 3 (" in told[0]
    assert "1 of its 2 samples are another rank's: sample 1 is also rank 0's" in told[0]


def too_few(folder: str) -> str:
    return refused(divergence.require_disjoint, Path(folder), range(mesh.rank() == 1, 1), "before step 1")


def test_a_rank_with_fewer_samples(ranks: Any, tmp_path: Path) -> None:
    told = ranks(too_few, str(tmp_path))
    assert "rank 1 (" in told[0]
    assert "it was dealt 0 samples, most ranks 1" in told[0]


def replicas(folder: str, kind: str) -> str:
    """Hybrid: ranks 0 and 2, and 1 and 3, hold the same half of `cut`; every rank holds `whole` and `count`."""
    devices = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
    half = torch.arange(4.0) + 4 * (mesh.rank() % 2)
    whole, count = torch.ones(3), 5
    if mesh.rank() == 2:
        half[1] += 1e-6 * (kind == "cut")
        whole[0] = 1 + 1e-6 * (kind == "whole")
        count += kind == "count"
    cut = DTensor.from_local(half, devices, [Replicate(), Shard(0)], run_check=False)
    tensors = {"cut": cut, "whole": whole}
    state = {"model": Tensors(lambda: tensors), "count": Json(lambda: count, lambda value: None)}
    return refused(divergence.require_replicas, Path(folder), state, "before step 1")


def test_replicas_are_compared_bit_for_bit_and_pieces_are_not(ranks: Any, tmp_path: Path) -> None:
    assert ranks(replicas, str(tmp_path), "") == [""] * 4
    # Of two halves there are two copies each, so that the first holder counts; of the others there are four.
    for kind, name in (("cut", "model.cut"), ("whole", "model.whole"), ("count", "count")):
        told = ranks(replicas, str(tmp_path), kind)
        assert f"{name} has other bits than on the ranks that hold a copy of it" in told[0]
        assert "rank 2 (" in told[0]
        assert told[0].count("has other bits") == 1


def test_a_checksum_sees_every_bit_and_every_place() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool):
        tensor = torch.arange(7).to(dtype)
        assert checksum(tensor) == checksum(tensor.clone())
        assert checksum(tensor) != checksum(tensor.flip(0)), dtype
    tensor = torch.randn(3, 5)
    other = tensor.clone()
    other[1, 2] = torch.nextafter(other[1, 2], torch.tensor(9.0))
    assert checksum(tensor) != checksum(other)
    assert checksum(torch.zeros(4)) != checksum(-torch.zeros(4))
    assert checksum(tensor.t()) == checksum(tensor.t().contiguous())
    assert checksum(torch.empty(0)) == 0
    assert checksum(torch.tensor(2.0)) != 0


def test_a_checksum_does_not_depend_on_its_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(1000)
    whole = checksum(tensor)
    monkeypatch.setattr(divergence, "PIECE", 7)
    assert checksum(tensor) == whole


def test_checksums_cover_the_whole_state_of_a_task() -> None:
    task = toys.Regression()
    (held,) = checksums(task.state()).values()
    assert {"model.0.weight", "optim.adamw.model.0.weight.exp_avg", "average.count"} <= held.keys()


def steps(folder: str, fault: str) -> str:
    task = toys.Regression(6, sharded=False)
    if mesh.rank() == 1 and fault == "weights":
        with torch.no_grad():
            task.modules["model"][0].weight[0, 0] += 1e-3
    if mesh.rank() == 1 and fault == "data":
        mine = task.units
        task.units = lambda cursor: mine(Cursor(cursor.units, cursor.tokens + 4))
    checks = FirstSteps(Path(folder), task)
    return refused(lambda: [checks.check(unit.cursor, unit) for unit in task.units(Cursor())])


def test_the_first_steps_of_a_task(ranks: Any, tmp_path: Path) -> None:
    assert ranks(steps, str(tmp_path), "") == [""] * 4
    assert "rank 1 (" in (told := ranks(steps, str(tmp_path), "weights")[0])
    assert "before step 1" in told
    assert "model.0.weight has other bits" in told
    assert "tokens done is 4, and 0 on ranks 0, 2, 3" in ranks(steps, str(tmp_path), "data")[0]


def cost(folder: str) -> float:
    task = toys.Regression(5)
    checks = FirstSteps(Path(folder), task)
    units = list(task.units(Cursor()))
    for unit in units[: divergence.STEPS_CHECKED]:
        checks.check(unit.cursor, unit)
    began = time.perf_counter()
    for _ in range(1000):
        checks.check(units[4].cursor, units[4])
    return (time.perf_counter() - began) / 1000


def test_later_steps_pay_nothing(ranks: Any, tmp_path: Path) -> None:
    assert max(ranks(cost, str(tmp_path))) < 5e-6


def test_the_code_is_known_by_its_files() -> None:
    version = code_version()
    assert version == code_version()
    assert version["torch"] == torch.__version__
    assert len(version["puna's files"]) == 16
