"""Memory-mapped token shards: a folder of raw token files, one manifest, and the tokenizer that made them.

    FOLDER/shards.json              written last, by rename: a folder without it does not exist
    FOLDER/tokenizer/               the tokenizer's own files
    FOLDER/train-00000.tokens       little-endian uint16 (vocabulary <= 65,536) or uint32, document after document
    FOLDER/train-00000.offsets.npy  int64, num_documents + 1: where each document begins in the token file

A document is BOS + text + EOS. Splits are `train` and `heldout`.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from puna.errors import DataError

if TYPE_CHECKING:
    from puna.llama.tokenizer import Tokenizer

FORMAT_VERSION = 1
MANIFEST = "shards.json"
KEYS = ("dtype", "vocab_size", "tokenizer_hash", "bos", "eos", "splits", "files")
HOW = "Make it with `puna corpus tokenize CORPUS --tokenizer FILE --out FOLDER`."
AGAIN = "Make the folder again with `puna corpus tokenize CORPUS --tokenizer FILE --out FOLDER`."


def write_atomic(path: Path, data: bytes) -> None:
    """Write a whole file so that a reader sees the old one or the new one, also after a kill or a power cut."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _facts(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


class _Shard:
    """One token file that is being written."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype) -> None:
        self.folder, self.name, self.dtype = folder, name, dtype
        self.offsets = [0]
        self.file: BinaryIO = open(folder / f"{name}.tokens", "wb")  # noqa: SIM115

    def add(self, ids: np.ndarray) -> None:
        self.file.write(ids.astype(self.dtype).tobytes())
        self.offsets.append(self.offsets[-1] + len(ids))

    def close(self) -> list[str]:
        """Flush to disk; the names of the files of this shard."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        with open(self.folder / f"{self.name}.offsets.npy", "wb") as file:
            np.save(file, np.array(self.offsets, np.int64))
            file.flush()
            os.fsync(file.fileno())
        return [f"{self.name}.tokens", f"{self.name}.offsets.npy"]


class ShardWriter:
    """Writes a folder of token shards; the folder counts as written only after `close` (or the end of a `with`).

    An older content of the folder is dropped at the start. `source` is kept in the manifest as it is; `shard_tokens` is
    the size after which a new file begins.
    """

    def __init__(
        self, folder: Path, tokenizer: "Tokenizer", source: Mapping[str, Any] | None = None, shard_tokens: int = 1 << 28
    ) -> None:
        self.folder, self.tokenizer, self.source = Path(folder), tokenizer, source or {}
        self.shard_tokens = shard_tokens
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
        self._open: dict[str, _Shard] = {}
        self._splits: dict[str, dict[str, Any]] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / MANIFEST).unlink(missing_ok=True)
        for old in [*self.folder.glob("*.tokens"), *self.folder.glob("*.offsets.npy")]:
            old.unlink()

    def add(self, split: str, ids: Sequence[int] | np.ndarray, num_bytes: int) -> None:
        """Append one document: `ids` of its text without BOS and EOS, `num_bytes` the UTF-8 bytes of its text."""
        facts = self._splits.setdefault(split, {"files": [], "num_tokens": 0, "num_documents": 0, "num_bytes": 0})
        shard = self._open.get(split)
        if shard is None or shard.offsets[-1] >= self.shard_tokens:
            shard = self._next_shard(split)
        document = np.empty(len(ids) + 2, np.int64)
        document[0], document[1:-1], document[-1] = self.tokenizer.bos, ids, self.tokenizer.eos
        if not 0 <= document.min() <= document.max() < self.tokenizer.vocab_size:
            raise ValueError(f"token ids must lie in 0..{self.tokenizer.vocab_size - 1}")
        shard.add(document)
        facts["num_tokens"] += len(document)
        facts["num_documents"] += 1
        facts["num_bytes"] += num_bytes

    def _next_shard(self, split: str) -> _Shard:
        files = self._splits[split]["files"]
        if split in self._open:
            files += self._open[split].close()
        self._open[split] = _Shard(self.folder, f"{split}-{len(files) // 2:05d}", self.dtype)
        return self._open[split]

    def close(self) -> dict[str, Any]:
        """Write the tokenizer and then the manifest, which is returned."""
        for split, shard in self._open.items():
            self._splits[split]["files"] += shard.close()
        shutil.rmtree(self.folder / "tokenizer", ignore_errors=True)
        self.tokenizer.save(self.folder / "tokenizer")
        names = [name for facts in self._splits.values() for name in facts["files"]]
        names += sorted(f"tokenizer/{path.name}" for path in (self.folder / "tokenizer").iterdir())
        manifest = {
            "format_version": FORMAT_VERSION,
            "dtype": self.dtype.name,
            "vocab_size": self.tokenizer.vocab_size,
            "tokenizer_hash": self.tokenizer.hash,
            "bos": self.tokenizer.bos,
            "eos": self.tokenizer.eos,
            "splits": self._splits,
            "files": {name: _facts(self.folder / name) for name in names},
            "source": dict(self.source),
        }
        write_atomic(self.folder / MANIFEST, json.dumps(manifest, indent=1).encode())
        return manifest

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            for shard in self._open.values():
                shard.file.close()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of shards, after a look at every file's size. Raises DataError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"There is no folder of token shards at {folder}", HOW)
    if not (folder / MANIFEST).is_file():
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:6]) or "nothing"
        raise DataError(f"{folder} has no {MANIFEST} (it holds {there}); no shards were finished there", HOW)
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        version = manifest["format_version"]
        missing = [key for key in KEYS if key not in manifest]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / MANIFEST} is damaged ({error})", AGAIN) from error
    if version != FORMAT_VERSION:
        raise DataError(f"{folder / MANIFEST} has format version {version}; this Puna reads {FORMAT_VERSION}", AGAIN)
    if missing:
        raise DataError(f"{folder / MANIFEST} is damaged (it lacks {', '.join(missing)})", AGAIN)
    for name, facts in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path} is missing; {MANIFEST} names it", AGAIN)
        if path.stat().st_size != facts["bytes"]:
            raise DataError(f"{path} has {path.stat().st_size:,} bytes; {MANIFEST} says {facts['bytes']:,}", AGAIN)
    return manifest


def verify(folder: Path) -> None:
    """Compare the SHA-256 of every file with the manifest; reads everything. Raises DataError naming the file."""
    for name, facts in read_manifest(folder)["files"].items():
        if sha256_file(Path(folder) / name) != facts["sha256"]:
            raise DataError(f"{Path(folder) / name} was changed after it was written (its SHA-256 differs)", AGAIN)


class Shards:
    """The documents of one split, read through memory maps.

    `lengths` is int64 over all documents, BOS and EOS included; `num_bytes` counts the UTF-8 bytes of the texts.
    Raises DataError when the folder is missing, incomplete or damaged, or has no such split.
    """

    def __init__(self, folder: Path | str, split: str) -> None:
        self.folder, self.split = Path(folder), split
        manifest = read_manifest(self.folder)
        if split not in manifest["splits"]:
            there = ", ".join(manifest["splits"]) or "none"
            raise DataError(f"{self.folder} has no documents in the split {split!r} (splits there: {there})", HOW)
        facts = manifest["splits"][split]
        self.num_documents: int = facts["num_documents"]
        self.num_tokens: int = facts["num_tokens"]
        self.num_bytes: int = facts["num_bytes"]
        self.vocab_size: int = manifest["vocab_size"]
        self.bos: int = manifest["bos"]
        self.eos: int = manifest["eos"]
        self.tokenizer_hash: str = manifest["tokenizer_hash"]
        self.tokenizer_dir = self.folder / "tokenizer"
        names = facts["files"]
        dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        self._tokens = [np.memmap(self.folder / name, dtype, "r") for name in names if name.endswith(".tokens")]
        self._offsets = [np.load(self.folder / name, mmap_mode="r") for name in names if name.endswith(".npy")]
        self._first = np.cumsum([0] + [len(offsets) - 1 for offsets in self._offsets])
        self.lengths = np.concatenate([np.diff(offsets) for offsets in self._offsets])
        self._check()

    def _check(self) -> None:
        fits = all(offsets[-1] == len(tokens) for tokens, offsets in zip(self._tokens, self._offsets, strict=True))
        counts = (len(self.lengths), int(self.lengths.sum())) == (self.num_documents, self.num_tokens)
        if not fits or not counts or self.lengths.min() < 2:
            raise DataError(f"The offsets of split {self.split!r} in {self.folder} do not fit its token files", AGAIN)

    def document(self, i: int) -> np.ndarray:
        """The token ids of document `i` (BOS + text + EOS), a view into the file: (lengths[i],) uint16 or uint32."""
        if not 0 <= i < self.num_documents:
            raise IndexError(f"document {i} of {self.num_documents}")
        shard = int(np.searchsorted(self._first, i, side="right")) - 1
        start, stop = self._offsets[shard][i - self._first[shard] :][:2]
        return self._tokens[shard][start:stop]
