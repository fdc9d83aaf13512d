"""A byte-level BPE trained on a corpus: Llama 3's pattern, its special tokens after the merges."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, models, pre_tokenizers, trainers

from puna.console import track
from puna.corpus import cache, rows
from puna.errors import TokenizerError
from puna.llama.shards import sha256_file, write_atomic
from puna.llama.tokenizer import BEGIN_OF_TEXT, NAMED_SPECIALS, Tokenizer, special_names
from puna.llama.tokenizer_json import PATTERN, byte_level

SMALL_VOCAB = 16_384
CODE = [Path(__file__), Path(rows.__file__)]


def default_num_special(vocab_size: int) -> int:
    """256 slots as in Llama 3; 16 (the named ones and four spare) below 16,384 ids, of which 256 would be a waste."""
    return 256 if vocab_size >= SMALL_VOCAB else 16


def train_tokenizer(corpus: Path, vocab_size: int, out: Path, num_special: int | None = None) -> dict[str, Any]:
    """Train a tokenizer on a corpus's training split into `out`: a .json file, or a folder that gets a tokenizer.json.

    vocab_size: all ids, the 256 bytes and `num_special` control tokens among them. A small corpus may have fewer pairs
    to merge; the report, kept beside the file as FILE.report.json, says which came out. Nothing is done where
    `out` already holds the result. Raises TokenizerError where the sizes do not fit, DataError without a corpus.
    """
    started, corpus, out = time.monotonic(), Path(corpus), Path(out)
    out = out if out.suffix == ".json" else out / "tokenizer.json"
    num_special = default_num_special(vocab_size) if num_special is None else num_special
    _check_sizes(vocab_size, num_special)
    source = rows.read_report(corpus)["files"]["train.jsonl"]["sha256"]
    options = {"vocab_size": vocab_size, "num_special": num_special, "tokenizers": tokenizers.__version__}
    wanted = cache.recipe(source, options, CODE)
    beside = out.with_name(out.name + ".report.json")
    made = cache.read_recipe(beside)
    current = cache.is_current(f"tokenizer {out}", out.parent, made, wanted)
    report = made if made is not None and current else _train(corpus, out, wanted)
    if not current:
        write_atomic(beside, json.dumps(report, indent=1).encode())
    return {**report, "up_to_date": current, "seconds": round(time.monotonic() - started, 2)}


def _check_sizes(vocab_size: int, num_special: int) -> None:
    if num_special < len(NAMED_SPECIALS):
        fix = f"Give at least {len(NAMED_SPECIALS)}: the chat formats need them."
        raise TokenizerError(f"num_special is {num_special}", fix)
    if vocab_size <= 256 + num_special:
        problem = f"A vocabulary of {vocab_size} has no room beside 256 bytes and {num_special} control tokens"
        raise TokenizerError(problem, f"Give a vocab_size above {256 + num_special}.")


def _train(corpus: Path, out: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    num_special = wanted["options"]["num_special"]
    num_documents = rows.read_report(corpus)["splits"]["train"]["documents"]
    texts = track(rows.texts(corpus, "train"), "training the tokenizer", num_documents)
    vocab, merges = _learn(texts, wanted["options"]["vocab_size"] - num_special)
    special = {name: len(vocab) + i for i, name in enumerate(special_names(num_special))}
    spec = byte_level(vocab, merges, special, BEGIN_OF_TEXT, ignore_merges=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, json.dumps(spec, ensure_ascii=False, indent=1).encode())
    return {
        **wanted,
        "vocab_size": len(vocab) + num_special,
        "num_merges": len(merges),
        "num_special": num_special,
        "tokenizer_hash": Tokenizer.load(out).hash,
        "files": {out.name: {"bytes": out.stat().st_size, "sha256": sha256_file(out)}},
    }


def _learn(texts: Iterator[str], size: int) -> tuple[dict[str, int], list[list[str]]]:
    """Bytes and merges, `size` pieces at most; a pair that occurs once is not merged."""
    bpe = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, min_frequency=2, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    model = json.loads(bpe.to_str())["model"]
    return model["vocab"], model["merges"]
