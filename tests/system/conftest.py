"""Token shards of real text that every machine with Python has, small enough to train on in seconds."""

import sysconfig
from pathlib import Path

import pytest

from puna.corpus.bpe import train_tokenizer
from puna.corpus.build import build_corpus
from puna.corpus.tokenize import tokenize_corpus


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the `json` and `email` packages of the standard library, vocabulary 512."""
    folder = tmp_path_factory.mktemp("data")
    source = folder / "source"
    source.mkdir()
    for package in ("json", "email"):
        for path in sorted((Path(sysconfig.get_path("stdlib")) / package).glob("*.py")):
            (source / f"{package}_{path.name}").write_bytes(path.read_bytes())
    build_corpus(str(source), folder / "corpus", heldout=0.1)
    train_tokenizer(folder / "corpus", 512, folder / "tokenizer.json")
    tokenize_corpus(folder / "corpus", folder / "tokenizer.json", folder / "shards")
    return folder / "shards"
