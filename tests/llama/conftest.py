import sys
from pathlib import Path

import pytest

from puna.llama.tokenizer import Tokenizer

sys.path.append(str(Path(__file__).parents[1]))
from tiny_llama import tiny_tokenizer


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Tokenizer:
    """A byte-level tokenizer with Llama 3's special tokens and a few merges."""
    return tiny_tokenizer(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def llama3(data_dir) -> Tokenizer:
    """Llama 3's own tokenizer."""
    return Tokenizer.load(data_dir / "tok-llama3")
