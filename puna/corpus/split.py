"""Which documents are held out, so that nothing held out has a near duplicate in training."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from puna.corpus.dedup import similarity
from puna.errors import PunaError

MAX_COMPARISONS = 200_000_000


def choose_heldout(groups: Sequence[str], sizes: Sequence[int], share: float, seed: int) -> np.ndarray:
    """Mark the held-out documents, (n,) bool: whole groups in the order of a hash of (seed, group id).

    A group is taken where it still fits into `share` of all bytes and is at most a tenth of that or four times the mean
    (a figure on held-out text should not hang on one file), until nine tenths are filled (going on would collect small
    documents); the smallest group is taken where none fits. `share` 0 holds nothing out.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for i, group in enumerate(groups):
        members[group].append(i)
    weight = {group: sum(sizes[i] for i in own) for group, own in members.items()}
    wanted = room = share * sum(sizes)
    largest = max(wanted / 10, 4 * sum(sizes) / max(len(members), 1))
    heldout = np.zeros(len(groups), bool)
    for group in sorted(members, key=lambda group: _hash(seed, group)):
        if room > wanted / 10 and weight[group] <= min(room, largest):
            room -= weight[group]
            heldout[members[group]] = True
    if share and not heldout.any() and len(members) > 1:
        heldout[members[min(members, key=lambda group: (weight[group], group))]] = True
    return heldout


def check_no_leak(keys: Sequence[bytes], signatures: np.ndarray, heldout: np.ndarray, threshold: float) -> int:
    """Compare held-out documents with all of training, one by one, not by the buckets that made the groups.

    keys: exact keys; signatures: (n, 300), empty to compare keys only. Every held-out document is compared where that
    is at most 200 million comparisons, else evenly spread ones; returns how many were. Raises PunaError at a leak.
    """
    train_keys = {key for key, out in zip(keys, heldout, strict=True) if not out}
    out = np.flatnonzero(heldout).tolist()
    if any(keys[i] in train_keys for i in out):
        raise PunaError("A held-out document has an exact copy in training: the split is wrong, nothing was written")
    if not len(signatures):
        return len(out)
    step = max(1, -(-len(out) * len(train_keys) // MAX_COMPARISONS))
    train = signatures[~heldout]
    for i in out[::step]:
        if len(train) and similarity(signatures[i], train).max() >= threshold:
            raise PunaError("A held-out document has a near copy in training: the split is wrong, nothing was written")
    return len(out[::step])


def _hash(seed: int, group: str) -> bytes:
    return hashlib.blake2b(f"{seed} {group}".encode(), digest_size=16).digest()
