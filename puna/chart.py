"""Charts as inline SVG, without script; their colours are in report.css."""

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]

MAX_POINTS, MAX_COLUMNS = 600, 160
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 14, 26
WIDE, HALF = (1080, 320), (520, 220)


@dataclass(frozen=True)
class Line:
    """One series. style: one of a, b, c (colours), with " faint" or " dots" after it."""

    name: str
    points: list[Point]
    style: str = "a"


@dataclass(frozen=True)
class Mark:
    """A vertical line at `x` with its word."""

    x: float
    name: str


@dataclass(frozen=True)
class Axis:
    """From values [low, high] to pixels [start, end], straight or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / ((high - low) or 1) * (self.end - self.start)


def chart(
    lines: Sequence[Line],
    *,
    unit: str,
    marks: Sequence[Mark] = (),
    log: bool = False,
    from_zero: bool = True,
    wide: bool = False,
) -> str:
    """Lines over the step as an SVG figure; the values under the pointer show as the browser's tooltip.

    unit: what the y axis counts. log: logarithmic y axis (values <= 0 are left out). from_zero: the y axis holds 0.
    """
    kept = [Line(line.name, [p for p in line.points if p[1] > 0 or not log], line.style) for line in lines]
    lines = [line for line in kept if line.points]
    if not lines:
        return '<p class="absent">Nothing recorded yet.</p>'
    width, height = WIDE if wide else HALF
    xs, ys = ([p[i] for line in lines for p in line.points] for i in (0, 1))
    x_axis = Axis(min(xs), max(max(xs), min(xs) + 1), LEFT, width - RIGHT)
    y_ticks = log_ticks(min(ys), max(ys)) if log else ticks(min(ys + [0] * from_zero), max(ys + [0] * from_zero), 5)
    y_axis = Axis(min(y_ticks[0], *ys), max(y_ticks[-1], *ys), height - BOTTOM, TOP, log)
    x_ticks = [x for x in ticks(x_axis.low, x_axis.high, 9 if wide else 5) if x_axis.low <= x <= x_axis.high]
    marks = [mark for mark in marks if x_axis.low <= mark.x <= x_axis.high]
    parts = [
        _group("grid", (_rule(y_axis(y), width, number_text(y)) for y in y_ticks)),
        _group("grid", (_word(x_axis(x), height - 8, number_text(x)) for x in x_ticks)),
        _group("marks", (_mark(x_axis(mark.x), height, mark.name) for mark in marks)),
        *(_draw(line, x_axis, y_axis) for line in lines),
        _group("hover", _columns(lines, x_axis, height)),
    ]
    keys = "".join(f'<span class="key {line.style}"><i></i>{escape(line.name)}</span>' for line in lines)
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(unit)} by step">'
        f"{''.join(parts)}</svg>"
        f'<figcaption>{keys}<span class="unit">{escape(unit)}, by step</span></figcaption></figure>'
    )


def cloud(groups: Sequence[tuple[str, Sequence[tuple[float, float, str]]]]) -> str:
    """Named groups of points (x, y, word) as an SVG figure without scales; a point's word is its tooltip."""
    width, height = WIDE
    xs, ys = [x for _, own in groups for x, _, _ in own], [y for _, own in groups for _, y, _ in own]
    x_axis, y_axis = Axis(min(xs), max(xs), LEFT, width - LEFT), Axis(min(ys), max(ys), height - TOP, TOP)
    parts, keys = [], []
    for n, (name, own) in enumerate(groups):
        style = "abc"[n % 3]
        dots = (
            f'<circle cx="{x_axis(x):.1f}" cy="{y_axis(y):.1f}" r="3"><title>{escape(word)}</title></circle>'
            for x, y, word in own
        )
        parts.append(_group(f"{style} dots", dots))
        keys.append(f'<span class="key {style} dots"><i></i>{escape(name)}</span>')
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" role="img" aria-label="points">{"".join(parts)}</svg>'
        f"<figcaption>{''.join(keys)}</figcaption></figure>"
    )


def bars(rows: Sequence[tuple[str, float, str, str]]) -> str:
    """Horizontal bars from rows (name, value, the value in words, css class)."""
    longest = max(value for _, value, _, _ in rows)
    return "".join(
        f'<div class="bar {css}"><span>{escape(name)}</span>'
        f'<div><b style="width:{100 * value / longest:.1f}%"></b></div><em>{escape(words)}</em></div>'
        for name, value, words, css in rows
    )


def smooth(line: list[Point]) -> list[Point]:
    """Exponential moving average without start-up bias; its memory is a fiftieth of the line, two points at least."""
    keep = 1 - 1 / max(len(line) / 50, 2)
    total = weight = 0.0
    out = []
    for x, y in line:
        total, weight = keep * total + y, keep * weight + 1
        out.append((x, total / weight))
    return out


def ticks(low: float, high: float, count: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten that cover [low, high] in about `count` steps."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / count))
    pace = next(power * m for m in (1, 2, 5, 10) if span / (power * m) <= count)
    return [n * pace for n in range(math.floor(low / pace), math.ceil(high / pace) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten around positive [low, high]; with 2 and 5 times them where there are few decades."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    between = (1, 2, 5) if len(decades) <= 3 else (1,)
    every = [m * 10.0**d for d in decades for m in between]
    first = max((t for t in every if t <= low), default=every[0])
    last = min((t for t in every if t >= high), default=every[-1])
    return [t for t in every if first <= t <= last]


def short(value: float) -> str:
    """Four significant digits: 0.01234, 3.142, 12,345, 3.1e-05."""
    if value == 0 or 1e-4 <= abs(value) < 1e4:
        return f"{value:.4g}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e7 else f"{value:.4g}"


def scaled(value: float, unit: str = "") -> str:
    """4.31 M, 25.9 G: with the prefix that leaves one to three digits before the point."""
    sizes = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
    size, prefix = next(((size, prefix) for size, prefix in sizes if abs(value) >= size), (1.0, ""))
    return f"{value / size:.3g} {prefix}{unit}".strip()


def number_text(value: float) -> str:
    """A tick's label."""
    value = float(f"{value:.6g}")
    return scaled(value).replace(" ", "") if abs(value) >= 10_000 else f"{value:,g}"


def _draw(line: Line, x_axis: Axis, y_axis: Axis) -> str:
    places = [(f"{x_axis(x):.1f}", f"{y_axis(y):.1f}") for x, y in thin(line.points)]
    if "dots" in line.style or len(places) == 1:
        return _group(f"{line.style} dots", (f'<circle cx="{x}" cy="{y}" r="3.5"/>' for x, y in places))
    return f'<path class="{line.style}" d="M{" L".join(f"{x},{y}" for x, y in places)}"/>'


def thin(line: list[Point]) -> list[Point]:
    """At most about MAX_POINTS points: of every stretch the lowest and the highest, and the line's two ends."""
    if len(line) <= MAX_POINTS:
        return line
    size = math.ceil(2 * len(line) / MAX_POINTS)
    stretches = (line[i : i + size] for i in range(0, len(line), size))
    kept = {extreme(stretch, key=lambda p: p[1]) for stretch in stretches for extreme in (min, max)}
    return sorted({line[0], line[-1], *kept})


def _columns(lines: Sequence[Line], x_axis: Axis, height: int) -> Iterator[str]:
    """Columns, drawn only under the pointer, whose titles tell every line's value at or next after their step."""
    steps = sorted({x for line in lines for x, _ in line.points})
    steps = steps[:: math.ceil(len(steps) / MAX_COLUMNS)]
    width = (x_axis.end - x_axis.start) / len(steps)
    for step in steps:
        told = "\n".join(_told(line, step) for line in lines)
        yield (
            f'<rect x="{x_axis(step) - width / 2:.1f}" y="{TOP}" width="{width:.1f}" height="{height - TOP - BOTTOM}">'
            f"<title>step {step:,g}\n{escape(told)}</title></rect>"
        )


def _told(line: Line, step: float) -> str:
    x, y = line.points[min(bisect_left(line.points, (step, -math.inf)), len(line.points) - 1)]
    return f"{line.name}: {short(y)}" + (f" (step {x:,g})" if x != step else "")


def _group(css: str, items: Iterable[str]) -> str:
    return f'<g class="{css}">{"".join(items)}</g>'


def _rule(y: float, width: int, name: str) -> str:
    line = f'<line x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return line + _word(LEFT - 8, y + 4, name, "end")


def _mark(x: float, height: int, name: str) -> str:
    line = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>'
    return line + _word(x + 5, TOP + 13, name, "start")


def _word(x: float, y: float, name: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(name)}</text>'
