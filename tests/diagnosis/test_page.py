"""The page: whole, self-contained, a function of the records; and the panel in a run's report."""

import json
import re
import sys
from pathlib import Path

import pytest

from puna import report
from puna.diagnosis.page import page, write_page
from puna.diagnosis.records import watched
from puna.diagnosis.words import diagnose

sys.path.append(str(Path(__file__).parents[1]))
from html_page import Page

ATTACK = "<script>alert('x')</script>"


def events_of(folder):
    return report.read_events(folder / "events.jsonl", [])


def page_of(events, name="mine"):
    found = watched(events)
    return page(name, found, diagnose(found))


def test_the_page_is_whole_and_needs_nothing_from_outside(stalled):
    html = page_of(events_of(stalled))
    drawn = Page(html)
    assert not {"script", "img", "link", "iframe", "object", "use"} & {tag for tag, _ in drawn.tags}
    for tag, attributes in drawn.tags:
        assert not {"src", "href", "srcset", "action"} & attributes.keys(), tag
        assert not [name for name in attributes if name.startswith("on")], tag
    assert not re.search(r"url\(|@import|javascript:|https?:", html.split("</style>")[1].replace("arxiv", ""))
    for words in ("Diagnosis", "Layer by step", "Over the steps", "Histogram of updates", "Rules", "before the alarm"):
        assert words in drawn.text
    assert all(attributes.get("aria-label") for tag, attributes in drawn.tags if attributes.get("role") == "img")


@pytest.mark.parametrize("keep", [0, 1, 2, 5])
def test_the_first_records_of_a_run_have_a_page(stalled, keep):
    Page(page_of(events_of(stalled)[:keep]))


def test_names_from_outside_are_text(stalled):
    raw = (stalled / "events.jsonl").read_text().replace('"layer 0"', json.dumps(ATTACK))
    html = page_of([json.loads(line) for line in raw.splitlines()], name=ATTACK)
    Page(html)
    assert ATTACK not in html
    assert "&lt;script&gt;" in html


def test_the_report_has_the_panel(stalled, tmp_path):
    (tmp_path / "events.jsonl").write_text((stalled / "events.jsonl").read_text())
    html = report.write_report(tmp_path).read_text()
    Page(html)
    assert "Alarm at step 101" in html
    assert "could not be drawn" not in html


def test_a_run_that_was_not_watched_says_so(tmp_path):
    (tmp_path / "events.jsonl").write_text('{"event": "start"}\n')
    assert "Not watched: [health] was off." in report.write_report(tmp_path).read_text()


def test_writing_leaves_nothing_aside(stalled, tmp_path):
    found = watched(events_of(stalled))
    write_page(tmp_path / "a.html", "mine", found, diagnose(found))
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]
