"""A pretraining run killed anywhere takes the path it would have taken; nothing unreadable, nobody left behind."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
from pretraining import command, losses, prepare, train, work
from processes import finish, start

from puna import resume
from puna.errors import DiskFull, RecipeError
from puna.train import checkpoint
from puna.train.metrics import read_events

STEPS = ("--train.tokens", "40960", "--checkpoint.every", "4", "--eval.tokens", "0")
NUM_STEPS = 40


@pytest.fixture(scope="module")
def straight(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of two processes that nobody disturbs."""
    run = tmp_path_factory.mktemp("straight") / "run"
    assert train(run, shards, *STEPS, size=2) == [0, 0]
    return losses(run)


def killed(run: Path, rng: random.Random) -> bool:
    """SIGKILL some or all ranks at a random instant, and see the others end; False where the run was done by then."""
    processes = start(work, str(run), size=2, folder=run.parent)
    deadline = time.monotonic() + 60
    before = len(read_events(run))
    patience = rng.choice(["steps", "checkpoint"])
    wanted = before + rng.randint(3, 12)
    while all(process.is_alive() for process in processes) and time.monotonic() < deadline:
        if patience == "steps" and len(read_events(run)) >= wanted:
            break
        if patience == "checkpoint" and len(read_events(run)) > before + 3 and checkpoint.incomplete(run):
            break
        time.sleep(0.001)
    pids = [process.pid for process in processes]
    victims = processes if rng.random() < 0.5 else [rng.choice(processes)]
    for process in victims:
        process.kill()
    codes = finish(processes, seconds=20)
    assert not any(pid and Path(f"/proc/{pid}").exists() for pid in pids)
    return codes != [0, 0]


def kill_and_resume(num_kills: int, seed: int, run: Path, shards: Path, straight: list[float]) -> None:
    """Every other attempt saves aside."""
    rng = random.Random(seed)
    prepare(run, shards, *STEPS, "--checkpoint.asynchronous", "true")
    kills = 0
    while kills < num_kills and killed(run, rng):
        kills += 1
        prepare(run, shards, *STEPS, "--checkpoint.asynchronous", str(kills % 2 == 0).lower())
        for step in checkpoint.complete_steps(run):
            checkpoint.verify(run, step)
    assert finish(start(work, str(run), size=2, folder=run.parent)) == [0, 0]
    assert kills
    assert losses(run) == straight


def test_five_kills(shards: Path, straight: list[float], tmp_path: Path) -> None:
    kill_and_resume(5, 1, tmp_path / "run", shards, straight)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 6))
def test_twenty_kills(seed: int, shards: Path, straight: list[float], tmp_path: Path) -> None:
    kill_and_resume(5, seed, tmp_path / "run", shards, straight)


@pytest.mark.parametrize("size", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_another_number_of_processes(size: int, shards: Path, straight: list[float], tmp_path: Path) -> None:
    """Saved by two processes, gone on with one or four: 1e-5 relative."""
    run = tmp_path / "run"
    processes = _stopped_half_way(run, shards)
    assert processes == [4, 4]
    assert train(run, shards, *STEPS, *(("--train.micro_batch", "2") if size == 4 else ()), size=size) == [0] * size
    resumed = next(event for event in read_events(run) if event["event"] == "resume")
    assert 0 < resumed["step"] < NUM_STEPS
    assert (resumed["saved_world_size"], resumed["world_size"]) == (2, size)
    assert losses(run) == pytest.approx(straight, rel=1e-5)


def test_a_command_that_is_stopped_ends_with_4_and_resume_goes_on(
    shards: Path, straight: list[float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`puna train`, SIGTERM, the folder moves; `puna resume` does what `puna resume --explain` says."""
    first, run = tmp_path / "first", tmp_path / "run"
    words = ("train", "tiny", "--run.dir", str(first), "--data.path", str(shards), *STEPS)
    (process,) = start(command, *words, "--train.micro_batch", "8")
    while sum(event["event"] == "step" for event in read_events(first)) < 6:
        assert process.is_alive()
        time.sleep(0.005)
    process.terminate()
    assert finish([process]) == [4]
    first.rename(run)
    told = resume.explain(run)
    assert told["cursor"]["step"] == read_events(run)[-1]["step"] >= 6
    assert set(told["restored"]) == {"model", "optim", "health", "health_sample"}
    assert told["redone"]["steps"] == 0
    assert "pass 1, " in told["data"]
    with pytest.raises(RecipeError, match=r"train.lr is 0.003 there, 1.0 here"):
        resume.explain(run, ["--train.lr", "1.0"])
    assert finish(start(command, "resume", str(run), "--json")) == [0]
    resumed = next(event for event in read_events(run) if event["event"] == "resume")
    assert resumed["step"] == told["cursor"]["step"]
    assert losses(run) == pytest.approx(straight, rel=1e-5)
    assert not first.exists()


def test_a_run_that_cannot_fit_is_refused_before_it_starts(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("puna.train.disk.free_bytes", lambda folder: 1_000_000)
    with pytest.raises(DiskFull, match=r"the checkpoints of .*run do not fit: 3 of 1\.8 MiB need 5\.4 MiB"):
        prepare(tmp_path / "run", shards, *STEPS)
    assert not (tmp_path / "run").exists()


def _stopped_half_way(run: Path, shards: Path) -> list[int | None]:
    """SIGTERM after some steps: state is saved and the status says that work is left."""
    prepare(run, shards, *STEPS)
    processes = start(work, str(run), size=2, folder=run.parent)
    while sum(event["event"] == "step" for event in read_events(run)) < 10:
        assert all(process.is_alive() for process in processes)
        time.sleep(0.005)
    for process in processes:
        os.kill(process.pid or 0, signal.SIGTERM)
    return finish(processes)
