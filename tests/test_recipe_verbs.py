"""`puna recipe init` and `puna recipe diff` as typed."""

import json
import sys
from collections.abc import Callable

import pytest

from puna import cli, recipe


@pytest.fixture
def puna(monkeypatch, capsys, tmp_path) -> Callable[..., tuple[int, str, str]]:
    """Runs one command in a scratch folder: status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["puna", *words])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return left.value.code, *capsys.readouterr()

    return run


def test_init_then_load_then_diff(puna, tmp_path):
    assert puna("recipe", "init") == (0, "mine.toml\n", "")
    assert recipe.load(tmp_path / "mine.toml").recipe.model == recipe.load("demo").recipe.model
    status, out, err = puna("recipe", "diff", "demo", "mine.toml")
    assert (status, err) == (0, "")
    assert [line.split() for line in out.splitlines()] == [
        ["key", "demo", "layer", "mine.toml", "layer"],
        ["run.dir", '"runs/demo"', "recipe", "demo", '"runs/mine"', "file", "mine.toml"],
    ]
    assert puna("recipe", "diff", "mine.toml", "mine.toml")[1] == "no difference\n"


def test_init_into_a_new_folder(puna, tmp_path):
    assert puna("recipe", "init", "llama3.2-1b", "--out", "new/own.toml")[:2] == (0, "new/own.toml\n")
    assert recipe.load(tmp_path / "new/own.toml").recipe.run.dir == "runs/own"


def test_init_does_not_overwrite(puna, tmp_path):
    (tmp_path / "mine.toml").write_text("mine")
    status, out, err = puna("recipe", "init")
    assert (status, out) == (2, "")
    assert err == "error: mine.toml is already there. Name another file with --out, or remove it.\n"


def test_diff_as_json(puna):
    records = json.loads(puna("recipe", "diff", "llama3-8b", "llama3.1-8b", "--json")[1])
    assert {"key": "run.dir", "a": {"value": "runs/llama3-8b", "layer": "recipe llama3-8b"}}.items() <= records[
        0
    ].items()
    assert json.loads(puna("recipe", "diff", "tiny", "tiny", "--json")[1]) == []


def test_diff_of_a_run_directory_and_of_nothing(puna, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.toml").write_text(recipe.load("tiny", ["--train.lr", "0.5"]).text)
    (record,) = json.loads(puna("recipe", "diff", "tiny", "run", "--json")[1])
    assert (record["key"], record["a"]["value"], record["b"]["value"]) == ("train.lr", 0.003, 0.5)
    assert puna("recipe", "diff", "tiny", "gone.toml")[2].startswith("error: no recipe at gone.toml.")
