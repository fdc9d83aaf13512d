"""What a rank says of itself, and what its machine says of it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from puna.train.heartbeat import Peer, Pulse, machine, process_state, stacks


def test_a_heartbeat_is_read_as_it_was_written(tmp_path: Path) -> None:
    pulse = Pulse(tmp_path / "rank-3", 3)
    pulse.error = "a long story " * 20
    pulse.beat()
    peer = Peer.at(tmp_path / "rank-3")
    assert (peer.told.rank, peer.told.pid, peer.told.state, peer.told.role) == (3, os.getpid(), "running", "trainer")
    assert peer.told.machine == machine()
    pulse.end("ended", "short")
    seen = peer.seen
    time.sleep(0.01)
    peer.look()
    assert (peer.told.state, peer.told.error) == ("ended", "short"), "what is left of a longer line does no harm"
    assert peer.seen > seen


def test_silence_is_told_from_words(tmp_path: Path) -> None:
    pulse = Pulse(tmp_path / "rank-0", 0)
    pulse.beat()
    peer = Peer.at(tmp_path / "rank-0")
    seen, line = peer.seen, (tmp_path / "rank-0").read_text()
    peer.look()
    assert peer.seen == seen
    (tmp_path / "rank-0").write_text(line[:20])
    peer.look()
    assert peer.seen == seen, "half a line is none"
    assert json.loads(line)["number"] == 0


def test_the_state_of_a_process() -> None:
    with subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE) as process:
        os.kill(process.pid, signal.SIGSTOP)
        while process_state(process.pid) != "T":
            time.sleep(0.001)
        process.kill()
        while process_state(process.pid) != "Z":
            time.sleep(0.001)
        process.wait()
        assert process_state(process.pid) == ""


def wait_here(event: threading.Event) -> None:
    event.wait()


def test_stacks_name_every_thread_but_the_one_that_asks() -> None:
    event = threading.Event()
    other = threading.Thread(target=wait_here, args=(event,), name="loader")
    other.start()
    told: list[str] = []
    asking = threading.Thread(target=lambda: told.append(stacks()), name="watchdog")
    asking.start()
    asking.join()
    event.set()
    other.join()
    assert "watchdog" not in told[0]
    assert "loader\n" in told[0]
    assert "test_heartbeat.py" in told[0]
    assert " wait_here" in told[0]
    assert told[0].splitlines()[-1].startswith("  ")
