"""Which checkpoints stay, what a damaged one does to the others, and what `puna verify` says of them."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from puna import cli
from puna.errors import CheckpointError
from puna.train import checkpoint
from puna.train.config import CheckpointConfig
from puna.train.rows import RowStore
from puna.train.task import Cursor, Rows, State, Tensors
from puna.train.verify import lines, verify_run

Losses = st.dictionaries(st.integers(0, 200), st.none() | st.floats(0, 9), max_size=20)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"keep": 1}, {0, 60}),
        ({"keep": 2}, {0, 50, 60}),
        ({"keep": 1, "keep_best": True}, {0, 30, 60}),
        ({"keep": 1, "keep_every": 20}, {0, 20, 40, 60}),
        ({"keep": 9}, {0, 10, 20, 30, 40, 50, 60}),
    ],
)
def test_what_stays(settings: dict[str, int], wanted: set[int]) -> None:
    losses = {0: None, 10: 5.0, 20: 3.0, 30: 2.0, 40: None, 50: 2.0, 60: 4.0}
    assert checkpoint.kept(losses, CheckpointConfig(**settings)) == wanted


@given(Losses, st.integers(1, 5), st.booleans(), st.integers(0, 30))
def test_the_newest_always_stay_and_nothing_is_made_up(
    losses: dict[int, float | None], keep: int, keep_best: bool, keep_every: int
) -> None:
    stay = checkpoint.kept(losses, CheckpointConfig(keep=keep, keep_best=keep_best, keep_every=keep_every))
    newest = sorted(step for step in losses if step)[-keep:]
    assert set(newest) <= stay <= set(losses)
    known = [loss for loss in losses.values() if loss is not None]
    assert not (keep_best and known) or any(losses[step] == min(known) for step in stay)
    assert not keep_every or all(step in stay for step in losses if step % keep_every == 0)


def state(run: Path, fill: float) -> State:
    store = RowStore(run, "users")
    store.write("0", np.full((2, 2), fill))
    return {"weights": Tensors(lambda: {"a": torch.full((400, 400), fill)}), "users": Rows(store)}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with the checkpoints of steps 2 and 4 and a save that was cut short."""
    for step in (2, 4):
        checkpoint.save(tmp_path, state(tmp_path, step), Cursor(step, step), 2)
    (tmp_path / "checkpoints" / "step-00000006" / "tensors").mkdir(parents=True)
    return tmp_path


def damage(path: Path, act: Callable[[bytearray], None]) -> None:
    contents = bytearray(path.read_bytes())
    act(contents)
    path.write_bytes(contents)


def flip(contents: bytearray) -> None:
    contents[len(contents) // 2] ^= 1


@pytest.fixture
def puna(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Status, stdout and stderr of a command."""

    def command(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["puna", *words])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return left.value.code, *capsys.readouterr()

    return command


def test_verify_says_ok(run: Path, puna: Callable[..., tuple[int, str, str]]) -> None:
    status, out, _ = puna("verify", str(run))
    assert status == 0
    first, second, cut = out.splitlines()
    assert first.startswith("step 2  ok  3 files, ")
    assert second.startswith("step 4  ok")
    assert cut == "step-00000006  incomplete: a save was cut short; it is passed over"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("checkpoints/step-00000002/tensors/__0_0.distcp", "__0_0.distcp has other contents than were saved"),
        ("rows/users/0.00000001.npy", "0.00000001.npy has other contents"),
        ("checkpoints/step-00000002/manifest.json", "manifest.json"),
    ],
)
def test_verify_names_what_is_damaged_and_ends_with_2(
    name: str, words: str, run: Path, puna: Callable[..., tuple[int, str, str]]
) -> None:
    damage(run / name, flip)
    status, out, _ = puna("verify", str(run), "--json")
    figures = json.loads(out)
    assert (status, figures["ok"], figures["run"]) == (2, False, str(run))
    assert [(each["step"], each["ok"]) for each in figures["checkpoints"]] == [(2, False), (4, True)]
    assert words in figures["checkpoints"][0]["damaged"][0]
    assert figures["incomplete"] == ["step-00000006"]
    assert puna("verify", str(run), "--step", "4")[0] == 0
    status, out, _ = puna("verify", str(run), "--step", "2")
    assert status == 2
    assert out.startswith("step 2  DAMAGED")
    assert words in out


def test_large_files_can_be_known_by_their_size(run: Path) -> None:
    path = run / "checkpoints/step-00000004/tensors/__0_0.distcp"
    damage(path, flip)
    checkpoint.verify(run, 4, hash_up_to=path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp has other contents"):
        checkpoint.verify(run, 4, hash_up_to=path.stat().st_size)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp should have \d+ bytes and has \d+"):
        checkpoint.verify(run, 4, hash_up_to=0)


def test_a_checkpoint_that_retention_takes_away_meanwhile_is_no_damage(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = checkpoint.damages

    def taken_away(folder: Path, manifest: checkpoint.Manifest, **words: float) -> object:
        if manifest.cursor.units == 2:
            checkpoint.remove(folder / "checkpoints" / "step-00000002")
        return real(folder, manifest, **words)

    monkeypatch.setattr("puna.train.verify.damages", taken_away)
    figures = verify_run(run)
    assert [each["step"] for each in figures["checkpoints"]] == [4]
    assert figures["ok"]
    assert lines(figures)[0].startswith("step 4  ok")


@pytest.mark.parametrize("step", [None, 3])
def test_nothing_to_verify_is_said(step: int | None, run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "none" if step is None else run
    wanted = "no complete checkpoint. Steps that are there: none" if step is None else "of step 3. .*: 2, 4"
    with pytest.raises(CheckpointError, match=wanted):
        verify_run(folder, step)


def test_a_damaged_older_manifest_stops_no_save_and_costs_no_row_file(run: Path) -> None:
    damage(run / "checkpoints/step-00000002/manifest.json", flip)
    checkpoint.save(run, state(run, 8), Cursor(8, 8), 3)
    assert checkpoint.complete_steps(run) == [2, 4, 8]
    assert (run / "rows/users/0.00000001.npy").exists(), "step 2 may name it"
    checkpoint.verify(run, 4)
    checkpoint.save(run, state(run, 9), Cursor(9, 9), 1)
    assert checkpoint.complete_steps(run) == [9]
    assert [path.name for path in (run / "rows/users").iterdir()] == ["0.00000004.npy"]
