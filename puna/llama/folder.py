"""The files of a checkpoint folder, whatever its form: read with a sentence where they cannot be, written whole."""

import json
import os
import pickle
import re
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna.errors import CheckpointError

AGAIN = "Fetch or export the file again."
_CODE = re.compile(r"GLOBAL (\S+)|whose module (\S+) is blocked")


def require(folder: Path, name: str, fix: str) -> None:
    """Raise CheckpointError, saying what there is, unless `folder` holds the file `name`."""
    if (folder / name).is_file():
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder", fix)
    there = ", ".join(sorted(entry.name for entry in folder.iterdir())) or "nothing"
    raise CheckpointError(f"{folder} has no {name}; it holds {there}", fix)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError for anything else."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is not JSON: {error}", AGAIN) from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} holds no JSON object", AGAIN)
    return values


def write_json(file: Path, values: Any) -> None:
    """Write values as indented JSON."""
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Tensors by name of a file that torch.save wrote, mapped from the disk. Nothing in the file is ever run.

    Raises CheckpointError where the file is damaged or holds anything but tensors.
    """
    if not zipfile.is_zipfile(file):
        raise CheckpointError(
            f"{file} ({file.stat().st_size:,} bytes) is cut short or not a file of torch.save",
            f"{AGAIN} A pointer file of git-lfs is exchanged for the real one by `git lfs pull`.",
        )
    try:
        tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refusal(file, _code_in(str(error))) from error
    except (RuntimeError, EOFError) as error:
        raise CheckpointError(f"{file} is damaged: {str(error).partition(chr(10))[0]}", AGAIN) from error
    if not isinstance(tensors, dict):
        raise _refusal(file, f"a {type(tensors).__name__}")
    for name, tensor in tensors.items():
        if not (isinstance(name, str) and isinstance(tensor, Tensor)):
            raise _refusal(file, f"a {type(tensor).__name__} under {name!r}")
    return tensors


def _code_in(message: str) -> str:
    found = _CODE.search(message)
    return next(filter(None, found.groups()), "code") if found else "code"


def _refusal(file: Path, what: str) -> CheckpointError:
    fix = "Puna reads tensors by name and runs nothing: save the state dict alone, or fetch the original file."
    return CheckpointError(f"{file} holds {what}, not only tensors", fix)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill; it becomes `folder` when the block ends well. Raises CheckpointError where that is in use."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} is already there", "Choose a new folder, or remove this one first.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        partial = Path(scratch) / "folder"
        partial.mkdir()
        yield partial
        os.replace(partial, folder)
