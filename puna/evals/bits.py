"""Bits per byte: what a model needs to write down held-out text, independent of its tokenizer.

Every held-out token but each document's first (BOS) is scored exactly once, EOS included, and each document alone. A
document longer than `context` is read in windows that advance by `stride`; a window scores only the tokens that no
earlier one scored, so past the first window every token sees at least context - stride tokens of history. A smaller
stride costs context / stride times the work and gives a lower (truer) figure.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from puna.console import track
from puna.errors import DataError
from puna.llama.loss import IGNORED
from puna.llama.model import Llama
from puna.llama.shards import Shards
from puna.llama.tokenizer import Tokenizer


@dataclass(frozen=True)
class Window:
    """Inputs [start, start + length) of a document; the first `num_seen` of its predictions were scored before."""

    document: int
    start: int
    length: int
    num_seen: int


def windows(document: int, num_targets: int, context: int, stride: int) -> Iterator[Window]:
    """The windows that score each of `num_targets` predictions once."""
    start = scored = 0
    while scored < num_targets:
        end = min(start + context, num_targets)
        yield Window(document, start, end - start, scored - start)
        scored, start = end, start + stride


def batches(pieces: list[Window], batch_tokens: int) -> Iterator[list[Window]]:
    """Windows of like length together, longest first; at most `batch_tokens` with padding, or one window."""
    batch: list[Window] = []
    for piece in sorted(pieces, key=lambda w: -w.length):
        if batch and (len(batch) + 1) * batch[0].length > batch_tokens:
            yield batch
            batch = []
        batch.append(piece)
    if batch:
        yield batch


def _tensors(batch: list[Window], shards: Shards) -> tuple[Tensor, Tensor]:
    """Tokens and targets, both (B, L) int64, padded on the right; what is not scored has target -100."""
    shape = (len(batch), batch[0].length)
    tokens, targets = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORED)
    for row, w in enumerate(batch):
        piece = torch.from_numpy(shards.document(w.document)[w.start : w.start + w.length + 1].astype(np.int64))
        tokens[row, : w.length] = piece[:-1]
        targets[row, w.num_seen : w.length] = piece[1 + w.num_seen :]
    return tokens, targets


def num_documents_within(shards: Shards, limit_tokens: int | None) -> int:
    """Documents, in the order of the shards, that it takes to reach `limit_tokens` scored tokens; None: all."""
    if limit_tokens is None:
        return shards.num_documents
    return min(int(np.searchsorted(np.cumsum(shards.lengths - 1), limit_tokens)) + 1, shards.num_documents)


def text(shards: Shards, num_documents: int | None = None) -> bytes:
    """The UTF-8 text of the first `num_documents` documents (None: all), decoded and joined."""
    tokenizer = Tokenizer.load(shards.tokenizer_dir)
    numbers = range(shards.num_documents if num_documents is None else num_documents)
    return "".join(tokenizer.decode(shards.document(d).tolist()) for d in numbers).encode()


def bits_per_byte(
    model: Llama,
    shards: Shards,
    *,
    context: int,
    stride: int,
    batch_tokens: int = 8_192,
    limit_tokens: int | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """Score the documents of `shards` with `model`, on the device where its parameters are.

    context: tokens of one forward. stride: tokens a window advances, 1 to context. batch_tokens: tokens of one forward
    over all rows, padding included. limit_tokens: stop after the document that reaches it. Returns bits_per_byte (of
    UTF-8 text), nats_per_token, num_tokens (scored), num_bytes, num_documents, context, stride. Raises DataError where
    the stride does not fit the context.
    """
    if not 1 <= stride <= context:
        raise DataError(
            f"A stride of {stride} tokens is not between 1 and the context of {context}", "Choose one that is."
        )
    num_documents = num_documents_within(shards, limit_tokens)
    pieces = [w for d in range(num_documents) for w in windows(d, int(shards.lengths[d]) - 1, context, stride)]
    plan = list(batches(pieces, batch_tokens))
    nats, device, was_training = 0.0, next(model.parameters()).device, model.training
    model.eval()
    with torch.inference_mode():
        for batch in track(plan, "bits per byte") if progress else plan:
            tokens, targets = _tensors(batch, shards)
            nats += float(model(tokens.to(device), targets.to(device)))
    model.train(was_training)
    num_tokens = sum(w.length - w.num_seen for w in pieces)
    num_bytes = shards.num_bytes if num_documents == shards.num_documents else len(text(shards, num_documents))
    return {
        "bits_per_byte": nats / math.log(2) / num_bytes,
        "nats_per_token": nats / num_tokens,
        "num_tokens": num_tokens,
        "num_bytes": num_bytes,
        "num_documents": num_documents,
        "context": context,
        "stride": stride,
    }
