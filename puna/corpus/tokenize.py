"""A corpus becomes token shards."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from puna.console import bar, err
from puna.corpus import cache, rows
from puna.errors import DataError
from puna.llama import shards
from puna.llama.tokenizer import Tokenizer

BATCH_CHARS = 1 << 21  # texts that are encoded at a time
CODE = [Path(__file__), Path(rows.__file__), Path(shards.__file__)]


def tokenize_corpus(corpus: Path, tokenizer: Path, out: Path) -> dict[str, Any]:
    """Encode both splits of a corpus into a folder of token shards; returns counts, `up_to_date` and `seconds`.

    Nothing is done where `out` already holds the result. Raises DataError and TokenizerError.
    """
    started, corpus, out = time.monotonic(), Path(corpus), Path(out)
    files = rows.read_report(corpus)["files"]
    loaded = Tokenizer.load(tokenizer)
    inputs = " ".join(files[f"{split}.jsonl"]["sha256"] for split in rows.SPLITS)
    wanted = cache.recipe(inputs, {"tokenizer": loaded.hash}, CODE)
    made = _made(out)
    current = cache.is_current(f"shards {out}", out, made, wanted)
    if not current:
        _encode(corpus, loaded, out, wanted)
    manifest = shards.read_manifest(out)
    splits = {
        split: {**facts, "bytes_per_token": round(facts["num_bytes"] / facts["num_tokens"], 4)}
        for split, facts in manifest["splits"].items()
    }
    facts = {name: manifest[name] for name in ("dtype", "vocab_size", "tokenizer_hash", "bos", "eos")}
    seconds = round(time.monotonic() - started, 2)
    return {"key": wanted["key"], **facts, "splits": splits, "up_to_date": current, "seconds": seconds}


def _made(out: Path) -> dict[str, Any] | None:
    """The recipe that the shards in `out` were made from, where there are whole ones made by this module."""
    if not (out / shards.MANIFEST).is_file():
        return None
    try:
        manifest = shards.read_manifest(out)
    except DataError as error:
        err.print(f"shards {out}: making them again, because {error.problem}", markup=False, soft_wrap=True)
        return None
    return {**manifest["source"], "files": manifest["files"]} if "key" in manifest["source"] else None


def _encode(corpus: Path, tokenizer: Tokenizer, out: Path, source: dict[str, Any]) -> None:
    counts = rows.read_report(corpus)["splits"]
    with shards.ShardWriter(out, tokenizer, source) as writer, bar() as progress:
        for split in rows.SPLITS:
            task = progress.add_task(f"tokenizing {split}", total=counts[split]["documents"])
            for texts in _batches(rows.texts(corpus, split)):
                for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
                    writer.add(split, ids, len(text.encode()))
                progress.advance(task, len(texts))


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    """Lists of texts that end with the one that reaches BATCH_CHARS."""
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if sum(map(len, batch)) >= BATCH_CHARS:
            yield batch
            batch = []
    if batch:
        yield batch
