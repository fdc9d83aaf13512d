"""Local processes die together, and say why."""

import os
import signal
import time
from pathlib import Path

import pytest
import workers
from processes import context

from puna.errors import DataError, NonFinite, RankFailed, Unfinished
from puna.train.launch import _as_left, launch


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(workers.__file__).parent))


def wait_for(condition: object, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except FileNotFoundError:
        return True


def test_every_rank_runs_with_its_environment_and_its_log(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    launch("workers:note", [str(tmp_path)], 2, tmp_path)
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert (tmp_path / "seen-0").read_text() == f"0 0 2 {threads} lo"
    assert (tmp_path / "seen-1").read_text() == f"1 1 2 {threads} lo"
    shown = capfd.readouterr()
    assert shown.out == "figure 0\n"
    assert shown.err.startswith("told 0\n")
    assert "\x1b[2K" in shown.err
    assert sorted((tmp_path / "logs" / "rank-0.log").read_text().split("\n")) == ["", "figure 0", "red line", "told 0"]
    assert "told 1" in (tmp_path / "logs" / "rank-1.log").read_text()


def test_threads_are_the_users_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    launch("workers:note", [str(tmp_path)], 2, tmp_path)
    assert (tmp_path / "seen-0").read_text().split()[3] == "7"
    launch("workers:note", [str(tmp_path)], 2, tmp_path, num_threads=3)
    assert (tmp_path / "seen-0").read_text().split()[3] == "3"


@pytest.mark.parametrize("environment", [{}, {"RANK": "5"}])
def test_one_rank_and_torchrun_run_here(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    launch("workers:note", [str(tmp_path)], 4 if environment else 1, tmp_path)
    assert [path.name for path in tmp_path.glob("seen-*")] == [f"seen-{environment.get('RANK')}"]
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("how", "kind", "words", "status"),
    [
        ("user", DataError, "shards/shards.json is missing. Make token shards first.", 2),
        ("nonfinite", NonFinite, "step 3 is not finite", 5),
        ("unfinished", Unfinished, "stopped at step 7", 4),
    ],
)
def test_an_error_on_all_ranks_is_raised_once_and_not_printed(
    how: str, kind: type, words: str, status: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(kind, match=f"^{words}$") as caught:
        launch("workers:fail", [how, "all"], 2, tmp_path)
    assert caught.value.exit_code == status
    assert capfd.readouterr() == ("", "")


def test_an_error_on_one_rank_stops_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("puna.train.launch.LAST_WORDS_SECONDS", 0.2)
    with pytest.raises(DataError):
        launch("workers:fail", ["user", "1"], 3, tmp_path)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("9", r"rank 1 was killed by SIGKILL; the other ranks were stopped. Its log is .*/logs/rank-1\.log"),
        ("11", "rank 1 was killed by SIGSEGV"),
        ("crash", r"rank 1 ended with status 1 \(KeyError: 'lost'\)"),
    ],
)
def test_a_dead_rank_is_named_at_once(how: str, words: str, tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(RankFailed, match=words):
        launch("workers:fail", [how, "1"], 3, tmp_path)
    assert time.monotonic() - began < 20


def test_roles_and_ranks_within_them(tmp_path: Path) -> None:
    launch("workers:note_role", [str(tmp_path)], {"trainer": 2, "lock": 1}, tmp_path)
    found = [(tmp_path / f"role-{rank}").read_text() for rank in range(3)]
    assert found == ["0 3 trainer 0 2", "1 3 trainer 1 2", "2 3 lock 0 1"]


def test_a_lost_rank_starts_all_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launch("workers:fail_at_first", [str(tmp_path), "9"], 2, tmp_path, max_restarts=2)
    assert {path.name for path in tmp_path.glob("start-*")} >= {"start-1-0", "start-0-1", "start-1-1"}
    said = capsys.readouterr().err
    assert "rank 1 was killed by SIGKILL" in said
    assert "restart 1 of 2" in said


@pytest.mark.parametrize(("how", "kind", "restarts"), [("9", RankFailed, 1), ("user", DataError, 0)])
def test_restarts_end_and_a_mistake_is_not_repeated(
    how: str,
    kind: type,
    restarts: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("puna.train.launch.LAST_WORDS_SECONDS", 0.2)
    with pytest.raises(kind):
        launch("workers:fail", [how, "1"], 2, tmp_path, max_restarts=1)
    assert capsys.readouterr().err.count("restart 1 of 1") == restarts


def test_the_words_of_a_watchdog_are_waited_for(tmp_path: Path) -> None:
    with pytest.raises(
        RankFailed, match=r"rank 1 was killed by SIGKILL; .*rank-1\.log\. rank 1 died, last seen in data"
    ):
        launch("workers:watch_over_a_death", [str(tmp_path)], 3, tmp_path)


def test_killing_the_launcher_leaves_no_process(tmp_path: Path) -> None:
    launcher = context.Process(target=workers.launch_sleepers, args=(str(tmp_path),))
    launcher.start()
    wait_for(lambda: len(list(tmp_path.glob("pid-?"))) == 2)
    pids = [int(path.read_text()) for path in tmp_path.glob("pid-?")]
    assert not any(gone(pid) for pid in pids)
    launcher.kill()
    launcher.join()
    wait_for(lambda: all(gone(pid) for pid in pids), seconds=5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on(number: signal.Signals, tmp_path: Path) -> None:
    launcher = context.Process(target=workers.launch_sleepers, args=(str(tmp_path),))
    launcher.start()
    wait_for(lambda: len(list(tmp_path.glob("pid-?"))) == 2)
    os.kill(launcher.pid, number)
    launcher.join(20)
    assert launcher.exitcode == 1  # RankFailed, of sleepers that do not handle it
    assert all(gone(int(path.read_text())) for path in tmp_path.glob("pid-?"))


def test_a_log_keeps_lines_as_they_look_in_the_end() -> None:
    assert _as_left(b"plain") == b"plain"
    assert _as_left(b"windows\r") == b"windows"
    assert _as_left(b"10 %\r\x1b[2K20 %\r\x1b[2Kdone \x1b[1mwell\x1b[0m") == b"done well"
