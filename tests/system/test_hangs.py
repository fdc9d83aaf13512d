"""A run that hangs ends by itself within 30 seconds, and one page names the rank and what it did."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import faults
import pytest
from pretraining import losses, prepare, train
from processes import finish, start

from puna.errors import Hung, RankFailed, RanksDiffer
from puna.train.heartbeat import process_state
from puna.train.launch import launch
from puna.train.metrics import read_events

LINES_OF_A_PAGE = 80


def ends(run: Path, fault: str, *words: str, size: int = 4) -> tuple[list[int | None], str, float]:
    """Exit codes, the page, and the seconds from the last good step to the last rank's end."""
    processes = start(faults.work, str(run), fault, *words, size=size, folder=run.parent)
    while sum(event["event"] == "step" for event in read_events(run)) < faults.WHEN:
        assert processes[0].is_alive()
        time.sleep(0.02)
    began = time.monotonic()
    while not all(process.exitcode is not None or process_state(process.pid) == "T" for process in processes):
        assert time.monotonic() - began < 60
        time.sleep(0.02)
    seconds = time.monotonic() - began
    codes = finish(processes, seconds=0.1)
    page = (run / "hang.txt").read_text(encoding="utf-8")
    assert len(page.splitlines()) <= LINES_OF_A_PAGE
    return codes, page, seconds


def test_a_stopped_rank_is_named(tmp_path: Path) -> None:
    codes, page, seconds = ends(tmp_path / "run", "stop")
    assert seconds < 30
    assert codes == [Hung.exit_code, None, Hung.exit_code, Hung.exit_code]
    assert re.search(
        r"rank 1 \(trainer, process \d+ on \S+\) is stopped \(SIGSTOP\), last seen in other work, step 6", page
    )
    row = next(line for line in page.splitlines() if line.startswith(">"))
    assert row.split()[1:3] == ["1", "trainer"]
    assert "stopped" in row
    (event,) = [event for event in read_events(tmp_path / "run") if event["event"] == "hang"]
    assert event["ranks"] == [1]


@pytest.mark.parametrize("fault", ["skips", pytest.param("adds", marks=pytest.mark.slow)])
def test_a_rank_that_skips_a_collective_is_named(fault: str, tmp_path: Path) -> None:
    codes, page, seconds = ends(tmp_path / "run", fault)
    assert seconds < 30
    assert set(codes) <= {Hung.exit_code, -signal.SIGABRT}
    assert re.search(r"the ranks do not make the same collectives: rank 1 \(trainer, process \d+ on \S+\) made", page)
    assert "--- stacks" in page
    assert re.search(r"train/(loop|task)\.py:\d+ \w+", page)


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        ("die", RankFailed.exit_code, r"rank 1 \(trainer, process \d+ on \S+\) died, last seen in other work, step 6"),
        pytest.param(
            "fail",
            RankFailed.exit_code,
            r"rank 1 .* failed in other work, step 6: KeyError: 'lost'",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "give up",
            Hung.exit_code,
            r"rank 1 .* has ended \(DataError: shard 7 is damaged on this machine",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "dawdle", Hung.exit_code, r"rank 1 .* has been in other work, step 6 for \d+ s", marks=pytest.mark.slow
        ),
    ],
)
def test_other_ways_to_leave_the_others_waiting(fault: str, code: int, words: str, tmp_path: Path) -> None:
    codes, page, seconds = ends(tmp_path / "run", fault, "1", "4")
    assert seconds < 15
    assert (codes[0], codes[2], codes[3]) == (code, code, code)
    assert re.search(words, page), page


def test_a_run_in_good_order_leaves_no_page(tmp_path: Path) -> None:
    processes = start(faults.work, str(tmp_path / "run"), "", "0.1", "0", "8", size=2, folder=tmp_path)
    assert finish(processes) == [0, 0]
    assert not (tmp_path / "run" / "hang.txt").exists()


def test_another_recipe_is_named_before_the_first_step(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    prepare(run, shards)
    prepare(tmp_path / "other", shards, "--train.lr", "1e-3")
    (tmp_path / "other" / "recipe.toml").rename(tmp_path / "other.toml")
    began = time.monotonic()
    processes = start(faults.pretrain, str(run), str(tmp_path / "other.toml"), size=3, folder=tmp_path)
    assert finish(processes) == [RanksDiffer.exit_code] * 3
    assert time.monotonic() - began < 30
    page = (run / "hang.txt").read_text(encoding="utf-8")
    assert len(page.splitlines()) <= LINES_OF_A_PAGE
    assert re.search(r"rank 1 \(trainer, process \d+ on \S+\): train\.lr is 0\.001, and 0\.003 on ranks 0, 2", page)
    assert not read_events(run)


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher's processes find the faults."""
    here = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(here), str(here.parent / "train")]))


@pytest.mark.slow
def test_the_launcher_starts_again_after_a_lost_rank(importable: None, tmp_path: Path) -> None:
    """The trajectory is the one that nobody disturbed."""
    for fault, restarts in (("", 0), ("die", 1)):
        run = tmp_path / f"run-{fault}"
        launch("faults:work", [str(run), fault, "5", "0", "12"], 2, run, num_threads=1, max_restarts=restarts)
    assert losses(tmp_path / "run-die") == losses(tmp_path / "run-")
    assert [event["step"] for event in read_events(tmp_path / "run-die") if event["event"] == "resume"] == [3]


@pytest.mark.slow
def test_the_launcher_tells_what_the_watchdog_saw(importable: None, tmp_path: Path) -> None:
    with pytest.raises(Hung, match=r"rank 1 .* is stopped .* The page is .*/run/hang\.txt"):
        launch("faults:work", [str(tmp_path / "run"), "stop"], 4, tmp_path / "run", num_threads=1)
    with pytest.raises(
        RankFailed, match=r"rank 1 was killed by SIGKILL; .*rank 1 .* died, last seen in other work, step 6"
    ):
        launch("faults:work", [str(tmp_path / "dead"), "die"], 2, tmp_path / "dead", num_threads=1)
    left = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True, check=False)
    assert not left.stdout


@pytest.mark.slow
@pytest.mark.parametrize("signal_name", ["KILL", "STOP"])
def test_torchrun_starts_again_after_a_lost_rank(signal_name: str, shards: Path, tmp_path: Path) -> None:
    """The trajectory is the one that nobody disturbed."""
    steps = ("--train.tokens", "20480", "--checkpoint.every", "5", "--eval.tokens", "0")
    assert train(tmp_path / "straight", shards, *steps, size=2) == [0, 0]
    run = tmp_path / "run"
    words = ["train", "tiny", "--run.dir", str(run), "--data.path", str(shards), *steps]
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    with subprocess.Popen([*line, "-m", "puna.cli", *words]) as torchrun:
        while sum(event["event"] == "step" for event in read_events(run)) < 8:
            assert torchrun.poll() is None
            time.sleep(0.005)
        subprocess.run(["kill", f"-{signal_name}", rank_process(run, 1)], check=True)
        assert torchrun.wait(120) == 0
    assert losses(run) == losses(tmp_path / "straight")
    assert [event["step"] for event in read_events(run) if event["event"] == "resume"] == [5]


def rank_process(run: Path, rank: int) -> str:
    """The process of a rank, by its heartbeat."""
    (beat,) = (run / "watch").glob(f"*/rank-{rank}")
    return re.search(r'"pid": (\d+)', beat.read_text(encoding="utf-8"))[1]
