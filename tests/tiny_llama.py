"""A random Llama of a few thousand parameters and a tokenizer trained on a few lines, for tests of generation."""

import json
from pathlib import Path

import torch
from tokenizers import Regex, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Trainable

from puna.llama.config import LlamaConfig
from puna.llama.model import Llama
from puna.llama.tokenizer import BEGIN_OF_TEXT, Tokenizer, special_names
from puna.llama.tokenizer_json import PATTERN, byte_level

LINES = ["the llama eats grass on the high plateau", "def add(a, b):\n    return a + b\n", "Ñandú, ¿qué? 日本語 🦙🦙"]
NUM_SPECIAL = 12


def tiny_tokenizer(folder: Path, vocab_size: int = 340) -> Tokenizer:
    """Byte-level BPE with Llama 3's special tokens, written to `folder`."""
    bpe = Trainable(models.BPE())
    words = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    size = vocab_size - NUM_SPECIAL
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(LINES * 8, trainer)
    learnt = json.loads(bpe.to_str())["model"]
    special = {name: size + i for i, name in enumerate(special_names(NUM_SPECIAL))}
    spec = byte_level(learnt["vocab"], learnt["merges"], special, BEGIN_OF_TEXT, ignore_merges=False)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return Tokenizer.load(folder)


def tiny_model(tokenizer: Tokenizer) -> Llama:
    """Weights wide enough that every position has favourites; a few ids more than the tokenizer has."""
    model = Llama(
        LlamaConfig(
            num_layers=2,
            dim=32,
            ffn_dim=64,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            max_seq_len=96,
            vocab_size=tokenizer.vocab_size + 12,
        )
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3, generator=generator)
    return model
