"""A small folder of token shards, made with the real writer."""

import random
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Bpe

from puna.llama.shards import ShardWriter
from puna.llama.tokenizer import Tokenizer

WORDS = ("def", "return", "self", "import", "os", "path", "α", "größer", "你好", "yield\n   ", "for", "in", "range")


def documents(seed: int, lengths: list[int]) -> list[str]:
    """Texts of so many words each."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=n)) for n in lengths]


TRAIN = documents(0, [40, 3, 120, 0, 60, 200])
HELDOUT = documents(1, [0, 5, 30, 11, 1, 12])


def write_tokenizer(file: Path, vocab_size: int) -> Tokenizer:
    """A byte-level BPE in tokenizer.json form."""
    specials = ["<|begin_of_text|>", "<|end_of_text|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe = Bpe(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        TRAIN, trainers.BpeTrainer(vocab_size=vocab_size - 2, initial_alphabet=alphabet, show_progress=False)
    )
    bpe.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    bpe.save(str(file))
    return Tokenizer.load(file)


@pytest.fixture(scope="session")
def kit() -> SimpleNamespace:
    """The texts behind the shards, and the maker of tokenizers."""
    return SimpleNamespace(train=TRAIN, heldout=HELDOUT, write_tokenizer=write_tokenizer)


@pytest.fixture(scope="session")
def shards_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of TRAIN and HELDOUT under a vocabulary of about 300 tokens."""
    folder = tmp_path_factory.mktemp("evals")
    tokenizer = write_tokenizer(folder / "tokenizer.json", 300)
    with ShardWriter(folder / "shards", tokenizer, shard_tokens=200) as writer:
        for split, texts in (("train", TRAIN), ("heldout", HELDOUT)):
            for text in texts:
                writer.add(split, tokenizer.encode(text), len(text.encode()))
    return folder / "shards"
