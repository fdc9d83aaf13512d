"""A Slurm batch script for a run, meant to be read: one task a node, which is torchrun. No torch here."""

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from puna.errors import RecipeError
from puna.train.torchrun import Meeting, torchrun

SAVE_SECONDS = 120  # before the end of its time, a run is told to save

_TIME = re.compile(r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+(:\d\d){0,2}")


@dataclass(frozen=True)
class Job:
    """What is asked of Slurm. `time` as sbatch takes it: minutes, HH:MM:SS, or D-HH:MM:SS."""

    num_nodes: int = 1
    gpus_per_node: int = 0
    time: str = ""
    account: str = ""
    partition: str = ""
    container: str = ""  # image, for clusters with the pyxis plugin


def script(words: Sequence[str], run: Path, job: Job, num_processes: int, max_restarts: int, folder: Path) -> str:
    """The batch script that runs `puna WORDS` from `folder` on `num_processes` ranks a node.

    With DRY_RUN=1 in the environment, the script prints the line that each node would run and ends. Raises RecipeError
    where a setting is not one that Slurm takes.
    """
    _check(job, run)
    meeting = Meeting("$head", name="$job")
    command = torchrun(
        words,
        num_processes=num_processes,
        num_nodes=job.num_nodes,
        meeting=meeting,
        max_restarts=max_restarts,
        python="python" if job.container else sys.executable,
    )
    return _TEMPLATE.format(
        title=f"{run}: {job.num_nodes} nodes x {num_processes} processes",
        directives="\n".join(f"#SBATCH --{line}" for line in _directives(job, run, num_processes)),
        folder=shlex.quote(str(folder)),
        num_nodes=job.num_nodes,
        logs=shlex.quote(str(run / "logs")),
        command="\n".join(f"  {_quoted(word)}" for word in command),
        srun=" ".join(["srun", "--kill-on-bad-exit=1", *_container(job)]),
    )


_TEMPLATE = """#!/bin/bash
# {title}
{directives}
set -euo pipefail
cd {folder}
mkdir -p {logs}

if [[ -n "${{SLURM_JOB_NODELIST:-}}" ]]; then
  nodes=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
else
  nodes=(node-{{1..{num_nodes}}})  # outside Slurm, for a dry run
fi
job=${{SLURM_JOB_ID:-0}}
head=${{nodes[0]}}

# The same line on every node: torchrun meets at the first one and starts the ranks.
launch=(
{command}
)

if [[ -n "${{DRY_RUN:-}}" ]]; then
  for node in "${{nodes[@]}}"; do
    echo "$node: ${{launch[*]}}"
  done
  exit 0
fi

# The flight recorder keeps the newest collectives; NCCL writes them to the run's watch folder when one times out.
export TORCH_FR_BUFFER_SIZE=2000 TORCH_NCCL_DUMP_ON_TIMEOUT=1

{srun} "${{launch[@]}}"
"""


def _directives(job: Job, run: Path, num_processes: int) -> list[str]:
    lines = [
        f"job-name=puna-{re.sub(r'[^A-Za-z0-9_.-]', '-', run.name)}",
        f"nodes={job.num_nodes}",
        "ntasks-per-node=1",
        f"cpus-per-task={num_processes}" if not job.gpus_per_node else f"gpus-per-node={job.gpus_per_node}",
        "exclusive",
        f"signal=TERM@{SAVE_SECONDS}",
        "open-mode=append",
        f"output={run / 'logs' / 'slurm-%j.out'}",
    ]
    optional = {"time": job.time, "account": job.account, "partition": job.partition}
    return lines + [f"{name}={value}" for name, value in optional.items() if value]


def _container(job: Job) -> list[str]:
    if not job.container:
        return []
    image = f"--container-image={shlex.quote(job.container)}"
    return [image, '--container-mounts="$PWD:$PWD"', '--container-workdir="$PWD"']


def _quoted(word: str) -> str:
    """For bash; the meeting's words name variables of the script."""
    return f'"{word}"' if word.startswith("--rdzv-") else shlex.quote(word)


def _check(job: Job, run: Path) -> None:
    if job.time and not _TIME.fullmatch(job.time):
        raise RecipeError(f"--time {job.time!r} is not a time that Slurm takes", "Write HH:MM:SS or D-HH:MM:SS.")
    given = {"account": job.account, "partition": job.partition, "container": job.container, "run.dir": str(run)}
    for name, value in given.items():
        if any(char.isspace() for char in value):
            raise RecipeError(
                f"--{name} {value!r} has a space in it, which a Slurm directive cannot hold", "Give another."
            )
