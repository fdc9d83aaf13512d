"""Processes with one process group, started once a session; they run functions that are named by file and name."""

import importlib.util
import inspect
import os
import traceback
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from processes import context

from puna.train.launch import die_with

SECONDS = 60


class Ranks:
    """`ranks(function, *arguments)` runs it on every rank and returns the results by rank."""

    def __init__(self, folder: Path, size: int) -> None:
        self.ends, self.processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=serve, args=(there, rank, size, str(folder / "store")), daemon=True)
            process.start()
            self.ends.append(here)
            self.processes.append(process)

    def __call__(self, function: Any, *arguments: Any) -> list[Any]:
        for end in self.ends:
            end.send((inspect.getsourcefile(function), function.__name__, arguments))
        answers: dict[int, Any] = {}
        waiting = dict(enumerate(self.ends))
        while waiting:
            ready = wait(list(waiting.values()), SECONDS)
            for rank in [rank for rank, end in waiting.items() if end in ready]:
                failed, answers[rank] = waiting.pop(rank).recv()
                assert not failed, f"rank {rank}: {answers[rank]}"
            assert ready, f"ranks {sorted(waiting)} do not answer"
        return [answers[rank] for rank in range(len(self.ends))]

    def close(self) -> None:
        for end in self.ends:
            end.send(None)
        for process in self.processes:
            process.join(2)
            process.kill()


def serve(end: Connection, rank: int, size: int, store: str) -> None:
    die_with(os.getppid())
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "PUNA_STORE": store}
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch

    from puna.train import mesh

    torch.set_num_threads(1)
    mesh.join_group(rank, size, torch.device("cpu"))
    modules: dict[str, Any] = {}
    while job := end.recv():
        file, name, arguments = job
        try:
            if file not in modules:
                spec = importlib.util.spec_from_file_location(Path(file).stem, file)
                modules[file] = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(modules[file])
            end.send((False, getattr(modules[file], name)(*arguments)))
        except BaseException:
            end.send((True, traceback.format_exc()))
    torch.distributed.destroy_process_group()
