"""What people see: progress bars on stderr and one printer; figures meant for machines go to stdout."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")

err = Console(stderr=True, highlight=False)


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
