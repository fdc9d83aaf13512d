"""Duplicates: exact after white space is evened out, and near by MinHash with locality-sensitive hashing.

Two documents are near duplicates when the Jaccard similarity of their sets of 5-word shingles reaches the threshold,
estimated from 300 hash functions (standard error at most 0.03). Broder 1997; banding as in Leskovec et al., Mining of
Massive Datasets, section 3.4: 50 bands of 6 rows miss a pair of similarity 0.8 with probability 3e-7, one of 0.7 with
probability 0.002.
"""

import hashlib
import re
from collections.abc import Iterator

import numpy as np

SHINGLE_WORDS = 5
NUM_BANDS, ROWS = 50, 6
NUM_HASHES = NUM_BANDS * ROWS
MAX_KNOWN_WORDS = 1 << 20
_WORD = re.compile(r"\w+")
_MIX = np.uint64(0x9E3779B97F4A7C15)


def exact_key(text: str) -> bytes:
    """16 bytes that are equal for texts that differ in white space only."""
    return hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).digest()


class MinHash:
    """Signatures of texts: for each of 300 hash functions the least value over the text's shingles."""

    def __init__(self) -> None:
        rng = np.random.Generator(np.random.PCG64(0x50554E41))
        self._factor = rng.integers(1, 1 << 63, NUM_HASHES, np.uint64) * np.uint64(2) + np.uint64(1)
        self._shift = rng.integers(0, 1 << 63, NUM_HASHES, np.uint64)
        self._word_hash: dict[str, int] = {}

    def signature(self, text: str) -> np.ndarray:
        """(300,) uint32; texts of fewer than 5 words count as one shingle."""
        shingles = np.unique(self._shingles(text))
        least = np.full(NUM_HASHES, np.iinfo(np.uint64).max, np.uint64)
        for start in range(0, len(shingles), 1024):  # a block of 1,024 x 300 values stays in the cache
            block = shingles[start : start + 1024, None] * self._factor + self._shift
            np.minimum(least, block.min(axis=0), out=least)
        return (least >> np.uint64(32)).astype(np.uint32)

    def _shingles(self, text: str) -> np.ndarray:
        words = np.fromiter(map(self._hash, _WORD.findall(text) or text.split()), np.uint64)
        count = max(len(words) - SHINGLE_WORDS + 1, 1)
        mixed = np.zeros(count, np.uint64)
        for k in range(min(SHINGLE_WORDS, len(words))):
            mixed = (mixed ^ words[k : k + count]) * _MIX
            mixed ^= mixed >> np.uint64(29)
        return mixed

    def _hash(self, word: str) -> int:
        known = self._word_hash.get(word)
        if known is None:
            if len(self._word_hash) >= MAX_KNOWN_WORDS:
                self._word_hash.clear()
            digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
            known = self._word_hash[word] = int.from_bytes(digest, "little")
        return known


def similarity(signature: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Estimated Jaccard similarity of one text, (300,), to others, (n, 300): (n,)."""
    return (others == signature).mean(axis=1)


def clusters(signatures: np.ndarray, threshold: float) -> np.ndarray:
    """Group texts whose estimated similarity reaches the threshold, transitively.

    signatures: (n, 300). Returns (n,): for each text the least index of its cluster.
    """
    roots = _Roots(len(signatures))
    for band in range(NUM_BANDS):
        for members in _buckets(signatures[:, band * ROWS : (band + 1) * ROWS]):
            _unite_similar(roots, signatures, members, threshold)
    return np.array([roots.find(i) for i in range(len(signatures))], np.int64)


def _buckets(rows: np.ndarray) -> Iterator[np.ndarray]:
    """Groups of at least two texts that agree in one band, (n, 6)."""
    key = np.zeros(len(rows), np.uint64)
    for column in rows.T:
        key = (key ^ column) * _MIX
        key ^= key >> np.uint64(29)
    order = np.argsort(key, kind="stable")
    ends = np.flatnonzero(np.diff(key[order])) + 1
    yield from (bucket for bucket in np.split(order, ends) if len(bucket) > 1)


def _unite_similar(roots: "_Roots", signatures: np.ndarray, members: np.ndarray, threshold: float) -> None:
    for place, i in enumerate(members[:-1]):
        others = np.array([j for j in members[place + 1 :] if roots.find(j) != roots.find(i)], np.int64)
        for j in others[similarity(signatures[i], signatures[others]) >= threshold]:
            roots.unite(i, j)


class _Roots:
    """Union-find; the root of a set is its least member."""

    def __init__(self, size: int) -> None:
        self.parent = list(range(size))

    def find(self, i: int) -> int:
        while self.parent[i] != i:
            self.parent[i] = self.parent[self.parent[i]]
            i = self.parent[i]
        return i

    def unite(self, i: int, j: int) -> None:
        low, high = sorted((self.find(i), self.find(j)))
        self.parent[high] = low
