"""A path becomes a Generator."""

from pathlib import Path

import torch

from puna.engine.generator import Generator
from puna.errors import CheckpointError
from puna.llama import hub
from puna.llama.tokenizer import Tokenizer
from puna.train.mesh import choose_compute, choose_device


def load(path: str | Path, dtype: torch.dtype | None = None) -> Generator:
    """The model and tokenizer of a Hugging Face folder or a run directory, ready to generate; on CUDA where it is.

    dtype: of the weights; None keeps the file's, but for 16-bit weights on a machine that multiplies float32 faster:
    these become float32. Raises CheckpointError and TokenizerError for what is wrong at `path`.
    """
    model, _, tokenizer_dir = hub.load(path, dtype)
    if tokenizer_dir is None:
        raise CheckpointError(f"{path} holds no tokenizer", "Put its tokenizer.json or tokenizer.model there.")
    device = choose_device("auto")
    if dtype is None and model.head.dtype != torch.float32 and choose_compute("auto", device).dtype == torch.float32:
        model = model.float()
    return Generator(model.to(device), Tokenizer.load(tokenizer_dir))
