"""A wrong mean, a lost mask or a shifted label is caught: training is held against the textbook."""

import json
from itertools import groupby
from pathlib import Path

import numpy as np
import planted
import pytest
import torch
from processes import finish, start
from torch.nn.functional import cross_entropy

from puna.llama.model import Llama
from puna.llama.packing import Stream
from puna.llama.shards import Shards, ShardWriter
from puna.llama.tokenizer import Tokenizer
from puna.recipe import load

NUM_STEPS, WARM_UP = 8, 4
TOLERANCE = 1e-5
"""Of the tests of equivalence."""
SETTINGS = {
    "--train.tokens": NUM_STEPS * 1024,
    "--schedule.warmup_tokens": WARM_UP * 1024,
    "--schedule.decay": "constant",
    "--train.micro_batch": 1024 // 128 // 2 // planted.NUM_MICRO,
}
OVERRIDES = [str(word) for pair in SETTINGS.items() for word in pair]


@pytest.fixture(scope="module")
def uneven(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stretches of long documents and of documents of one token: some windows have half as many targets as others.

    On documents that are all alike a mean by rank is off by less than the rounding, and no comparison sees it.
    """
    folder = tmp_path_factory.mktemp("uneven") / "shards"
    with ShardWriter(folder, Tokenizer.load(shards / "tokenizer")) as writer:
        for split in ("train", "heldout"):
            source = Shards(shards, split)
            for number in range(min(source.num_documents, 8)):
                text = source.document(number)[1:-1]
                cuts = [cut for cut in range(300, len(text)) if cut % 400 >= 300 or cut % 400 == 0]
                for piece in np.split(text, cuts):
                    writer.add(split, piece, 0)
    return folder


@pytest.fixture(scope="module")
def textbook(uneven: Path) -> torch.Tensor:
    """Losses of one process that knows no batches: every document alone, one mean over all targets, torch's AdamW."""
    torch.set_num_threads(1)
    recipe = load("tiny", ["--data.path", str(uneven), *OVERRIDES]).recipe
    train, stream = recipe.train, Stream(Shards(uneven, "train"), recipe.run.seed)
    model = Llama(recipe.model)
    model.init_weights(recipe.run.seed)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": train.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=train.betas, eps=train.eps)
    found = []
    for step in range(NUM_STEPS):
        pieces = sorted((p for index in range(8 * step, 8 * step + 8) for p in documents(stream, index)), key=len)
        alike = [torch.stack(list(group)) for _, group in groupby(pieces, key=len)]
        loss = sum(
            cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten(), reduction="sum") for rows in alike
        )
        loss = loss / sum(rows[:, 1:].numel() for rows in alike)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip)
        for group in optimizer.param_groups:
            group["lr"] = train.lr * min(1.0, (step + 0.5) / WARM_UP)
        optimizer.step()
        found.append(float(loss.detach()))
    return torch.tensor(found, dtype=torch.float64)


def documents(stream: Stream, index: int) -> list[torch.Tensor]:
    """The documents of a window that have a target in it."""
    tokens, numbers = stream.sample(index, 128)
    pieces = [torch.from_numpy(tokens[numbers == number]) for number in np.unique(numbers)]
    return [piece for piece in pieces if len(piece) > 1]


@pytest.fixture(scope="module")
def errors(uneven: Path, textbook: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Largest relative distance of a loss from the textbook's, by bug; on two ranks with two micro-batches each."""
    folder = tmp_path_factory.mktemp("planted")
    words = [str(folder / "losses.json"), "--data.path", str(uneven), *OVERRIDES]
    assert finish(start(planted.train_all, *words, size=2, folder=folder)) == [0, 0]
    losses = json.loads((folder / "losses.json").read_text())
    found = {bug: torch.tensor(values, dtype=torch.float64) for bug, values in losses.items()}
    assert {len(values) for values in found.values()} == {NUM_STEPS}
    return {bug: float(((values - textbook) / textbook).abs().max()) for bug, values in found.items()}


def test_training_is_the_textbook(errors: dict[str, float]) -> None:
    assert errors["no_bug"] <= TOLERANCE / 10


@pytest.mark.parametrize("bug", [bug.__name__ for bug in planted.BUGS])
def test_a_planted_bug_is_caught(bug: str, errors: dict[str, float]) -> None:
    assert errors[bug] > TOLERANCE
