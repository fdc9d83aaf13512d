"""Token shards of real text that every machine with Python has, small enough to train on in seconds; a browser."""

import shutil
import sysconfig
from pathlib import Path

import pytest

from puna.corpus.bpe import train_tokenizer
from puna.corpus.build import build_corpus
from puna.corpus.tokenize import tokenize_corpus

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


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


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window, or a skip that says what is missing."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()
