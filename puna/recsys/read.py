"""Rows of click files as they stream by: text (plain, gzip, xz, bzip2, zstd) and Parquet. Memory does not grow.

A block is bytes with the bounds of every field in them: field c of row r is data[bounds[r, c, 0] : bounds[r, c, 1]].
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from puna.errors import DataError
from puna.recsys.layouts import BETWEEN, LEFT_OUT, Layout
from puna.sparse.compiled import exact_kernel
from puna.sparse.text import NEWLINE, RETURN, open_file, shown, told_of_damage, whole_lines

BLOCK_ROWS = 1 << 16
SPACE = ord(" ")


@dataclass(frozen=True)
class Block:
    """Rows of a file. first: line (or row, in Parquet) of the first one, from 1; lines: of every row."""

    path: Path
    data: npt.NDArray[np.uint8]
    bounds: npt.NDArray[np.int64]  # (rows, columns, 2)
    lines: npt.NDArray[np.int64]  # (rows,)

    def __len__(self) -> int:
        return len(self.lines)

    def text(self, row: int, column: int) -> str:
        """One field."""
        start, end = self.bounds[row, column]
        return bytes(self.data[start:end]).decode("utf-8", "replace")

    def place(self, row: int, name: str) -> str:
        """Where a field is, for a message."""
        return f"{self.path}, line {self.lines[row]:,}, column {name}"

    def column(self, place: int) -> npt.NDArray[np.int64]:
        """Where the fields of a column begin and end, (rows, 2)."""
        return np.ascontiguousarray(self.bounds[:, place])

    def items(self, place: int, name: str, size: int) -> "Block":
        """Values of a column of bags, as a block of `size` columns, empty where a bag has no more.

        Raises DataError for a bag of more (file, line, column).
        """
        bounds = np.zeros((len(self), size, 2), np.int64)
        bad = _split_bags(self.data, self.column(place), ord(BETWEEN), bounds)
        if bad >= 0:
            raise DataError(
                f"{self.place(bad, name)}: {shown(self.text(bad, place))!r} has more than {size} values",
                f"Describe the column as bag:{name}:SIZE with the most values that a row has.",
            )
        return Block(self.path, self.data, bounds, self.lines)

    def rest(self, count: int) -> "Block":
        """The rows after the first `count`."""
        return Block(self.path, self.data, self.bounds[count:], self.lines[count:])


def read(path: Path, layout: Layout) -> Iterator[Block]:
    """Blocks of rows with the layout's columns; a first line that is the layout's names is a header.

    Raises DataError: no such file, a row with another number of fields (file and line), a column that a Parquet file
    does not have, damaged or truncated compression.
    """
    if not path.is_file():
        raise DataError(
            f"no click file at {path}", "Give a TSV, CSV or Parquet file; .gz, .xz, .zst and .bz2 are read."
        )
    if path.suffix == ".parquet":
        yield from _parquet(path, layout)
        return
    reached, again = 0, "Fetch it again; an import that was begun goes on from where it stands."
    with told_of_damage(path, again, lambda: f" after line {reached:,}"):
        for block in _text(path, layout):
            reached = int(block.lines[-1]) if len(block) else reached
            yield block


def _text(path: Path, layout: Layout) -> Iterator[Block]:
    line, width = 1, len(layout.names)
    with open_file(path) as file:
        for piece in whole_lines(file):
            if line == 1 and (header := _header(path, piece, layout)):
                piece, line = piece[header:], 2
            data = np.frombuffer(piece, np.uint8)
            num_lines = int((data == NEWLINE).sum())
            bounds, lines = np.empty((num_lines, width, 2), np.int64), np.empty(num_lines, np.int64)
            count, bad = _split(data, ord(layout.delimiter), line, bounds, lines)
            if bad >= 0:
                raise _wrong_row(path, int(lines[count]), piece, bad, layout)
            yield Block(path, data, bounds[:count], lines[:count])
            line += num_lines


def _header(path: Path, piece: bytes, layout: Layout) -> int:
    """Bytes of a header line; 0 where the first line is a sample. Raises DataError for a header of other columns."""
    first = piece[: piece.index(b"\n") + 1]
    fields = [field.strip() for field in first.decode("utf-8", "replace").rstrip("\r\n").split(layout.delimiter)]
    wanted = {name for name, role in zip(layout.names, layout.roles, strict=True) if role != LEFT_OUT}
    if len(wanted & set(fields)) < max(2, len(wanted) // 2):
        return 0
    if missing := [name for name in layout.names if name in wanted and name not in fields]:
        raise DataError(
            f"{path}, line 1: the header lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}",
            "Give the file the layout's columns, or describe its own with --columns.",
        )
    if len(fields) != len(layout.names) or [f for f in fields if f in wanted] != [
        name for name in layout.names if name in wanted
    ]:
        raise DataError(
            f"{path}, line 1: the header has the columns {', '.join(fields)}, not {', '.join(layout.names)}",
            "Describe the file's own columns, in order, with --columns.",
        )
    return len(first)


@exact_kernel
def _split(data: Any, separator: int, first: int, bounds: Any, lines: Any) -> Any:
    """Fields of each line with any, spaces around them left out: rows found, start of the first bad line or -1."""
    row, line, start = 0, first, 0
    num_columns = bounds.shape[1]
    for end in range(data.shape[0]):
        if data[end] != NEWLINE:
            continue
        last = end - 1 if end > start and data[end - 1] == RETURN else end
        if last > start:
            lines[row] = line
            column, field = 0, start
            for at in range(start, last + 1):
                if at == last or data[at] == separator:
                    if column < num_columns:
                        left, right = field, at
                        while left < right and data[left] == SPACE:
                            left += 1
                        while right > left and data[right - 1] == SPACE:
                            right -= 1
                        bounds[row, column, 0] = left
                        bounds[row, column, 1] = right
                    column += 1
                    field = at + 1
            if column != num_columns:
                return row, start
            row += 1
        line += 1
        start = end + 1
    return row, -1


@exact_kernel
def _split_bags(data: Any, fields: Any, separator: int, bounds: Any) -> int:
    """Values of each field, spaces around them and empty ones left out; the first field with too many, or -1."""
    for row in range(fields.shape[0]):
        count, start, end = 0, fields[row, 0], fields[row, 1]
        for at in range(start, end + 1):
            if at < end and data[at] != separator:
                continue
            left, right = start, at
            while left < right and data[left] == SPACE:
                left += 1
            while right > left and data[right - 1] == SPACE:
                right -= 1
            if left < right:
                if count == bounds.shape[1]:
                    return row
                bounds[row, count, 0] = left
                bounds[row, count, 1] = right
                count += 1
            start = at + 1
    return -1


def _wrong_row(path: Path, line: int, piece: bytes, start: int, layout: Layout) -> DataError:
    text = piece[start : piece.index(b"\n", start)].decode("utf-8", "replace").rstrip("\r")
    found, wanted = len(text.split(layout.delimiter)), len(layout.names)
    lacks = f"; the first column it lacks is {layout.names[found]}" if found < wanted else ""
    return DataError(
        f"{path}, line {line:,} has {found} columns where {wanted} were expected between {layout.delimiter!r}{lacks}: "
        f"{shown(text)!r}",
        "Mend the line, or describe the columns with --columns and what parts them with --delimiter.",
    )


def _parquet(path: Path, layout: Layout) -> Iterator[Block]:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is no Parquet file: {error}", "Write it again.") from None
    wanted = [name for name, role in zip(layout.names, layout.roles, strict=True) if role != LEFT_OUT]
    if missing := [name for name in wanted if name not in file.schema_arrow.names]:
        raise DataError(
            f"{path} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}; it has "
            f"{', '.join(file.schema_arrow.names)}",
            "Give the file the layout's columns, or describe its own with --columns.",
        )
    first = 1
    for batch in file.iter_batches(BLOCK_ROWS, columns=wanted):
        pieces, size = [], 0
        bounds = np.zeros((batch.num_rows, len(layout.names), 2), np.int64)
        for name in wanted:
            place = layout.names.index(name)
            values = batch.column(name)
            if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
                values = _joined(path, name, values, bool(layout.sizes) and layout.sizes[place] > 1)
            values = pc.fill_null(values.cast(pa.large_string()), "")
            _, offsets, data = values.buffers()
            ends = np.frombuffer(offsets, np.int64)[values.offset : values.offset + len(values) + 1]
            text = np.frombuffer(data, np.uint8)[: ends[-1]] if data else np.empty(0, np.uint8)
            bounds[:, place, 0], bounds[:, place, 1] = size + ends[:-1], size + ends[1:]
            pieces.append(text)
            size += len(text)
        data = np.concatenate(pieces)
        data.flags.writeable = False
        yield Block(path, data, bounds, np.arange(first, first + batch.num_rows))
        first += batch.num_rows


def _joined(path: Path, name: str, lists: Any, is_bag: bool) -> Any:
    """Lists of a Parquet column as the text of bags. Raises DataError where it is no bag, or a value would be two."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not is_bag:
        raise DataError(
            f"{path}, column {name}: it holds lists", f"Describe it as bag:{name}:SIZE with the most values of a row."
        )
    lists = lists.cast(pa.list_(pa.string()))
    texts = pc.fill_null(lists.values, "")
    if pc.any(pc.match_substring(texts, BETWEEN)).as_py():
        raise DataError(f"{path}, column {name}: a value has {BETWEEN!r} in it", "Write another sign in its place.")
    return pc.binary_join(pa.ListArray.from_arrays(lists.offsets, texts), BETWEEN)
