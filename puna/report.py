"""A run directory becomes one page: RUN/report.html, self-contained, without scripts and without network.

The page knows records, not rooms. A room adds a panel of its own with

    @panel("Rollouts")
    def rollouts(records: Records) -> str:  # HTML; everything from outside goes through `escape`
        return chart([Line("reward", records.series("reward"))], unit="reward")

What is missing is said in words; a file that cannot be read is named at the foot of the page.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape as _escape
from pathlib import Path
from statistics import median
from typing import Any

from puna.chart import Line, Mark, Point, bars, chart, scaled, short, smooth
from puna.diagnosis.page import panel as health_panel
from puna.diagnosis.records import watched
from puna.diagnosis.words import diagnose
from puna.errors import DataError

Event = dict[str, Any]
STYLE = Path(__file__).with_name("report.css")


def escape(value: object) -> str:
    """Text safe inside HTML and inside a quoted attribute."""
    return _escape(str(value), quote=True)


# --- records --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Records:
    """What a run directory holds, as read.

    events: every record in order. steps: one record a step, the last where a step was lost to a kill and done again (a
    resume takes back what came after the step it resumed from). redone: all records of each step done more than once.
    recipe: dotted key -> {value, layer}. problems: sentences about what could not be read. A file that is not there is
    an empty dictionary.
    """

    folder: Path
    events: list[Event] = field(default_factory=list)
    steps: list[Event] = field(default_factory=list)
    redone: list[list[Event]] = field(default_factory=list)
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

    def setting(self, key: str) -> Any:
        """The recipe's value of a dotted key, or None."""
        entry = self.recipe.get(key)
        return entry.get("value") if isinstance(entry, dict) else entry


def read(run: Path) -> Records:
    """Read the files of a run directory; nothing in them is trusted."""
    problems: list[str] = []
    events = read_events(run / "events.jsonl", problems)
    files = {name: _read_object(run / f"{name}.json", problems) for name in ("recipe", "versions", "model", "summary")}
    steps, redone = _by_step(events)
    recipe = Records(run, recipe=files["recipe"])
    named = recipe.setting("data.path")
    alone = isinstance(named, str) and not recipe.setting("data.sources")
    shards = _read_object(Path(named) / "shards.json", problems) if alone else {}
    return Records(run, events, steps, redone, **files, shards=shards, problems=problems)


def read_events(path: Path, problems: list[str]) -> list[Event]:
    """Every record of an events.jsonl in order; lines that cannot be read are told in `problems`."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
    events, unread = [], []
    for place, line in enumerate(lines, 1):
        record = _parse(line)
        if isinstance(record, dict) and isinstance(record.get("event"), str):
            events.append(record)
        elif line.strip():
            unread.append(place)
    if unread:
        shown = ", ".join(map(str, unread[:5])) + (" and more" if len(unread) > 5 else "")
        problems.append(
            f"events.jsonl: {plural(len(unread), 'record')} could not be read, and left out (line {shown})."
        )
    return events


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _read_object(path: Path, problems: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    found = _parse(path.read_text(encoding="utf-8", errors="replace"))
    if not isinstance(found, dict):
        problems.append(f"{path.name} could not be read: it is damaged, or no table.")
        return {}
    return found


def _by_step(events: list[Event]) -> tuple[list[Event], list[list[Event]]]:
    """The step records that count, and all records of the steps that have several."""
    attempts: dict[int, list[Event]] = {}
    last: dict[int, Event] = {}
    for event in events:
        step = event.get("step")
        if event["event"] in ("resume", "rollback") and isinstance(step, int):
            if event["event"] == "rollback":  # other data follows: nothing is done again
                attempts = {n: rows for n, rows in attempts.items() if n <= step}
            last = {n: kept for n, kept in last.items() if n <= step}
        elif event["event"] == "step" and isinstance(step, int):
            attempts.setdefault(step, []).append(event)
            last[step] = event
    return [last[n] for n in sorted(last)], [attempts[n] for n in sorted(attempts) if len(attempts[n]) > 1]


def number(event: Event, key: str) -> float | None:
    """The finite number under `key`, or None."""
    value = event.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) else None


def points(events: Iterable[Event], key: str, scale: float = 1.0) -> list[Point]:
    """(step, value * scale) of every event that has both; the last of each step, in order of steps."""
    pairs = ((number(event, "step"), number(event, key)) for event in events)
    return sorted({x: y * scale for x, y in pairs if x is not None and y is not None}.items())


# --- words ----------------------------------------------------------------------------------------------------------


def plural(count: int, noun: str) -> str:
    """1 step, 2,000 steps."""
    ending = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{ending}"


def duration(seconds: float) -> str:
    """47 s, 4 min 10 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def text(value: object) -> str:
    """A value of a JSON file as escaped text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, list):
        return ", ".join(map(text, value)) or "none"
    if isinstance(value, float) and math.isfinite(value):
        return short(value)
    return escape("none" if value is None else value)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], css: str = "") -> str:
    """A table; the cells are HTML."""
    top = "".join(f"<th>{name}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table class="{css}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def pairs(values: dict[str, Any]) -> str:
    """A table of a nested dictionary's dotted names and values."""
    return table(("name", "value"), list(_flat(values)), "pairs")


def _flat(values: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield escape(f"{prefix}{key}"), text(value)


def details(title: str, body: str) -> str:
    """A part that opens on a click."""
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def absent(sentence: str) -> str:
    """What stands where there is nothing to show."""
    return f'<p class="absent">{escape(sentence)}</p>'


# --- panels ---------------------------------------------------------------------------------------------------------

Draw = Callable[[Records], str]


@dataclass(frozen=True)
class Panel:
    """A titled part of the page. wide: takes the whole row."""

    title: str
    draw: Draw
    wide: bool


PANELS: list[Panel] = []


def panel(title: str, *, wide: bool = False) -> Callable[[Draw], Draw]:
    """Register a function from a run's records to HTML as the page's next panel; one that gives "" is left out."""

    def register(draw: Draw) -> Draw:
        PANELS.append(Panel(title, draw, wide))
        return draw

    return register


def resume_marks(records: Records) -> list[Mark]:
    """Where the run was taken up again."""
    steps = (number(event, "step") for event in records.of("resume"))
    return [Mark(step, "resumed") for step in steps if step is not None]


@panel("Loss", wide=True)
def loss(records: Records) -> str:
    """Training loss, raw and smoothed, and the loss on each split that is not trained on."""
    train = records.series("loss")
    lines = [Line("train, each step", train, "a faint"), Line("train, smoothed", smooth(train))]
    scored = [event for event in records.of("eval") if number(event, "loss") is not None]
    for style, split in zip("bc", sorted({str(event.get("split")) for event in scored}), strict=False):
        own = [event for event in scored if str(event.get("split")) == split]
        lines.append(Line(split, points(own, "loss"), f"{style} dots"))
    return chart(lines, unit="nats per token", marks=resume_marks(records), from_zero=False, wide=True)


BASELINES = {"gzip": "gzip -9", "xz": "xz -9", "ngram": "5-gram, Witten–Bell"}


@panel("Bits per byte", wide=True)
def bits(records: Records) -> str:
    """The model beside compressors and an n-gram model of the same tokens."""
    scored = [event for event in records.of("eval") if number(event, "bits_per_byte") is not None]
    known = records.summary | {key: value for event in scored for key, value in event.items()}
    rows = [(f"model, {plural(int(x), 'step')}", y, "model") for x, y in points(scored, "bits_per_byte")]
    if not rows:
        named = {"model, before training": "bits_per_byte_before", "model, after training": "bits_per_byte_after"}
        rows = [(name, value, "model") for name, key in named.items() if (value := number(known, key)) is not None]
    if not rows:
        return absent("Not measured yet; `puna eval` on this run writes it here.")
    baselines = [(name, number(known, f"{key}_bits_per_byte")) for key, name in BASELINES.items()]
    rows += [(name, value, "") for name, value in baselines if value is not None]
    size = number(known, "num_bytes")
    text_size = "held-out text" if size is None else f"{scaled(size, 'B')} of held-out text"
    note = (
        f'<p class="note">Bits it takes to write a byte of {text_size}, and the share of its size. Lower is better.</p>'
    )
    return (
        bars(
            [
                (name, value, f"{value:.3f} · {100 * value / 8:.1f} %", css)
                for name, value, css in sorted(rows, key=lambda row: -row[1])
            ]
        )
        + note
    )


@panel("Optimiser health", wide=True)
def health(records: Records) -> str:
    """What the health monitor saw."""
    found = watched(records.events)
    return health_panel(found, diagnose(found)) if found else absent("Not watched: [health] was off.")


@panel("Tokens per second")
def throughput(records: Records) -> str:
    """Over all ranks."""
    speed = records.series("tokens_per_s")
    lines = [Line("each step", speed, "a faint"), Line("smoothed", smooth(speed))]
    return chart(lines, unit="tokens per second", marks=resume_marks(records))


@panel("Predicted and measured")
def predicted(records: Records) -> str:
    """Step time, speed and memory as the planner told them at the start, beside the run's own."""
    told = next(iter(reversed(records.of("prediction"))), None)
    if told is None:
        return ""
    rows = []
    for name, key, measured, scale, unit in (
        ("step", "seconds", _median(_like(records, told, "step_s")), 1.0, "s"),
        ("tokens/s", "tokens_per_s", _median(_like(records, told, "tokens_per_s")), 1.0, ""),
        ("memory of a rank", "memory_bytes", _most(records.series("peak_memory_bytes")), 2**-20, "MiB"),
    ):
        expected = number(told, key)
        if expected is not None:
            rows.append((name, *_beside(expected, measured, scale, unit)))
    low, high = number(told, "low"), number(told, "high")
    ends = "" if low is None or high is None else f" The step's 80 % interval is {low:.3g} to {high:.3g} s."
    note = "Measured: the median step of the predicted size, without the first; the most that any rank has held."
    return table(("", "predicted", "measured", "error"), rows, "figures") + f'<p class="note">{note}{ends}</p>'


def _like(records: Records, told: Event, key: str) -> list[Point]:
    """A series over the steps that consumed the predicted tokens, without the first of them."""
    size, before, found = number(told, "batch_tokens"), 0.0, []
    for step in records.steps:
        tokens = number(step, "tokens")
        if tokens is None:
            continue
        if size is None or tokens - before == size:
            found.append(step)
        before = tokens
    return points(found[1:], key)


def _most(line: list[Point]) -> float | None:
    return max((y for _, y in line), default=None)


def _beside(expected: float, measured: float | None, scale: float, unit: str) -> tuple[str, str, str]:
    error = "–" if not measured else f"{expected / measured - 1:+.1%}"
    shown = (f"{value * scale:,.4g} {unit}".strip() for value in (expected, measured) if value is not None)
    return next(shown), next(shown, "–"), error


@panel("Model FLOPs utilisation")
def mfu(records: Records) -> str:
    """Share of the matrix peak, with its formula."""
    share = records.series("mfu", 100)
    if not share:
        return absent("Not recorded; it needs the machine's peak matrix rate.")
    flops, peak, processes = (records.fact(key) for key in ("flops_per_token", "peak_flops", "world_size"))
    formula = "MFU = tokens per second × FLOPs per token ÷ (processes × peak FLOP/s of one)"
    if flops and peak and processes:
        formula += f"; here {scaled(flops, 'FLOP')}, {plural(processes, 'process')}, {scaled(peak, 'FLOP/s')}"
    return chart([Line("MFU", share)], unit="% of peak") + f'<p class="note">{escape(formula)}</p>'


@panel("Learning rate")
def learning_rate(records: Records) -> str:
    """The schedule as it ran."""
    return chart([Line("learning rate", records.series("lr"))], unit="learning rate")


@panel("Gradient norm")
def gradient_norm(records: Records) -> str:
    """Global norm before clipping."""
    norm, clip = records.series("grad_norm"), records.setting("train.clip")
    lines = [Line("before clipping", norm)]
    if clip and norm:
        lines.append(Line(f"clipped to {short(clip)}", [(norm[0][0], clip), (norm[-1][0], clip)], "b"))
    return chart(lines, unit="gradient norm", marks=resume_marks(records), log=True)


@panel("Peak memory")
def memory(records: Records) -> str:
    """As the step records hold it."""
    return chart([Line("peak", records.series("peak_memory_bytes", 2**-20))], unit="MiB")


@panel("Data wait")
def data_wait(records: Records) -> str:
    """Share of the time spent waiting for data, step by step."""
    waits, steps = dict(records.series("data_wait_s")), dict(records.series("step_s"))
    share = [(x, 100 * wait / (wait + steps[x])) for x, wait in waits.items() if steps.get(x)]
    return chart([Line("waiting", share)], unit="% of the time")


@panel("Resumes", wide=True)
def resumes(records: Records) -> str:
    """Steps that were lost to a kill and done again, and whether they came out the same."""
    places = [text(event.get("step", "?")) for event in records.of("resume")]
    if not places:
        return absent("The run was never interrupted.")
    attempts = [
        (events[0]["step"], [x for e in events if (x := number(e, "loss")) is not None]) for events in records.redone
    ]
    spreads = [(step, losses[0], losses[-1], max(losses) - min(losses)) for step, losses in attempts if losses]
    taken_up = f"Taken up again from step {', '.join(places)}."
    if not spreads:
        return f"<p>{taken_up} No step had to be done twice.</p>"
    worst = max(spread for *_, spread in spreads)
    verdict = (
        "with the same loss each time, bit for bit" if worst == 0 else f"the losses differ by at most {short(worst)}"
    )
    rows = [(f"{step:,}", f"{first:.9g}", f"{last:.9g}", short(spread)) for step, first, last, spread in spreads[-20:]]
    shown = table(("step", "loss, first time", "loss, last time", "largest difference"), rows, "figures")
    sentence = f"{taken_up} {plural(len(spreads), 'step')} done again, <strong>{verdict}</strong>."
    return f"<p>{sentence}</p>" + details("The losses, side by side", shown)


@panel("Samples", wide=True)
def samples(records: Records) -> str:
    """What the model wrote: the last eight."""
    found = [event for event in records.of("sample") if "completion" in event]
    if not found:
        return absent("No samples were taken.")
    shown = ((escape(event.get("prompt", "")), escape(event["completion"])) for event in found[-8:])
    return "".join(f"<pre><span>{prompt}</span>{completion}</pre>" for prompt, completion in shown)


@panel("Summary", wide=True)
def summary(records: Records) -> str:
    """The machine-readable result, for people; only the main job writes one."""
    return pairs(records.summary) if records.summary else ""


@panel("Recipe", wide=True)
def recipe(records: Records) -> str:
    """Every setting with the layer that set it: flags, then what the recipe chose, then defaults."""
    if not records.recipe:
        return absent("This run has no recipe.json.")
    chosen: list[tuple[str, str, str]] = []
    defaults: list[tuple[str, str, str]] = []
    for key, entry in records.recipe.items():
        layer = str(entry.get("layer", "unknown")) if isinstance(entry, dict) else "unknown"
        row = (f"<code>{escape(key)}</code>", text(records.setting(key)), escape(layer))
        (defaults if layer == "default" else chosen).append(row)
    chosen.sort(key=lambda row: row[2] != "flag")
    head = ("setting", "value", "set by")
    shown = table(head, chosen) if chosen else absent("Every setting has its default.")
    return shown + (
        details(plural(len(defaults), "setting") + " at the default", table(head, defaults)) if defaults else ""
    )


@panel("Model")
def model(records: Records) -> str:
    """Shape and size."""
    size = records.fact("num_parameters")
    values = ({} if size is None else {"parameters": size}) | records.model
    return pairs(values) if values else absent("This run has no model.json.")


@panel("Data")
def data(records: Records) -> str:
    """What is read of each source, and the token shards where there is one source."""
    drawn, splits = _drawn(records.fact("sources")), records.shards.get("splits")
    if not isinstance(splits, dict):
        return drawn or absent("The token shards that the recipe names (data.path) are not at hand.")
    counts = ("num_documents", "num_tokens", "num_bytes")
    rows = [(escape(name), *(_count(facts.get(key)) for key in counts)) for name, facts in splits.items()]
    other = {key: value for key, value in records.shards.items() if key not in ("splits", "files")}
    splits_table = table(("split", "documents", "tokens", "bytes"), rows, "figures")
    return drawn + splits_table + details("The manifest", pairs(other))


def _drawn(sources: Any) -> str:
    """The start record's table of sources."""
    if not isinstance(sources, list) or not all(isinstance(source, dict) for source in sources):
        return ""
    return table(
        ("source", "documents", "tokens", "share", "tokens drawn", "epochs"),
        [
            (
                escape(str(source.get("source"))),
                _count(source.get("num_documents")),
                _count(source.get("num_tokens")),
                _share(source, "share"),
                _count(source.get("drawn_tokens")),
                _share(source, "epochs"),
            )
            for source in sources
        ],
        "figures",
    )


def _share(record: Event, key: str) -> str:
    value = number(record, key)
    return "?" if value is None else f"{value:.3g}"


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else text(value)


@panel("Versions and machine")
def versions(records: Records) -> str:
    """What ran it."""
    facts = {key: records.fact(key) for key in ("mesh", "dtype", "dtype_reason")}
    values = records.versions | {key: value for key, value in facts.items() if value is not None}
    return pairs(values) if values else absent("This run has no versions.json.")


@panel("Checkpoints")
def checkpoints(records: Records) -> str:
    """What was saved, and what is still there."""
    saved = {event["step"]: event for event in records.of("checkpoint") if isinstance(event.get("step"), int)}
    if not saved:
        return absent("No checkpoint was recorded.")
    kept = {path.parent.name for path in records.folder.glob("checkpoints/*/manifest.json")}
    rows = []
    for step, event in sorted(saved.items())[-12:]:
        seconds, size = number(event, "seconds"), number(event, "bytes")
        rows.append(
            (
                f"{step:,}",
                "?" if seconds is None else duration(seconds),
                "?" if size is None else scaled(size, "B"),
                "yes" if f"step-{step:08d}" in kept else "no longer",
            )
        )
    return f"<p>{plural(len(saved), 'checkpoint')} saved.</p>" + table(
        ("step", "time", "size", "kept"), rows, "figures"
    )


# --- the page -------------------------------------------------------------------------------------------------------


def write_report(run: Path, more: Sequence[Panel] = ()) -> Path:
    """Write RUN/report.html from the files of the run directory `run`; returns its path. Raises DataError.

    more: panels of the run's own room, which follow the first one.
    """
    if not run.is_dir():
        raise DataError(
            f"There is no run directory at {run}", "Give the folder that `puna train` wrote (its --run.dir)."
        )
    page = run / "report.html"
    aside = run / f".report-{os.getpid()}.tmp"
    aside.write_text(render(read(run), more), encoding="utf-8")
    os.replace(aside, page)
    return page


def render(records: Records, more: Sequence[Panel] = ()) -> str:
    """The page as HTML."""
    name = escape(records.folder.resolve().name)
    parts = "".join(_section(part, records) for part in (*PANELS[:1], *more, *PANELS[1:]))
    problems = "".join(f"<li>{escape(problem)}</li>" for problem in records.problems)
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<title>{name} · Puna</title>
<style>{STYLE.read_text(encoding="utf-8")}</style></head>
<body><header>{_header(name, records)}</header>
<main>{parts}</main>
<footer>{f'<ul class="problems">{problems}</ul>' if problems else ""}
<p>Written {made} from the files of {escape(records.folder)}.</p></footer></body></html>
"""


def _section(part: Panel, records: Records) -> str:
    try:
        body = part.draw(records)
    except Exception as error:  # a page with a hole is worth more than no page
        body = absent(f"This panel could not be drawn: {type(error).__name__}: {error}.")
    if not body:
        return ""
    return f'<section class="{"wide" if part.wide else "half"}"><h2>{escape(part.title)}</h2>{body}</section>\n'


def _header(name: str, records: Records) -> str:
    css, sentence = verdict(records)
    shown = "".join(f"<div><dt>{label}</dt><dd>{escape(value)}</dd></div>" for label, value in _tiles(records).items())
    return f"""<p class="brand">Puna run report</p><h1>{name}</h1>
<p class="verdict {css}">{escape(sentence)}</p>
<dl>{shown}</dl>"""


def verdict(records: Records) -> tuple[str, str]:
    """(css class, sentence): how the run stands."""
    if not records.events:
        return "open", "Empty: nothing has been recorded yet"
    turns = [event for event in records.events if event["event"] in ("start", "resume", "step", "stop")]
    if not turns or turns[-1]["event"] != "stop":
        return "open", "Unfinished: still going, or killed (no stop was recorded)"
    reason = str(turns[-1].get("reason", "no reason recorded"))
    return ("done", "Done") if reason == "done" else ("open", f"Unfinished: {reason}")


def _tiles(records: Records) -> dict[str, str]:
    last = records.steps[-1] if records.steps else {}
    scored = points(records.of("eval"), "bits_per_byte")
    return {
        "steps": f"{last.get('step', 0):,}",
        "tokens": scaled(number(last, "tokens") or 0),
        "final loss": _shown(number(last, "loss"), short),
        "bits per byte": _shown(scored[-1][1] if scored else None, "{:.3f}".format),
        "time": duration(seconds_of_work(records)),
        "tokens/s, median": _shown(_median(records.series("tokens_per_s")), "{:,.0f}".format),
        "MFU, median": _shown(_median(records.series("mfu", 100)), "{:.1f} %".format),
        "parameters": _shown(records.fact("num_parameters"), scaled),
    }


def _shown(value: Any, how: Callable[[Any], str]) -> str:
    return "–" if value is None else how(value)


def _median(line: list[Point]) -> float | None:
    return median(y for _, y in line) if line else None


def seconds_of_work(records: Records) -> float:
    """Time the run was alive: from each start to the last record of training before the next start."""
    total, begin, end = 0.0, None, 0.0
    for event in records.events:
        at = number(event, "time")
        if at is None or event["event"] not in ("start", "resume", "step", "checkpoint", "stop"):
            continue
        if event["event"] == "start" or begin is None:
            total, begin = total + (0.0 if begin is None else end - begin), at
        end = at
    return total + (0.0 if begin is None else end - begin)
