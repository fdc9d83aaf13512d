"""What a user would take instead of Puna's codec: each as a pair of functions over one table's rows.

Packages that are not installed are left out, by name.
"""

import importlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

PACKAGES = {
    "sz3_nopred": ("pysz", "pysz"),
    "zfp": ("zfpy", "zfpy"),
    "quantise_blosc2": ("blosc2", "blosc2"),
    "blosc2": ("blosc2", "blosc2"),
    "lz4": ("lz4.block", "lz4"),
    "quantise_lz4": ("lz4.block", "lz4"),
    "quantise_zstd1": ("backports.zstd", "backports-zstd"),
    "distinct_quantise_zstd1": ("backports.zstd", "backports-zstd"),
}
"""A peer's module, and the package that brings it."""


class Peer(NamedTuple):
    """encode(rows, ids, bound) -> parts; decode(parts, ids) -> rows; the size of the parts is what is sent."""

    encode: Callable[[np.ndarray, np.ndarray | None, float], list[Any]]
    decode: Callable[[list[Any], np.ndarray | None, tuple[int, int]], np.ndarray]


def size(parts: list[Any]) -> int:
    """Bytes that are sent: byte strings, and four for each number."""
    return sum(len(part) if isinstance(part, bytes) else 4 for part in parts)


def available() -> tuple[list[str], list[str]]:
    """Peers that are here, and those that are not (said aloud)."""
    here, missing = [], []
    for name, (module, package) in PACKAGES.items():
        try:
            importlib.import_module(module)
            here.append(name)
        except ImportError:
            missing.append(name)
            print(f"SKIPPED {name}: pip install {package}", file=sys.stderr)
    return here, missing


def make(name: str, index_sent: bool) -> Peer:
    """A peer; index_sent says whether distinct rows come with their index."""
    module = importlib.import_module(PACKAGES[name][0])
    if name == "distinct_quantise_zstd1":
        return _distinct(_zstd(module), index_sent)
    if name == "quantise_zstd1":
        return _quantised(*_zstd(module))
    if name == "quantise_lz4":
        return _quantised(module.compress, module.decompress)
    if name == "quantise_blosc2":
        return _quantised(lambda data: module.compress2(data, typesize=1), module.decompress2)
    if name == "lz4":
        return _exact(module.compress, module.decompress)
    if name == "blosc2":
        return _exact(lambda data: module.compress2(data, typesize=4), module.decompress2)
    return _zfp(module) if name == "zfp" else _sz3(module)


def _zstd(module: Any) -> tuple[Callable, Callable]:
    compressor, decompressor = module.ZstdCompressor(level=1), module.decompress
    return lambda data: compressor.compress(data, module.ZstdCompressor.FLUSH_FRAME), decompressor


def quantised(rows: np.ndarray, bound: float) -> tuple[torch.Tensor, float]:
    """round(x / 2E) as int8, and 2E: the published quantiser in a few lines of torch."""
    values = torch.from_numpy(rows)
    low, high = torch.aminmax(values)
    step = max(2 * bound * float(high - low), 1e-30)
    return (values * (1 / step)).round_().to(torch.int8), step


def _quantised(compress: Callable, decompress: Callable) -> Peer:
    def encode(rows: np.ndarray, ids: np.ndarray | None, bound: float) -> list[Any]:
        codes, step = quantised(rows, bound)
        return [compress(codes.numpy().tobytes()), step]

    def decode(parts: list[Any], ids: np.ndarray | None, shape: tuple[int, int]) -> np.ndarray:
        codes = np.frombuffer(decompress(parts[0]), np.int8).reshape(shape)
        return np.multiply(codes, np.float32(parts[1]), dtype=np.float32)

    return Peer(encode, decode)


def _distinct(codec: tuple[Callable, Callable], index_sent: bool) -> Peer:
    inner = _quantised(*codec)

    def encode(rows: np.ndarray, ids: np.ndarray | None, bound: float) -> list[Any]:
        _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
        parts = inner.encode(rows[first], None, bound)
        return [*parts, codec[0](inverse.astype(np.uint16).tobytes())] if index_sent else parts

    def decode(parts: list[Any], ids: np.ndarray | None, shape: tuple[int, int]) -> np.ndarray:
        rows = inner.decode(parts, None, (-1, shape[1]))
        return rows[
            np.frombuffer(codec[1](parts[2]), np.uint16) if index_sent else np.unique(ids, return_inverse=True)[1]
        ]

    return Peer(encode, decode)


def _exact(compress: Callable, decompress: Callable) -> Peer:
    return Peer(
        lambda rows, ids, bound: [compress(rows.tobytes())],
        lambda parts, ids, shape: np.frombuffer(decompress(parts[0]), np.float32).reshape(shape),
    )


def _zfp(module: Any) -> Peer:
    def encode(rows: np.ndarray, ids: np.ndarray | None, bound: float) -> list[Any]:
        return [module.compress_numpy(rows, tolerance=bound * float(rows.max() - rows.min()))]

    return Peer(encode, lambda parts, ids, shape: module.decompress_numpy(parts[0]))


def _sz3(module: Any) -> Peer:
    def encode(rows: np.ndarray, ids: np.ndarray | None, bound: float) -> list[Any]:
        config = module.szConfig(rows.shape)
        config.cmprAlgo = module.szAlgorithm.NOPRED
        config.errorBoundMode = module.szErrorBoundMode.ABS
        config.absErrorBound = bound * float(rows.max() - rows.min())
        return [module.sz.compress(rows, config)[0].tobytes()]

    def decode(parts: list[Any], ids: np.ndarray | None, shape: tuple[int, int]) -> np.ndarray:
        return module.sz.decompress(np.frombuffer(parts[0], np.uint8), np.float32, shape)[0]

    return Peer(encode, decode)
