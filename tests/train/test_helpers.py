"""Roles that the others can do without: killed ones are started again or missed, and nobody waits for them."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import workers

from puna.errors import DataError, RankFailed
from puna.train.launch import launch

ROLES = {"server": 1, "trainer": 2}


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(workers.__file__).parent))


def kill_when_there(folder: Path, ranks: list[int], times: int = 1, then: str = "") -> threading.Thread:
    """Kill these ranks as soon as they have left their process ids, so many times each; over once `then` is there."""

    def work() -> None:
        for rank in ranks * times:
            path = folder / f"pid-{rank}"
            while not path.exists():
                time.sleep(0.01)
            pid = int(path.read_text())
            path.unlink()
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.5)  # for the launcher to see it
        while not (folder / then).exists():
            time.sleep(0.01)
        (folder / "over").touch()

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_the_others_go_on_without_a_helper(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    killer = kill_when_there(tmp_path, [1])
    launch("workers:help_out", [str(tmp_path), "over"], ROLES, tmp_path, helpers={"trainer"})
    killer.join()
    assert "rank 1 was killed by SIGKILL; the others go on" in capfd.readouterr().err
    assert not (tmp_path / "pid-1").exists()


def test_a_helper_is_started_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    killer = kill_when_there(tmp_path, [2], times=2, then="pid-2")
    launch("workers:help_out", [str(tmp_path), "over"], ROLES, tmp_path, max_restarts=2, helpers={"trainer"})
    killer.join()
    assert capfd.readouterr().err.count("rank 2 was killed by SIGKILL; it is started again") == 2
    assert (tmp_path / "starts-2").read_text() == "xxx"


def test_without_any_helper_the_run_ends(tmp_path: Path) -> None:
    killer = kill_when_there(tmp_path, [1, 2])
    with pytest.raises(RankFailed, match="was killed by SIGKILL; the other ranks were stopped"):
        launch("workers:help_out", [str(tmp_path), "never"], ROLES, tmp_path, helpers={"trainer"})
    killer.join()


def test_a_mistake_of_a_helper_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"shards.json is missing"):
        launch("workers:fail", ["user", "2"], ROLES, tmp_path, helpers={"trainer"})


def test_nobody_waits_for_helpers(tmp_path: Path) -> None:
    """The server ends at once, while they would sleep for a minute."""
    began = time.monotonic()
    launch("workers:help_out", [str(tmp_path), "at once"], ROLES, tmp_path, helpers={"trainer"})
    assert time.monotonic() - began < 50
