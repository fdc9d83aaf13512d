"""`puna health` on the command line."""

import json
import sys

import pytest

from puna import cli


@pytest.fixture
def puna(monkeypatch, capsys):
    """Runs one command in this process: (status, stdout, stderr)."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["puna", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        told = capsys.readouterr()
        return left.value.code, told.out, told.err

    return run


def test_the_diagnosis_is_printed(puna, stalled):
    status, out, _ = puna("health", stalled)
    assert status == 0
    assert f"{stalled}: Alarm at step 101 of 150" in out
    order = (
        "What came first",
        "Which layers",
        "What it means",
        "What to do next, cheapest first\n  1. Look: hold step",
    )
    places = [out.index(words) for words in order]
    assert places == sorted(places)


def test_json_is_all_there_is_on_stdout(puna, stalled):
    status, out, _ = puna("health", stalled, "--json")
    figures = json.loads(out)
    assert status == 0
    assert figures["run"] == str(stalled)
    assert (figures["state"], figures["first"]["step"], figures["first"]["state"]) == ("alarm", 101, "alarm")
    assert {"layers", "spells", "loss", "actions", "meaning", "next", "notes", "headline"} < figures.keys()


def test_the_page_is_written_and_named(puna, stalled, tmp_path):
    status, out, _ = puna("health", stalled, "--html", tmp_path / "page.html")
    assert status == 0
    assert out.rstrip().endswith(str(tmp_path / "page.html"))
    assert "<!doctype html>" in (tmp_path / "page.html").read_text()
    status, _, err = puna("health", stalled, "--html", tmp_path / "nowhere" / "page.html")
    assert status == 1
    assert "No such file or directory" in err


def test_a_run_that_is_going_on_and_a_torn_line(puna, stalled, tmp_path):
    lines = (stalled / "events.jsonl").read_text().splitlines()
    (tmp_path / "events.jsonl").write_text("\n".join(lines[:20]) + '\n{"event": "heal')
    status, out, _ = puna("health", tmp_path)
    assert status == 0
    assert "1 record could not be read, and left out (line 21)" in out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "There are no records in {}: no events.jsonl, or an empty one. Give the run's directory"),
        ("", "There are no records in {}: no events.jsonl, or an empty one. Give the run's directory"),
        ('{"event": "start"}\n', "{} has no health records: it was made with the monitor off"),
    ],
)
def test_a_folder_without_health_records_is_one_sentence(puna, tmp_path, text, words):
    if text is not None:
        (tmp_path / "events.jsonl").write_text(text)
    status, out, err = puna("health", tmp_path)
    assert (status, out) == (2, "")
    assert words.format(tmp_path) in err
    assert err.count("\n") == 1


def test_reading_needs_no_torch(stalled):
    import subprocess

    code = f"""
import sys
from puna.cli import main
sys.argv = ["puna", "health", {str(stalled)!r}, "--json"]
try:
    main()
finally:
    assert "torch" not in sys.modules, "torch was imported"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
