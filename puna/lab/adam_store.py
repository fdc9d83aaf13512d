"""Many runs on a few processes, each kept in a file of its own: what was done is not done again."""

import json
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from puna.console import bar
from puna.lab.adam_jobs import do
from puna.lab.adam_spec import Job


def complete(jobs: Sequence[Job], folder: Path, num_workers: int, description: str) -> list[dict[str, Any]]:
    """Results in the order of the jobs; those that are not in `folder` yet are made, `num_workers` at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / job.file() for job in jobs]
    missing = [(job, path) for job, path in zip(jobs, paths, strict=True) if not path.exists()]
    with bar() as progress:
        task = progress.add_task(description, total=len(jobs), completed=len(jobs) - len(missing))
        if missing:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(num_workers, mp_context=context, initializer=_one_thread) as pool:
                for done in as_completed([pool.submit(_make, job, path) for job, path in missing]):
                    done.result()
                    progress.advance(task)
    return [json.loads(path.read_text()) for path in paths]


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _make(job: Job, path: Path) -> None:
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(do(job), allow_nan=False))
    os.replace(partial, path)
