"""A run on a mixture of two sources: what it prints, records and evaluates, on one process and on two."""

import json
import shutil
import sysconfig
from pathlib import Path

import pytest
from pretraining import losses, train

from puna.corpus.build import build_corpus
from puna.corpus.tokenize import tokenize_corpus
from puna.errors import DataError
from puna.evals.suite import shards_folder
from puna.train.metrics import read_events

SHORT = ("--train.tokens", "6144", "--schedule.warmup_tokens", "1024", "--checkpoint.every", "6")


@pytest.fixture(scope="module")
def pair(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The shards of `json` and `email`, and with the same tokenizer those of `logging`."""
    folder = tmp_path_factory.mktemp("pair")
    shutil.copytree(Path(sysconfig.get_path("stdlib")) / "logging", folder / "source")
    build_corpus(str(folder / "source"), folder / "corpus", heldout=0.3)
    tokenize_corpus(folder / "corpus", shards.parent / "tokenizer.json", folder / "logging")
    return [shards, folder / "logging"]


def flag(pair: list[Path], *weights: float) -> tuple[str, str]:
    return "--data.sources", json.dumps([[str(path), weight] for path, weight in zip(pair, weights, strict=False)])


def test_figures_of_each_source(pair: list[Path], tmp_path: Path) -> None:
    assert train(tmp_path / "run", pair[0], *SHORT, *flag(pair, 3, 1)) == [0]
    events = read_events(tmp_path / "run")
    (start,) = [event for event in events if event["event"] == "start"]
    assert [(Path(s["source"]).name, s["share"], s["drawn_tokens"]) for s in start["sources"]] == [
        ("shards", 0.75, 4608),
        ("logging", 0.25, 1536),
    ]
    figures = [event for event in events if event["event"] == "eval"][-1]
    assert figures["loss"] == pytest.approx(0.75 * figures["loss_shards"] + 0.25 * figures["loss_logging"])
    assert figures["loss_shards"] != figures["loss_logging"]


def test_one_source_trains_as_path_does(pair: list[Path], tmp_path: Path) -> None:
    assert train(tmp_path / "path", pair[0], *SHORT) == [0]
    assert train(tmp_path / "sources", pair[1], *SHORT, *flag(pair, 0.5)) == [0]
    assert losses(tmp_path / "path") == losses(tmp_path / "sources")


@pytest.mark.slow
def test_two_processes_draw_the_same(pair: list[Path], tmp_path: Path) -> None:
    for size in (1, 2):
        assert train(tmp_path / f"{size}", pair[0], *SHORT, *flag(pair, 2, 1), size=size) == [0] * size
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "2"), rel=1e-5)


def test_evaluation_asks_which_source() -> None:
    recipe = {"data.path": "unread", "data.sources": [["a", 1.0], ["b", 2.0]]}
    with pytest.raises(DataError, match=r"run was trained on several sources: a, b\. Choose one with --data FOLDER"):
        shards_folder(Path("run"), recipe, None)
    assert shards_folder(Path("run"), recipe, Path("b")) == Path("b")
    assert shards_folder(Path("run"), {**recipe, "data.sources": [["a", 1.0]]}, None) == Path("a")
    assert shards_folder(Path("run"), {**recipe, "data.sources": []}, None) == Path("unread")
