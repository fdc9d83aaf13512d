"""Three toy tasks under the one loop, killed and resumed: the path they would have taken, and nothing left over."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))

import toys
from processes import finish, start

from puna.errors import RankFailed, RunLocked
from puna.train import checkpoint
from puna.train.launch import launch
from puna.train.metrics import last_steps, read_events

KINDS = ("regression", "table", "phases")
KILLED = -signal.SIGKILL


def train(kind: str, run: Path, *words: str, size: int = 1) -> list[int | None]:
    return finish(start(toys.train, kind, str(run), *words, size=size, folder=run.parent))


def losses(run: Path) -> list[float]:
    steps = last_steps(read_events(run))
    assert list(steps) == list(range(1, len(steps) + 1))
    return [steps[step]["loss"] for step in steps]


def final(run: Path) -> dict[str, Any]:
    """Everything that the newest checkpoint holds."""
    manifest = checkpoint.read_manifest(run)
    tensors = {key: torch.full(shape, torch.nan) for key, shape in manifest.tensors.items()}
    if tensors:
        folder = run / "checkpoints" / f"step-{manifest.cursor.units:08d}" / "tensors"
        with pytest.warns(UserWarning, match="single process"):
            dcp.load(tensors, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    named = [(name, entry["file"]) for name, table in manifest.rows.items() for entry in table.values()]
    rows = {file.split(".")[0]: torch.from_numpy(np.load(run / "rows" / name / file)) for name, file in named}
    return tensors | rows | manifest.json


def assert_same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    """Uninterrupted runs, by task and number of processes; made as they are asked for."""

    class Runs(dict[tuple[str, int], Path]):
        def __missing__(self, key: tuple[str, int]) -> Path:
            kind, size = key
            run = tmp_path_factory.mktemp(f"{kind}-{size}") / "run"
            assert train(kind, run, size=size) == [0] * size
            self[key] = run
            return run

    return Runs()


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_takes_the_same_path(kind: str, straight: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (2, 4, 1, 6):  # counted from where each attempt resumes; steps since the last checkpoint are done again
        assert train(kind, run, "12", "2", f"step:{step}:0") == [KILLED]
    assert train(kind, run) == [0]
    assert [event["step"] for event in read_events(run) if event["event"] == "resume"] == [2, 2, 6]
    assert losses(run) == losses(straight[kind, 1])
    assert_same(final(run), final(straight[kind, 1]))
    assert checkpoint.complete_steps(run) == [10, 12]


@pytest.mark.parametrize("kind", ["regression", "table"])
@pytest.mark.parametrize("where", ["fsync", "replace", "replace-after"])
def test_a_kill_at_any_write_leaves_a_readable_run(kind: str, where: str, straight: Any, tmp_path: Path) -> None:
    """Kill at the first write, then the second, ... of every attempt: data files, folders, manifest, row partitions."""
    run = tmp_path / "run"
    for when in range(1, 60):
        (code,) = train(kind, run, "6", "2", f"{where}:{when}:0")
        for step in checkpoint.complete_steps(run):
            checkpoint.verify(run, step)
        if code == 0:
            break
        assert code == KILLED
    assert code == 0
    assert when > 2
    assert losses(run) == losses(straight[kind, 1])[:6]
    assert not checkpoint.incomplete(run)
    if kind == "table":
        named = {entry["file"] for step in (4, 6) for entry in table_of(run, step).values()}
        assert {path.name for path in (run / "rows" / "entities").iterdir()} == named


def table_of(run: Path, step: int) -> dict[str, dict[str, Any]]:
    return checkpoint.read_manifest(run, step).rows["entities"]


@pytest.mark.parametrize(
    ("num_kills", "kinds"),
    [(5, ("regression",)), pytest.param(20, ("regression", "phases"), marks=pytest.mark.slow)],
)
def test_random_kills(num_kills: int, kinds: tuple[str, ...], straight: Any, tmp_path: Path) -> None:
    """At random times, of all ranks or of one, in two processes."""
    dice = random.Random(6)
    for kind in kinds:
        run = tmp_path / kind
        for _ in range(num_kills):
            processes = start(toys.train, kind, str(run), "12", "1", "", "0.02", size=2, folder=tmp_path)
            time.sleep(dice.uniform(0.3, 1.2))
            victims = processes if dice.random() < 0.5 else [dice.choice(processes)]
            for process in victims:
                process.kill()
            finish(processes, seconds=10)
        assert train(kind, run, size=2) == [0, 0]
        assert losses(run) == losses(straight[kind, 2])
        assert_same(final(run), final(straight[kind, 2]))


def test_a_rank_that_dies_is_named_and_takes_the_others_with_it(
    straight: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(toys.__file__).parent))
    run = tmp_path / "run"
    with pytest.raises(RankFailed, match=r"rank 1 was killed by SIGKILL; the other ranks were stopped.*rank-1\.log"):
        launch("toys:train", ["regression", str(run), "12", "2", "step:5:1"], 2, run)
    left = subprocess.run(["pgrep", "-f", str(run)], capture_output=True, text=True, check=False)
    assert not left.stdout, "a worker was left over"
    launch("toys:train", ["regression", str(run)], 2, run)
    assert losses(run) == losses(straight["regression", 2])
    assert "step 5" in (run / "logs" / "rank-0.log").read_text()


@pytest.mark.parametrize("size", [1, 2])
def test_sigterm_saves_and_exits_with_4(size: int, straight: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    processes = start(toys.train, "regression", str(run), "12", "100", "", "0.1", size=size, folder=tmp_path)
    while len(last_steps(read_events(run))) < 3:
        time.sleep(0.01)
    processes[-1].terminate()  # one rank is told; all of them agree
    assert finish(processes) == [4] * size
    stop = read_events(run)[-1]
    assert stop["error"] == "Unfinished"
    assert "stopped by a signal" in stop["reason"]
    assert checkpoint.complete_steps(run) == [stop["step"]]
    assert train("regression", run, size=size) == [0] * size
    assert losses(run) == losses(straight["regression", size])
    assert len([event for event in read_events(run) if event["event"] == "step"]) == 12, "no step was done twice"


def test_a_second_signal_exits_at_once(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (process,) = start(toys.train, "regression", str(run), "12", "100", "", "3")
    while not any(event["event"] == "start" for event in read_events(run)):
        time.sleep(0.01)
    time.sleep(0.5)
    process.terminate()
    time.sleep(0.1)
    began = time.monotonic()
    process.terminate()
    assert finish([process]) == [128 + signal.SIGTERM]
    assert time.monotonic() - began < 1.5


def test_a_run_directory_in_use_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (process,) = start(toys.train, "regression", str(run), "12", "100", "", "1")
    while not (run / "events.jsonl").is_file():
        time.sleep(0.01)
    with pytest.raises(RunLocked, match=rf"{run} is in use by process {process.pid} on .*choose another folder"):
        toys.train("regression", str(run))
    process.kill()
    finish([process])
    toys.train("regression", str(run))
    assert len(losses(run)) == 12


@pytest.mark.parametrize("size", [1, 4])
def test_two_processes_become_one_or_four(size: int, straight: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train("plain", run, "6", size=2) == [0, 0]
    assert train("plain", run, size=size) == [0] * size
    resumed = next(event for event in read_events(run) if event["event"] == "resume")
    assert (resumed["step"], resumed["saved_world_size"], resumed["world_size"]) == (6, 2, size)
    torch.testing.assert_close(losses(run), losses(straight["plain", 2]), rtol=1e-5, atol=0)
    torch.testing.assert_close(final(run), final(straight["plain", 2]), rtol=1e-5, atol=1e-7)
