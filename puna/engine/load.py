"""A path becomes a Generator."""

from pathlib import Path

import torch

from puna.engine.generator import Generator
from puna.errors import CheckpointError
from puna.llama import hub
from puna.llama.identity import verify_identity
from puna.llama.tokenizer import Tokenizer
from puna.train.mesh import choose_compute, choose_device


def load(path: str | Path, dtype: torch.dtype | None = None, *, allow_mismatch: bool = False) -> Generator:
    """The model and tokenizer of a Hugging Face folder or a run directory, ready to generate; on CUDA where it is.

    dtype: of the weights; None keeps the file's, but for 16-bit weights on a machine that multiplies float32 faster:
    these become float32. allow_mismatch: also where tokenizer, special tokens, chat template or dtype are not those
    that the checkpoint was made with. Raises CheckpointError and TokenizerError for what is wrong at `path`.
    """
    model, _, tokenizer_dir = hub.load(path, dtype)
    if tokenizer_dir is None:
        raise CheckpointError(f"{path} holds no tokenizer", "Put its tokenizer.json or tokenizer.model there.")
    tokenizer = Tokenizer.load(tokenizer_dir)
    if not allow_mismatch:
        stored = None if dtype else str(model.head.dtype).removeprefix("torch.")
        verify_identity(Path(path), tokenizer_dir, tokenizer, stored)
    device = choose_device("auto")
    if dtype is None and model.head.dtype != torch.float32 and choose_compute("auto", device).dtype == torch.float32:
        model = model.float()
    return Generator(model.to(device), tokenizer)
