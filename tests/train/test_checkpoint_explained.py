"""`puna resume --explain`: what would be restored, resharded, reset and redone, without touching anything."""

import json
from pathlib import Path

import pytest
import toys

from puna import cli, resume
from puna.errors import CheckpointError
from puna.train.config import CheckpointConfig, EvalConfig, LoopConfig, RunConfig
from puna.train.explain import explain, lines
from puna.train.loop import Run
from puna.train.metrics import append_event, read_events
from puna.train.task import Task


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Six units of a regression, a checkpoint every two; then two that no checkpoint knows, and a save cut short."""
    train(toys.Regression(6), tmp_path)
    for step in (7, 8):
        append_event(tmp_path, {"event": "step", "step": step, "loss": 1.0, "step_s": 1.5, "data_wait_s": 0.5})
    (tmp_path / "checkpoints" / "step-00000008").mkdir()
    return tmp_path


def train(task: Task, folder: Path) -> None:
    config = LoopConfig(
        run=RunConfig(tensorboard=False, device="cpu"), checkpoint=CheckpointConfig(every=2), eval=EvalConfig(tokens=0)
    )
    Run(task, folder, config).go()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_number_of_processes(run: Path) -> None:
    before = contents(run)
    told = explain(run, 1, 7, {})
    assert contents(run) == before, "nothing is touched"
    json.dumps(told)
    assert told["checkpoint"] == str(run / "checkpoints" / "step-00000006")
    assert told["older_checkpoints"] == [4]
    assert told["cursor"] == {"step": 6, "tokens": 96}
    assert told["data"] == "96 tokens into the order of seed 7"
    assert told["restored"] == {
        "model": "4 tensors, 65 numbers",
        "optim": "12 tensors, 134 numbers",
        "average": "4 tensors, 65 numbers",
        "average.count": "in the manifest",
    }
    assert told["resharded"] == {}
    assert "the same numbers are drawn" in told["reset"]["random generators"]
    assert told["redone"] == {"steps": 2, "seconds": 4.0}
    assert told["passed_over"] == ["step-00000008"]


def test_another_number_of_processes(run: Path) -> None:
    told = explain(run, 4, 7, {"run.num_processes": (1, 4)})
    assert set(told["resharded"]) == {"model", "optim", "average"}
    assert told["resharded"]["model"] == "from 1 to 4 ranks, cut anew"
    assert "dropout falls elsewhere" in told["reset"]["random generators"]
    said = lines(told)
    assert "cursor       step 6, 96 tokens" in said
    assert "resharded    model: from 1 to 4 ranks, cut anew" in said
    assert "changed      run.num_processes: 1 -> 4" in said
    assert "redone       2 steps after the checkpoint (4.0 s)" in said
    assert said[-1] == "passed over  step-00000008: a save was cut short"


def test_torchrun_says_how_many_there_are(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert explain(run, 1, 7, {})["resharded"]["model"] == "from 1 to 2 ranks, cut anew"


def test_the_explained_is_what_happens(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = explain(run, 1, 7, {})
    train(toys.Regression(8), run)
    resumed = [event for event in read_events(run) if event["event"] == "resume"][-1]
    assert (resumed["step"], resumed["tokens"]) == (told["cursor"]["step"], told["cursor"]["tokens"])
    assert f"{', '.join(told['restored'])}, saved by 1 processes" in capsys.readouterr().err.replace(
        "optim.adamw", "optim"
    )


def test_rows_and_passes_are_counted(tmp_path: Path) -> None:
    train(toys.Table(str(tmp_path), 4), tmp_path)
    append_event(tmp_path, {"event": "start", "num_train_tokens": 100})
    told = explain(tmp_path, 1, 0, {})
    assert told["restored"] == {"entities": "4 partitions, 6,656 bytes"}
    assert told["data"] == "128 tokens into the order of seed 0: pass 2, 28.0% through"


def test_a_run_without_a_checkpoint_starts_anew(tmp_path: Path) -> None:
    told = explain(tmp_path, 1, 0, {})
    assert told["checkpoint"] is None
    assert lines(told) == [f"{tmp_path} has no complete checkpoint: the run starts from its beginning"]


def test_a_damaged_checkpoint_is_named(run: Path) -> None:
    path = run / "checkpoints" / "step-00000006" / "tensors" / ".metadata"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"\.metadata should have \d+ bytes and has \d+"):
        explain(run, 1, 7, {})


def test_a_folder_that_holds_no_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        resume.explain(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} holds no run: there is no {tmp_path}/recipe.toml. Give a folder that `puna train` has written."
    )


def test_the_verb_explains_and_trains_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told, asked = explain(run, 1, 7, {}), []
    monkeypatch.setattr(resume, "explain", lambda *words: asked.append(words) or told)
    monkeypatch.setattr(resume, "resume", lambda *words: asked.append(words) or {"steps": 3})

    def puna(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["puna", "resume", str(run), *words])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == 0
        return capsys.readouterr().out

    assert puna("--explain", "--run.num_processes", "4") == "\n".join(lines(told)) + "\n"
    assert json.loads(puna("--explain", "--json")) == told
    assert json.loads(puna("--json", "--checkpoint.keep", "1")) == {"steps": 3}
    assert asked == [(run, ("--run.num_processes", "4")), (run, ()), (run, ("--checkpoint.keep", "1"))]
