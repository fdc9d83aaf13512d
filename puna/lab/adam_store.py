"""Many runs on a few processes, each kept in a file of its own: what was done is not done again."""

import json
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from puna.console import bar
from puna.lab.adam_spec import RunSpec
from puna.train.config import HealthConfig

RUN = ("lab/adam_run.py", "lab/adam_text.py", "lab/adam_trial.py")
WATCHED = (
    "train/adam_stats.py",
    "train/adam_sampler.py",
    "train/detector.py",
    "train/health.py",
    "train/health_track.py",
)
REMEDIES = (
    "lab/adam_arms.py", "train/clipping.py", "train/stable_adamw.py", "train/controller.py", "train/tensor_guard.py",
    "train/spike_judge.py", "train/actions.py", "train/levers.py", "train/trend.py",
)  # fmt: skip
"""Code that a result depends on, beside PyTorch: every result, those of watched runs, those under a remedy."""


@dataclass(frozen=True)
class Job:
    """A run and what it is trained under: the name of an arm (see `puna.lab.adam_jobs`), whether it is watched."""

    spec: RunSpec
    arm: str = "nothing"
    watch: bool = True
    health: dict[str, Any] = field(default_factory=dict)  # settings of HealthConfig other than the defaults

    def file(self) -> str:
        """Name of its result: changes with anything that it depends on."""
        settings = HealthConfig(**self.health).model_dump(mode="json") if self.watch else None
        facts = [self.spec.model_dump(mode="json"), self.arm, settings, _code(self.watch, self.arm)]
        digest = blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=6).hexdigest()
        return f"{self.spec.title}-{self.arm.replace('/', 'over').replace(' ', '_')}-{digest}.json"


def _code(watch: bool, arm: str) -> str:
    root = Path(__file__).parents[1]
    files = RUN + WATCHED * watch + REMEDIES * (arm != "nothing")
    return blake2b(b"".join((root / name).read_bytes() for name in files), digest_size=6).hexdigest()


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
    from puna.lab.adam_jobs import do

    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(do(job), allow_nan=False))
    os.replace(partial, path)
