"""What people see: progress bars and one printer on stderr, tables on stdout."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")

WIDTH = 205  # of tables where stdout is not a terminal

err = Console(stderr=True, highlight=False)


def out() -> Console:
    """Stdout; where it is not a terminal, as wide as tables need."""
    return Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)


def bar(*extra: str) -> Progress:
    """A progress bar on stderr; `extra` are rich column templates such as "{task.fields[loss]}"."""
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    ]
    return Progress(*columns, *(TextColumn(text) for text in extra), console=err)


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate with a progress bar; `total` is needed where the length is not known."""
    with bar() as progress:
        yield from progress.track(items, total=total, description=description)
