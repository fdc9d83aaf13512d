"""A path becomes a Generator."""

from pathlib import Path

import torch

from puna.engine.generator import Generator
from puna.errors import CheckpointError
from puna.llama import hub
from puna.llama.tokenizer import Tokenizer


def load(path: Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Generator:
    """The model and tokenizer of a Hugging Face folder or a run directory, ready to generate.

    dtype: of the weights; None keeps the file's. Raises CheckpointError and TokenizerError for what is wrong at `path`.
    """
    model, _, tokenizer_dir = hub.load(path, dtype)
    if tokenizer_dir is None:
        raise CheckpointError(f"{path} holds no tokenizer", "Put its tokenizer.json or tokenizer.model there.")
    return Generator(model.to(device), Tokenizer.load(tokenizer_dir))
