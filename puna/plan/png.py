"""Line charts as PNG files, with nothing but NumPy and zlib: a canvas, a small font, an encoder."""

import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from puna.chart import log_ticks, short, ticks

Point = tuple[float, float]
Line = Mapping[str, Sequence[Point]]

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 320, 76, 96, 40, 30
PAPER, INK, RULE = (255, 255, 255), (40, 44, 50), (224, 222, 216)
COLOURS = ((37, 99, 184), (191, 84, 19), (43, 127, 85))
SCALE = 2


def _font() -> dict[str, np.ndarray]:
    """Letters of three by five dots: after each its five rows, an octal digit a row, the left dot highest."""
    table = (
        "075557 126227 271747 371717 455711 574717 674757 771222 875757 975717 .00002 -00700 /11244 %51245 "
        "a25755 b65656 c34443 d65556 e74647 f74644 g34753 h55755 i72227 j11157 k55655 l44447 m57755 n65555 o25552 "
        "p65644 q25563 r65655 s34216 t72222 u55557 v55552 w55775 x55255 y55222 z71247"
    )
    found = {}
    for word in table.split():
        rows = [[int(digit) >> 2 & 1, int(digit) >> 1 & 1, int(digit) & 1] for digit in word[1:]]
        found[word[0]] = np.array(rows, dtype=bool)
    return found


class Canvas:
    """Pixels, and what can be drawn on them."""

    def __init__(self, width: int, height: int) -> None:
        self.pixels = np.full((height, width, 3), PAPER, dtype=np.uint8)
        self.font = _font()

    def line(self, start: Point, end: Point, colour: tuple[int, int, int], thick: int = 1) -> None:
        """A straight line between two points."""
        steps = int(max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)) * 2
        xs = np.rint(np.linspace(start[0], end[0], steps)).astype(int)
        ys = np.rint(np.linspace(start[1], end[1], steps)).astype(int)
        for right in range(thick):
            for down in range(thick):
                self.pixels[
                    np.clip(ys + down, 0, len(self.pixels) - 1), np.clip(xs + right, 0, self.pixels.shape[1] - 1)
                ] = colour

    def word(self, x: float, y: float, text: str, colour: tuple[int, int, int] = INK, align: float = 0.0) -> None:
        """Text whose upper left corner is at (x, y), moved left by `align` of its width; unknown letters are gaps."""
        pace = 4 * SCALE
        left, top = round(x - align * pace * len(text)), round(y)
        for place, letter in enumerate(text.lower()):
            if letter not in self.font:
                continue
            dots = np.kron(self.font[letter], np.ones((SCALE, SCALE), dtype=bool))
            at = left + place * pace
            window = self.pixels[max(0, top) : top + 5 * SCALE, max(0, at) : at + 3 * SCALE]
            window[dots[: window.shape[0], : window.shape[1]]] = colour

    def encode(self) -> bytes:
        """The bytes of a PNG file."""
        height, width, _ = self.pixels.shape
        rows = b"".join(b"\0" + row.tobytes() for row in self.pixels)
        head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
        return b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in chunks
        )


def charts(pictures: Sequence[tuple[str, Line]]) -> bytes:
    """Titled charts one below the other, over a logarithmic x axis, as one PNG."""
    canvas = Canvas(WIDTH, HEIGHT * len(pictures))
    for number, (title, lines) in enumerate(pictures):
        _chart(canvas, number * HEIGHT, title, lines)
    return canvas.encode()


def _chart(canvas: Canvas, top: int, title: str, lines: Line) -> None:
    canvas.word(LEFT, top + 14, title)
    points = [point for line in lines.values() for point in line]
    if not points:
        return
    low, high = min(x for x, _ in points), max(x for x, _ in points)
    marks = ticks(0, max(y for _, y in points), 5)

    def place(x: float, y: float) -> Point:
        across = math.log(x / low) / (math.log(high / low) or 1)
        return LEFT + across * (WIDTH - LEFT - RIGHT), top + HEIGHT - BOTTOM - y / marks[-1] * (HEIGHT - TOP - BOTTOM)

    for mark in marks:
        _, y = place(low, mark)
        canvas.line((LEFT, y), (WIDTH - RIGHT, y), RULE)
        canvas.word(LEFT - 8, y - 5, short(mark), align=1)
    for x in [x for x in log_ticks(low, high) if low <= x <= high] or [low]:
        canvas.word(place(x, 0)[0], top + HEIGHT - BOTTOM + 8, short(x), align=0.5)
    for colour, (name, line) in zip(COLOURS, lines.items(), strict=False):
        spots = [place(*point) for point in line]
        for start, end in pairwise(spots):
            canvas.line(start, end, colour, 2)
        canvas.word(spots[-1][0] + 8, spots[-1][1] - 5, name, colour)
