"""Local processes that die together: one for each rank, watched, and killed by the kernel should the launcher die.

Under torchrun (RANK is set) nothing is launched. Meeting place is a file in a temporary folder, so no port is chosen.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from types import FrameType
from typing import Any, BinaryIO, NoReturn

import puna.errors
from puna.errors import PunaError, RankFailed, UserError

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
    pumps: list[Thread]


def launch(target: str, arguments: Sequence[str], num_processes: int, run: Path, num_threads: int = 0) -> None:
    """Call `target` ("module:function") with the string arguments in every rank; returns when all have.

    In this process where there is one rank only, or under torchrun. Otherwise each worker writes RUN/logs/rank-N.log;
    rank 0 is shown too. A PunaError of a worker is raised here; RankFailed names a rank that died of anything else.
    SIGTERM and SIGINT are passed on. num_threads: intra-op threads of a process; 0: cores divided by processes.
    """
    if num_processes == 1 or "RANK" in os.environ:
        _resolve(target)(*arguments)
        return
    (run / "logs").mkdir(parents=True, exist_ok=True)
    meeting = Path(tempfile.mkdtemp(prefix="puna-"))
    workers: list[_Worker] = []
    try:
        with _signals_passed_to(workers):
            for rank in range(num_processes):
                environment = _environment(rank, num_processes, num_threads, meeting)
                workers.append(_start(rank, [target, *arguments], environment, run, meeting))
            _watch(workers)
    finally:
        _kill(workers)
        shutil.rmtree(meeting)


def _environment(rank: int, num_processes: int, num_threads: int, meeting: Path) -> dict[str, str]:
    threads = num_threads or max(1, len(os.sched_getaffinity(0)) // num_processes)
    chosen = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": num_processes,
        "LOCAL_WORLD_SIZE": num_processes,
        "PUNA_STORE": meeting / "store",
        "PUNA_LAUNCHER": os.getpid(),
        "PUNA_ERROR_FILE": meeting / f"rank-{rank}.error",
        "PYTHONUNBUFFERED": 1,
    }
    if num_threads:
        chosen["OMP_NUM_THREADS"] = threads
    defaults = {"OMP_NUM_THREADS": threads, "GLOO_SOCKET_IFNAME": "lo"}
    if rank == 0 and sys.stderr.isatty():
        defaults |= {"TTY_COMPATIBLE": 1, "TTY_INTERACTIVE": 1, "COLUMNS": shutil.get_terminal_size().columns}
    text = [{k: str(v) for k, v in part.items()} for part in (defaults, chosen)]
    return text[0] | dict(os.environ) | text[1]


def _start(rank: int, words: list[str], environment: dict[str, str], run: Path, meeting: Path) -> _Worker:
    log, error = run / "logs" / f"rank-{rank}.log", meeting / f"rank-{rank}.error"
    command = [sys.executable, "-m", "puna.train.launch", *words]
    # In a session of its own: Ctrl-C in a terminal reaches the launcher alone, which passes it on once.
    if rank:
        with log.open("ab") as file:
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
        return _Worker(rank, process, log, error, [])
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, start_new_session=True)
    pumps = [Thread(target=_pump, args=(source, fd, log)) for fd, source in ((1, process.stdout), (2, process.stderr))]
    for pump in pumps:
        pump.start()
    return _Worker(rank, process, log, error, pumps)


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


def _watch(workers: list[_Worker]) -> None:
    """Return when every rank has ended well; raise for the first that has not, with the others stopped."""
    while True:
        codes = [worker.process.poll() for worker in workers]
        failed = [worker for worker, code in zip(workers, codes, strict=True) if code]
        if failed:
            _raise_for(failed, workers)
        if all(code == 0 for code in codes):
            return
        time.sleep(POLL_SECONDS)


def _raise_for(failed: list[_Worker], workers: list[_Worker]) -> NoReturn:
    told = next((worker for worker in failed if worker.error.is_file()), None)
    if told:
        deadline = time.monotonic() + LAST_WORDS_SECONDS
        while any(worker.process.poll() is None for worker in workers) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
    _kill(workers)
    if told:
        kind, words = json.loads(told.error.read_text(encoding="utf-8"))
        raise getattr(puna.errors, kind)(*words)
    # A rank that a signal took is the cause; the others failed because it was gone.
    guilty = min(failed, key=lambda worker: (worker.process.returncode >= 0, worker.rank))
    raise RankFailed(f"rank {guilty.rank} {_ending(guilty)}; the other ranks were stopped. Its log is {guilty.log}")


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
def _signals_passed_to(workers: list[_Worker]) -> Iterator[None]:
    def pass_on(number: int, frame: FrameType | None) -> None:
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


def _resolve(target: str) -> Callable[..., Any]:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def _work(target: str, arguments: list[str]) -> int:
    """What a worker does; its exit status. The launcher tells of a PunaError, so it is not printed here."""
    try:
        _resolve(target)(*arguments)
    except PunaError as error:
        words = [error.problem, error.fix] if isinstance(error, UserError) else [str(error)]
        path = Path(os.environ["PUNA_ERROR_FILE"])
        path.with_suffix(".tmp").write_text(json.dumps([type(error).__name__, words]), encoding="utf-8")
        path.with_suffix(".tmp").rename(path)
        return error.exit_code
    return 0


if __name__ == "__main__":
    die_with(int(os.environ["PUNA_LAUNCHER"]))
    sys.exit(_work(sys.argv[1], sys.argv[2:]))
