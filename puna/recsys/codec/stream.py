"""The head of a stream: all that a decoder must know before it makes room for anything. Layout: docs/codec.md.

What a stream may ask for is bounded by its own length: FREE_VALUES numbers, and VALUES_PER_BYTE more for each byte. The
encoder pads the few streams that say more in less.
"""

import binascii
import struct
from dataclasses import dataclass

from puna.errors import DataError
from puna.recsys.codec.quantise import MAX_CODES, Grid

MAGIC, VERSION = 0xC3, 1
RAW, FIXED, RANS, HUFFMAN, VECTOR_LZ = range(5)
METHODS = {RAW: "raw", FIXED: "fixed", RANS: "rans", HUFFMAN: "huffman", VECTOR_LZ: "vector_lz"}
ALL_ROWS, KNOWN_IDS, SENT_INDEX, IN_ORDER = range(4)
FREE_VALUES, VALUES_PER_BYTE = 1 << 21, 1 << 10
MAX_ROWS, MAX_WIDTH = 1 << 28, 1 << 20
_BASE, _EXCEPTIONS, _PADDING = 4, 8, 16


@dataclass(slots=True)
class Head:
    """A stream's head."""

    method: int
    index: int  # ALL_ROWS: no distinct rows were looked for
    num_rows: int
    width: int
    num_distinct: int
    grid: Grid | None = None  # None with RAW
    num_exceptions: int = 0
    padding: int = 0

    @property
    def num_coded(self) -> int:
        """Distinct rows that the payload holds."""
        return self.num_distinct - self.num_exceptions


def damaged(what: str) -> DataError:
    """The error of a stream that cannot be decoded."""
    return DataError(f"the codec stream is damaged: {what}", "Send or write it again.")


def write(head: Head, body_size: int) -> bytes:
    """The head's bytes; sets its padding, which goes after the body."""
    head.padding = max(0, -(-(head.num_rows * head.width - FREE_VALUES) // VALUES_PER_BYTE) - body_size)
    flags = head.index | (_EXCEPTIONS if head.num_exceptions else 0) | (_PADDING if head.padding else 0)
    grid = head.grid
    if grid and grid.base:
        flags |= _BASE
    text = bytearray((MAGIC, VERSION << 4 | head.method, flags))
    text += varint(head.num_rows) + varint(head.width)
    if head.index in (KNOWN_IDS, SENT_INDEX):
        text += varint(head.num_distinct)
    if head.num_exceptions:
        text += varint(head.num_exceptions)
    if head.padding:
        text += varint(head.padding)
    if grid:
        text += varint(2 * grid.low if grid.low >= 0 else -2 * grid.low - 1) + varint(grid.num_codes - 1)
        text += struct.pack("<ff", grid.step, grid.base) if grid.base else struct.pack("<f", grid.step)
    return bytes(text + binascii.crc_hqx(text, 0xFFFF).to_bytes(2, "little"))


def read(stream: memoryview) -> tuple[Head, int]:
    """The head, checked, and where the body begins; DataError where it is damaged or asks for too much."""
    if len(stream) < 3:
        raise damaged(f"it has {len(stream)} bytes")
    if stream[0] != MAGIC:
        raise damaged(f"it begins with {stream[0]:#04x} instead of {MAGIC:#04x}")
    if stream[1] >> 4 != VERSION:
        raise DataError(f"the codec stream is of version {stream[1] >> 4}", f"This Puna reads version {VERSION}.")
    method, flags = stream[1] & 15, stream[2]
    if method not in METHODS or flags >= 2 * _PADDING or (method == RAW and flags & (_BASE | _EXCEPTIONS)):
        raise damaged(f"no such method or flags, {method} and {flags:#04x}")
    reader = Reader(stream, 3)
    head = Head(method, flags & 3, reader.varint(), reader.varint(), 0)
    head.num_distinct = reader.varint() if head.index in (KNOWN_IDS, SENT_INDEX) else head.num_rows
    head.num_exceptions = reader.varint() if flags & _EXCEPTIONS else 0
    head.padding = reader.varint() if flags & _PADDING else 0
    if method != RAW:
        low, largest = reader.varint(), reader.varint()
        step = reader.float32()
        base = reader.float32() if flags & _BASE else 0.0
        head.grid = Grid(step, base, low // 2 if low % 2 == 0 else -(low + 1) // 2, largest + 1)
    end = reader.at
    if int.from_bytes(reader.take(2), "little") != binascii.crc_hqx(stream[:end], 0xFFFF):
        raise damaged("the checksum of its head is another")
    _check(head, len(stream), len(stream) - reader.at)
    return head, reader.at


def _check(head: Head, size: int, body_size: int) -> None:
    if head.num_rows > MAX_ROWS or not 1 <= head.width <= MAX_WIDTH:
        raise damaged(f"rows of shape ({head.num_rows}, {head.width})")
    if head.num_rows * head.width > FREE_VALUES + VALUES_PER_BYTE * size:
        raise damaged(f"{size} bytes cannot hold {head.num_rows} x {head.width} numbers")
    if head.num_distinct > head.num_rows or (head.num_distinct == 0) != (head.num_rows == 0):
        raise damaged(f"{head.num_distinct} distinct of {head.num_rows} rows")
    if head.num_exceptions > head.num_distinct or head.padding > body_size:
        raise damaged("more exceptions or padding than there is room for")
    grid = head.grid
    if grid and (grid.num_codes > MAX_CODES or abs(grid.low) > 1 << 22 or not 0 <= grid.step < float("inf")):
        raise damaged(f"a grid of {grid.num_codes} codes from {grid.low} with step {grid.step}")
    if grid and grid.num_codes > 256 and head.method != FIXED:
        raise damaged(f"{grid.num_codes} codes with method {METHODS[head.method]}")


def varint(number: int) -> bytes:
    """A whole number from 0 on, seven bits a byte, lowest first; the top bit: more follow."""
    if number < 128:
        return bytes((number,))
    return bytes((number & 127 | 128,)) + varint(number >> 7)


class Reader:
    """Takes parts of a stream and never more than it has."""

    def __init__(self, stream: memoryview, at: int = 0) -> None:
        self.stream, self.at = stream, at

    def take(self, size: int) -> memoryview:
        """The next bytes."""
        if size > len(self.stream) - self.at:
            raise damaged(f"it ends after {len(self.stream)} bytes, within a part of {size}")
        self.at += size
        return self.stream[self.at - size : self.at]

    def rest(self) -> memoryview:
        """All that is left."""
        return self.take(len(self.stream) - self.at)

    def varint(self) -> int:
        """A number of `varint`'s, below 2**35."""
        number, at = 0, self.at
        for shift in range(0, 35, 7):
            if at == len(self.stream):
                raise damaged("it ends within a number")
            byte = self.stream[at]
            number |= (byte & 127) << shift
            at += 1
            if byte < 128:
                self.at = at
                return number
        raise damaged("a number of more than 35 bits")

    def float32(self) -> float:
        """Four bytes, little-endian."""
        return float(struct.unpack("<f", self.take(4))[0])
