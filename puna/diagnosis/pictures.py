"""What the health monitor saw, as inline SVG without script: layer by step, time-lines, histograms of updates."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby, pairwise
from pathlib import Path
from statistics import median
from typing import Any

from puna.chart import Axis, Line, Mark, Point, chart, number_text, short, ticks
from puna.diagnosis.records import REACH, STATISTICS, Event, Watched

STYLE = Path(__file__).with_name("health.css")
MAPS = ("u_rms", "surprise", "stall", "lag_cosine", "f9")
TIME_LINES = ("u_rms", "surprise", "stall")
MAX_COLUMNS, MAX_MARKS = 160, 40
WIDTH, LEFT, RIGHT, TOP = 1080, 132, 12, 26
PALE, STRONG = 6, 3  # classes of colour below the limit, and from it on
BINS = 41
SETTLED = 30  # steps after which r is no longer +-1 by construction: 3 / (1 - beta1) at 0.9


# --- layer by step --------------------------------------------------------------------------------------------------


def heat_maps(found: Watched) -> str:
    """One map of each statistic that was recorded; the reader picks."""
    shown = [key for key in MAPS if found.worst(key)]
    if not shown:
        return '<p class="absent">No statistics were recorded yet.</p>'
    first = _first_map(found, shown)
    order = [first, *(key for key in shown if key != first)]
    picks = "".join(
        f'<input type="radio" name="map" id="map-{key}"{" checked" if key == first else ""}>'
        f'<label for="map-{key}">{escape(STATISTICS[key].name)}</label>'
        for key in order
    )
    return f'<div class="picks">{picks}{"".join(f"<div>{heat_map(found, key)}</div>" for key in order)}</div>'


def _first_map(found: Watched, shown: Sequence[str]) -> str:
    """The statistic of the first evidence of the worst state, else the first that there is."""
    worst = [one.statistic for change in found.changes if change.state == found.state for one in change.reasons]
    return next((key for key in worst if key in shown), shown[0])


def heat_map(found: Watched, key: str) -> str:
    """Layers down, steps along, the worst tensor's value as colour: blue below the alarm's limit, orange from it on."""
    statistic, limit, lines = STATISTICS[key], found.limit(key), found.worst(key)
    steps = sorted({int(step) for line in lines.values() for step, _ in line})
    columns = _columns(steps)
    values = {layer: _by_column(line, columns, max if statistic.rises else min) for layer, line in lines.items()}
    height = min(22.0, max(5.0, 440 / len(values)))
    bottom = TOP + height * len(values)
    axis = Axis(columns[0], columns[-1], LEFT, WIDTH - RIGHT)
    rows = [
        (TOP + i * height, [None if value is None else shade(statistic.badness(value, limit)) for value in line])
        for i, line in enumerate(values.values())
    ]
    cells = "".join(_cells(rows, columns, axis, height, level) for level in range(PALE + STRONG))
    names = "".join(
        _word(LEFT - 8, y + height / 2 + 4, name, "end")
        for i, (name, (y, _)) in enumerate(zip(values, rows, strict=True))
        if i % math.ceil(13 / height) == 0
    )
    pace = [x for x in ticks(axis.low, axis.high, 9) if axis.low <= x <= axis.high]
    below = "".join(_word(axis(x), bottom + 18, number_text(x)) for x in pace)
    told = _map_words(found, key, lines)
    return (
        f'<figure><div class="map"><svg viewBox="0 0 {WIDTH} {bottom + 26:.0f}" role="img" aria-label="{escape(told)}">'
        f"{_ribbon(found, axis)}{cells}{names}{below}{_lines(marks(found), axis, bottom)}"
        f'<g class="hover">{"".join(_hover(values, columns, axis, bottom))}</g></svg></div>'
        f"<figcaption>{_legend(key, limit)}<span class='unit'>worst {_kind(key)} of each layer</span></figcaption>"
        f'</figure><p class="note">{escape(told)}</p>'
    )


def _kind(key: str) -> str:
    return "tensor" if STATISTICS[key].vectors else "matrix"


def shade(badness: float) -> int:
    """Class of colour 0 to 8: six below the limit (badness 1), three from it on."""
    if badness < 1:
        return max(0, int(badness * PALE))
    return PALE + min(STRONG - 1, int((badness - 1) * STRONG))


def _columns(steps: Sequence[int]) -> list[int]:
    """Edges of the columns: each begins at a sample, or at every n-th where there are many, and ends at the next."""
    size = math.ceil(len(steps) / MAX_COLUMNS)
    gaps = [b - a for a, b in pairwise(steps)]
    return [*steps[::size], steps[-1] + max(1, round(median(gaps)) if gaps else 1)]


def _by_column(line: list[Point], columns: Sequence[int], worst: Callable[..., float]) -> list[float | None]:
    """The worst value in each column."""
    found: list[float | None] = []
    place = 0
    for end in columns[1:]:
        begin = place
        while place < len(line) and line[place][0] < end:
            place += 1
        found.append(worst((value for _, value in line[begin:place]), default=None))
    return found


def _cells(
    rows: Sequence[tuple[float, list[int | None]]], columns: Sequence[int], axis: Axis, height: float, level: int
) -> str:
    """All cells of one colour as one path; neighbours in a row are one rectangle."""
    parts = []
    for y, line in rows:
        place = 0
        for same, run in groupby(line):
            end = place + len(list(run))
            if same == level:
                x, width = axis(columns[place]), axis(columns[end]) - axis(columns[place])
                parts.append(f"M{x:.1f} {y:.1f}h{width:.1f}v{height:.1f}h{-width:.1f}z")
            place = end
    return f'<path class="cells h{level}" d="{"".join(parts)}"/>' if parts else ""


def _hover(values: dict[str, list[float | None]], columns: Sequence[int], axis: Axis, bottom: float) -> Iterator[str]:
    """A column under the pointer tells its steps and its layers' values."""
    for i, (begin, end) in enumerate(pairwise(columns)):
        known = [(layer, value) for layer, line in values.items() if (value := line[i]) is not None]
        told = "\n".join(f"{layer}: {short(value)}" for layer, value in known[:12])
        span = f"step {begin:,}" if end - begin == 1 else f"steps {begin:,} to {end - 1:,}"
        yield (
            f'<rect x="{axis(begin):.1f}" y="{TOP}" width="{axis(end) - axis(begin):.1f}" height="{bottom - TOP:.1f}">'
            f"<title>{span}\n{escape(told)}</title></rect>"
        )


def _ribbon(found: Watched, axis: Axis) -> str:
    """The monitor's state along the steps."""
    turns = [(axis.low, "calm"), *((float(step), state) for step, state in found.turns()), (axis.high, "")]
    parts = []
    for (begin, state), (end, _) in pairwise(turns):
        begin, end = (min(max(step, axis.low), axis.high) for step in (begin, end))
        if end > begin:
            parts.append(
                f'<rect class="state-{state}" x="{axis(begin):.1f}" y="6" width="{axis(end) - axis(begin):.1f}" '
                f'height="10"><title>{state}, steps {begin:,.0f} to {end:,.0f}</title></rect>'
            )
    return _word(LEFT - 8, 15, "state", "end") + "".join(parts)


def _legend(key: str, limit: float) -> str:
    """The colours with the values they begin at."""
    statistic = STATISTICS[key]
    edges = [level / PALE for level in range(PALE)] + [1 + level / STRONG for level in range(STRONG)]
    swatches = "".join(
        f'<svg viewBox="0 0 14 12" aria-hidden="true"><rect class="h{level}" width="14" height="12"/></svg>'
        for level in range(len(edges))
    )
    side = "≥" if statistic.rises else "≤"
    words = f"{statistic.calm:.2g} · limit {short(limit)} · {side} {statistic.at(edges[-1], limit):.2g}"
    states = "".join(
        f'<span class="key"><svg viewBox="0 0 14 12" aria-hidden="true"><rect class="state-{state}" width="14" '
        f'height="12"/></svg> {state}</span>'
        for state in ("calm", "watch", "alarm")
    )
    return f'<span class="key">{swatches} {escape(words)}</span>{states}'


def _map_words(found: Watched, key: str, lines: dict[str, list[Point]]) -> str:
    """What the map shows, for those who cannot see it."""
    statistic, limit = STATISTICS[key], found.limit(key)
    pick, passed = (max, "rose above") if statistic.rises else (min, "fell below")
    extreme = {layer: pick(line, key=lambda point: point[1]) for layer, line in lines.items()}
    layer = pick(extreme, key=lambda name: extreme[name][1])
    step, value = extreme[layer]
    over = [name for name, (_, y) in extreme.items() if statistic.badness(y, limit) > 1]
    return (
        f"{statistic.name}: {'highest' if statistic.rises else 'lowest'} {short(value)} in {layer} at step {step:,}; "
        f"{len(over)} of {len(lines)} layers {passed} {short(limit)}."
    )


# --- time-lines -----------------------------------------------------------------------------------------------------


def time_lines(found: Watched) -> str:
    """Loss, and the statistics of the worst and of the middle layer, with alarms and actions marked."""
    noted = marks(found)
    figures = [chart([Line("loss", found.losses)], unit="loss", marks=noted, from_zero=False)] if found.losses else []
    for key in TIME_LINES:
        lines = found.worst(key)
        if lines:
            figures.append(_time_line(key, lines, found.limit(key), noted))
    return f'<div class="lines">{"".join(figures)}</div>'


def _time_line(key: str, lines: dict[str, list[Point]], limit: float, noted: Sequence[Mark]) -> str:
    statistic = STATISTICS[key]
    steps: dict[float, list[float]] = {}
    for line in lines.values():
        for step, value in line:
            steps.setdefault(step, []).append(value)
    worst = max if statistic.rises else min
    ends = (min(steps), max(steps))
    drawn = [
        Line("worst layer", [(step, worst(values)) for step, values in sorted(steps.items())]),
        Line("middle layer", [(step, median(values)) for step, values in sorted(steps.items())], "c"),
        Line(f"limit {short(limit)}", [(step, limit) for step in ends], "b faint"),
    ]
    return chart(drawn, unit=statistic.name, marks=noted, log=statistic.log)


def marks(found: Watched) -> list[Mark]:
    """Where an alarm began and where the controller acted; a word only where the one before leaves it room."""
    words: dict[int, list[str]] = {}
    for change in found.changes:
        if change.state == "alarm":
            words.setdefault(change.step, []).append("alarm")
    for action in found.actions:
        words.setdefault(action["step"], []).append(str(action.get("action", "action")).replace("_", " "))
    span = (found.steps[1] - found.steps[0]) or 1
    noted: list[Mark] = []
    free = -math.inf
    for step, names in sorted(words.items())[:MAX_MARKS]:
        name = ", ".join(dict.fromkeys(names)) if step >= free else ""
        free = step + span * 0.016 * (len(name) + 2) if name else free
        noted.append(Mark(step, name))
    return noted


def _lines(noted: Sequence[Mark], axis: Axis, bottom: float) -> str:
    drawn = "".join(
        f'<line x1="{axis(mark.x):.1f}" x2="{axis(mark.x):.1f}" y1="{TOP - 6}" y2="{bottom:.1f}"/>'
        for mark in noted
        if axis.low <= mark.x <= axis.high
    )
    return f'<g class="marks">{drawn}</g>'


# --- histograms -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """A histogram record and why it is shown."""

    name: str
    record: Event


def histograms(found: Watched) -> str:
    """Updates of the first layer that was in trouble, at the beginning, before the alarm, at it and after it."""
    layer = _layer(found)
    shown = moments(found, layer) if layer else []
    if not shown or layer is None:
        return '<p class="absent">No histograms were recorded yet.</p>'
    drawn = "".join(histogram(moment.record["layers"][layer], moment, layer) for moment in shown)
    return (
        f'<p class="note">Updates r = m̂ ÷ (√v̂ + ε) of {escape(layer)}. One peak at 0 is healthy; two groups at ±1 are '
        f'the state of the theory. The outermost bars hold what lies beyond ±2.</p><div class="moments">{drawn}</div>'
    )


def _layer(found: Watched) -> str | None:
    """That of the first evidence of the worst state; without one the layer whose updates were largest."""
    drawn = {layer for record in found.histograms for layer in _counted(record)}
    named = [one.layer for change in found.changes if change.state == found.state for one in change.reasons]
    largest = {layer: max(value for _, value in line) for layer, line in found.worst("u_rms").items()}
    ranked = [*named, *sorted(largest, key=lambda layer: -largest[layer]), *found.names()]
    return next((layer for layer in ranked if layer in drawn), None)


def _counted(record: Event) -> dict[str, Any]:
    layers = record.get("layers")
    whole = layers.items() if isinstance(layers, dict) else ()
    return {
        name: counts
        for name, counts in whole
        if isinstance(counts, list) and len(counts) == BINS and all(isinstance(n, int | float) for n in counts)
        and sum(counts) > 0
    }  # fmt: skip


def moments(found: Watched, layer: str) -> list[Moment]:
    """At most four records that have a histogram of the layer, in order of steps."""
    records = sorted({r["step"]: r for r in found.histograms if layer in _counted(r)}.items())
    if not records:
        return []
    steps = [step for step, _ in records]
    alarm = next((change.step for change in found.changes if change.state == "alarm"), None)
    named = _through(steps) if alarm is None else _around(steps, alarm)
    return [Moment(name, dict(records)[step]) for step, name in sorted(named.items())]


def _through(steps: Sequence[int]) -> dict[int, str]:
    """The first histogram that says something, and three more up to the last."""
    settled = [step for step in steps if step >= SETTLED] or list(steps)
    later = {settled[round(share * (len(settled) - 1))]: "later" for share in (1 / 3, 2 / 3, 1)}
    return later | {settled[0]: "the beginning"}


def _around(steps: Sequence[int], alarm: int) -> dict[int, str]:
    """The beginning, and the histograms next to the step of the alarm."""
    earlier, later = [step for step in steps if step < alarm], [step for step in steps if step >= alarm]
    named = {step: "the beginning" for step in earlier if step >= SETTLED or step == earlier[-1]}
    named = dict(list(named.items())[:1]) | dict.fromkeys(earlier[-1:], "before the alarm")
    named |= dict.fromkeys([*(s for s in later if s >= alarm + 50), *later[-1:]][:1], "after it")
    return named | dict.fromkeys(later[:1], "at the alarm")


def histogram(counts: Sequence[float], moment: Moment, layer: str) -> str:
    """41 bars on [-2, 2]; those beyond +-0.9 in another colour."""
    width, height, left, bottom, top = 260, 170, 34, 22, 10
    total, tallest = sum(counts), max(counts)
    axis = Axis(-REACH, REACH, left, width - 6)
    up = Axis(0, tallest / total, height - bottom, top)
    pace = 2 * REACH / BINS
    bars, beyond = [], 0.0
    for i, count in enumerate(counts):
        begin = -REACH + i * pace
        outer = abs(begin + pace / 2) > 0.9
        beyond += count * outer
        y = up(count / total)
        bars.append(
            f'<rect class="count{" beyond" if outer else ""}" x="{axis(begin) + 0.4:.1f}" y="{y:.1f}" '
            f'width="{axis(begin + pace) - axis(begin) - 0.8:.1f}" height="{height - bottom - y:.1f}"/>'
        )
    words = "".join(_word(axis(x), height - 6, f"{x:g}".replace("-", "−")) for x in (-2, -1, 0, 1, 2))
    words += _word(left - 4, top + 8, f"{100 * tallest / total:.0f} %", "end")
    base = f'<line class="axis" x1="{left}" x2="{width - 6}" y1="{height - bottom}" y2="{height - bottom}"/>'
    said = f"Step {moment.record['step']:,}, {moment.name}: {100 * beyond / total:.0f} % beyond ±0.9"
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(f"{layer}. {said}")}">'
        f"{''.join(bars)}{base}{words}</svg><figcaption>{escape(said)}</figcaption></figure>"
    )


def _word(x: float, y: float, name: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(name)}</text>'
