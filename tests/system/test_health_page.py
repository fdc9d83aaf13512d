"""The health page in a real browser: maps can be picked, words can be read in light and dark, it fits a phone."""

import sys
from pathlib import Path

import pytest

from puna.diagnosis.page import write_page
from puna.diagnosis.records import watched
from puna.diagnosis.words import diagnose
from puna.report import read_events, write_report

sys.path.append(str(Path(__file__).parents[1] / "diagnosis"))
from stalling import STALL, train

pytestmark = [pytest.mark.slow, pytest.mark.browser]

CONTRAST = """() => {
  const light = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map((x) => x / 255)
      .map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4))
    return 0.2126 * r + 0.7152 * g + 0.0722 * b
  }
  const ground = light(getComputedStyle(document.querySelector("section")).backgroundColor)
  const against = (colour) => {
    const pair = [light(colour), ground].sort((a, b) => a - b)
    return (pair[1] + 0.05) / (pair[0] + 0.05)
  }
  const parts = "section p, section li, section h2, section h3, section td, figcaption span"
  const words = [...document.querySelectorAll(parts)]
    .map((one) => against(getComputedStyle(one).color))
  const svg = [...document.querySelectorAll("svg text")].map((one) => against(getComputedStyle(one).fill))
  return Math.min(...words, ...svg)
}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = train(tmp_path_factory.mktemp("health") / "run", 150, STALL)
    found = watched(read_events(folder / "events.jsonl", []))
    write_page(folder / "health.html", "run", found, diagnose(found))
    write_report(folder)
    return folder


@pytest.fixture
def opened(browser, folder):
    """Opens a page of the folder; a broken policy or a script error fails the test."""
    wrong, contexts = [], []

    def open_page(name="health.html", width=1100, scheme="light"):
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(f"file://{folder / name}")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.mark.parametrize("name", ["health.html", "report.html"])
def test_one_map_is_seen_and_another_can_be_picked(opened, name):
    page = opened(name)
    maps = page.locator(".picks > div")
    assert [maps.nth(i).is_visible() for i in range(maps.count())] == [True] + [False] * (maps.count() - 1)
    page.click("label[for=map-u_rms]")
    assert page.get_by_label("update RMS: highest").is_visible()
    assert not maps.nth(0).is_visible()
    page.keyboard.press("ArrowRight")
    assert not page.get_by_label("update RMS: highest").is_visible()


def test_the_map_is_coloured(opened):
    page = opened()
    fills = page.eval_on_selector_all(".picks path.cells", "all => all.map((one) => getComputedStyle(one).fill)")
    assert len(set(fills)) >= 4
    assert "none" not in fills


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["health.html", "report.html"])
def test_words_can_be_read(opened, name, scheme):
    assert opened(name, scheme=scheme).evaluate(CONTRAST) > 4.5


@pytest.mark.parametrize("name", ["health.html", "report.html"])
def test_it_fits_a_phone(opened, name):
    page = opened(name, width=360)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
