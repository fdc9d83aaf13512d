"""What the launcher's tests have ranks do; nothing here imports torch, so that they start at once."""

import os
import signal
import sys
import time
from pathlib import Path

from puna.errors import DataError, NonFinite, RankFailed, Unfinished
from puna.train.launch import watched


def note(folder: str) -> None:
    """Leave what this rank sees."""
    keys = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME")
    Path(folder, f"seen-{os.environ.get('RANK')}").write_text(" ".join(os.environ.get(key, "-") for key in keys))
    print("figure", os.environ.get("RANK"))
    print("told", os.environ.get("RANK"), file=sys.stderr)
    print("frame 1\r\x1b[2Kframe 2\r\x1b[2K\x1b[31mred\x1b[0m line", file=sys.stderr)


def sleep(folder: str, seconds: str = "60") -> None:
    """Leave the process id, then wait."""
    Path(folder, f"pid-{os.environ['RANK']}.tmp").write_text(str(os.getpid()))
    Path(folder, f"pid-{os.environ['RANK']}.tmp").rename(Path(folder, f"pid-{os.environ['RANK']}"))
    time.sleep(float(seconds))


def fail(how: str, who: str) -> None:
    """Rank `who` (or "all") fails; the others wait."""
    if who not in ("all", os.environ["RANK"]):
        time.sleep(60)
    if how == "user":
        raise DataError("shards/shards.json is missing", "Make token shards first.")
    if how == "nonfinite":
        raise NonFinite("step 3 is not finite")
    if how == "unfinished":
        raise Unfinished("stopped at step 7")
    if how == "crash":
        raise KeyError("lost")
    os.kill(os.getpid(), int(how))


def launch_sleepers(folder: str) -> None:
    """A launcher, to be killed. Its process has the environment of the fork server, whichever test started that."""
    from puna.train.launch import launch

    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    launch("workers:sleep", [folder], 2, Path(folder))


def note_role(folder: str) -> None:
    """Leave the role that this rank was given."""
    keys = ("RANK", "WORLD_SIZE", "ROLE_NAME", "ROLE_RANK", "ROLE_WORLD_SIZE")
    Path(folder, f"role-{os.environ['RANK']}").write_text(" ".join(os.environ[key] for key in keys))


def fail_at_first(folder: str, how: str) -> None:
    """Rank 1 fails unless it has been started again."""
    restart = os.environ["TORCHELASTIC_RESTART_COUNT"]
    Path(folder, f"start-{os.environ['RANK']}-{restart}").touch()
    if restart == "0":
        fail(how, "1")


def watch_over_a_death(folder: str) -> None:
    """Rank 1 is killed; the others have a watchdog, which takes a moment to tell of it."""
    watched()
    Path(folder, f"ready-{os.environ['RANK']}").touch()
    while not all(Path(folder, f"ready-{rank}").exists() for rank in range(3)):
        time.sleep(0.01)
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.3)
    raise RankFailed("rank 1 died, last seen in data wait")


def help_out(folder: str, until: str) -> None:
    """Helpers sleep, and leave a mark each time that they start; the server (rank 0) ends when `until` is there, or
    at once."""
    rank, path = os.environ["RANK"], Path(folder)
    if rank != "0":
        with (path / f"starts-{rank}").open("a") as file:
            file.write("x")
        sleep(folder)
    while until != "at once" and not (path / until).exists():
        time.sleep(0.01)
