"""A wrong mean, a lost mask or a shifted label is caught: training is held against the textbook."""

from pathlib import Path

import numpy as np
import planted
import pytest
import torch
from pretraining import losses, prepare
from processes import finish, start
from torch.nn.functional import cross_entropy

from puna.llama.model import Llama
from puna.llama.packing import Stream
from puna.llama.shards import Shards, ShardWriter
from puna.llama.tokenizer import Tokenizer
from puna.recipe import load

NUM_STEPS, WARM_UP = 10, 4
SETTINGS = {
    "--train.tokens": NUM_STEPS * 1024,
    "--schedule.warmup_tokens": WARM_UP * 1024,
    "--schedule.decay": "constant",
    "--train.micro_batch": 1024 // 128 // 2 // planted.NUM_MICRO,
    "--checkpoint.every": NUM_STEPS,
    "--eval.tokens": 0,
}
OVERRIDES = [str(word) for pair in SETTINGS.items() for word in pair]


@pytest.fixture(scope="module")
def short(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same text in documents of 3 to 60 tokens, so that windows, micro-batches and ranks differ in targets."""
    folder = tmp_path_factory.mktemp("short") / "shards"
    generator = np.random.default_rng(5)
    with ShardWriter(folder, Tokenizer.load(shards / "tokenizer")) as writer:
        for split in ("train", "heldout"):
            source = Shards(shards, split)
            for number in range(min(source.num_documents, 8)):
                text = source.document(number)[1:-1]
                cuts = np.cumsum(generator.integers(1, 59, len(text)))
                for piece in np.split(text, cuts[cuts < len(text)]):
                    writer.add(split, piece, 0)
    return folder


@pytest.fixture(scope="module")
def textbook(short: Path) -> torch.Tensor:
    """Losses of one process that knows no batches: every document alone, one mean over all targets, torch's AdamW."""
    torch.set_num_threads(1)
    recipe = load("tiny", ["--data.path", str(short), *OVERRIDES]).recipe
    train, stream = recipe.train, Stream(Shards(short, "train"), recipe.run.seed)
    model = Llama(recipe.model)
    model.init_weights(recipe.run.seed)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": train.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=train.betas, eps=train.eps)
    found = []
    for step in range(NUM_STEPS):
        pieces = [piece for index in range(8 * step, 8 * step + 8) for piece in documents(stream, index)]
        loss = sum(cross_entropy(model(p[None, :-1])[0], p[1:], reduction="sum") for p in pieces)
        loss = loss / sum(len(piece) - 1 for piece in pieces)
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


def error(bug: str, short: Path, textbook: torch.Tensor, folder: Path) -> float:
    """Largest relative distance of a loss from the textbook's, of a run on two ranks with two micro-batches each."""
    prepare(folder / "run", short, *OVERRIDES)
    assert finish(start(planted.work, bug, str(folder / "run"), size=2, folder=folder)) == [0, 0]
    found = torch.tensor(losses(folder / "run"), dtype=torch.float64)
    assert len(found) == NUM_STEPS
    return float(((found - textbook) / textbook).abs().max())


def test_training_is_the_textbook(short: Path, textbook: torch.Tensor, tmp_path: Path) -> None:
    assert error("nothing", short, textbook, tmp_path) <= 1e-5


@pytest.mark.parametrize("bug", [bug.__name__ for bug in planted.BUGS])
def test_a_planted_bug_is_caught(bug: str, short: Path, textbook: torch.Tensor, tmp_path: Path) -> None:
    assert error(bug, short, textbook, tmp_path) > 1e-4
