"""Tensors on disk: torch DCP, with files hashed as they are written and an index that cannot run code."""

import os
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata

from puna.errors import CheckpointError
from puna.train import mesh
from puna.train.hashed import Hashed

METADATA = "torch.distributed.checkpoint.metadata"
DTYPE_NAMES = frozenset(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))


def write_tensors(folder: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> dict[str, Any]:
    """Write this rank's shards; size and hash of its files, by name. Every rank of `group` calls it.

    Raises on this rank what stopped it, the system's error where there is one. Where another rank failed, that does.
    """
    if not tensors:
        return {}
    writer = _Writer(folder)
    try:
        _quietly(dcp.save, tensors, storage_writer=writer, process_group=group)
    except CheckpointException as failed:
        causes = failed.failures
        if writer.files.error is None and mesh.rank() not in causes:
            return {}
        raise writer.files.error or RuntimeError(str(causes[mesh.rank()][0])) from failed
    return {name: file.fingerprint for name, file in writer.files.written.items()}


def read_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill the tensors in place, resharded. Every rank calls it. Raises CheckpointError for an index that is none."""
    if tensors:
        _quietly(dcp.load, tensors, storage_reader=_Reader(folder))


def _quietly(act: Callable[..., Any], *words: Any, **named: Any) -> None:
    """DCP without a process group, which it warns of."""
    if dist.is_initialized():
        act(*words, **named)
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        act(*words, no_dist=True, **named)


class _Writer(dcp.FileSystemWriter):
    """DCP's writer, on files that are hashed as they are written."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.fs = self.files = _Files()


class _Files(FileSystem):
    """The files written so far, and the error that stopped one of them."""

    def __init__(self) -> None:
        self.written: dict[str, Hashed] = {}
        self.error: BaseException | None = None

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        """DCP's, hashed."""
        try:
            with super().create_stream(path, mode) as stream:
                self.written[Path(path).name] = hashed = Hashed(stream)  # type: ignore[arg-type]
                yield hashed
        except Exception as error:
            self.error = _first_cause(error)
            raise

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """DCP's."""
        super().rename(path, new_path)
        self.written[Path(new_path).name] = self.written.pop(Path(path).name)


def _first_cause(error: BaseException) -> BaseException:
    """The system's error, where it is behind another one: torch raises a second one as it closes the file."""
    found: BaseException | None = error
    while found and not isinstance(found, OSError):
        found = found.__cause__ or found.__context__
    return found or error


class _Reader(dcp.FileSystemReader):
    """DCP's reader, whose index is a pickle: this one builds only what an index is made of. Raises CheckpointError."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        with (folder / ".metadata").open("rb") as file:
            self._index: Metadata = _IndexUnpickler(file).load()

    def read_metadata(self, *words: Any, **named: Any) -> Metadata:
        """The index, read before DCP could wrap what is wrong with it."""
        assert self._index.storage_meta is not None
        self._index.storage_meta.load_id = self.load_id
        return self._index


class _IndexUnpickler(pickle.Unpickler):
    ALLOWED = frozenset(
        {
            *((METADATA, name) for name in ("Metadata", "TensorStorageMetadata", "TensorProperties", "MetadataIndex")),
            *((METADATA, name) for name in ("ChunkStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING")),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("pathlib", "PosixPath"),
            ("pathlib._local", "PosixPath"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.ALLOWED or (module == "torch" and name in DTYPE_NAMES):
            return super().find_class(module, name)
        raise CheckpointError(f"the index of a checkpoint asks for {module}.{name}", "Do not load this checkpoint.")
