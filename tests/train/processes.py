"""Processes that can be killed: forked from a server that has torch already, so that each starts in milliseconds."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from puna.errors import PunaError
from puna.train.launch import die_with

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["puna.train.loop", "torch.distributed.fsdp", "torch._dynamo", "puna.train.launch"])


def start(function: Callable[..., None], *words: str, size: int = 1, folder: Path | None = None) -> list[BaseProcess]:
    """One process for each rank; their status is that of a PunaError, or 1."""
    ranks = range(size)
    store = str(folder / f"store-{os.urandom(4).hex()}") if folder else ""
    processes = [context.Process(target=_main, args=(rank, size, store, function, words)) for rank in ranks]
    for process in processes:
        process.start()
    return processes


def finish(processes: list[BaseProcess], seconds: float = 60) -> list[int | None]:
    """Their exit codes (negative: the signal), by rank."""
    for process in processes:
        process.join(seconds)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
        process.close()
    return codes


def _main(rank: int, size: int, store: str, function: Callable[..., None], words: tuple[Any, ...]) -> None:
    die_with(os.getppid())
    if size > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "PUNA_STORE": store}
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        function(*words)
    except PunaError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
