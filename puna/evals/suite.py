"""`puna eval`: bits per byte of a checkpoint on held-out text, beside gzip, xz and a 5-gram model."""

import hashlib
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from puna.console import err
from puna.errors import CheckpointError, DataError
from puna.evals.bits import bits_per_byte, text
from puna.evals.compressors import gzip_bits_per_byte, xz_bits_per_byte
from puna.evals.ngram import NGram
from puna.llama import hub
from puna.llama.shards import Shards, read_manifest, write_atomic
from puna.llama.tokenizer import Tokenizer
from puna.train import checkpoint
from puna.train.metrics import append_event

MAX_CONTEXT = 8_192
NGRAM_ORDER, NGRAM_TOKENS = 5, 50_000_000
BASELINES = "baselines.json"


def evaluate(
    path: Path,
    data: Path | None = None,
    step: int | None = None,
    baselines: bool = True,
    context: int | None = None,
    stride: int | None = None,
) -> dict[str, Any]:
    """Score a run directory or a Hugging Face folder on the held-out split of token shards.

    data: the shards; a run's own (data.path of its recipe) where None. step: a run's checkpoint, the newest where None.
    context: tokens of one window; where None, the longest sequence the run trained on, or the model's up to 8,192.
    stride: half the context where None. Returns bits_per_byte, num_bytes, num_tokens, step, seconds and `protocol`, and
    with baselines gzip_, xz_ and ngram_bits_per_byte. A run gets the figures as an event as well. Raises DataError and
    CheckpointError.
    """
    began, path = time.monotonic(), Path(path)
    recipe = read_recipe(path)
    shards = Shards(shards_folder(path, recipe, data), "heldout")
    if recipe is not None:
        step = checkpoint.read_manifest(path, step).cursor.units
    loaded = hub.load(path, step=step)
    check_tokenizer(loaded, shards, path)
    model = loaded.model.to("cuda" if torch.cuda.is_available() else "cpu")
    if context is None:
        context = min(loaded.config.max_seq_len, MAX_CONTEXT) if recipe is None else trained_context(recipe)
    if stride is None:
        stride = max(context // 2, 1)
    scored = bits_per_byte(model, shards, context=context, stride=stride)
    result: dict[str, Any] = {
        key: scored[key] for key in ("bits_per_byte", "nats_per_token", "num_bytes", "num_tokens")
    }
    if baselines:
        result |= cached_baselines(shards.folder)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    card = protocol(shards, context, stride, dtype)
    result |= {"step": step, "seconds": time.monotonic() - began, "protocol": card}
    if recipe is not None:
        append_event(path, {"event": "eval", "split": "heldout", **result})
    return result


def protocol(shards: Shards, context: int, stride: int, dtype: str) -> dict[str, Any]:
    """What another evaluation must share to be comparable."""
    return {
        "split": shards.split,
        "shards_hash": content_hash(shards.folder),
        "tokenizer_hash": shards.tokenizer_hash,
        "bos": shards.bos,
        "eos": shards.eos,
        "scored": "every token but BOS, each document alone; EOS included",
        "bytes": "UTF-8 text of the documents",
        "context": context,
        "stride": stride,
        "dtype": dtype,
    }


def content_hash(folder: Path) -> str:
    """SHA-256 over the hashes of a shard folder's files, as its manifest holds them."""
    files = read_manifest(folder)["files"]
    return hashlib.sha256("".join(f"{name} {files[name]['sha256']}\n" for name in sorted(files)).encode()).hexdigest()


# --- where things are -----------------------------------------------------------------------------------------------


def read_recipe(path: Path) -> dict[str, Any] | None:
    """The settings of a run directory by dotted key; None for a Hugging Face folder."""
    file = path / "recipe.json"
    if not file.is_file():
        return None
    return {key: entry["value"] for key, entry in json.loads(file.read_text(encoding="utf-8")).items()}


def shards_folder(path: Path, recipe: dict[str, Any] | None, data: Path | None) -> Path:
    """The token shards to score on. Raises DataError where nobody names any, or a mixture's recipe names several."""
    if data is not None:
        return Path(data)
    if recipe is None:
        raise DataError(f"{path} is not a run directory, so it names no data", "Give token shards with --data FOLDER.")
    sources = recipe.get("data.sources") or [[recipe["data.path"], 1.0]]
    if len(sources) > 1:
        names = ", ".join(folder for folder, _ in sources)
        raise DataError(f"{path} was trained on several sources: {names}", "Choose one with --data FOLDER.")
    return Path(sources[0][0])


def trained_context(recipe: dict[str, Any]) -> int:
    """The longest sequence that a run trains on."""
    return max(recipe["train.seq_len"], *(length for _, length in recipe["schedule.seq_stages"]), 1)


def check_tokenizer(loaded: hub.Loaded, shards: Shards, path: Path) -> None:
    """Raise CheckpointError unless the checkpoint's tokenizer made the shards: by hash, or by the ids of their text.

    One tokenizer has several file forms (tokenizer.model, tokenizer.json), and so several hashes.
    """
    if loaded.tokenizer_dir is None:
        raise CheckpointError(
            f"{path} came without a tokenizer, so its tokens cannot be held against those of {shards.folder}",
            "Put its tokenizer.json or tokenizer.model into the folder.",
        )
    own = Tokenizer.load(loaded.tokenizer_dir)
    if own.hash == shards.tokenizer_hash or same_ids(own, shards):
        return
    raise CheckpointError(
        f"{path} has the tokenizer {own.hash[:12]}, but the shards in {shards.folder} were made with the tokenizer "
        f"{shards.tokenizer_hash[:12]}, which gives other ids",
        f"Make shards with its own tokenizer: puna corpus tokenize CORPUS --tokenizer {loaded.tokenizer_dir}.",
    )


def same_ids(own: Tokenizer, shards: Shards, max_documents: int = 100) -> bool:
    """Whether `own` gives the ids that the shards hold, for the text of up to `max_documents` documents."""
    made = Tokenizer.load(shards.tokenizer_dir)
    if (own.vocab_size, own.bos, own.eos) != (made.vocab_size, made.bos, made.eos):
        return False
    documents = [shards.document(d).tolist() for d in range(min(shards.num_documents, max_documents))]
    return own.encode_batch([made.decode(ids) for ids in documents], bos=True, eos=True) == documents


# --- baselines ------------------------------------------------------------------------------------------------------


def cached_baselines(folder: Path) -> dict[str, float]:
    """`measure_baselines` of the shards in `folder`, kept beside them under the hash of their content."""
    key, file = content_hash(folder), folder / BASELINES
    kept = json.loads(file.read_text()) if file.is_file() else {}
    if key in kept:
        err.print(f"gzip, xz and 5-gram: kept in {file} under {key[:12]}")
        return kept[key]
    err.print(f"gzip, xz and 5-gram: measured now, to be kept under {key[:12]}")
    found = measure_baselines(folder)
    try:
        write_atomic(file, json.dumps({key: found}, indent=1).encode())
    except OSError as error:
        err.print(f"[yellow]not kept: {error}[/yellow]")
    return found


def measure_baselines(folder: Path) -> dict[str, float]:
    """gzip -9 and xz -9 of the held-out text, and a 5-gram model of the tokens, trained on the train split alone."""
    heldout, train = Shards(folder, "heldout"), Shards(folder, "train")
    whole = text(heldout)
    tokens, offsets = flat(train, NGRAM_TOKENS)
    model = NGram(tokens, offsets, heldout.vocab_size, NGRAM_ORDER)
    return {
        "gzip_bits_per_byte": gzip_bits_per_byte(whole),
        "xz_bits_per_byte": xz_bits_per_byte(whole),
        "ngram_bits_per_byte": model.nats(*flat(heldout)) / math.log(2) / heldout.num_bytes,
        "ngram_train_tokens": len(tokens),
    }


def flat(shards: Shards, max_tokens: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of whole documents up to `max_tokens`, end to end, and their offsets (num_documents + 1,)."""
    ends = np.cumsum(shards.lengths)
    count = len(ends) if max_tokens is None else max(int(np.searchsorted(ends, max_tokens, side="right")), 1)
    return np.concatenate([shards.document(d) for d in range(count)]), np.concatenate([[0], ends[:count]])
