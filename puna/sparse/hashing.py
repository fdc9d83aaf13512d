"""Hashes in kernels: of 64 bits, and of text in 128."""

from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

from puna.sparse.compiled import exact_kernel

_SEEDS = np.array([0x243F6A8885A308D3, 0x13198A2E03707344], np.uint64)


@exact_kernel
def mix(x: Any) -> Any:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): 64 bits that depend on all 64 bits of x."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hashes(data: Any, starts: Any, ends: Any) -> npt.NDArray[np.uint64]:
    """(rows, 2): 128 bits of each text data[starts[i]:ends[i]]. Two of a billion meet with a chance of 1e-21."""
    found = np.empty((len(starts), 2), np.uint64)
    _hash_all(data, starts, ends, _SEEDS, found)
    return found


@exact_kernel
def _hash_all(data: Any, starts: Any, ends: Any, seeds: Any, out: Any) -> None:
    for row in range(starts.shape[0]):
        for n in range(2):
            out[row, n] = _hash(data, starts[row], ends[row], seeds[n])


@exact_kernel
def _hash(data: Any, start: int, end: int, seed: Any) -> Any:
    state = mix(seed ^ np.uint64(end - start))
    word, filled = np.uint64(0), 0
    for at in range(start, end):
        word = (word << np.uint64(8)) | np.uint64(data[at])
        filled += 1
        if filled == 8:
            state = mix(state ^ word) + seed
            word, filled = np.uint64(0), 0
    return mix(mix(state ^ word) + seed)


def key_of(*parts: Any) -> int:
    """64 bits that are a function of the parts."""
    return int.from_bytes(blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest(), "little")
