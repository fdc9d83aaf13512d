"""Launch lines and batch scripts for several machines."""

import os
import subprocess
from pathlib import Path

import pytest

from puna.errors import RecipeError
from puna.train.slurm import Job, script
from puna.train.torchrun import Meeting, flags_of_this_node, torchrun

WORDS = ["train", "runs/my run/launch/recipe.toml"]


def bash(text: str, folder: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = folder / "train.sbatch"
    path.write_text(text, encoding="utf-8")
    return subprocess.run(
        ["bash", *flags, str(path)], capture_output=True, text=True, env=os.environ | environment, check=False
    )


def test_one_machine_stands_alone() -> None:
    line = torchrun(WORDS, num_processes=8, max_restarts=3, python="py")
    assert line == [
        "py", "-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=8", "--max-restarts=3", "--role=trainer",
        "--standalone", "-m", "puna.cli", *WORDS,
    ]  # fmt: skip


def test_several_machines_meet() -> None:
    line = torchrun(WORDS, num_processes=4, num_nodes=2, meeting=Meeting("node1", 29_401, "seven"))
    assert "--nnodes=2" in line
    assert line[line.index("--rdzv-backend=c10d") :][:3] == [
        "--rdzv-backend=c10d",
        "--rdzv-id=seven",
        "--rdzv-endpoint=node1:29401",
    ]
    assert "--standalone" not in line


def test_a_machine_says_its_own_address_and_whether_it_is_the_meeting_place() -> None:
    flags = flags_of_this_node(Meeting("127.0.0.1"))
    assert flags == ["--local-addr=127.0.0.1", "--rdzv-conf=is_host=1"]
    line = torchrun(WORDS, num_processes=1, num_nodes=2, meeting=Meeting("127.0.0.1"), of_node=flags)
    assert line[line.index("-m", 3) - 2 :][:3] == [*flags, "-m"]


def test_the_script_is_bash_and_its_dry_run_prints_a_line_for_each_node(tmp_path: Path) -> None:
    job = Job(num_nodes=3, gpus_per_node=8, time="1-12:00:00", account="herd", partition="high")
    text = script(["train", "a $(touch pwned) b.toml"], Path("runs/x"), job, 8, 2, tmp_path)
    assert bash(text, tmp_path, "-n").returncode == 0
    dry = bash(text, tmp_path, DRY_RUN="1")
    assert dry.stderr == ""
    lines = dry.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["node-1", "node-2", "node-3"]
    for line in lines:
        assert "--nnodes=3 --nproc-per-node=8 --max-restarts=2" in line
        assert "--rdzv-id=0 --rdzv-endpoint=node-1:29400" in line
        assert line.endswith("-m puna.cli train a $(touch pwned) b.toml")
    assert not list(tmp_path.rglob("pwned"))
    directives = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]
    assert {"nodes=3", "gpus-per-node=8", "time=1-12:00:00", "account=herd", "partition=high"} <= {*directives}
    assert {"job-name=puna-x", "ntasks-per-node=1", "signal=TERM@120", "output=runs/x/logs/slurm-%j.out"} <= {
        *directives
    }


def test_under_slurm_the_nodes_are_slurms(tmp_path: Path) -> None:
    text = script(WORDS, Path("runs/x"), Job(num_nodes=2), 1, 0, tmp_path)
    binary = tmp_path / "scontrol"
    binary.write_text('#!/bin/sh\n[ "$*" = "show hostnames llama[3-4]" ] && printf "llama3\\nllama4\\n"\n')
    binary.chmod(0o755)
    inside = {"SLURM_JOB_NODELIST": "llama[3-4]", "SLURM_JOB_ID": "77", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    lines = bash(text, tmp_path, DRY_RUN="1", **inside).stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["llama3", "llama4"]
    assert "--rdzv-id=77 --rdzv-endpoint=llama3:29400" in lines[1]


def test_the_line_is_srun_s(tmp_path: Path) -> None:
    """With a `srun` that says what it was given: words arrive whole."""
    text = script(WORDS, Path("runs/x"), Job(container="image:1"), 2, 0, tmp_path)
    binary = tmp_path / "srun"
    binary.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    binary.chmod(0o755)
    done = bash(text, tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    assert words[:4] == [
        "--kill-on-bad-exit=1",
        "--container-image=image:1",
        f"--container-mounts={tmp_path}:{tmp_path}",
        f"--container-workdir={tmp_path}",
    ]
    assert words[4] == "python"
    assert words[-2:] == WORDS
    assert (tmp_path / "runs" / "x" / "logs").is_dir()


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (Job(time="soon"), "--time 'soon' is not a time that Slurm takes. Write HH:MM:SS"),
        (Job(account="a b"), "--account 'a b' has a space in it"),
        (Job(partition="a\nb"), r"--partition 'a\nb' has a space in it"),
    ],
)
def test_what_slurm_would_not_take_is_refused(job: Job, words: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as refused:
        script(WORDS, Path("runs/x"), job, 1, 0, tmp_path)
    assert words in str(refused.value)


@pytest.mark.parametrize("time", ["30", "24:00:00", "30:00", "2-0", "2-12:30", ""])
def test_times_of_slurm(time: str, tmp_path: Path) -> None:
    assert ("#SBATCH --time=" in script(WORDS, Path("runs/x"), Job(time=time), 1, 0, tmp_path)) == bool(time)
