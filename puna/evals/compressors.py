"""General-purpose compressors as a yardstick: what a model must beat to have learnt more than repetition."""

import gzip
import lzma


def gzip_bits_per_byte(text: bytes) -> float:
    """Bits per byte of `gzip -9` (no time stamp in the header, so the same text gives the same figure)."""
    return 8 * len(gzip.compress(text, 9, mtime=0)) / len(text)


def xz_bits_per_byte(text: bytes) -> float:
    """Bits per byte of `xz -9` (a window of 64 MiB: it sees the whole of a smaller text at once)."""
    return 8 * len(lzma.compress(text, preset=9)) / len(text)
