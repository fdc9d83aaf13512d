"""A random Llama of a few thousand parameters and a tokenizer trained on a few lines."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Trainable

from puna.engine.generator import Generator
from puna.llama.config import LlamaConfig
from puna.llama.model import Llama
from puna.llama.tokenizer import NAMED_SPECIALS, PATTERN, Tokenizer

LINES = ["the llama eats grass on the high plateau", "def add(a, b):\n    return a + b\n", "Ñandú, ¿qué? 日本語 🦙🦙"]


def train_tokenizer(folder: Path) -> Tokenizer:
    """Byte-level BPE of some 300 tokens with Llama 3's special tokens."""
    bpe = Trainable(models.BPE())
    words = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        LINES * 8,
        trainers.BpeTrainer(
            vocab_size=340, special_tokens=list(NAMED_SPECIALS), show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return Tokenizer.load(folder)


def tiny_config(vocab_size: int) -> LlamaConfig:
    return LlamaConfig(
        num_layers=2, dim=32, ffn_dim=64, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=vocab_size, max_seq_len=96
    )


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def model(tokenizer) -> Llama:
    """Weights wide enough that every position has favourites; a few ids more than the tokenizer has."""
    model = Llama(tiny_config(tokenizer.vocab_size + 12))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3, generator=generator)
    return model


@pytest.fixture
def generator(model, tokenizer) -> Generator:
    return Generator(model, tokenizer)
