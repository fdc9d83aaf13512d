"""What a run is told to take before it starts, and what it says when it is refused memory. Nothing is mocked."""

import errno
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from puna import predicted
from puna.corpus.bpe import train_tokenizer
from puna.corpus.build import build_corpus
from puna.corpus.tokenize import tokenize_corpus
from puna.errors import OutOfMemory
from puna.recipe import Recipe, load
from puna.report import write_report
from puna.train import hardware
from puna.train.checkpoint import complete_steps
from puna.train.hardware import Hardware, Kernels, Table
from puna.train.mesh import Compute, Mesh
from puna.train.metrics import read_events
from puna.train.out_of_memory import is_out_of_memory, kernel_kills, limit_bytes

CPU = torch.device("cpu")
GROUP = Path("/sys/fs/cgroup/memory")


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few thousand tokens of this file's neighbours."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "source").mkdir()
    for path in sorted(Path(__file__).parent.glob("test_*.py"))[:6]:
        (folder / "source" / path.name).write_bytes(path.read_bytes())
    build_corpus(str(folder / "source"), folder / "corpus", heldout=0.2)
    train_tokenizer(folder / "corpus", 300, folder / "tokenizer.json")
    tokenize_corpus(folder / "corpus", folder / "tokenizer.json", folder / "shards")
    return folder / "shards"


LIMITED = """
import re, resource, puna.run
from puna.cli import main
held = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (held + {more}, held + {more}))
print("limit", held + {more}, flush=True)
main()
"""


def train(run: Path, shards: Path, *words: str, more: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """`puna train tiny`; with an address space of `more` bytes beyond the libraries, if any."""
    settings = {
        "run.dir": run, "data.path": shards, "eval.tokens": 0, "train.batch_tokens": 65536, "train.tokens": 65536,
        "schedule.warmup_tokens": 0, "checkpoint.initial": "true", "checkpoint.asynchronous": "false",
    }  # fmt: skip
    named = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
    code = LIMITED.format(more=more) if more else "from puna.cli import main; main()"
    command = [sys.executable, "-c", code, "train", "tiny", *named, *words]
    return subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment
    )


def test_a_run_that_is_refused_memory_says_what_it_needs(tmp_path: Path, shards: Path) -> None:
    """The kernel really refuses: the address space has 450 MB more than the libraries take, and 790 are needed."""
    nothing = str(tmp_path / "config")
    ended = train(tmp_path / "run", shards, "--train.micro_batch", "512", more=450 << 20, XDG_CONFIG_HOME=nothing)
    assert ended.returncode == OutOfMemory.exit_code, ended.stderr
    assert "no prediction: this machine has not been measured. `puna doctor` does it in seconds." in ended.stderr
    assert not [event for event in read_events(tmp_path / "run") if event["event"] == "prediction"]
    assert "Traceback" not in ended.stderr
    words, limit = ended.stderr.replace("\n", " "), int(ended.stdout.split()[1])
    assert "rank 0 was refused" in words
    assert f"{limit / 1e9:.2f} GB" in words
    assert "train.micro_batch 256 instead of 512" in words
    assert "The checkpoint of step 0 is as it was; the same command resumes from it." in words
    stop = read_events(tmp_path / "run")[-1]
    assert (stop["event"], stop["error"], stop["step"]) == ("stop", "OutOfMemory", 0)
    assert stop["reason"] in words
    assert complete_steps(tmp_path / "run") == [0]


@pytest.mark.slow
def test_the_remedy_helps(tmp_path: Path, shards: Path) -> None:
    for size, code in ((512, OutOfMemory.exit_code), (32, 0)):
        ended = train(tmp_path / "run", shards, "--train.micro_batch", str(size), more=450 << 20)
        assert ended.returncode == code, ended.stderr
    assert "resumed from step 0" in ended.stderr


@pytest.mark.slow
def test_a_rank_that_the_kernel_ends_for_lack_of_memory_is_told_of(tmp_path: Path, shards: Path) -> None:
    """Under a control group of 900 MB, of which two processes need twice as much."""
    line = next((x for x in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in x), "")
    group = GROUP / line.rpartition(":")[2].lstrip("/") / f"puna-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text("900M")
    except OSError as error:
        pytest.skip(f"no control group of version 1 may be made here: {error}")
    before = kernel_kills()
    code = f"import os; open('{group}/cgroup.procs', 'w').write(str(os.getpid())); from puna.cli import main; main()"
    settings = {
        "run.dir": tmp_path / "run",
        "data.path": shards,
        "train.batch_tokens": 131072,
        "train.micro_batch": 512,
    }
    settings |= {"train.tokens": 131072, "run.num_processes": 2, "schedule.warmup_tokens": 0, "eval.tokens": 0}
    words = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
    ended = subprocess.run([sys.executable, "-c", code, "train", "tiny", *words], capture_output=True, text=True)
    group.rmdir()
    assert kernel_kills() > before
    assert ended.returncode == OutOfMemory.exit_code, ended.stderr
    assert "The kernel ended it for lack of memory. Does not fit: needs" in ended.stderr.replace("\n", " ")
    assert read_events(tmp_path / "run")[-1]["error"] == "OutOfMemory"


def caught(call) -> BaseException:
    with pytest.raises(BaseException) as error:  # noqa: PT011
        call()
    return error.value


def test_what_is_a_refusal_of_memory() -> None:
    """As torch, Python and the system raise it here."""
    assert is_out_of_memory(caught(lambda: torch.empty(1 << 50)))
    assert is_out_of_memory(caught(lambda: bytearray(1 << 60)))
    assert is_out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert not is_out_of_memory(caught(lambda: torch.ones(2, 3) @ torch.ones(2, 3)))
    assert not is_out_of_memory(OSError(errno.ENOENT, "No such file"))
    assert predicted._asked(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")) == "2,147 MB"
    assert predicted._asked(caught(lambda: torch.empty(1 << 50, dtype=torch.uint8))) == "1,125,899,907 MB"


def test_the_diagnosis_never_raises(tmp_path: Path) -> None:
    recipe: Recipe = load("tiny", ["--mesh.dp_replicate", "3"]).recipe
    told = predicted.diagnosis(recipe, tmp_path, 2, CPU)
    assert told.startswith("More is not known (RecipeError: the mesh dp_replicate 3 does not multiply")
    assert told.endswith("No checkpoint was saved yet.")


def test_every_remedy_fits_and_may_be_changed_in_a_run_that_resumes(monkeypatch: pytest.MonkeyPatch) -> None:
    from puna.run import FREE_TO_CHANGE

    recipe = load("tiny", ["--train.batch_tokens", "131072", "--train.micro_batch", "512"]).recipe
    room = predicted.memory(recipe, {"dp_replicate": 1, "dp_shard": 1}, 4, CPU).total // 2
    monkeypatch.setattr(predicted, "available", lambda device, num_ranks: room)
    ways = predicted.remedies(recipe, 1, CPU, 4)
    assert len(ways) == 3
    assert all(way["need_gb"] * 1e9 <= room for way in ways)
    assert all(key.startswith(FREE_TO_CHANGE) for way in ways for key in re.findall(r"\w+\.\w+ ", way["change"]))
    told = predicted.diagnosis(recipe, Path("nowhere"), 1, CPU)
    assert f"Does not fit: needs {2 * room / 1e9:.2f} GB of {room / 1e9:.2f} GB" in told
    assert "activations" in told


def test_what_this_job_may_hold_is_less_under_a_limit() -> None:
    before, unlimited = resource.getrlimit(resource.RLIMIT_AS), limit_bytes()
    assert 0 < limit_bytes() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert limit_bytes(4) == limit_bytes() // 4
    below = min(limit_bytes() - 1, 1 << 40)
    resource.setrlimit(resource.RLIMIT_AS, (below, before[1]))
    try:
        assert limit_bytes() == below
        assert limit_bytes(2) == min(below, unlimited // 2)
        assert limit_bytes(10**9) < 1000  # a share of the machine's, which is less
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def measured_machine(folder: Path) -> Path:
    """A configuration folder with the entry that `puna doctor` would leave."""

    def table(num_axes: int) -> Table:
        return Table(axes=((64, 4096),) * num_axes, seconds=(1e-4,) * 2**num_axes)

    axes = {"product": 3, "attention": 2, "lookup": 2, "norm": 1, "turn": 1, "gate": 1, "unit": 1}
    tables = {name + way: table(num) for name, num in axes.items() for way in ("", "_back")}
    tables |= {name: table(1) for name in ("add", "scale", "softmax", "adamw", "fresh")}
    for kind in ("none", "selective", "full"):
        tables[f"blocks_{kind}"] = Table(axes=((1, 2),), seconds=(0.01, 0.02))
    timed = [
        Kernels(num_processes=n, num_threads=1, tables=tables, code_bytes=3 * 10**8, runtime_bytes=10**7, slack=0.5)
        for n in (1, 2)
    ]
    rates = {"fp32": 5e10, "bf16": 1e10}
    entry = Hardware(
        num_cores=2, memory=8 * 10**9, matrix_flops=rates, memory_bandwidth={"fp32": 1e10}, kernels=tuple(timed),
        link_latency=1e-4, link_bandwidth=1e9,
    )  # fmt: skip
    hardware.write(entry, folder / "puna" / "hardware" / "this-machine.toml")
    return folder


def test_a_prediction_is_of_the_kernels_that_were_timed(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(measured_machine(tmp_path)))
    recipe = load("tiny", ["--data.path", str(shards)]).recipe
    place = Mesh(CPU, 0, 1, {"dp_replicate": 1, "dp_shard": 1, "pp": 1, "cp": 1, "tp": 1}, None)  # type: ignore[arg-type]
    told = predicted.predict(recipe, place, Compute(torch.float32, "asked", 1e10))
    assert told
    assert told["low"] < told["seconds"] < told["high"]
    assert told["tokens_per_s"] == pytest.approx(1024 / told["seconds"])
    assert told["memory_bytes"] == sum(told["memory"].values()) > 3e8
    twice = recipe.model_copy(update={"train": recipe.train.model_copy(update={"batch_tokens": 2048})})
    more = predicted.predict(twice, place, Compute(torch.float32, "asked", 1e10))
    assert more
    assert 1.5 * told["seconds"] < more["seconds"] < 2.1 * told["seconds"]
    half = recipe.model_copy(update={"train": recipe.train.model_copy(update={"dtype": "bf16"})})
    assert predicted.predict(half, place, Compute(torch.bfloat16, "asked", 1e10)) is None
    assert "no prediction: the kernels of this job (bf16) were not timed" in capsys.readouterr().err.replace("\n", " ")
    ways = predicted.remedies(recipe, 1, CPU, 4)
    assert ways
    assert all(way["device_time"] is not None for way in ways)


@pytest.mark.slow
def test_a_layout_that_was_searched_becomes_a_recipe_that_runs_beside_its_prediction(
    tmp_path: Path, shards: Path
) -> None:
    """On two processes of this machine: `puna plan search --emit`, `puna train`, the report's panel."""
    variables = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CONFIG_HOME": str(measured_machine(tmp_path / "config"))}
    found, run = tmp_path / "found.toml", tmp_path / "run"

    def puna(*words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "puna.cli", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, env=variables)

    searched = puna("plan", "search", "tiny", "--gpu", "this-machine", "--gpus", 2, "--emit", found)
    assert searched.returncode == 0, searched.stderr
    loaded = load(str(found)).recipe
    assert (loaded.run.num_processes, loaded.train.dtype) == (2, "fp32")
    ended = puna("train", found, "--run.dir", run, "--data.path", shards, "--train.tokens", 3072, "--eval.tokens", 0)
    assert ended.returncode == 0, ended.stderr
    (told,) = (event for event in read_events(run) if event["event"] == "prediction")
    assert told["low"] < told["seconds"] < told["high"]
    assert told["tokens_per_s"] == pytest.approx(told["batch_tokens"] / told["seconds"])
    assert told["memory_bytes"] == sum(told["memory"].values())
    text = write_report(run).read_text()
    assert "Predicted and measured" in text
