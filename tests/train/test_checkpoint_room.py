"""A disk that is full, found out beforehand or half-way: older checkpoints stay, and the words say what to do."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from torch.distributed.checkpoint.filesystem import FileSystem

from puna.errors import CheckpointError, DiskFull
from puna.train import checkpoint, disk
from puna.train.config import CheckpointConfig, EvalConfig, LoopConfig, RunConfig, ScheduleConfig, TrainConfig
from puna.train.loop import Run
from puna.train.manifest import complete_steps, incomplete
from puna.train.metrics import read_events
from puna.train.task import Cursor, State, Tensors

GIB = 2**30


def state(numbers: int, fill: float = 1.0) -> State:
    return {"weights": Tensors(lambda: {"a": torch.full((numbers,), fill)})}


@contextmanager
def no_room(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Data files are on a device that is always full."""
    real = FileSystem.create_stream

    def full(self: FileSystem, path: Path, mode: str) -> Any:
        return real(self, "/dev/full" if path.suffix == ".distcp" else path, mode)

    with monkeypatch.context() as patch:
        patch.setattr(FileSystem, "create_stream", full)
        yield


@contextmanager
def small_files(num_bytes: int) -> Iterator[None]:
    """No file grows beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("numbers", [4, 1 << 18])
def test_a_disk_that_is_full_half_way(numbers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, state(numbers), Cursor(1, 1), 1)
    words = r"the checkpoint of step 2 could not be written: rank 0: OSError: \[Errno 28\] No space left on device"
    with no_room(monkeypatch), pytest.raises(DiskFull, match=words):
        checkpoint.save(tmp_path, state(numbers, 2.0), Cursor(2, 2), 1)
    assert complete_steps(tmp_path) == [1]
    assert not incomplete(tmp_path)
    checkpoint.verify(tmp_path)
    checkpoint.save(tmp_path, state(numbers, 2.0), Cursor(2, 2), 1)
    assert complete_steps(tmp_path) == [2]


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    with small_files(1 << 16), pytest.raises(DiskFull, match=r"rank 0: OSError: \[Errno 27\] File too large"):
        checkpoint.save(tmp_path, state(1 << 16), Cursor(2, 2), 1)
    assert not incomplete(tmp_path)


def test_a_manifest_for_which_there_is_no_room(tmp_path: Path) -> None:
    """The data files fit, the manifest does not."""
    checkpoint.save(tmp_path, state(4), Cursor(1, 1), 1)
    many: State = {"weights": Tensors(lambda: {f"a{i:04d}": torch.ones(()) for i in range(9)})}
    sizes = [path.stat().st_size for path in (tmp_path / "checkpoints").rglob("*.distcp")]
    with small_files(12 * sizes[0]):
        checkpoint.save(tmp_path, many, Cursor(2, 2), 2)
    long = {"text": "x" * 20 * sizes[0]}
    snapshot = checkpoint.take_snapshot(many, Cursor(3, 3))
    snapshot.json.update(long)
    with small_files(12 * sizes[0]), pytest.raises(DiskFull, match="the checkpoint of step 3 could not be written"):
        checkpoint.write(tmp_path, snapshot, CheckpointConfig())
    assert complete_steps(tmp_path) == [1, 2]
    assert not incomplete(tmp_path)


def test_what_is_needed_is_known_before(tmp_path: Path) -> None:
    task = toys.Regression(2)
    needed = checkpoint.needed_bytes(task.state())
    taken = checkpoint.save(tmp_path, task.state(), Cursor(1, 1), 1).num_bytes
    assert taken < needed < taken + 2 * checkpoint.INDEX_BYTES
    large = state(10_000_000)
    assert checkpoint.needed_bytes(large) == pytest.approx(4e7, rel=0.03)


def loop(run: Path, every: int = 2, units: int = 6) -> Run:
    config = LoopConfig(
        run=RunConfig(tensorboard=False, device="cpu"),
        checkpoint=CheckpointConfig(every=every, keep=1),
        eval=EvalConfig(tokens=0),
    )
    return Run(toys.Regression(units), run, config)


def test_a_checkpoint_without_room_is_left_out_with_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    frees = iter([GIB, 1000, GIB])
    monkeypatch.setattr(disk, "free_bytes", lambda folder: next(frees))
    loop(tmp_path).go()
    (left_out,) = [event for event in read_events(tmp_path) if event["event"] == "checkpoint_left_out"]
    words = f"no room for the checkpoint of step 4: it needs 1.1 MiB and the disk of {tmp_path} has 0.0 MiB free. "
    assert left_out["step"] == 4
    assert left_out["reason"].startswith(words)
    assert f"WARNING: {words}" in capsys.readouterr().err
    assert complete_steps(tmp_path) == [6]


def test_the_last_checkpoint_without_room_is_an_error_and_the_one_before_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frees = iter([GIB, GIB, 1000, 1000])
    monkeypatch.setattr(disk, "free_bytes", lambda folder: next(frees))
    with pytest.raises(DiskFull, match="no room for the checkpoint of step 6") as caught:
        loop(tmp_path).go()
    assert caught.value.exit_code == 2
    assert complete_steps(tmp_path) == [4]
    stop = read_events(tmp_path)[-1]
    assert (stop["event"], stop["error"]) == ("stop", "DiskFull")
    monkeypatch.setattr(disk, "free_bytes", lambda folder: GIB)
    loop(tmp_path).go()
    assert complete_steps(tmp_path) == [6]


def test_another_failure_is_no_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*words: Any) -> None:
        raise PermissionError(13, "Permission denied", "manifest.json")

    monkeypatch.setattr(checkpoint, "_commit", denied)
    with pytest.raises(CheckpointError, match=r"rank 0: PermissionError: .*'manifest\.json'. Mend that") as caught:
        checkpoint.save(tmp_path, state(4), Cursor(2, 2), 1)
    assert not isinstance(caught.value, DiskFull)
    assert not incomplete(tmp_path)


# --- before a run starts


def require(run: Path, num_there: int = 0, **settings: Any) -> None:
    train = TrainConfig(tokens=1000 * 1024, batch_tokens=1024, seq_len=128)
    disk.require_plan(run, CheckpointConfig(**settings), train, ScheduleConfig(), GIB // 12, num_there)


@pytest.mark.parametrize(
    ("settings", "num_there", "held"),
    [
        ({}, 0, 3),
        ({"keep": 1}, 0, 2),
        ({"keep": 1, "initial": True, "keep_best": True}, 0, 4),
        ({"keep": 1, "keep_every": 200}, 0, 7),
        ({"keep": 5}, 3, 3),
        ({"keep": 1}, 9, 1),
        ({"keep": 9, "every": 600}, 0, 2),
    ],
)
def test_what_a_run_will_hold_must_fit(
    settings: dict[str, Any], num_there: int, held: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = GIB // 12 * 12
    monkeypatch.setattr(disk, "free_bytes", lambda folder: held * each)
    require(tmp_path, num_there, **settings)
    monkeypatch.setattr(disk, "free_bytes", lambda folder: held * each - 1)
    with pytest.raises(DiskFull, match=rf"do not fit: {held} of 1,024.0 MiB.*checkpoint\.keep"):
        require(tmp_path, num_there, **settings)


def test_the_words_of_a_plan_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda folder: GIB // 2)
    with pytest.raises(DiskFull) as caught:
        require(tmp_path / "run", num_there=1)
    assert str(caught.value) == (
        f"the checkpoints of {tmp_path / 'run'} do not fit: 2 of 1,024.0 MiB beside the 1 that are there need "
        "2.00 GiB, and the disk has 512.0 MiB free. Free 1.50 GiB there, choose another disk with --run.dir,"
        " or keep fewer (checkpoint.keep, checkpoint.keep_every; one more is there while it is written)."
    )


def test_averages_and_ramps_are_counted() -> None:
    train = TrainConfig(tokens=1000 * 1024, batch_tokens=2048, seq_len=128)
    assert disk.checkpoint_bytes(train, ScheduleConfig(), 10) == 120
    assert disk.checkpoint_bytes(train, ScheduleConfig(average="ema"), 10) == 160
    ramp = ScheduleConfig(batch_stages=((1024, 1024),))
    assert disk.num_held(CheckpointConfig(keep=1, keep_every=500), train, ramp) == 2 + 2


def test_free_bytes_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert disk.free_bytes(tmp_path / "a" / "b") == disk.free_bytes(tmp_path) > 0
