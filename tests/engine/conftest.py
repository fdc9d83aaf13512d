"""A tiny Llama and its tokenizer."""

import sys
from pathlib import Path

import pytest
import torch

from puna.engine.generator import Generator
from puna.llama.model import Llama
from puna.llama.tokenizer import Tokenizer

sys.path.append(str(Path(__file__).parents[1]))
from tiny_llama import tiny_model, tiny_tokenizer


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def model(tokenizer) -> Llama:
    return tiny_model(tokenizer)


@pytest.fixture
def generator(model, tokenizer) -> Generator:
    return Generator(model, tokenizer)
