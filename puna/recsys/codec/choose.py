"""Which codec pays on a link: the speed-up formula of Feng et al. (SC24) with measured ratio and speeds."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from puna.recsys.codec.api import Codec, Slice

PLAIN = "plain"
"""Sent as it is, without a codec."""


@dataclass(frozen=True)
class Measured:
    """What a codec did to a slice; speeds in bytes of float32 rows a second."""

    ratio: float
    encode_bytes_per_s: float
    decode_bytes_per_s: float


def exchange_time(measured: Measured, link_bytes_per_s: float) -> float:
    """1/CR + B (1/Tc + 1/Td): the exchange's time as a share of that of the plain rows over the same link."""
    codec = 1 / measured.encode_bytes_per_s + 1 / measured.decode_bytes_per_s
    return 1 / measured.ratio + link_bytes_per_s * codec


def speedup(measured: Measured, link_bytes_per_s: float) -> float:
    """How many times faster than plain rows an exchange becomes."""
    return 1 / exchange_time(measured, link_bytes_per_s)


def pick(measured: dict[str, Measured], link_bytes_per_s: float) -> str:
    """The codec with the largest speed-up; PLAIN where none is above 1."""
    best = max(measured, key=lambda name: speedup(measured[name], link_bytes_per_s), default=PLAIN)
    return best if measured and speedup(measured[best], link_bytes_per_s) > 1 else PLAIN


def measure(
    codec: Codec, example: Slice, names: Sequence[str] = ("copy", "raw", "fixed", "rans"), repeats: int = 3
) -> dict[str, Measured]:
    """Each codec on one slice: its ratio, and the median speeds of `repeats` turns after one that is not timed."""
    found = {}
    for name in names:
        stream = codec.encode(example.rows, example.ids, example.bound, name)
        out = codec.decode(stream, example.ids)
        times: list[tuple[float, float]] = []
        for _ in range(repeats):
            began = time.perf_counter()
            codec.encode(example.rows, example.ids, example.bound, name)
            encoded = time.perf_counter()
            codec.decode(stream, example.ids, out)
            times.append((encoded - began, time.perf_counter() - encoded))
        encode_s, decode_s = (statistics.median(column) for column in zip(*times, strict=True))
        found[name] = Measured(out.nbytes / len(stream), out.nbytes / encode_s, out.nbytes / decode_s)
    return found
