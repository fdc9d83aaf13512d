"""The order of samples: a pure function of (seed, index), whatever the number of ranks and workers."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

_ROUNDS = 6
_MULTIPLIERS = np.array([0xBF58476D1CE4E5B9, 0x94D049BB133111EB], dtype=np.uint64)


def permute(seed: int, epoch: int, n: int) -> Callable[[npt.ArrayLike], npt.NDArray[np.int64]]:
    """A random permutation of range(n) that is never stored: maps positions to samples, any number at a time.

    A Feistel network over the next even power of two, walked until the value is below n (Black and Rogaway 2002,
    "Ciphers with arbitrary finite domains", §3), so memory and start-up do not grow with n.
    """
    if n < 1:
        raise ValueError(f"cannot order {n} samples")
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(_ROUNDS, np.uint64).astype(np.uint64)

    def at(positions: npt.ArrayLike) -> npt.NDArray[np.int64]:
        values = np.array(positions, dtype=np.uint64)
        if values.size and int(values.max()) >= n:
            raise IndexError(f"position {int(values.max())} of {n} samples")
        flat = _feistel(values.reshape(-1), keys, half)
        while (outside := flat >= n).any():
            flat[outside] = _feistel(flat[outside], keys, half)
        return flat.reshape(values.shape).astype(np.int64)

    return at


def _feistel(values: npt.NDArray[np.uint64], keys: npt.NDArray[np.uint64], half: int) -> npt.NDArray[np.uint64]:
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * _MULTIPLIERS[0]
    x = (x ^ (x >> np.uint64(27))) * _MULTIPLIERS[1]
    return x ^ (x >> np.uint64(31))
