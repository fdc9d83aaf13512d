"""An interpolated n-gram model with Witten-Bell smoothing, from sorted arrays of integers.

    p(w | h) = (c(h w) + t(h) p(w | h')) / (c(h) + t(h))

c counts in the training tokens, t(h) is the number of distinct tokens seen after h, h' is h without its oldest token,
and below the single token stands the uniform 1 / V (Witten and Bell 1991; Chen and Goodman 1999, section 2.4). Nothing
crosses a document border; a document's first token (BOS) is context and is never predicted.

An n-gram is one integer: (rank of its first n - 1 tokens among all seen) * V + last token. Ranks are below the number
of training tokens, so the key fits int64 for any vocabulary and any corpus that fits memory.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class _Level:
    """Counts of one n. keys, counts: (num_ngrams,), sorted by key. total, distinct: (num_contexts,), c(h) and t(h)."""

    keys: Ints
    counts: Ints
    total: Ints
    distinct: Ints

    def find(self, keys: Ints) -> Ints:
        """Rank of each key, -1 where it was never seen."""
        rank = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[rank] == keys, rank, -1)

    def mix(self, keys: Ints, contexts: Ints, lower: Floats) -> tuple[Floats, Ints]:
        """p(w | h) from `lower` = p(w | h'), and the rank of each n-gram. Rank -1: unseen; as a context, no change."""
        rank = np.where(contexts >= 0, self.find(keys), -1)
        count = np.where(rank >= 0, self.counts[rank], 0)
        distinct, total = self.distinct[contexts], self.total[contexts]
        known = (contexts >= 0) & (total > 0)
        mixed = (count + distinct * lower) / np.maximum(total + distinct, 1)
        return np.where(known, mixed, lower), rank


def _level(keys: Ints, num_contexts: int, vocab_size: int) -> tuple[_Level, Ints]:
    """Counts over the keys of every n-gram occurrence, and the rank of each occurrence."""
    unique, ranks, counts = np.unique(keys, return_inverse=True, return_counts=True)
    contexts = unique // vocab_size
    total = np.bincount(contexts, weights=counts, minlength=num_contexts).astype(np.int64)
    return _Level(unique, counts, total, np.bincount(contexts, minlength=num_contexts)), ranks


class NGram:
    """Counts of a training corpus up to n-grams of `order` tokens.

    tokens: (num_tokens,) integers below vocab_size. offsets: (num_documents + 1,): document d is
    tokens[offsets[d] : offsets[d + 1]]. Takes about 150 bytes a training token at the peak for order 5.
    """

    def __init__(self, tokens: np.ndarray, offsets: np.ndarray, vocab_size: int, order: int = 5) -> None:
        self.vocab_size, self.order = vocab_size, order
        tokens, depth = np.asarray(tokens, np.int64), _depth(offsets)
        self.levels: list[_Level] = []
        contexts, num_contexts = np.zeros(len(tokens), np.int64), 1
        for n in range(1, order + 1):
            last = np.flatnonzero(depth >= max(n - 1, 1))
            if not len(last):
                break
            level, ranks = _level(contexts[last] * vocab_size + tokens[last], num_contexts, vocab_size)
            self.levels.append(level)
            if n == 1:  # as a context a single token is its own rank, for BOS is a context too
                ends, num_contexts = tokens, vocab_size
            else:
                ends, num_contexts = np.full(len(tokens), -1), len(level.keys)
                ends[last] = ranks
            contexts = _shift(ends)

    def probabilities(self, tokens: np.ndarray, offsets: np.ndarray) -> Floats:
        """p of every token but each document's first, given what stands before it in its document: (num_scored,)."""
        tokens, depth = np.asarray(tokens, np.int64), _depth(offsets)
        p = np.full(len(tokens), 1 / self.vocab_size)
        contexts = np.zeros(len(tokens), np.int64)
        for n, level in enumerate(self.levels, 1):
            contexts = np.where(depth >= max(n - 1, 1), contexts, -1)
            p, ranks = level.mix(contexts * self.vocab_size + tokens, contexts, p)
            contexts = _shift(tokens if n == 1 else ranks)
        return p[depth > 0]

    def nats(self, tokens: np.ndarray, offsets: np.ndarray) -> float:
        """Sum of -log p over every token but each document's first."""
        return float(-np.log(self.probabilities(tokens, offsets)).sum())


def _depth(offsets: np.ndarray) -> Ints:
    """Place of each token in its document, from 0."""
    lengths = np.diff(offsets)
    return np.arange(offsets[-1], dtype=np.int64) - np.repeat(np.asarray(offsets[:-1], np.int64), lengths)


def _shift(ends: Ints) -> Ints:
    """What ended one token earlier."""
    return np.concatenate([ends[:1] * 0 - 1, ends[:-1]])
