"""Real text for small experiments: ASCII characters, and batches of them as a function of (seed, step)."""

import re
from functools import cache

import numpy as np
import torch
from torch import Tensor

from puna.corpus.documents import open_source
from puna.errors import DataError

NUM_CHARACTERS = 128
MAX_BYTES = 2_000_000
HELDOUT = 0.1


@cache
def characters(source: str) -> np.ndarray:
    """The first `MAX_BYTES` bytes of a source (a file, a folder or `stdlib`) as uint8.

    Bytes above 127 are 127, white space of any length is one space: so windows differ less in their loss, and a spike
    stands out sooner.
    """
    pieces, total = [], 0
    for document in open_source(source):
        pieces.append(document.data)
        total += len(document.data)
        if total >= MAX_BYTES:
            break
    text = np.frombuffer(re.sub(rb"\s+", b" ", b"".join(pieces)[:MAX_BYTES]), dtype=np.uint8)
    if len(text) < 10_000:
        raise DataError(f"{source} holds {len(text)} bytes of text", "Give at least 10,000 bytes.")
    return np.minimum(text, NUM_CHARACTERS - 1)


def batch(source: str, seed: int, step: int, num_rows: int, seq_len: int) -> np.ndarray:
    """Windows of the training part, (num_rows, seq_len + 1), drawn by (seed, step)."""
    text = characters(source)
    return _windows(text[: int(len(text) * (1 - HELDOUT))], np.random.default_rng((seed, step)), num_rows, seq_len)


def heldout(source: str, num_rows: int, seq_len: int) -> np.ndarray:
    """Windows of the last part of the text, always the same."""
    text = characters(source)
    return _windows(text[int(len(text) * (1 - HELDOUT)) :], np.random.default_rng(0), num_rows, seq_len)


def _windows(text: np.ndarray, draw: np.random.Generator, num_rows: int, seq_len: int) -> np.ndarray:
    starts = draw.integers(0, len(text) - seq_len - 1, num_rows)
    return text[starts[:, None] + np.arange(seq_len + 1)]


def as_tokens(windows: np.ndarray) -> tuple[Tensor, Tensor]:
    """Tokens and targets (rows, seq_len), int64."""
    tokens = torch.from_numpy(windows.astype(np.int64))
    return tokens[:, :-1], tokens[:, 1:]
