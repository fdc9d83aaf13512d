"""What the launcher's tests have ranks do; nothing here imports torch, so that they start at once."""

import os
import sys
import time
from pathlib import Path

from puna.errors import DataError, NonFinite, Unfinished


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
