"""Several folders of token shards as one endless sequence of samples, in given shares.

Which source sample i is of, and its number within that source, follow from i and the weights alone, so data order stays
a pure function of (seed, sample index), every source counts its own epochs, and shares are exact: after any number of
samples every source is within (number of sources) samples of its share. One source alone has its own order.
"""

from collections.abc import Sequence
from fractions import Fraction
from math import floor
from pathlib import Path
from typing import Any

import numpy as np

from puna.errors import DataError
from puna.llama.config import DataConfig
from puna.llama.packing import Samples
from puna.llama.shards import Shards


def open_sources(data: DataConfig, split: str) -> list[Shards]:
    """The token shards of each source, in the recipe's order.

    Raises DataError where one is missing or damaged, or where two were made by different tokenizers.
    """
    sources = [Shards(folder, split) for folder, _ in data.mixture()]
    first = sources[0]
    for other in sources[1:]:
        if other.tokenizer_hash != first.tokenizer_hash:
            raise DataError(
                f"{first.folder} and {other.folder} were made by different tokenizers "
                f"({first.tokenizer_hash[:12]} and {other.tokenizer_hash[:12]})",
                "Tokenize all sources with one tokenizer, or leave one of them out.",
            )
    return sources


def shares(data: DataConfig) -> list[float]:
    """The share of the tokens that each source gives; they sum to 1."""
    weights = [Fraction(weight) for _, weight in data.mixture()]
    return [float(weight / sum(weights)) for weight in weights]


class Mixture:
    """Streams as one; has the face of a stream.

    Sources split off one by one: of the first n samples that are left, floor(n p) are the next source's, with p its
    weight over the weights that are left. Fractions are exact, so the counts are too, however long the run.
    """

    def __init__(self, streams: Sequence[Samples], weights: Sequence[float]) -> None:
        self.streams = list(streams)
        exact = [Fraction(weight) for weight in weights]
        self._splits = [weight / sum(exact[place:]) for place, weight in enumerate(exact[:-1])]

    def place(self, index: int) -> tuple[int, int]:
        """Which source sample `index` is of, and which sample of that source it is."""
        for source, share in enumerate(self._splits):
            before = floor(share * index)
            if floor(share * (index + 1)) > before:
                return source, before
            index -= before
        return len(self._splits), index

    def sample(self, index: int, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        """As `Stream.sample`."""
        source, own = self.place(index)
        return self.streams[source].sample(own, seq_len)


def plan(data: DataConfig, sources: Sequence[Shards], tokens: int) -> list[dict[str, Any]]:
    """What a run of `tokens` tokens reads of each source: the records of the table and of the start event."""
    return [
        {
            "source": str(shards.folder),
            "num_documents": shards.num_documents,
            "num_tokens": shards.num_tokens,
            "share": share,
            "drawn_tokens": round(share * tokens),
            "epochs": share * tokens / shards.num_tokens,
        }
        for shards, share in zip(sources, shares(data), strict=True)
    ]


def table(records: Sequence[dict[str, Any]]) -> str:
    """The records of `plan` as aligned text."""
    rows = [("source", "documents", "tokens", "share", "drawn", "epochs")]
    rows += [
        (
            record["source"],
            f"{record['num_documents']:,}",
            f"{record['num_tokens']:,}",
            f"{record['share']:.4f}",
            f"{record['drawn_tokens']:,}",
            f"{record['epochs']:.2f}",
        )
        for record in records
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )


def labels(sources: Sequence[Shards]) -> list[str]:
    """Short names of the sources: the folder's own name, or its whole path where two have the same."""
    names = [Path(shards.folder).name for shards in sources]
    return [name if names.count(name) == 1 else str(shards.folder) for name, shards in zip(names, sources, strict=True)]
