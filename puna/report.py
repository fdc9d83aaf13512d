"""A run directory becomes one page: RUN/report.html, self-contained, without scripts and without network.

The page knows records, not rooms. A room adds a panel of its own with

    @panel("Rollouts")
    def rollouts(records: Records) -> str:      # HTML; everything from outside goes through `escape`
        return chart([Line("reward", records.series("reward"))], unit="reward")

What is missing is said in words; a file that cannot be read is named at the foot of the page.
"""

import json
import math
import os
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape as _escape
from pathlib import Path
from statistics import median
from typing import Any

Point = tuple[float, float]
Event = dict[str, Any]


def escape(value: object) -> str:
    """Text safe inside HTML and inside a quoted attribute."""
    return _escape(str(value), quote=True)


# --- records --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Records:
    """What a run directory holds, as read.

    events: every record in order. steps: one record a step, the last where a step was lost to a kill and done again.
    redone: (first, last) record of each such step. recipe: dotted key -> {value, layer}. problems: sentences about what could not
    be read. A file that is not there is an empty dictionary.
    """

    folder: Path
    events: list[Event] = field(default_factory=list)
    steps: list[Event] = field(default_factory=list)
    redone: list[tuple[Event, Event]] = field(default_factory=list)
    recipe: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    shards: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def of(self, kind: str) -> list[Event]:
        """Events of one kind, in order."""
        return [event for event in self.events if event["event"] == kind]

    def series(self, key: str, scale: float = 1.0) -> list[Point]:
        """(step, value * scale) of every step that has a finite number under `key`."""
        return points(self.steps, key, scale)

    def fact(self, key: str) -> Any:
        """The newest value of `key` among the start records, or None."""
        return next((event[key] for event in reversed(self.of("start")) if event.get(key) is not None), None)


def read(run: Path) -> Records:
    """Read the files of a run directory; nothing in them is trusted."""
    problems: list[str] = []
    events = _read_events(run / "events.jsonl", problems)
    files = {name: _read_object(run / f"{name}.json", problems) for name in ("recipe", "versions", "model", "summary")}
    steps, redone = _last_of_each([e for e in events if e["event"] == "step"])
    named = files["recipe"].get("data.path")
    path = named.get("value") if isinstance(named, dict) else None
    shards = _read_object(Path(path) / "shards.json", problems) if isinstance(path, str) and path else {}
    return Records(run, events, steps, redone, **files, shards=shards, problems=problems)


def _read_events(path: Path, problems: list[str]) -> list[Event]:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
    events, torn = [], []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line) if line.strip() else None
        except ValueError:
            record = line
        if isinstance(record, dict) and isinstance(record.get("event"), str):
            events.append(record)
        elif record is not None:
            torn.append(number)
    if torn:
        shown = ", ".join(map(str, torn[:5])) + (" and more" if len(torn) > 5 else "")
        problems.append(f"events.jsonl: {plural(len(torn), 'line')} could not be read and was left out (line {shown}).")
    return events


def _read_object(path: Path, problems: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        problems.append(f"{path.name} could not be read: {error}.")
        return {}
    if not isinstance(found, dict):
        problems.append(f"{path.name} holds no table.")
        return {}
    return found


def _last_of_each(steps: list[Event]) -> tuple[list[Event], list[tuple[Event, Event]]]:
    first: dict[int, Event] = {}
    last: dict[int, Event] = {}
    for event in steps:
        if isinstance(event.get("step"), int):
            first.setdefault(event["step"], event)
            last[event["step"]] = event
    return [last[n] for n in sorted(last)], [(first[n], last[n]) for n in sorted(last) if first[n] is not last[n]]


def number(event: Event, key: str) -> float | None:
    """The finite number under `key`, or None."""
    value = event.get(key)
    return value if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None


def points(events: Iterable[Event], key: str, scale: float = 1.0) -> list[Point]:
    """(step, value * scale) of every event that has both as finite numbers; the last of each step, in order of steps."""
    pairs = ((number(event, "step"), number(event, key)) for event in events)
    return sorted({x: y * scale for x, y in pairs if x is not None and y is not None}.items())


# --- words ----------------------------------------------------------------------------------------------------------


def plural(count: int, noun: str) -> str:
    """1 step, 2,000 steps."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def short(value: float) -> str:
    """Four significant digits: 0.01234, 3.142, 12,345, 3.1e-05."""
    if value == 0 or 1e-4 <= abs(value) < 1e4:
        return f"{value:.4g}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e7 else f"{value:.3e}"


def scaled(value: float, unit: str = "") -> str:
    """4.31 M, 25.9 G: with the prefix that leaves one to three digits before the point."""
    size, prefix = next(
        ((s, p) for s, p in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")) if abs(value) >= s), (1, "")
    )
    return f"{value / size:.3g} {prefix}{unit}".strip()


def duration(seconds: float) -> str:
    """47 s, 4 min 10 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def text(value: object) -> str:
    """A value of a JSON file as escaped text."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return escape(short(value) if isinstance(value, float) and math.isfinite(value) else value)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], css: str = "") -> str:
    """A table; the cells are HTML."""
    top = "".join(f"<th>{name}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table class="{css}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def facts(pairs: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested dictionary as rows (dotted name, value), both escaped."""
    rows = []
    for key, value in pairs.items():
        nested = isinstance(value, dict)
        rows += facts(value, f"{prefix}{key}.") if nested else [(escape(f"{prefix}{key}"), text(value))]
    return rows


def absent(sentence: str) -> str:
    """What stands where there is nothing to show."""
    return f'<p class="absent">{escape(sentence)}</p>'


# --- charts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One series of a chart. style: one of a, b, c (colours), with " faint" or " dots" after it."""

    name: str
    points: list[Point]
    style: str = "a"


@dataclass(frozen=True)
class Mark:
    """A vertical line at `x` with its word."""

    x: float
    name: str


NUM_POINTS, NUM_HOVER = 600, 160
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 14, 26


def chart(
    lines: Sequence[Line],
    *,
    unit: str,
    marks: Sequence[Mark] = (),
    log: bool = False,
    from_zero: bool = True,
    wide: bool = False,
) -> str:
    """Lines over the step as inline SVG; a value under the pointer shows as the browser's tooltip. `log`: the y axis."""
    lines = [Line(line.name, [p for p in line.points if p[1] > 0 or not log], line.style) for line in lines]
    lines = [line for line in lines if line.points]
    if not lines:
        return absent("Nothing recorded yet.")
    width, height = (1080, 320) if wide else (520, 220)
    xs, ys = ([p[i] for line in lines for p in line.points] for i in (0, 1))
    x_ticks = _ticks(min(xs), max(xs), 8 if wide else 5)
    y_ticks = _log_ticks(min(ys), max(ys)) if log else _ticks(min(0, *ys) if from_zero else min(ys), max(ys), 5)
    x_axis = _Axis(min(xs), max(max(xs), min(xs) + 1), LEFT, width - RIGHT)
    bend = math.log10 if log else float
    y_axis = _Axis(bend(min(y_ticks[0], *ys)), bend(max(y_ticks[-1], *ys)), height - BOTTOM, TOP)

    def place(x: float, y: float) -> str:
        return f"{x_axis(x):.1f},{y_axis(bend(y)):.1f}"

    grid = "".join(
        f'<line x1="{LEFT}" x2="{width - RIGHT}" y1="{y_axis(bend(y)):.1f}" y2="{y_axis(bend(y)):.1f}"/>'
        f'<text x="{LEFT - 8}" y="{y_axis(bend(y)) + 4:.1f}" text-anchor="end">{_tick_text(y)}</text>'
        for y in y_ticks
    ) + "".join(
        f'<text x="{x_axis(x):.1f}" y="{height - 8}" text-anchor="middle">{_tick_text(x)}</text>'
        for x in x_ticks
        if x in x_axis
    )
    flags = "".join(
        f'<line x1="{x_axis(m.x):.1f}" x2="{x_axis(m.x):.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>'
        f'<text x="{x_axis(m.x) + 4:.1f}" y="{TOP + 8}">{escape(m.name)}</text>'
        for m in marks
        if m.x in x_axis
    )
    drawn = "".join(_draw(line, place) for line in lines)
    legend = "".join(f'<span class="key {line.style}"><i></i>{escape(line.name)}</span>' for line in lines)
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(unit)} over steps">'
        f'<g class="grid">{grid}</g><g class="marks">{flags}</g>{drawn}{_hover(lines, x_axis, height)}</svg>'
        f'<figcaption>{legend}<span class="unit">{escape(unit)}, by step</span></figcaption></figure>'
    )


@dataclass(frozen=True)
class _Axis:
    """From values [low, high] to pixels [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / ((self.high - self.low) or 1) * (self.end - self.start)

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) inside, or just around, [low, high]."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / count))
    pace = next(power * m for m in (1, 2, 5, 10) if span / (power * m) <= count)
    return [n * pace for n in range(math.floor(low / pace), math.ceil(high / pace) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(decades) <= 3 else (1,)
    return [m * 10.0**d for d in decades for m in steps if low / 5 <= m * 10.0**d <= high * 2] or [low, high]


def _tick_text(value: float) -> str:
    value = float(f"{value:.6g}")
    return scaled(value).replace(" ", "") if abs(value) >= 10_000 else f"{value:,g}"


def _draw(line: Line, place: Callable[[float, float], str]) -> str:
    if "dots" in line.style or len(line.points) == 1:
        dots = (place(*p).split(",") for p in line.points)
        return (
            f'<g class="{line.style} dots">' + "".join(f'<circle cx="{x}" cy="{y}" r="3.5"/>' for x, y in dots) + "</g>"
        )
    return f'<path class="{line.style}" d="M{" L".join(place(*p) for p in _thin(line.points))}"/>'


def _thin(line: list[Point]) -> list[Point]:
    """At most NUM_POINTS points that keep the extremes: the lowest and the highest of every stretch."""
    if len(line) <= NUM_POINTS:
        return line
    size = math.ceil(2 * len(line) / NUM_POINTS)
    stretches = (line[i : i + size] for i in range(0, len(line), size))
    kept = {f(stretch, key=lambda p: p[1]) for stretch in stretches for f in (min, max)}
    return sorted({line[0], line[-1], *kept})


def _hover(lines: Sequence[Line], x_axis: _Axis, height: int) -> str:
    """Invisible columns whose titles tell the values at their step."""
    at = sorted({x for line in lines for x, _ in line.points})
    at = at[:: math.ceil(len(at) / NUM_HOVER)]
    half = (x_axis.end - x_axis.start) / max(len(at), 1) / 2
    columns = []
    for x in at:
        near = [
            (line.name, line.points[min(bisect_left(line.points, (x, -math.inf)), len(line.points) - 1)])
            for line in lines
        ]
        told = "\n".join(f"{name} {short(y)}" + (f" (step {px:,g})" if px != x else "") for name, (px, y) in near)
        columns.append(
            f'<rect x="{x_axis(x) - half:.1f}" y="{TOP}" width="{2 * half:.1f}" height="{height - TOP - BOTTOM}">'
            f"<title>step {x:,g}\n{escape(told)}</title></rect>"
        )
    return f'<g class="hover">{"".join(columns)}</g>'


def smooth(line: list[Point]) -> list[Point]:
    """Exponential moving average without start-up bias, its memory one fiftieth of the line (at least two points)."""
    keep = 1 - 1 / max(len(line) / 50, 2)
    total = weight = 0.0
    out = []
    for x, y in line:
        total, weight = keep * total + y, keep * weight + 1
        out.append((x, total / weight))
    return out


def bars(rows: Sequence[tuple[str, float, str]]) -> str:
    """Horizontal bars from rows (name, value, css class); shorter is better where the caller says so."""
    longest = max(value for _, value, _ in rows)
    return "".join(
        f'<div class="bar {css}"><span>{escape(name)}</span><b style="width:{60 * value / longest:.1f}%"></b><em>{value:.3f}</em></div>'
        for name, value, css in rows
    )


# --- panels ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    """A titled part of the page. wide: takes the whole row."""

    title: str
    draw: Callable[[Records], str]
    wide: bool


PANELS: list[Panel] = []


def panel(title: str, *, wide: bool = False) -> Callable[[Callable[[Records], str]], Callable[[Records], str]]:
    """Register a function from a run's records to HTML as the page's next panel."""

    def register(draw: Callable[[Records], str]) -> Callable[[Records], str]:
        PANELS.append(Panel(title, draw, wide))
        return draw

    return register


def resume_marks(records: Records) -> list[Mark]:
    """Where the run was taken up again."""
    return [Mark(event["step"], "resumed") for event in records.of("resume") if number(event, "step") is not None]


@panel("Loss", wide=True)
def loss(records: Records) -> str:
    """Training loss, raw and smoothed, and the loss on held-out documents."""
    train = records.series("loss")
    lines = [Line("train, each step", train, "a faint"), Line("train, smoothed", smooth(train))]
    for style, split in zip(
        "bc", sorted({str(e.get("split")) for e in records.of("eval") if number(e, "loss") is not None}), strict=False
    ):
        lines.append(
            Line(
                split, points((e for e in records.of("eval") if str(e.get("split")) == split), "loss"), f"{style} dots"
            )
        )
    return chart(lines, unit="nats per token", marks=resume_marks(records), from_zero=False, wide=True)


@panel("Bits per byte", wide=True)
def bits(records: Records) -> str:
    """The model beside compressors and an n-gram model of the same tokens."""
    scored = [e for e in records.of("eval") if number(e, "bits_per_byte") is not None]
    known = records.summary | {key: value for event in scored for key, value in event.items()}
    names = {"gzip": "gzip -9", "xz": "xz -9", "ngram": "5-gram, Witten–Bell"}
    rows = [(f"model, {int(x):,} steps", y, "model") for x, y in points(scored, "bits_per_byte")]
    if not rows:
        told = {"before training": "bits_per_byte_before", "after training": "bits_per_byte_after"}
        rows = [(f"model, {name}", y, "model") for name, key in told.items() if (y := number(known, key)) is not None]
    if not rows:
        return absent("Not measured yet: `puna eval RUN` writes it here.")
    baselines = [(name, number(known, f"{key}_bits_per_byte")) for key, name in names.items()]
    ranked = sorted([*rows, *((name, y, "") for name, y in baselines if y is not None)], key=lambda row: -row[1])
    size = f" of {scaled(known['num_bytes'], 'B')}" if number(known, "num_bytes") else ""
    return f"<p>Bits to write one byte of held-out text{size}; lower is better.</p>{bars(ranked)}"


@panel("Throughput")
def throughput(records: Records) -> str:
    """Tokens per second."""
    speed = records.series("tokens_per_s")
    return chart(
        [Line("each step", speed, "a faint"), Line("smoothed", smooth(speed))],
        unit="tokens per second",
        marks=resume_marks(records),
    )


@panel("Model FLOPs utilisation")
def mfu(records: Records) -> str:
    """Share of the matrix peak, with its formula."""
    share = records.series("mfu", 100)
    if not share:
        return absent("Not recorded: it needs the machine's peak matrix rate.")
    flops, peak = records.fact("flops_per_token"), records.fact("peak_flops")
    numbers = ""
    if flops and peak:
        pace = median(y for _, y in records.series("tokens_per_s")) if records.series("tokens_per_s") else 0
        numbers = f" = {short(pace)} × {scaled(flops, 'FLOP')} ÷ {scaled(peak, 'FLOP/s')} = {100 * pace * flops / peak:.1f} % at the median step"
    formula = f'<p class="note">MFU = tokens/s × FLOPs per token ÷ peak FLOP/s{escape(numbers)}</p>'
    return chart([Line("MFU", share)], unit="% of peak") + formula


@panel("Learning rate")
def learning_rate(records: Records) -> str:
    """The schedule as it ran."""
    return chart([Line("learning rate", records.series("lr"))], unit="learning rate")


@panel("Gradient norm")
def gradient_norm(records: Records) -> str:
    """Global norm before clipping."""
    norm = records.series("grad_norm")
    clip = records.recipe.get("train.clip", {}).get("value")
    limit = (
        [Line(f"clipped above {short(clip)}", [(norm[0][0], clip), (norm[-1][0], clip)], "b")] if clip and norm else []
    )
    return chart([Line("before clipping", norm), *limit], unit="gradient norm", marks=resume_marks(records), log=True)


@panel("Peak memory")
def memory(records: Records) -> str:
    """Of the process with the most."""
    return chart([Line("peak", records.series("peak_memory_bytes", 2**-20))], unit="MiB")


@panel("Data wait")
def data_wait(records: Records) -> str:
    """Share of each step spent waiting for data."""
    waits, steps = dict(records.series("data_wait_s")), dict(records.series("step_s"))
    share = [(x, 100 * waits[x] / steps[x]) for x in waits if steps.get(x)]
    return chart([Line("waiting", share)], unit="% of the step")


@panel("Resumes", wide=True)
def resumes(records: Records) -> str:
    """Steps that were lost to a kill and done again, and whether they came out the same."""
    if not records.of("resume"):
        return absent("The run was never interrupted.")
    places = ", ".join(f"step {text(event.get('step'))}" for event in records.of("resume"))
    rows = [(a["step"], number(a, "loss"), number(b, "loss")) for a, b in records.redone]
    pairs = [
        (step, first, last, abs(first - last)) for step, first, last in rows if first is not None and last is not None
    ]
    if not pairs:
        return f"<p>Taken up again at {places}. No step had to be done twice.</p>"
    worst = max(difference for *_, difference in pairs)
    verdict = (
        "Every one gave the same loss, bit for bit." if worst == 0 else f"The losses differ by at most {short(worst)}."
    )
    shown = [(f"{s:,}", f"{first:.9g}", f"{last:.9g}", short(d)) for s, first, last, d in pairs[-20:]]
    detail = table(("step", "loss, first time", "loss, again", "difference"), shown, "figures")
    count = plural(len(pairs), "step")
    return f"<p>Taken up again at {places}. {count} done twice. <strong>{verdict}</strong></p><details><summary>Show</summary>{detail}</details>"


@panel("Samples", wide=True)
def samples(records: Records) -> str:
    """What the model wrote."""
    found = [e for e in records.of("sample") if isinstance(e.get("completion"), str)]
    if not found:
        return absent("No samples were taken.")
    return "".join(
        f'<figure class="sample"><figcaption>step {text(e.get("step", "?"))}</figcaption>'
        f"<pre><span>{escape(e.get('prompt', ''))}</span>{escape(e['completion'])}</pre></figure>"
        for e in found[-8:]
    )


@panel("Summary", wide=True)
def summary(records: Records) -> str:
    """The machine-readable result, for people."""
    return (
        table(("", ""), facts(records.summary), "pairs") if records.summary else absent("No summary.json in this run.")
    )


@panel("Recipe", wide=True)
def recipe(records: Records) -> str:
    """Every setting with the layer that set it; the ones that somebody chose come first."""
    if not records.recipe:
        return absent("No recipe.json in this run.")
    entries = {key: entry if isinstance(entry, dict) else {"value": entry} for key, entry in records.recipe.items()}
    groups: dict[bool, list[tuple[str, str, str]]] = {True: [], False: []}
    for key, entry in entries.items():
        layer = str(entry.get("layer", "unknown"))
        groups[layer != "default"].append((f"<code>{escape(key)}</code>", text(entry.get("value")), escape(layer)))
    head = ("setting", "value", "set by")
    chosen = table(head, groups[True]) if groups[True] else absent("Nothing was changed from the defaults.")
    rest = f"<details><summary>{plural(len(groups[False]), 'default')}</summary>{table(head, groups[False])}</details>"
    return chosen + (rest if groups[False] else "")


@panel("Model")
def model(records: Records) -> str:
    """Shape and size."""
    size = records.fact("num_parameters")
    rows = [("parameters", f"{size:,}")] if isinstance(size, int) else []
    return (
        table(("", ""), rows + facts(records.model), "pairs")
        if rows or records.model
        else absent("No model.json in this run.")
    )


@panel("Data")
def data(records: Records) -> str:
    """The token shards."""
    splits = records.shards.get("splits")
    if not isinstance(splits, dict) or not splits:
        return absent("The token shards that the recipe names are not at hand (data.path).")
    keys = ("num_documents", "num_tokens", "num_bytes")
    rows = [(escape(name), *(text(split.get(key)) for key in keys)) for name, split in splits.items()]
    other = facts({k: v for k, v in records.shards.items() if k != "splits"})
    return table(("split", "documents", "tokens", "bytes"), rows, "figures") + table(("", ""), other, "pairs")


@panel("Versions and machine")
def versions(records: Records) -> str:
    """What ran it."""
    start = {key: records.fact(key) for key in ("mesh", "dtype", "dtype_reason") if records.fact(key) is not None}
    rows = facts(records.versions) + facts(start)
    return table(("", ""), rows, "pairs") if rows else absent("No versions.json in this run.")


@panel("Checkpoints")
def checkpoints(records: Records) -> str:
    """What was saved, and what is still there."""
    kept = {path.parent.name for path in records.folder.glob("checkpoints/*/manifest.json")}
    saved = {event["step"]: event for event in records.of("checkpoint") if isinstance(event.get("step"), int)}
    if not saved:
        return absent("No checkpoint was recorded.")
    rows = [
        (
            f"{step:,}",
            *(shown(number(event, key)) for key, shown in (("seconds", _seconds), ("bytes", _bytes))),
            "yes" if f"step-{step:08d}" in kept else "no longer",
        )
        for step, event in sorted(saved.items())[-12:]
    ]
    return f"<p>{plural(len(saved), 'checkpoint')} saved.</p>" + table(
        ("step", "time", "size", "kept"), rows, "figures"
    )


def _seconds(value: float | None) -> str:
    return "?" if value is None else duration(value)


def _bytes(value: float | None) -> str:
    return "?" if value is None else scaled(value, "B")


# --- the page -------------------------------------------------------------------------------------------------------


def write_report(run: Path) -> Path:
    """Write RUN/report.html from the files of the run directory `run`, and return its path."""
    records = read(run)
    page = run / "report.html"
    aside = page.with_suffix(f".{os.getpid()}.tmp")
    aside.write_text(render(records), encoding="utf-8")
    os.replace(aside, page)
    return page


def render(records: Records) -> str:
    """The page as HTML."""
    name = escape(records.folder.resolve().name)
    parts = "".join(_section(part, records) for part in PANELS)
    problems = "".join(f"<li>{escape(p)}</li>" for p in records.problems)
    foot = f'<ul class="problems">{problems}</ul>' if problems else ""
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{name} · Puna</title><style>{STYLE}</style></head><body><header>{_header(name, records)}</header>"
        f"<main>{parts}</main><footer>{foot}<p>Written {made} from the files of {escape(records.folder)}.</p></footer></body></html>\n"
    )


def _section(part: Panel, records: Records) -> str:
    try:
        body = part.draw(records)
    except Exception as error:  # a page with a hole is worth more than no page
        body = absent(f"This panel could not be drawn: {type(error).__name__}: {error}.")
    return f'<section class="{"wide" if part.wide else ""}"><h2>{escape(part.title)}</h2>{body}</section>'


def verdict(records: Records) -> tuple[str, str]:
    """(css class, sentence): how the run stands."""
    if not records.events:
        return "open", "Empty: nothing has been recorded yet"
    last = next(
        (e for e in reversed(records.events) if e["event"] in ("start", "resume", "stop", "step")), records.events[-1]
    )
    if last["event"] != "stop":
        return "open", "Unfinished: no stop was recorded, so the run is still going or was killed"
    reason = str(last.get("reason", "no reason recorded"))
    return ("done", "Done") if reason == "done" else ("open", f"Unfinished: stopped ({reason})")


def seconds_of_work(records: Records) -> float:
    """Time between the first and the last record of each life of the run; the gaps between lives are not counted."""
    total, begin, end = 0.0, None, 0.0
    for event in records.events:
        at = number(event, "time")
        if at is None:
            continue
        if event["event"] == "start" or begin is None:
            total, begin = total + (end - begin if begin is not None else 0.0), at
        if event["event"] in ("start", "step", "checkpoint", "stop"):
            end = at
    return total + max(end - begin, 0.0) if begin is not None else 0.0


def _header(name: str, records: Records) -> str:
    css, sentence = verdict(records)
    last = records.steps[-1] if records.steps else {}
    speed, share = (([y for _, y in records.series(key)]) for key in ("tokens_per_s", "mfu"))
    size, scored = records.fact("num_parameters"), points(records.of("eval"), "bits_per_byte")
    tiles = {
        "steps": f"{last['step']:,}" if last else "0",
        "tokens": scaled(number(last, "tokens") or 0),
        "final loss": short(x) if (x := number(last, "loss")) is not None else "–",
        "bits per byte": f"{scored[-1][1]:.3f}" if scored else "–",
        "time": duration(seconds_of_work(records)),
        "tokens/s, median": f"{median(speed):,.0f}" if speed else "–",
        "MFU, median": f"{100 * median(share):.1f} %" if share else "–",
        "parameters": scaled(size) if isinstance(size, int) else "–",
    }
    shown = "".join(f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in tiles.items())
    return f'<p class="brand">Puna run report</p><h1>{name}</h1><p class="verdict {css}">{escape(sentence)}</p><dl>{shown}</dl>'


STYLE = """
:root{--ground:#f6f5f1;--card:#fff;--ink:#1d2126;--soft:#646c76;--rule:#e3e1da;--a:#2563b8;--b:#bf5413;--c:#2b7f55;--good:#24754c;--warn:#9a5b00}
@media(prefers-color-scheme:dark){:root{--ground:#14171b;--card:#1c2026;--ink:#e6e8ea;--soft:#98a1ac;--rule:#2f353d;--a:#6ea8f2;--b:#f0965a;
--c:#63c08f;--good:#63c08f;--warn:#e6ad54}}
*{box-sizing:border-box}
body{margin:0;padding:32px max(16px,calc(50vw - 580px)) 48px;background:var(--ground);color:var(--ink);font:15px/1.5 system-ui,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{margin:0;font-size:30px;line-height:1.2;overflow-wrap:anywhere}
h2{margin:0 0 12px;font-size:15px;font-weight:650}
.brand{margin:0 0 4px;color:var(--soft);font-size:13px}
.verdict{display:inline-block;margin:10px 0 18px;padding:3px 12px;border:1px solid;border-radius:99px;font-size:14px;font-weight:600}
.done{color:var(--good)}.open{color:var(--warn)}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(128px,1fr));margin:0 0 20px;background:var(--card);border:1px solid var(--rule);border-radius:10px}
dl div{padding:12px 16px}dt{color:var(--soft);font-size:12.5px}dd{margin:0;font-size:20px;font-weight:600;font-variant-numeric:tabular-nums;white-space:nowrap}
main{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:16px;align-items:start}
section{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:16px 18px}
.wide{grid-column:1/-1}
@media(max-width:820px){section{grid-column:1/-1}}
p{margin:0 0 10px}.absent{color:var(--soft);font-style:italic;margin:0}.note{color:var(--soft);font-size:13px;margin:8px 0 0}
figure{margin:0}svg{display:block;width:100%;height:auto}svg text{font-size:11.5px;fill:var(--soft);font-variant-numeric:tabular-nums}
.grid line{stroke:var(--rule)}path{fill:none;stroke-width:1.8;stroke-linejoin:round}
path.a{stroke:var(--a)}path.b{stroke:var(--b)}path.c{stroke:var(--c)}path.faint{stroke-width:1;opacity:.38}
g.a circle{fill:var(--a)}g.b circle{fill:var(--b)}g.c circle{fill:var(--c)}g.dots circle{stroke:var(--card);stroke-width:1.2}
.marks line{stroke:var(--soft);stroke-dasharray:3 3}.hover rect{fill:transparent}.hover rect:hover{fill:var(--a);opacity:.16}
figcaption{display:flex;flex-wrap:wrap;gap:4px 16px;margin-top:6px;color:var(--soft);font-size:13px}.unit{margin-left:auto}
.key i{display:inline-block;width:16px;height:3px;margin-right:6px;vertical-align:middle;border-radius:2px}
.key.dots i{width:8px;height:8px;border-radius:50%}.key.faint i{opacity:.38}.a i{background:var(--a)}.b i{background:var(--b)}.c i{background:var(--c)}
.bar{display:grid;grid-template-columns:190px 1fr;position:relative;align-items:center;margin:5px 0;font-size:14px}
.bar{display:flex;gap:10px}.bar span{flex:0 0 190px}.bar b{height:16px;background:var(--soft);opacity:.55;border-radius:3px}
.bar em{font-style:normal;font-variant-numeric:tabular-nums}.bar.model b{background:var(--a);opacity:1}.bar.model{font-weight:600}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:13.5px}
th{text-align:left;color:var(--soft);font-weight:500;font-size:12.5px}th,td{padding:4px 14px 4px 0;border-bottom:1px solid var(--rule);vertical-align:top}
td{overflow-wrap:anywhere;font-variant-numeric:tabular-nums}.pairs thead{display:none}.pairs td:first-child{color:var(--soft);width:42%}
.figures th,.figures td{text-align:right}.figures th:first-child,.figures td:first-child{text-align:left}
code,pre{font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
pre{margin:4px 0 0;padding:12px 14px;background:var(--ground);border-radius:8px;white-space:pre-wrap;overflow-wrap:anywhere}
pre span{color:var(--soft)}.sample+.sample{margin-top:14px}
summary{cursor:pointer;color:var(--soft);margin:8px 0 4px;font-size:13.5px}
footer{margin-top:20px;color:var(--soft);font-size:13px}.problems{color:var(--warn);padding-left:18px}
"""
