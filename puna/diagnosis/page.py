"""The diagnosis with its pictures: a page of its own for any folder, and the panel of a run's report."""

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from puna.chart import short
from puna.diagnosis import pictures
from puna.diagnosis.records import Watched, number
from puna.diagnosis.words import Diagnosis

PAGE_STYLE = Path(__file__).parents[1] / "report.css"
NUMBERED = "What to do next, cheapest first"
VERDICTS = {"calm": "done", "watch": "open", "alarm": "bad"}


def write_page(out: Path, name: str, found: Watched, diagnosis: Diagnosis) -> None:
    """Write the page of a folder called `name` to the file `out`, whole or not at all."""
    aside = out.with_name(f".{out.name}-{os.getpid()}.tmp")
    aside.write_text(page(name, found, diagnosis), encoding="utf-8")
    os.replace(aside, out)


def page(name: str, found: Watched, diagnosis: Diagnosis) -> str:
    """The page as HTML: self-contained, without script; a function of the records and the name alone."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    style = PAGE_STYLE.read_text(encoding="utf-8") + pictures.STYLE.read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<title>{escape(name)} · optimiser health · Puna</title>
<style>{style}</style></head>
<body><header><p class="brand">Puna health</p><h1>{escape(name)}</h1></header>
<main>{_section("Diagnosis", _words(diagnosis))}
{_section("Layer by step", pictures.heat_maps(found))}
{_section("Over the steps", pictures.time_lines(found))}
{_section("Histogram of updates", pictures.histograms(found))}
{_section("Rules", rules(found))}</main></body></html>
"""


def panel(found: Watched, diagnosis: Diagnosis) -> str:
    """The same inside another page, with a style of its own."""
    style = pictures.STYLE.read_text(encoding="utf-8")
    shown = (
        ("", _words(diagnosis)),
        ("Layer by step", pictures.heat_maps(found)),
        ("Over the steps", pictures.time_lines(found)),
        ("Histogram of updates", pictures.histograms(found)),
    )
    parts = "".join((f"<h3>{title}</h3>" if title else "") + body for title, body in shown)
    return f'<svg width="0" height="0" aria-hidden="true"><style>{style}</style></svg><div class="health">{parts}</div>'


def rules(found: Watched) -> str:
    """The thresholds that this run was held against."""
    if not found.rules:
        return '<p class="absent">The monitor did not record its rules.</p>'
    cells = "".join(
        f"<tr><td>{escape(str(row.get('rule', '?')))}</td><td>{escape(str(row.get('statistic', '?')))}</td>"
        f"<td>{_shown(row, 'watch')}</td><td>{_shown(row, 'alarm')}</td><td>{_shown(row, 'steps')}</td></tr>"
        for row in found.rules
    )
    head = "".join(f"<th>{name}</th>" for name in ("rule", "statistic", "watch", "alarm", "steps in a row"))
    return (
        f'<div class="scroll"><table class="figures"><thead><tr>{head}</tr></thead><tbody>{cells}</tbody></table></div>'
    )


def _shown(row: dict[str, Any], key: str) -> str:
    value = number(row, key)
    return "–" if value is None else short(value)


def _words(diagnosis: Diagnosis) -> str:
    css = VERDICTS[diagnosis.state]
    parts = "".join(_part(title, sentences) for title, sentences in diagnosis.parts())
    return f'<p class="verdict {css}">{escape(diagnosis.headline)}</p>{parts}'


def _part(title: str, sentences: Sequence[str]) -> str:
    if len(sentences) == 1 and title != NUMBERED:
        return f"<h3>{escape(title)}</h3><p>{escape(sentences[0])}</p>"
    kind = "ol" if title == NUMBERED else "ul"
    rows = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f"<h3>{escape(title)}</h3><{kind}>{rows}</{kind}>"


def _section(title: str, body: str) -> str:
    return f'<section class="wide health"><h2>{escape(title)}</h2>{body}</section>'
