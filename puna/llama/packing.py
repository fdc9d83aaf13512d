"""Documents become batches: a pure function of (seed, sample index), whatever the number of ranks.

Every epoch the documents are laid end to end in an order drawn from (seed, epoch) and cut into windows of `seq_len`
tokens, which are taken in an order drawn from (seed, epoch, seq_len), so that the windows of a step come from all over
the corpus. Within a window attention stays inside a document (Llama 3, section 3.2); a document's first token is never
a target, every other token of a window is one. The end of an epoch that does not fill a window is left out; it is
another one every epoch.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from puna.llama.attention import Mask
from puna.llama.shards import Shards
from puna.train.order import permute

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Sequences of one forward on one rank.

    tokens, targets, documents: (B, L) int64; targets hold -100 where nothing is predicted; documents number the
    documents of a row. ids: sample index of each row. weight: number of targets.
    """

    tokens: Tensor
    targets: Tensor
    documents: Tensor
    ids: tuple[int, ...]
    weight: int

    @property
    def mask(self) -> Mask:
        """Causal, inside documents."""
        return Mask(documents=self.documents)

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        tokens, targets, documents = (
            x.to(device, non_blocking=True) for x in (self.tokens, self.targets, self.documents)
        )
        return Batch(tokens, targets, documents, self.ids, self.weight)


class Samples(Protocol):
    """What micro-batches are made of: a stream, or several as one."""

    def sample(self, index: int, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of sample `index` and the next one, and which document each belongs to; both (seq_len + 1,)."""


class Stream:
    """The endless sequence of windows over the documents of one split."""

    def __init__(self, shards: Shards, seed: int) -> None:
        self.shards, self.seed = shards, seed
        self._epoch = -1

    def sample(self, index: int, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of sample `index` and the next one, and which document each belongs to; both (seq_len + 1,).

        A sample is a function of (seed, index, seq_len): where seq_len changes within an epoch, the rest of the epoch
        is drawn anew.
        """
        num_windows = max(1, self.shards.num_tokens // seq_len)
        epoch, place = divmod(index, num_windows)
        window = int(permute(self.seed ^ seq_len, epoch, num_windows)(place))
        return self.read(epoch * self.shards.num_tokens + window * seq_len, seq_len + 1)

    def read(self, offset: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [offset, offset + length) of all epochs end to end, and which document each is of; (length,)."""
        tokens, documents = np.empty(length, np.int64), np.empty(length, np.int64)
        done = number = 0
        while done < length:
            epoch, start = divmod(offset + done, self.shards.num_tokens)
            self._enter(epoch)
            place = int(np.searchsorted(self._ends, start, side="right"))
            piece = self.shards.document(int(self._order[place]))[int(start - self._ends[place]) :][: length - done]
            tokens[done : done + len(piece)] = piece
            documents[done : done + len(piece)] = number
            done, number = done + len(piece), number + 1
        return tokens, documents

    def _enter(self, epoch: int) -> None:
        if epoch != self._epoch:
            self._order = permute(self.seed, epoch, self.shards.num_documents)(np.arange(self.shards.num_documents))
            self._ends = np.cumsum(self.shards.lengths[self._order])
            self._epoch = epoch


def packed(stream: Samples, indices: list[int], seq_len: int) -> Batch:
    """The samples of these indices as rows (B, seq_len) that hold several documents each."""
    rows = [stream.sample(index, seq_len) for index in indices]
    tokens, documents = (torch.from_numpy(np.stack(columns)) for columns in zip(*rows, strict=True))
    targets = torch.where(documents[:, 1:] == documents[:, :-1], tokens[:, 1:], IGNORED)
    weight = int((targets != IGNORED).sum())
    return Batch(tokens[:, :-1].contiguous(), targets, documents[:, :-1].contiguous(), tuple(indices), weight)


def unpacked(batch: Batch) -> Batch:
    """The same documents, each in a row of its own, padded on the right to the longest piece."""
    pieces = [
        (tokens[documents == number], targets[documents == number])
        for tokens, targets, documents in zip(batch.tokens, batch.targets, batch.documents, strict=True)
        for number in documents.unique()
    ]
    length = max(len(tokens) for tokens, _ in pieces)
    tokens = torch.zeros(len(pieces), length, dtype=torch.int64)
    targets = torch.full((len(pieces), length), IGNORED)
    for row, (piece, target) in enumerate(pieces):
        tokens[row, : len(piece)], targets[row, : len(target)] = piece, target
    return Batch(tokens, targets, torch.zeros_like(tokens), batch.ids, batch.weight)


def micro_batches(
    stream: Samples,
    cursor: int,
    *,
    batch_tokens: int,
    seq_len: int,
    micro_batch: int,
    rank: int,
    num_ranks: int,
    pack: bool = True,
) -> list[Batch]:
    """This data-parallel rank's micro-batches of the step that starts at `cursor` consumed tokens.

    The step takes samples cursor // seq_len onwards; its micro-step m takes R * B of them, of which rank r has the r-th
    B. So the union over ranks does not depend on their number.
    """
    start, num_samples = cursor // seq_len, batch_tokens // seq_len
    batches = []
    for first in range(start + rank * micro_batch, start + num_samples, num_ranks * micro_batch):
        batch = packed(stream, list(range(first, first + micro_batch)), seq_len)
        batches.append(batch if pack else unpacked(batch))
    return batches
