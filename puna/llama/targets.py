"""How many tokens of a source train; a row, a batch or a source of which none does is refused by name."""

from collections.abc import Iterable
from dataclasses import dataclass

from puna.errors import DataError
from puna.llama.packing import IGNORED, Batch

MEND = "Every token of it is masked; look at the loss mask or at the roles, or leave it out."


@dataclass(frozen=True)
class Targets:
    """Tokens that were looked at, padding included, and those among them that train."""

    num_rows: int
    num_tokens: int
    num_targets: int

    @property
    def share(self) -> float:
        """Of the tokens, those that train."""
        return self.num_targets / self.num_tokens


def count_targets(source: str, batches: Iterable[Batch], row_name: str = "row") -> Targets:
    """Count over batches of one source whose rows are named by `ids`.

    Raises DataError, which names the source, where there is no target at all; else the first batch or row without one.
    """
    rows: list[tuple[int, str, int, int]] = []
    for number, batch in enumerate(batches):
        targets = (batch.targets != IGNORED).sum(dim=1).tolist()
        rows += [(number, f"{row_name} {i}", batch.tokens.shape[1], n) for i, n in zip(batch.ids, targets, strict=True)]
    total = Targets(len(rows), sum(length for *_, length, _ in rows), sum(n for *_, n in rows))
    if not total.num_targets:
        raise DataError(f"{source} has no target token in any of the {len(rows)} rows that were read of it", MEND)
    for batch_number in sorted({number for number, *_ in rows}):
        own = [(name, n) for number, name, _, n in rows if number == batch_number]
        names = ", ".join(name for name, _ in own[:4]) + (", ..." if len(own) > 4 else "")
        if not any(n for _, n in own):
            raise DataError(f"batch {batch_number} of {source} ({names}) has no target token", MEND)
    for _, name, _, n in rows:
        if not n:
            raise DataError(f"{name} of {source} has no target token: it would train nothing", MEND)
    return total
