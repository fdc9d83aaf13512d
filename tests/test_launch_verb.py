"""`puna launch`: launch lines, batch scripts, and what is refused."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from puna import cli, launch, recipe
from puna.errors import PunaError, RecipeError


@pytest.fixture
def puna(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs one command in a scratch folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *words: CliRunner().invoke(cli.puna, ["launch", *words])


def test_a_dry_run_prints_the_line_of_each_node_and_writes_nothing(puna: Callable[..., Result], tmp_path: Path) -> None:
    done = puna("tiny", "--nodes", "2", "--endpoint", "n1:29500", "--dry-run", "--run.num_processes", "4")
    lines = done.stdout.splitlines()
    assert [line.split(": ")[0] for line in lines] == ["node-1", "node-2"]
    for line in lines:
        assert "--nnodes=2 --nproc-per-node=4 --max-restarts=0 --role=trainer" in line
        assert "--rdzv-endpoint=n1:29500 -m puna.cli train runs/tiny/launch/recipe.toml" in line
    assert not list(tmp_path.iterdir())


def test_slurm_writes_a_script_and_a_copy_of_the_recipe(puna: Callable[..., Result], tmp_path: Path) -> None:
    words = ["tiny", "--on", "slurm", "--nodes", "2", "--gpus", "4", "--account", "herd", "--train.lr", "0.5"]
    figures = json.loads(puna(*words, "--json").stdout)
    assert figures["submit"] == "sbatch runs/tiny/launch/train.sbatch"
    assert len(figures["lines"]) == 2
    script = tmp_path / figures["script"]
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    assert "#SBATCH --account=herd" in script.read_text(encoding="utf-8")
    dry = subprocess.run(["bash", str(script)], env={"DRY_RUN": "1"}, capture_output=True, text=True, check=True)
    assert dry.stdout.splitlines() == figures["lines"]
    kept = recipe.load(tmp_path / "runs" / "tiny" / "launch" / "recipe.toml").recipe
    assert kept == recipe.load("tiny", ["--train.lr", "0.5"]).recipe
    assert (tmp_path / "runs" / "tiny" / "logs").is_dir()


def test_a_dry_run_on_slurm_prints_the_same_lines(puna: Callable[..., Result], tmp_path: Path) -> None:
    words = ["tiny", "--on", "slurm", "--nodes", "3"]
    dry = puna(*words, "--dry-run").stdout.splitlines()
    assert not list(tmp_path.iterdir())
    assert dry == json.loads(puna(*words, "--json").stdout)["lines"]


def test_a_dry_run_on_ray_names_the_ranks(puna: Callable[..., Result]) -> None:
    lines = puna("tiny", "--on", "ray", "--nodes", "2", "--run.num_processes", "2", "--dry-run").stdout.splitlines()
    assert lines[3] == "rank 3: puna.run:work runs/tiny"


def test_torchrun_takes_over(puna: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(launch.os, "execv", lambda path, line: seen.append(line))
    with pytest.raises(AttributeError):  # in a real run execv does not return
        raise puna("tiny").exception or AttributeError
    assert seen[0][-4:] == ["-m", "puna.cli", "train", "runs/tiny/launch/recipe.toml"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--nodes", "2"], "2 machines have no place to meet. Give --endpoint HOST:PORT"),
        (["--nodes", "2", "--endpoint", ":1"], "--endpoint ':1' is not HOST:PORT. Write for instance node1:29400."),
        (["--endpoint", "a:b"], "--endpoint 'a:b' is not HOST:PORT"),
        (["--on", "slurm", "--time", "later"], "--time 'later' is not a time that Slurm takes"),
        (["--on", "slurm", "--run.dir", "my runs/x"], "--run.dir 'my runs/x' has a space in it"),
    ],
)
def test_mistakes(words: list[str], told: str, puna: Callable[..., Result]) -> None:
    error = puna("tiny", *words).exception
    assert isinstance(error, RecipeError | PunaError)
    assert told in str(error)
