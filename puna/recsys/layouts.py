"""What the columns of a click file are."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from puna.errors import DataError

LABEL, DENSE, TABLE, HOUR, LEFT_OUT, BAG = "label", "dense", "table", "hour", "-", "bag"
ROLES = (LABEL, DENSE, TABLE, BAG, HOUR, LEFT_OUT)
BETWEEN = "|"
"""Parts the values of a bag."""


@dataclass(frozen=True)
class Layout:
    """Names and roles of the columns of a row, in order.

    A column of role hour is a time such as 14102103 (year, month, day, hour): it becomes the dense features hour_of_day
    and day_of_week, and may not fall from row to row. sizes: values of a column's fields at most; where that is more
    than one, a field is a bag of values of one table.
    """

    names: tuple[str, ...]
    roles: tuple[str, ...]
    delimiter: str = "\t"
    positive: str = "1"
    negative: str | None = "0"  # None: whatever is not positive
    sizes: tuple[int, ...] = ()  # none: one each

    def of(self, role: str) -> list[int]:
        """Places of the columns of a role."""
        return [place for place, found in enumerate(self.roles) if found == role]

    @property
    def dense(self) -> tuple[str, ...]:
        """Names of the dense features."""
        names = [self.names[place] for place in self.of(DENSE)]
        return (*names, *(("hour_of_day", "day_of_week") if self.of(HOUR) else ()))

    @property
    def tables(self) -> tuple[str, ...]:
        """Names of the categorical features."""
        return tuple(self.names[place] for place in self.of(TABLE))

    @property
    def hots(self) -> tuple[int, ...]:
        """Values of every categorical feature at most."""
        return tuple(self.sizes[place] if self.sizes else 1 for place in self.of(TABLE))


def _layout(columns: Sequence[tuple[str, str]], delimiter: str) -> Layout:
    return Layout(tuple(name for _, name in columns), tuple(role for role, _ in columns), delimiter)


CRITEO = _layout(
    [(LABEL, "label"), *((DENSE, f"I{n}") for n in range(1, 14)), *((TABLE, f"C{n}") for n in range(1, 27))], "\t"
)
"""Kaggle Display Advertising and the terabyte logs: no header, tab-separated."""

_AVAZU_TABLES = (
    "C1 banner_pos site_id site_domain site_category app_id app_domain app_category device_id device_ip device_model "
    "device_type device_conn_type C14 C15 C16 C17 C18 C19 C20 C21"
)
AVAZU = _layout(
    [(LEFT_OUT, "id"), (LABEL, "click"), (HOUR, "hour")] + [(TABLE, name) for name in _AVAZU_TABLES.split()],
    ",",
)
"""Avazu 2014: comma-separated, with or without a header."""

LAYOUTS = {"criteo": CRITEO, "avazu": AVAZU}


def parse_columns(text: str, delimiter: str, positive: str, negative: str | None) -> Layout:
    """A layout from words such as `label,dense:age,table:city,bag:tags:20,-`. Raises DataError for words that mean
    nothing."""
    columns, sizes = [], []
    for place, word in enumerate(text.split(","), start=1):
        role, _, name = word.strip().partition(":")
        if role not in ROLES:
            raise DataError(
                f"column {place} is described as {word!r}", f"Write ROLE:NAME with a role of {', '.join(ROLES)}."
            )
        size = "1"
        if role == BAG:
            role, (name, _, size) = TABLE, name.rpartition(":")
            if not name or not size.isdecimal() or int(size) < 2 or delimiter == BETWEEN:
                raise DataError(
                    f"column {place} is described as {word!r}",
                    f"Write bag:NAME:SIZE, 2 or more values parted by {BETWEEN!r} (fields by another), or table:NAME.",
                )
        columns.append((role, name or (role if role in (LABEL, HOUR) else f"{role}{place}")))
        sizes.append(int(size))
    layout = _layout(columns, delimiter)
    kept = [name for name, role in zip(layout.names, layout.roles, strict=True) if role != LEFT_OUT]
    if len(layout.of(LABEL)) != 1 or not layout.tables or len(set(kept)) < len(kept) or len(layout.of(HOUR)) > 1:
        raise DataError(
            f"the columns {text} do not describe clicks",
            "Name one label, at least one table, at most one hour, and no name twice.",
        )
    return replace(layout, positive=positive, negative=negative, sizes=tuple(sizes))
