"""Local processes that die together: one for each rank, watched, and killed by the kernel should the launcher die.

Under torchrun, Slurm or Ray (RANK is set) nothing is launched. Meeting place is a file in a temporary folder, so no
port is chosen. A process knows its role and its rank within it by torchrun's names: ROLE_NAME, ROLE_RANK,
ROLE_WORLD_SIZE.
"""

import ctypes
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from types import FrameType
from typing import Any, BinaryIO, NoReturn

import puna.errors
from puna.console import err
from puna.errors import Hung, PunaError, RankFailed, UserError

POLL_SECONDS = 0.02
LAST_WORDS_SECONDS = 5.0  # for the other ranks to end by themselves after a Puna error, which all of them meet
PR_SET_PDEATHSIG = 1
_ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass
class _Worker:
    rank: int
    process: subprocess.Popen[bytes]
    log: Path
    error: Path
    watched: Path
    pumps: list[Thread]
    helps: bool = False


def launch(
    target: str,
    arguments: Sequence[str],
    num_processes: int | Mapping[str, int],
    run: Path,
    num_threads: int = 0,
    max_restarts: int = 0,
    helpers: Container[str] = (),
) -> None:
    """Call `target` ("module:function") with the string arguments in every rank; returns when all have.

    num_processes: how many, or how many of each role ({"trainer": 4, "lock": 1}; ranks are dealt in this order). In
    this process where there is one rank only, or where a launcher has set RANK. Otherwise each worker writes
    RUN/logs/rank-N.log; rank 0 is shown too. A PunaError of a worker is raised here; RankFailed and Hung name the rank,
    and up to `max_restarts` times start all ranks again. SIGTERM and SIGINT are passed on. num_threads: intra-op
    threads of a process; 0: cores divided by processes. helpers: roles that the others can do without: where a signal
    has killed one of them it is started again alone, up to `max_restarts` times, and while one is left the run goes on;
    once all others have ended, they are stopped.
    """
    roles = dict(num_processes) if isinstance(num_processes, Mapping) else {"trainer": num_processes}
    if sum(roles.values()) == 1 or "RANK" in os.environ:
        resolve(target)(*arguments)
        return
    (run / "logs").mkdir(parents=True, exist_ok=True)
    job = _Job([target, *arguments], _places(roles), run, num_threads, helpers, max_restarts)
    for restart in range(max_restarts + 1):
        signals: list[int] = []
        try:
            _launch_once(job, restart, signals)
            return
        except (RankFailed, Hung) as error:
            if signals or restart == max_restarts:
                raise
            err.print(f"{error}\nrestart {restart + 1} of {max_restarts}", markup=False, soft_wrap=True)


@dataclass(frozen=True)
class _Job:
    words: list[str]
    places: list[dict[str, Any]]
    run: Path
    num_threads: int
    helpers: Container[str]
    max_restarts: int

    def start(self, place: dict[str, Any], restart: int, meeting: Path) -> _Worker:
        """The process of one place."""
        environment = _environment(place | {"TORCHELASTIC_RESTART_COUNT": restart}, self.num_threads, meeting)
        worker = _start(place["RANK"], self.words, environment, self.run, meeting)
        worker.helps = place["ROLE_NAME"] in self.helpers
        return worker


def _launch_once(job: _Job, restart: int, signals: list[int]) -> None:
    meeting = Path(tempfile.mkdtemp(prefix="puna-"))
    workers: list[_Worker] = []
    try:
        with _signals_passed_to(workers, signals):
            for place in job.places:
                workers.append(job.start(place, restart, meeting))
            left = iter(range(job.max_restarts))
            while dead := _watch(workers):
                workers.remove(dead)
                again = not signals and next(left, None) is not None
                goes_on = "it is started again" if again else "the others go on"
                err.print(f"rank {dead.rank} {_ending(dead)}; {goes_on}", markup=False, soft_wrap=True)
                if again:
                    workers.append(job.start(job.places[dead.rank], restart, meeting))
                elif not any(worker.helps for worker in workers):
                    _raise_for([dead], workers)
    finally:
        _kill(workers)
        shutil.rmtree(meeting)


def _places(roles: Mapping[str, int]) -> list[dict[str, Any]]:
    """Where each process stands: its rank among all and in its role, by torchrun's names."""
    size = sum(roles.values())
    of_role = [(role, rank, count) for role, count in roles.items() for rank in range(count)]
    return [
        {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": size,
            "LOCAL_WORLD_SIZE": size,
            "ROLE_NAME": role,
            "ROLE_RANK": role_rank,
            "ROLE_WORLD_SIZE": count,
        }
        for rank, (role, role_rank, count) in enumerate(of_role)
    ]


def _environment(place: dict[str, Any], num_threads: int, meeting: Path) -> dict[str, str]:
    threads = num_threads or max(1, len(os.sched_getaffinity(0)) // place["WORLD_SIZE"])
    chosen = place | {
        "PUNA_STORE": meeting / "store",
        "PUNA_LAUNCHER": os.getpid(),
        "PUNA_ERROR_FILE": meeting / f"rank-{place['RANK']}.error",
        "PYTHONUNBUFFERED": 1,
    }
    if num_threads:
        chosen["OMP_NUM_THREADS"] = threads
    defaults: dict[str, Any] = {"OMP_NUM_THREADS": threads, "GLOO_SOCKET_IFNAME": "lo"}
    if place["RANK"] == 0 and sys.stderr.isatty():
        defaults |= {"TTY_COMPATIBLE": 1, "TTY_INTERACTIVE": 1, "COLUMNS": shutil.get_terminal_size().columns}
    text = [{k: str(v) for k, v in part.items()} for part in (defaults, chosen)]
    return text[0] | dict(os.environ) | text[1]


def _start(rank: int, words: list[str], environment: dict[str, str], run: Path, meeting: Path) -> _Worker:
    log = run / "logs" / f"rank-{rank}.log"
    told = (meeting / f"rank-{rank}.error", meeting / f"rank-{rank}.watched")
    command = [sys.executable, "-m", "puna.train.launch", *words]
    # In a session of its own: Ctrl-C in a terminal reaches the launcher alone, which passes it on once.
    if rank:
        with log.open("ab") as file:
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
        return _Worker(rank, process, log, *told, [])
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, start_new_session=True)
    pumps = [Thread(target=_pump, args=(source, fd, log)) for fd, source in ((1, process.stdout), (2, process.stderr))]
    for pump in pumps:
        pump.start()
    return _Worker(rank, process, log, *told, pumps)


def _pump(source: BinaryIO, shown: int, log: Path) -> None:
    """Show everything; log whole lines as they look in the end, without the frames of a progress bar."""
    line = b""
    with source, log.open("ab", buffering=0) as file:
        while chunk := os.read(source.fileno(), 1 << 16):
            os.write(shown, chunk)
            *whole, line = (line + chunk).split(b"\n")
            file.write(b"".join(_as_left(text) + b"\n" for text in whole))
            line = line.rpartition(b"\r")[2] if len(line) > 1 << 12 else line
        file.write(_as_left(line))


def _as_left(line: bytes) -> bytes:
    return _ESCAPES.sub(b"", line.rstrip(b"\r").rpartition(b"\x1b[2K")[2]).rpartition(b"\r")[2]


def _watch(workers: list[_Worker]) -> _Worker | None:
    """Return when every rank has ended well (None), or a helper was killed; raise for the first other that has not
    ended well, with the others stopped."""
    while True:
        codes = [worker.process.poll() for worker in workers]
        failed = [worker for worker, code in zip(workers, codes, strict=True) if code]
        killed = [worker for worker in failed if worker.helps and worker.process.returncode < 0]
        if len(failed) > len(killed):
            _raise_for(failed, workers)
        if all(code == 0 or worker.helps for worker, code in zip(workers, codes, strict=True)):
            return None
        if killed:
            return killed[0]
        time.sleep(POLL_SECONDS)


def _raise_for(failed: list[_Worker], workers: list[_Worker]) -> NoReturn:
    if any(worker.error.is_file() for worker in failed) or any(worker.watched.is_file() for worker in workers):
        deadline = time.monotonic() + LAST_WORDS_SECONDS
        while any(worker.process.poll() is None for worker in workers) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
    _kill(workers)
    # A rank that a signal took is the cause; the others failed because it was gone.
    guilty = min(failed, key=lambda worker: (worker.process.returncode >= 0, worker.rank))
    words = f"rank {guilty.rank} {_ending(guilty)}; the other ranks were stopped. Its log is {guilty.log}"
    told = next((worker for worker in [*failed, *workers] if worker.error.is_file()), None)
    if not told:
        raise RankFailed(words)
    error = error_in(told.error)
    if isinstance(error, RankFailed) and guilty.process.returncode < 0:
        raise RankFailed(f"{words}. {error}")
    raise error


def error_in(path: Path) -> PunaError:
    """The error that a rank has left with `tell`."""
    kind, words = json.loads(path.read_text(encoding="utf-8"))
    return getattr(puna.errors, kind)(*words)


def _ending(worker: _Worker) -> str:
    code = worker.process.returncode
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    last = worker.log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
    return f"ended with status {code} ({last})"


def _kill(workers: list[_Worker]) -> None:
    for worker in workers:
        if worker.process.poll() is None:
            worker.process.kill()
    for worker in workers:
        worker.process.wait()
        for pump in worker.pumps:
            pump.join()


@contextmanager
def _signals_passed_to(workers: list[_Worker], received: list[int]) -> Iterator[None]:
    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for worker in workers:
            if worker.process.poll() is None:
                worker.process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies; at once where it is no longer `parent` (Linux)."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)


def resolve(target: str) -> Callable[..., Any]:
    """The function that "module:function" names."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def words_of(error: PunaError) -> list[Any]:
    """An error as JSON: its class and what to make it of."""
    return [type(error).__name__, [error.problem, error.fix] if isinstance(error, UserError) else [str(error)]]


def tell(error: PunaError) -> bool:
    """Leave an error for the launcher, which raises it; False where nobody would."""
    path = os.environ.get("PUNA_ERROR_FILE")
    if not path:
        return False
    temporary = Path(path).with_suffix(".tmp")
    temporary.write_text(json.dumps(words_of(error)), encoding="utf-8")
    temporary.rename(path)
    return True


def watched() -> None:
    """Let the launcher know that when a rank dies, a watchdog in the others will tell of it."""
    if path := os.environ.get("PUNA_ERROR_FILE"):
        Path(path).with_suffix(".watched").touch()


def _work(target: str, arguments: list[str]) -> int:
    """What a worker does; its exit status. The launcher tells of a PunaError, so it is not printed here."""
    try:
        resolve(target)(*arguments)
    except PunaError as error:
        tell(error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    die_with(int(os.environ["PUNA_LAUNCHER"]))
    sys.exit(_work(sys.argv[1], sys.argv[2:]))
