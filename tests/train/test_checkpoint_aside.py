"""Saving in the background: the state of its step, whatever training does meanwhile; no failure is lost."""

import errno
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import toys
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.fsdp import fully_shard

from puna.errors import CheckpointError, NonFinite
from puna.train import checkpoint, mesh
from puna.train.config import CheckpointConfig, EvalConfig, LoopConfig, MeshConfig, RunConfig
from puna.train.loop import Run
from puna.train.manifest import complete_steps, incomplete
from puna.train.metrics import Recorder, read_events
from puna.train.rows import RowStore
from puna.train.saver import Saver
from puna.train.task import Cursor, Json, Rows, State, StepReport, Tensors

ASIDE = CheckpointConfig(every=2, asynchronous=True)


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one."""
    with mesh.open_mesh(RunConfig(device="cpu"), MeshConfig()):
        yield


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Writing waits until it is set."""
    gate, real = threading.Event(), checkpoint.write

    def waiting(*words: Any) -> checkpoint.Manifest:
        assert gate.wait(10)
        return real(*words)

    monkeypatch.setattr(checkpoint, "write", waiting)
    yield gate
    gate.set()


@pytest.fixture
def slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing takes a while."""
    real = checkpoint.write

    def waiting(*words: Any) -> checkpoint.Manifest:
        time.sleep(0.2)
        return real(*words)

    monkeypatch.setattr(checkpoint, "write", waiting)


@contextmanager
def saver(run: Path, config: CheckpointConfig = ASIDE) -> Iterator[Saver]:
    with Recorder(run, speaks=mesh.rank() == 0) as record, Saver(run, config, record) as made:
        yield made


class Things:
    """One of each kind of state."""

    def __init__(self, run: Path, fill: float) -> None:
        self.tensor, self.table, self.store = torch.full((3, 2), fill), {"list": [fill]}, RowStore(run, "users")
        self.store.write("0", np.full((2, 2), fill))

    def state(self) -> State:
        json = Json(lambda: self.table, lambda table: setattr(self, "table", table))
        return {"weights": Tensors(lambda: {"a": self.tensor}), "users": Rows(self.store), "table": json}

    def change(self, fill: float) -> None:
        self.tensor.fill_(fill)
        self.table["list"].append(fill)
        self.store.write("0", np.full((2, 2), fill))


def events_of(run: Path, *kinds: str) -> list[dict[str, Any]]:
    return [event for event in read_events(run) if event["event"] in kinds]


@pytest.mark.usefixtures("alone")
def test_what_is_saved_is_the_state_of_the_step(tmp_path: Path, gate: threading.Event) -> None:
    things = Things(tmp_path, 1.0)
    with saver(tmp_path) as saving:
        saving.save(things.state(), Cursor(2, 20))
        things.change(9.0)
        (things.store.folder / "1.00000001.npy.tmp").write_bytes(b"being written")
        assert not complete_steps(tmp_path)
        gate.set()
        saving.wait()
        assert saving.step == 2
    assert sorted(things.store.files()) == ["0.00000001.npy", "0.00000002.npy", "1.00000001.npy.tmp"], "none is swept"
    found = Things(tmp_path / "other", 0.0)
    found.store = RowStore(tmp_path, "users")
    checkpoint.load(tmp_path, found.state())
    assert (found.tensor == 1).all()
    assert found.table == {"list": [1.0]}
    assert (found.store.read("0") == 1).all()
    (event,) = events_of(tmp_path, "checkpoint")
    assert event["step"] == 2
    assert event["held_s"] <= event["seconds"]


@pytest.mark.usefixtures("alone")
def test_a_second_save_waits_for_the_first(tmp_path: Path, gate: threading.Event) -> None:
    things = Things(tmp_path, 1.0)
    with saver(tmp_path) as saving:
        saving.save(things.state(), Cursor(2, 20))
        threading.Timer(0.2, gate.set).start()
        began = time.monotonic()
        saving.save(things.state(), Cursor(4, 40))
        assert time.monotonic() - began > 0.15
        assert complete_steps(tmp_path)[0] == 2
    assert complete_steps(tmp_path) == [2, 4], "leaving waits too"


@pytest.mark.usefixtures("alone")
def test_the_last_save_is_on_disk_when_it_returns(tmp_path: Path) -> None:
    things = Things(tmp_path, 1.0)
    with saver(tmp_path) as saving:
        saving.save(things.state(), Cursor(2, 20))
        saving.save(things.state(), Cursor(3, 30), last=True)
        assert complete_steps(tmp_path) == [2, 3]
        saving.save(things.state(), Cursor(3, 30), last=True)
    assert [event["step"] for event in events_of(tmp_path, "checkpoint")] == [2, 3], "once is enough"


class Counting(toys.Regression):
    """Every step waits a moment, until the checkpoint under way has been seen or not."""

    def step(self, unit: toys.Unit) -> StepReport:
        time.sleep(0.02)
        return super().step(unit)


def loop(run: Path, task: toys.Regression, config: CheckpointConfig = ASIDE) -> Run:
    return Run(
        task,
        run,
        LoopConfig(run=RunConfig(tensorboard=False, device="cpu"), checkpoint=config, eval=EvalConfig(tokens=0)),
    )


@pytest.mark.usefixtures("alone", "slowly")
def test_steps_are_done_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    loop(tmp_path, Counting(6)).go()
    steps = [event["step"] for event in read_events(tmp_path) if event["event"] in ("step", "checkpoint")]
    assert steps[:4] == [1, 2, 3, 4], "step 3 does not wait for the checkpoint of step 2, but that of step 4 does"
    assert events_of(tmp_path, "checkpoint")[0]["held_s"] < 0.1 < events_of(tmp_path, "checkpoint")[0]["seconds"]
    assert complete_steps(tmp_path) == [4, 6]


@pytest.mark.usefixtures("alone")
def test_a_checkpoint_is_told_of_once_it_is_written(tmp_path: Path) -> None:
    loop(tmp_path, Counting(9), CheckpointConfig(every=5, asynchronous=True)).go()
    told = [event["step"] for event in read_events(tmp_path) if event["event"] in ("step", "checkpoint")]
    assert told.index(5, told.index(5) + 1) < told.index(9), "not only at the next save"


@pytest.mark.usefixtures("alone")
def test_the_trajectory_is_the_same(tmp_path: Path) -> None:
    ends = []
    for name, config in (("at once", CheckpointConfig(every=2)), ("aside", ASIDE)):
        task = toys.Regression(9)
        loop(tmp_path / name, task, config).go()
        state = {key: item.get() for key, item in task.state().items() if isinstance(item, Tensors)}
        ends.append(([event["loss"] for event in events_of(tmp_path / name, "step")], state))
        checkpoint.load(tmp_path / name, toys.Regression(9).state())
    assert ends[0][0] == ends[1][0]
    torch.testing.assert_close(ends[0][1], ends[1][1], rtol=0, atol=0)


class Diverging(toys.Regression):
    def loss_sum(self, batch: toys.Batch) -> torch.Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().loss_sum(batch) * (torch.nan if self.calls == 6 else 1.0)


@pytest.mark.usefixtures("alone", "slowly")
def test_a_run_that_fails_finishes_the_save_under_way(tmp_path: Path) -> None:
    with pytest.raises(NonFinite):
        loop(tmp_path, Diverging(9)).go()
    assert complete_steps(tmp_path) == [2]
    assert [event["event"] for event in read_events(tmp_path)][-2:] == ["checkpoint", "stop"]


def broken(number: int, rank: int) -> Any:
    """DCP's way to open a file, which fails on one rank, once."""
    calls, real = [], FileSystem.create_stream

    def act(*words: Any) -> Any:
        calls.append(1)
        if mesh.rank() == rank and len(calls) == 1:
            raise OSError(number, "no such luck")
        return real(*words)

    return act


def fail_on_a_rank(run: str, number: int, aside: bool) -> tuple[str, int, list[int]]:
    """What a run says whose third rank cannot write its first checkpoint; where it ends; the checkpoints."""
    config = CheckpointConfig(every=2, asynchronous=aside)
    task = Counting(12)
    made = loop(Path(run), task, config)
    with mock.patch.object(FileSystem, "create_stream", broken(number, 2)):
        try:
            made.go()
        except CheckpointError as error:
            return str(error), made.cursor.units, complete_steps(Path(run))
    return "done", made.cursor.units, complete_steps(Path(run))


@pytest.mark.parametrize("aside", [False, True])
def test_a_rank_that_cannot_write_ends_the_run_on_all_ranks_by_name(aside: bool, tmp_path: Path, ranks: Any) -> None:
    told = ranks(fail_on_a_rank, str(tmp_path), errno.EIO, aside)
    said, step, steps = told[0]
    assert told == [told[0]] * 4
    assert said.startswith("the checkpoint of step 2 could not be written: rank 2: OSError: [Errno 5] no such luck. ")
    assert 2 <= step <= 4
    assert steps == []
    assert not incomplete(tmp_path), "what was written is gone"
    assert read_events(tmp_path)[-1]["error"] == "CheckpointError"


@pytest.mark.parametrize("aside", [False, True])
def test_a_rank_without_room_leaves_the_checkpoint_out_and_training_goes_on(
    aside: bool, tmp_path: Path, ranks: Any
) -> None:
    told = ranks(fail_on_a_rank, str(tmp_path), errno.ENOSPC, aside)
    assert told == [("done", 12, [10, 12])] * 4
    (event,) = events_of(tmp_path, "checkpoint_left_out")
    assert event["step"] == 2
    assert "rank 2: OSError: [Errno 28] no such luck" in event["reason"]


def save_shards_aside(run: str) -> None:
    """Shards that divide unevenly, changed in place while they are written."""
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 7)
    wanted = {name: p.detach().clone() for name, p in model.named_parameters()}
    fully_shard(model)
    with saver(Path(run)) as saving:
        saving.save({"model": Tensors(lambda: dict(model.named_parameters()))}, Cursor(4, 4))
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
    assert saving.step == 4
    checkpoint.load(Path(run), {"model": Tensors(lambda: dict(model.named_parameters()))})
    for name, p in model.named_parameters():
        assert torch.equal(p.full_tensor(), wanted[name])


def test_shards_are_saved_aside(tmp_path: Path, ranks: Any) -> None:
    ranks(save_shards_aside, str(tmp_path))
    assert checkpoint.verify(tmp_path).world_size == 4
