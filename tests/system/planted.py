"""Bugs of normalisation, planted into the code that trains, and processes that train with one of them."""

from dataclasses import replace

import numpy as np
import torch

NUM_MICRO = 2


def per_micro_batch_mean() -> None:
    """Each micro-batch divides by its own targets."""
    from puna.llama.pretrain import Pretrain

    right = Pretrain.loss_sum

    def loss_sum(self, batch):
        loss = right(self, batch)
        if loss.requires_grad:
            loss.register_hook(lambda slope: torch.full_like(slope, 1 / (batch.weight * NUM_MICRO)))
        return loss

    Pretrain.loss_sum = loss_sum


def per_rank_mean() -> None:
    """Each rank divides by its own targets."""
    from puna.train.task import GradientTask

    right = GradientTask.accumulate
    GradientTask.accumulate = lambda self, unit, factor: right(self, unit, 1 / sum(b.weight for b in unit.batches))


def document_mask_dropped() -> None:
    """Attention sees the documents before its own."""
    from puna.llama.attention import Mask
    from puna.llama.packing import Batch

    Batch.mask = property(lambda batch: Mask())


def loss_mask_dropped() -> None:
    """The first token of a document is predicted from the one before it."""
    from puna.llama import packing

    right = packing.packed

    def packed(stream, indices, seq_len):
        targets = torch.from_numpy(np.stack([stream.sample(index, seq_len)[0] for index in indices])[:, 1:])
        return replace(right(stream, indices, seq_len), targets=targets, weight=targets.numel())

    packing.packed = packed


def labels_shifted() -> None:
    """A token's target is the one after the next."""
    from puna.llama import packing

    right = packing.packed

    def packed(stream, indices, seq_len):
        batch = right(stream, indices, seq_len)
        targets = torch.full_like(batch.targets, packing.IGNORED)
        targets[:, :-1] = batch.targets[:, 1:]
        return replace(batch, targets=targets, weight=int((targets != packing.IGNORED).sum()))

    packing.packed = packed


def nothing() -> None:
    """No bug."""


BUGS = (per_micro_batch_mean, per_rank_mean, document_mask_dropped, loss_mask_dropped, labels_shifted)


def work(bug: str, run: str) -> None:
    """What every rank does."""
    globals()[bug]()
    from puna.run import work

    work(run)
