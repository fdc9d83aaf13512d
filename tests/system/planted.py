"""Bugs of normalisation, planted into the code that trains, and ranks that train with each of them in turn."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from puna.llama import packing
from puna.llama.attention import Mask
from puna.llama.pretrain import Pretrain
from puna.recipe import load
from puna.train import mesh
from puna.train.task import Cursor, GradientTask

NUM_MICRO = 2


def no_bug(patch: pytest.MonkeyPatch) -> None:
    """The code as it is."""


def per_micro_batch_mean(patch: pytest.MonkeyPatch) -> None:
    """Each micro-batch divides by its own targets."""
    right = Pretrain.loss_sum

    def loss_sum(self, batch):
        loss = right(self, batch)
        loss.register_hook(lambda slope: torch.full_like(slope, 1 / (batch.weight * NUM_MICRO)))
        return loss

    patch.setattr(Pretrain, "loss_sum", loss_sum)


def per_rank_mean(patch: pytest.MonkeyPatch) -> None:
    """Each rank divides by its own targets."""
    right = GradientTask.accumulate

    def accumulate(self, unit, factor):
        return right(self, unit, 1 / sum(batch.weight for batch in unit.batches))

    patch.setattr(GradientTask, "accumulate", accumulate)


def document_mask_dropped(patch: pytest.MonkeyPatch) -> None:
    """Attention sees the documents before its own."""
    patch.setattr(packing.Batch, "mask", property(lambda batch: Mask()))


def loss_mask_dropped(patch: pytest.MonkeyPatch) -> None:
    """The first token of a document is predicted from the one before it."""
    right = packing.packed

    def packed(stream, indices, seq_len):
        targets = torch.from_numpy(np.stack([stream.sample(index, seq_len)[0] for index in indices])[:, 1:])
        return replace(right(stream, indices, seq_len), targets=targets, weight=targets.numel())

    patch.setattr(packing, "packed", packed)


def labels_shifted(patch: pytest.MonkeyPatch) -> None:
    """A token's target is the one after the next."""
    right = packing.packed

    def packed(stream, indices, seq_len):
        batch = right(stream, indices, seq_len)
        targets = torch.full_like(batch.targets, packing.IGNORED)
        targets[:, :-1] = batch.targets[:, 1:]
        return replace(batch, targets=targets, weight=int((targets != packing.IGNORED).sum()))

    patch.setattr(packing, "packed", packed)


BUGS: tuple[Callable[[pytest.MonkeyPatch], None], ...] = (
    per_micro_batch_mean,
    per_rank_mean,
    document_mask_dropped,
    loss_mask_dropped,
    labels_shifted,
)


def train_all(out: str, *overrides: str) -> None:
    """What every rank does: train without and with each bug; rank 0 writes the losses of every step by bug."""
    recipe = load("tiny", overrides).recipe
    with mesh.open_mesh(recipe.run, recipe.mesh) as place:
        compute = mesh.choose_compute("fp32", place.device)
        found = {}
        for bug in (no_bug, *BUGS):
            with pytest.MonkeyPatch.context() as patch:
                bug(patch)
                sections = (recipe.model, recipe.data, recipe.train, recipe.schedule, recipe.mesh, recipe.eval)
                task = Pretrain(*sections, recipe.run.seed, place, compute)
                found[bug.__name__] = [task.step(unit).loss for unit in task.units(Cursor())]
    if place.rank == 0:
        Path(out).write_text(json.dumps(found))
