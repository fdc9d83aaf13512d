"""`puna health`: parses, reads, prints. What it needs is imported inside the verb."""

import json
import shutil
import textwrap
from pathlib import Path

import click

from puna.verbs import as_json


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--html", "out", type=click.Path(path_type=Path, dir_okay=False), help="Also write the page to this file."
)
@as_json
def health(run: Path, out: Path | None, as_json: bool) -> None:
    """Say how the optimiser of a run is doing, in words.

    RUN is a run directory or the folder of a drop-in, finished or not. Told are whether it is calm, what was first and
    in which layers, what it means, and what to do next, the cheapest first.

    \b
    Example:  puna health runs/mine --html health.html
    """
    from puna.diagnosis.page import write_page
    from puna.diagnosis.records import watched
    from puna.diagnosis.words import diagnose, require
    from puna.report import read_events

    problems: list[str] = []
    events = read_events(run / "events.jsonl", problems)
    found = watched(events)
    require(found, str(run), bool(events))
    diagnosis = diagnose(found, problems)
    if out:
        write_page(out, run.resolve().name, found, diagnosis)
    if as_json:
        click.echo(json.dumps({"run": str(run), **diagnosis.figures()}))
        return
    click.echo(f"{run}: {diagnosis.headline}")
    width = shutil.get_terminal_size((100, 24)).columns
    for title, sentences in diagnosis.parts():
        click.echo(f"\n{title}")
        for place, sentence in enumerate(sentences, 1):
            lead = f"  {place}. " if title.startswith("What to do") else "  "
            click.echo(textwrap.fill(sentence, width, initial_indent=lead, subsequent_indent=" " * len(lead)))
    if out:
        click.echo(f"\n{out}")
