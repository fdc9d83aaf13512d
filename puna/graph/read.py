"""Rows of edge files as they stream by: TSV, CSV and Parquet; plain, gzip, xz, zstd or bzip2. Memory does not grow.

A batch of rows is a list of columns; a column is bytes with the start and end of each row's text in them.
"""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from puna.errors import DataError
from puna.sparse.compiled import exact_kernel
from puna.sparse.text import NEWLINE, OPENERS, RETURN, open_file, shown, told_of_damage, whole_lines

BLOCK_ROWS = 1 << 18
SEPARATOR = "\x1f"  # between the fields of a CSV line once its quotes are gone
DELIMITERS = {".csv": ",", ".jlg": ","}


@dataclass(frozen=True)
class Column:
    """A field of every row of a batch: row i is data[starts[i]:ends[i]]."""

    data: npt.NDArray[np.uint8]
    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]

    def text(self, row: int) -> str:
        """One row's text."""
        return bytes(self.data[self.starts[row] : self.ends[row]]).decode("utf-8", "replace")


@dataclass(frozen=True)
class Rows:
    """A batch: its columns in the order asked for, and the line (or row) of its first one."""

    path: Path
    first: int
    columns: Sequence[Column]
    are_lines: bool = True

    def __len__(self) -> int:
        return len(self.columns[0].starts)

    def place(self, row: int) -> str:
        """Where a row is, for a message."""
        if not self.are_lines:
            return f"{self.path}, row {self.first + row:,}"
        before = self.columns[0].data[: self.columns[0].starts[row]]
        return f"{self.path}, line {self.first + int((before == NEWLINE).sum()):,}"


def read(path: Path, num_columns: int, delimiter: str | None = None, header: bool = False) -> Iterator[Rows]:
    """Batches of rows with exactly `num_columns` fields. delimiter: by the file's name where None.

    Raises DataError: no such file, a row with another number of fields (file and line), damaged compression.
    """
    if not path.is_file():
        raise DataError(f"no edge file at {path}", "Give a TSV, CSV or Parquet file; .gz, .xz, .zst and .bz2 are read.")
    if path.suffix == ".parquet":
        yield from _parquet(path, num_columns)
        return
    suffixes = [suffix for suffix in path.suffixes if suffix not in (*OPENERS, ".zst")]
    separator = delimiter or DELIMITERS.get(suffixes[-1] if suffixes else "", "\t")
    with told_of_damage(path, "Fetch or compress it again."):
        yield from _text(path, num_columns, separator, header)


def _text(path: Path, num_columns: int, separator: str, header: bool) -> Iterator[Rows]:
    line = 1
    with open_file(path) as file:
        if header:
            file.readline()
            line = 2
        for block in whole_lines(file):
            mark = separator
            if separator == "," and b'"' in block:
                block, mark = _unquoted(path, line, block), SEPARATOR
            data = np.frombuffer(block, np.uint8)
            bounds = np.empty((int((data == NEWLINE).sum()), num_columns, 2), np.int64)
            count, bad, lines = _split(data, ord(mark), bounds)
            if bad >= 0:
                raise _wrong_row(path, line + lines, block, bad, num_columns, separator)
            yield Rows(
                path, line, [Column(data, bounds[:count, c, 0], bounds[:count, c, 1]) for c in range(num_columns)]
            )
            line += lines


def column_of_lines(block: bytes) -> Column:
    """Whole lines as one column."""
    data = np.frombuffer(block, np.uint8)
    ends = np.flatnonzero(data == NEWLINE)
    return Column(data, np.concatenate([[0], ends[:-1] + 1]), ends)


def _unquoted(path: Path, line: int, block: bytes) -> bytes:
    """A block of CSV with quotes, without them."""
    try:
        rows = list(csv.reader(block.decode().splitlines(), strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}, from line {line:,} on: {error}", "Mend the quotes there.") from None
    return "".join(SEPARATOR.join(row) + "\n" for row in rows).encode()


@exact_kernel
def _split(data: Any, separator: int, bounds: Any) -> Any:
    """Fields of each line with any: rows found, start of the first line with other fields or -1, lines read."""
    row, lines, start = 0, 0, 0
    num_columns = bounds.shape[1]
    for end in range(data.shape[0]):
        if data[end] != NEWLINE:
            continue
        last = end - 1 if end > start and data[end - 1] == RETURN else end
        if last > start:
            column, field = 0, start
            for at in range(start, last + 1):
                if at == last or data[at] == separator:
                    if column < num_columns:
                        bounds[row, column, 0] = field
                        bounds[row, column, 1] = at
                        if at == field:
                            return row, start, lines
                    column += 1
                    field = at + 1
            if column != num_columns:
                return row, start, lines
            row += 1
        lines += 1
        start = end + 1
    return row, -1, lines


def _wrong_row(path: Path, line: int, block: bytes, start: int, num_columns: int, separator: str) -> DataError:
    text = block[start : block.index(b"\n", start)].decode("utf-8", "replace").replace(SEPARATOR, separator)
    fields = text.rstrip("\r").split(separator)
    found = "an empty field" if len(fields) == num_columns else f"{len(fields)} fields"
    return DataError(
        f"{path}, line {line:,} has {found} where {num_columns} were expected between {separator!r}: {shown(text)!r}",
        "Mend the line, or name the columns with --columns and what parts them with --delimiter.",
    )


def _parquet(path: Path, num_columns: int) -> Iterator[Rows]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} is no Parquet file: {error}", "Write it again.") from None
    if len(file.schema_arrow) != num_columns:
        names = ", ".join(file.schema_arrow.names)
        raise DataError(f"{path} has the columns {names}; {num_columns} were expected", "Name them with --columns.")
    first = 1
    for batch in file.iter_batches(BLOCK_ROWS):
        columns = []
        for name, values in zip(batch.schema.names, batch.columns, strict=True):
            if values.null_count:
                row = values.is_null().to_numpy(zero_copy_only=False).argmax()
                raise DataError(f"{path}, row {first + row:,}: {name} is empty", "Leave such rows out.")
            columns.append(_strings(values.cast(pa.large_string())))
        yield Rows(path, first, columns, are_lines=False)
        first += batch.num_rows


def _strings(values: Any) -> Column:
    _, offsets, data = values.buffers()
    bounds = np.frombuffer(offsets, np.int64)[values.offset : values.offset + len(values) + 1]
    return Column(np.frombuffer(data, np.uint8), bounds[:-1], bounds[1:])
