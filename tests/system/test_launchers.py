"""The same recipe by torchrun, by Ray, and on two network namespaces that act as two machines: the same losses."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from pretraining import losses, train

STEPS = ("--train.tokens", "10240", "--checkpoint.every", "5", "--eval.tokens", "0")
ROOT = Path(__file__).parents[2]


def puna(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    given = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    line = [sys.executable, "-m", "puna.cli", *words]
    return subprocess.run(line, cwd=folder, env=given, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def straight(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of two processes of the local launcher's kind."""
    run = tmp_path_factory.mktemp("straight") / "run"
    assert train(run, shards, *STEPS, size=2) == [0, 0]
    return losses(run)


def flags(shards: Path) -> list[str]:
    return ["tiny", "--run.dir", "run", "--data.path", str(shards), *STEPS]


@pytest.mark.slow
def test_by_torchrun(shards: Path, straight: list[float], tmp_path: Path) -> None:
    done = puna(tmp_path, "launch", *flags(shards), "--run.num_processes", "2")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == straight


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("ray"), reason="ray is not installed (the extra `ray`)")
def test_by_ray(shards: Path, straight: list[float], tmp_path: Path) -> None:
    done = puna(tmp_path, "launch", *flags(shards), "--on", "ray", "--run.num_processes", "2", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == len(straight)
    assert losses(tmp_path / "run") == straight


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("ray"), reason="ray is not installed (the extra `ray`)")
def test_a_mistake_on_ray_is_told_as_elsewhere(shards: Path, tmp_path: Path) -> None:
    done = puna(
        tmp_path, "launch", *flags(shards), "--on", "ray", "--run.num_processes", "2", "--train.micro_batch", "8"
    )
    assert done.returncode == 2
    assert "do not split into micro-batches" in done.stderr


@pytest.fixture
def namespaces() -> Iterator[list[str]]:
    """Two network namespaces with a cable between them: 10.77.0.1 and 10.77.0.2."""
    names = [f"puna{os.getpid()}a", f"puna{os.getpid()}b"]
    if not shutil.which("ip") or subprocess.run(["ip", "netns", "add", names[0]], capture_output=True).returncode:
        pytest.skip("network namespaces need root and the program `ip`")
    try:
        for line in (
            f"netns add {names[1]}",
            f"link add puna0 netns {names[0]} type veth peer name puna0 netns {names[1]}",
            *(f"-n {name} addr add 10.77.0.{i}/24 dev puna0" for i, name in enumerate(names, start=1)),
            *(f"-n {name} link set {device} up" for name in names for device in ("lo", "puna0")),
        ):
            if (done := subprocess.run(["ip", *line.split()], capture_output=True, text=True)).returncode:
                pytest.skip(f"`ip {line}` is not permitted here: {done.stderr.strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.slow
def test_two_namespaces_are_two_machines(
    namespaces: list[str], shards: Path, straight: list[float], tmp_path: Path
) -> None:
    """The same command in each; they share nothing but the file system."""
    words = ["launch", *flags(shards), "--nodes", "2", "--endpoint", "10.77.0.1:29411"]
    given = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "puna.cli", *words]
    nodes = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, *line], cwd=tmp_path, env=given, stderr=subprocess.PIPE, text=True
        )
        for name in namespaces
    ]
    said = [node.communicate(timeout=120)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert losses(tmp_path / "run") == straight
