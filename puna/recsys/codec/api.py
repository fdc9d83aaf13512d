"""Error-bounded compression of embedding rows: `encode`, `decode`, and `Codec` for many of them.

stream = encode(rows, bound=0.01)
again = decode(stream)           # |rows - again| <= 0.01 (max - min), everywhere
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from puna.errors import DataError
from puna.recsys.codec import encoder
from puna.recsys.codec.decoder import Decoder
from puna.recsys.codec.encoder import Encoder, Rows
from puna.recsys.codec.quantise import finite_range


class Slice(NamedTuple):
    """What one stream holds: rows (n, D) float32 of one table for one receiver, and how they are coded."""

    rows: Any
    ids: Any = None
    bound: float = 0.01
    codec: str = "auto"


class Codec:
    """Encodes and decodes in buffers that are used again, many slices at a time over `num_threads` threads.

    For one caller at a time. Streams are the same for any number of threads. check_ids=False trusts that lookups of one
    id have equal rows, as those of one table have.
    """

    def __init__(self, num_threads: int = 1, check_ids: bool = True) -> None:
        self._encoders = [Encoder(check_ids) for _ in range(num_threads)]
        self._decoders = [Decoder() for _ in range(num_threads)]
        self._pool = ThreadPoolExecutor(num_threads) if num_threads > 1 else None

    def __enter__(self) -> "Codec":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads."""
        if self._pool:
            self._pool.shutdown()

    def encode(self, rows: Any, ids: Any = None, bound: float = 0.01, codec: str = "auto") -> bytes:
        """As the function `encode`."""
        return self._encoders[0].encode(*encoder.check(rows, ids, bound, codec), bound, codec)

    def decode(self, stream: Any, ids: Any = None, out: Rows | None = None) -> Rows:
        """As the function `decode`; into `out` (n, D) where given."""
        return self._decoders[0].decode(stream, ids, out)

    def encode_many(self, slices: Sequence[Slice]) -> list[bytes]:
        """The stream of each slice, in order."""

        def work(worker: Encoder, number: int) -> bytes:
            rows, ids, bound, codec = slices[number]
            return worker.encode(*encoder.check(rows, ids, bound, codec), bound, codec)

        return self._spread(self._encoders, work, [np.size(s.rows) for s in slices])

    def decode_many(
        self,
        streams: Sequence[Any],
        ids: Sequence[Any] | None = None,
        outs: Sequence[Rows | None] | None = None,
    ) -> list[Rows]:
        """The rows of each stream, in order."""

        def work(worker: Decoder, number: int) -> Rows:
            return worker.decode(streams[number], ids[number] if ids else None, outs[number] if outs else None)

        return self._spread(self._decoders, work, [len(s) for s in streams])

    def _spread(self, workers: list[Any], work: Callable[[Any, int], Any], sizes: list[int]) -> list[Any]:
        """work(worker, n) for all n; each worker has neighbouring ones of about the same size in all."""
        if self._pool is None or len(sizes) < 2:
            return [work(workers[0], number) for number in range(len(sizes))]
        ends = np.cumsum(sizes) * len(workers) // max(sum(sizes), 1)
        parts = [np.flatnonzero(np.minimum(ends, len(workers) - 1) == w) for w in range(len(workers))]
        found = self._pool.map(lambda w: [work(workers[w], int(n)) for n in parts[w]], range(len(workers)))
        return [one for part in found for one in part]


def encode(rows: Any, ids: Any = None, bound: float = 0.01, codec: str = "auto") -> bytes:
    """Rows (n, D) float32 as a stream from which `decode` makes rows that differ by at most bound (max - min).

    max and min are those of the slice's finite values. Rows that cannot keep the bound are sent as they are; NaN and
    infinity come back bit for bit. Equal arguments give equal bytes.

    ids (n,): whole numbers that the receiver knows and gives to `decode`; lookups of one id have equal rows. Without
    them repeated rows are found by their content and sent once, with an index. codec is auto (fewest bytes), rans,
    fixed (for fast links), raw (distinct rows, exact), copy (all rows, exact), or huffman, vector_lz, published (all
    rows, as Feng et al.).
    DataError: rows that are not float32 (n, D), ids of another length or of rows that differ, a bound not in (0, 0.5].
    """
    return _own.codec.encode(rows, ids, bound, codec)


def decode(stream: Any, ids: Any = None) -> Rows:
    """Rows (n, D) float32 of a stream (bytes, or anything that holds bytes).

    ids (n,): those that `encode` was given, and needed only then. DataError: a stream that is cut, altered, or of
    another version; ids that are not those. Memory is bounded by the stream's length, see docs/codec.md.
    """
    return _own.codec.decode(stream, ids)


def bound_of(rows: Any, bound: float) -> float:
    """The largest difference that `encode` allows: bound (max - min) over the finite values; 0 without any."""
    if np.asarray(rows).dtype != np.float32:
        raise DataError(f"rows are {np.asarray(rows).dtype}", "They must be float32.")
    low, high = finite_range(np.ascontiguousarray(rows).reshape(-1))
    return bound * max(high - low, 0.0)


class _Own(threading.local):
    """A codec for each thread."""

    def __init__(self) -> None:
        self.codec = Codec()


_own = _Own()
