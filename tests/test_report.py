import json
import math
import re
import sys
from pathlib import Path

import pytest

from puna import chart as charts
from puna import report
from puna.errors import DataError
from puna.report import PANELS, Panel, Records, panel, points, read, seconds_of_work, verdict, write_report

sys.path.append(str(Path(__file__).parent))
from html_page import Page

ATTACK = "<script>alert('x')</script><img src=http://evil.example/a.png onerror=alert(1)>"
STEP_BYTES, BATCH = 3.1e8, 8192


def step(n, at, wobble=0.0):
    loss = 1.9 + 6.4 * math.exp(-n / 40) + 0.08 * math.sin(n * 2.4) + wobble
    return {
        "event": "step", "step": n, "tokens": n * BATCH, "loss": loss, "lr": 2e-3 * min(1, n / 20) * (1 - n / 260),
        "grad_norm": 0.6 + 2.5 * math.exp(-n / 15) + 0.2 * abs(math.sin(n * 3.1)),
        "tokens_per_s": 6500 + 220 * math.sin(n * 1.7), "mfu": 0.46 + 0.015 * math.sin(n * 1.7),
        "peak_memory_bytes": STEP_BYTES + 1e6 * min(n, 30), "data_wait_s": 0.004, "step_s": 1.25, "time": at,
    }  # fmt: skip


def lived():
    """Events of a run of 200 steps, killed after step 127 and taken up again from the checkpoint at 120."""
    start = {
        "event": "start", "step": 0, "num_parameters": 4_329_728, "flops_per_token": 2.59e7, "peak_flops": 1.83e11,
        "world_size": 2, "mesh": "dp_shard 2", "dtype": "fp32", "dtype_reason": "bf16 is slower here", "time": 1000.0,
    }  # fmt: skip
    prediction = {
        "event": "prediction", "seconds": 1.4, "low": 1.2, "high": 1.6, "tokens_per_s": BATCH / 1.4,
        "batch_tokens": BATCH, "memory_bytes": 3.0e8, "time": 1000.1,
    }  # fmt: skip
    saved = [
        {"event": "checkpoint", "step": n, "seconds": 0.21, "bytes": 5.2e7, "time": 1000 + n} for n in (40, 80, 120)
    ]
    first = [step(n, 1000.0 + n) for n in range(1, 128)]
    again = [step(n, 2000.0 + n - 120) for n in range(121, 201)]
    return [
        start,
        prediction,
        {"event": "eval", "step": 0, "split": "heldout", "loss": 8.32, "time": 1000.5},
        *first,
        *saved,
        start | {"step": 120, "time": 1999.0},
        {"event": "resume", "step": 120, "time": 2000.0},
        *again,
        {"event": "eval", "step": 200, "split": "heldout", "loss": 2.31, "time": 2081.0},
        {"event": "checkpoint", "step": 200, "seconds": 0.2, "bytes": 5.2e7, "time": 2082.0},
        {"event": "stop", "reason": "done", "time": 2083.0},
        {"event": "eval", "step": 0, "bits_per_byte": 3.61, "num_bytes": 561_000, "time": 2200.0},
        {
            "event": "eval", "step": 200, "bits_per_byte": 1.642, "gzip_bits_per_byte": 2.03, "xz_bits_per_byte": 1.69,
            "ngram_bits_per_byte": 1.55, "num_bytes": 561_000, "time": 2210.0,
        },
        {"event": "sample", "prompt": "def read_lines(path):\n", "completion": "    return open(path).read()\n"},
        {"event": "sample", "prompt": ATTACK, "completion": ATTACK, "time": 2220.0},
    ]  # fmt: skip


def write(run, events=(), **files):
    run.mkdir(parents=True, exist_ok=True)
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    for name, values in files.items():
        (run / f"{name}.json").write_text(json.dumps(values))
    return run


@pytest.fixture
def run(tmp_path):
    """A realistic run directory."""
    write(tmp_path / "shards")
    splits = {"train": {"num_documents": 1200, "num_tokens": 3_300_000, "num_bytes": 10_900_000}}
    (tmp_path / "shards" / "shards.json").write_text(json.dumps({"dtype": "uint16", "splits": splits}))
    folder = write(
        tmp_path / "demo",
        lived(),
        recipe={
            "run.seed": {"value": 0, "layer": "default"},
            "train.lr": {"value": 2e-3, "layer": "recipe demo"},
            "train.clip": {"value": 1.0, "layer": "default"},
            "data.path": {"value": str(tmp_path / "shards"), "layer": "flag"},
            "model.rope_scaling": {"value": None, "layer": "default"},
        },
        versions={"python": "3.11.7", "torch": "2.13.0", "puna": "0.1", "machine": {"cpu": "EPYC", "num_cores": 2}},
        model={"num_layers": 4, "dim": 256, "vocab_size": 4096},
        summary={"steps": 200, "hf_greedy_identical": True, "served_completion": ATTACK},
    )
    (folder / "checkpoints" / "step-00000200").mkdir(parents=True)
    (folder / "checkpoints" / "step-00000200" / "manifest.json").write_text("{}")
    return folder


def page_of(run):
    return Page(write_report(run).read_text())


def test_every_panel_is_drawn(run):
    page = page_of(run)
    assert page.sections() == len(PANELS)
    assert all(entry.title in page.text for entry in PANELS)
    for words in ("could not be", "Nothing recorded", "not at hand", "has no", "Not measured", "No checkpoint"):
        assert words not in page.text
    assert sum(tag == "svg" for tag, _ in page.tags) == 7


def test_the_header_tells_how_the_run_stands(run):
    page = page_of(run)
    for words in ("demo", "Done", "200", "1.64 M", "1.642", "4.33 M", "46.0 %"):
        assert words in page.text
    assert verdict(read(run)) == ("done", "Done")


def test_the_page_needs_no_network_and_runs_nothing(run):
    page = page_of(run)
    assert not {"script", "img", "link", "iframe", "object", "use"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not {"src", "href", "srcset", "action"} & attributes.keys(), tag
        assert not [name for name in attributes if name.startswith("on")], tag
    html = write_report(run).read_text()
    assert not re.search(r"url\(|@import|javascript:", html)
    assert "default-src 'none'" in html


def test_text_from_outside_is_escaped_everywhere(tmp_path):
    events = [
        {"event": "start", "step": ATTACK, "num_parameters": 5, "mesh": ATTACK, "dtype": ATTACK},
        {"event": "eval", "split": ATTACK, "step": 1, "loss": 2.0},
        step(1, 1.0),
        {"event": "resume", "step": ATTACK},
        {"event": "sample", "prompt": ATTACK, "completion": ATTACK, "step": ATTACK},
        {"event": "stop", "reason": ATTACK},
    ]
    run = write(
        tmp_path / "a<script>b",
        events,
        recipe={ATTACK: {"value": ATTACK, "layer": ATTACK}, "data.path": {"value": ATTACK}},
        versions={ATTACK: [ATTACK]},
        model={ATTACK: ATTACK},
        summary={ATTACK: {ATTACK: ATTACK}},
    )
    html = write_report(run).read_text()
    assert "<script" not in html
    assert "<img" not in html
    assert html.count("&lt;script&gt;alert") >= 12
    assert ATTACK in Page(html).text


def test_a_step_done_twice_counts_once_and_proves_the_resume(run):
    records = read(run)
    assert [event["step"] for event in records.steps] == list(range(1, 201))
    assert [[event["step"] for event in attempts] for attempts in records.redone] == [[n, n] for n in range(121, 128)]
    assert "7 steps done again, with the same loss each time, bit for bit" in page_of(run).text


def test_a_resume_that_differs_is_told(tmp_path):
    events = [step(1, 1.0), step(2, 2.0), {"event": "resume", "step": 1}, step(2, 3.0, wobble=0.25)]
    assert "the losses differ by at most 0.25" in page_of(write(tmp_path / "run", events)).text


def test_time_of_work_leaves_the_gap_between_two_lives_out(run):
    assert seconds_of_work(read(run)) == pytest.approx((1120 - 1000) + (2083 - 1999))


def test_the_settings_that_somebody_chose_come_first(run):
    text = page_of(run).text
    places = [text.index(words) for words in ("data.path", "train.lr", "settings at the default", "run.seed")]
    assert places == sorted(places)


def test_data_wait_is_a_share_of_the_whole_time(tmp_path):
    events = [step(n, float(n)) | {"data_wait_s": 1.0, "step_s": 3.0} for n in (1, 2)]
    assert "waiting: 25\n" in write_report(write(tmp_path / "run", events)).read_text().replace("</title>", "\n")


def test_a_resume_takes_back_what_came_after_it(tmp_path):
    """Killed after step 9, resumed from 4, killed after 6: steps 7 to 9 are not part of the run any more."""
    events = [*(step(n, 1.0) for n in range(1, 10)), {"event": "resume", "step": 4}, step(5, 2.0), step(6, 2.0)]
    assert [event["step"] for event in read(write(tmp_path / "run", events)).steps] == [1, 2, 3, 4, 5, 6]


def test_baselines_and_models_are_ranked(run):
    text = page_of(run).text
    places = [text.index(name) for name in ("model, 0 steps", "gzip -9", "xz -9", "model, 200 steps", "5-gram")]
    assert places == sorted(places)


def test_what_was_predicted_stands_beside_what_was_measured(tmp_path):
    sizes = [100, 100, 100, 100, 400, 400]
    told = {"event": "prediction", "seconds": 2.2, "low": 1.9, "high": 2.5, "tokens_per_s": 100 / 2.2,
            "batch_tokens": 100, "memory_bytes": 2**30}  # fmt: skip
    steps = [
        {"event": "step", "step": n, "tokens": sum(sizes[:n]), "loss": 1.0, "step_s": seconds,
         "tokens_per_s": 100 / seconds, "peak_memory_bytes": 2.0**31}
        for n, seconds in enumerate([9.0, 2.0, 2.0, 2.0, 50.0, 50.0], 1)
    ]  # fmt: skip
    text = page_of(write(tmp_path / "run", [told | {"seconds": 7.0}, told, *steps])).text
    shown = text[text.index("Predicted and measured") :]
    for words in ("2.2 s", "2 s", "+10.0%", "50", "-9.1%", "1,024 MiB", "2,048 MiB", "-50.0%", "1.9 to 2.5 s"):
        assert words in shown
    assert "7 s" not in shown
    assert "Predicted and measured" not in page_of(write(tmp_path / "other", steps)).text


@pytest.mark.parametrize("events", [[], [{"event": "start"}], [{"event": "stop"}], [{"event": "step"}], [step(1, 0.0)]])
def test_a_run_that_hardly_began(tmp_path, events):
    page = page_of(write(tmp_path / "run", events))
    assert page.sections() == len(PANELS) - 2  # no prediction, no summary
    assert "could not be drawn" not in page.text


def test_an_empty_folder_is_told_in_words(tmp_path):
    text = page_of(tmp_path).text
    for words in ("Empty: nothing has been recorded yet", "Nothing recorded yet", "no recipe.json", "no versions.json"):
        assert words in text


def test_a_run_still_going_or_killed_is_unfinished(tmp_path):
    run = write(tmp_path / "run", lived()[:100])
    assert "Unfinished: still going, or killed" in page_of(run).text


def test_a_stop_that_is_not_done_gives_its_reason(tmp_path):
    run = write(tmp_path / "run", [step(1, 1.0), {"event": "stop", "reason": "SIGTERM"}])
    assert verdict(read(run)) == ("open", "Unfinished: SIGTERM")


def test_a_torn_last_line_is_left_out_and_named(run):
    with open(run / "events.jsonl", "a") as file:
        file.write('{"event": "step", "step": 201, "lo')
    page = page_of(run)
    assert "1 record could not be read" in page.text
    assert page.sections() == len(PANELS)
    assert len(read(run).steps) == 200


def test_damaged_files_are_named(tmp_path):
    run = write(tmp_path / "run", [step(1, 1.0)], model=[1, 2])
    (run / "recipe.json").write_text('{"train.lr": ')
    (run / "versions.json").write_bytes(b"\xff\xfe\x00")
    with open(run / "events.jsonl", "a") as file:
        file.write('7\n["event"]\n{"event": 3}\n\n')
    text = page_of(run).text
    for words in ("recipe.json could not be read", "versions.json could not be read", "model.json could not be read"):
        assert words in text
    assert "3 records could not be read" in text


def test_values_of_a_wrong_type_leave_the_page_whole(tmp_path):
    wrong = [{"event": kind, "step": "x", "loss": [], "time": None, "bits_per_byte": {}, "seconds": "?"}
             for kind in ("start", "prediction", "step", "eval", "checkpoint", "resume", "sample", "stop")]  # fmt: skip
    bad = [
        step(n, 1.0) | {"loss": value, "mfu": value} for n, value in enumerate([math.nan, math.inf, None, "2", True])
    ]
    recipe = {"train.clip": 3, "train.lr": {"value": "fast"}, "data.path": {"value": 7}}
    page = page_of(write(tmp_path / "run", [*wrong, *bad], recipe=recipe, summary={"num_bytes": "many"}))
    assert page.sections() == len(PANELS)
    assert "could not be drawn" not in page.text


def test_no_run_directory(tmp_path):
    with pytest.raises(
        DataError, match=r"There is no run directory at .*nowhere.*Give the folder that `puna train` wrote"
    ):
        write_report(tmp_path / "nowhere")


def test_nothing_but_the_page_is_left(run):
    before = {path.name for path in run.iterdir()}
    assert write_report(run) == run / "report.html"
    assert {path.name for path in run.iterdir()} == before | {"report.html"}


def test_a_room_adds_a_panel_and_a_broken_one_leaves_a_hole(run, monkeypatch):
    monkeypatch.setattr(report, "PANELS", list(PANELS))

    @panel("Rollouts", wide=True)
    def rollouts(records: Records) -> str:
        return f"<p>{len(records.steps)} rollouts</p>"

    @panel("Broken")
    def broken(records: Records) -> str:
        raise KeyError("reward<b>")

    text = page_of(run).text
    assert "Rollouts200 rollouts" in text
    assert "This panel could not be drawn: KeyError: 'reward<b>'." in text
    assert report.PANELS[-1] == Panel("Broken", broken, wide=False)


def test_long_runs_stay_small_and_keep_their_extremes(tmp_path):
    events = [step(n, float(n)) for n in range(1, 20_001)]
    events[7_776]["loss"] = 99.0
    run = write(tmp_path / "run", events)
    assert len(write_report(run).read_text()) < 700_000
    line = points(read(run).steps, "loss")
    assert (7_777, 99.0) in charts.thin(line)
    assert len(charts.thin(line)) <= charts.MAX_POINTS + 2


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 7), (1.93, 8.31), (0, 3e9), (5, 5), (0, 0), (-3, 2), (1e-9, 2e-9)]
)
def test_ticks_cover_the_values(low, high):
    found = charts.ticks(low, high, 5)
    assert found[0] <= low
    assert found[-1] >= high or found[-1] == pytest.approx(high)
    assert 1 <= len(found) <= 8


@pytest.mark.parametrize(("low", "high"), [(0.5, 3), (1e-3, 1e3), (1, 1), (0.001, 0.001), (3e-5, 4e7)])
def test_log_ticks_cover_the_values(low, high):
    found = charts.log_ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high


def test_smoothing_starts_at_the_first_value_and_follows():
    assert charts.smooth([]) == []
    assert charts.smooth([(1, 4.0), (2, 4.0)]) == [(1, 4.0), (2, 4.0)]
    rising = charts.smooth([(n, float(n)) for n in range(1000)])
    assert rising[0] == (0, 0.0)
    assert 970 < rising[-1][1] < 999


@pytest.mark.parametrize(
    ("value", "words"), [(0, "0"), (3.14159, "3.142"), (12_345.6, "12,346"), (2e-5, "2e-05"), (3e9, "3e+09")]
)
def test_short(value, words):
    assert charts.short(value) == words


@pytest.mark.parametrize(
    ("value", "words"), [(0, "0"), (950, "950"), (4_329_728, "4.33 M"), (2.59e10, "25.9 G"), (6e15, "6e+03 T")]
)
def test_scaled(value, words):
    assert charts.scaled(value) == words


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0 s"), (47.25, "47.2 s"), (250, "4 min 10 s"), (7500, "2 h 05 min")]
)
def test_duration(seconds, words):
    assert report.duration(seconds) == words


def test_the_sources_of_a_mixture_are_told(tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "shards.json").write_text(json.dumps({"splits": {"train": {"num_tokens": 987_654}}}))
    code = {"source": "shards/<code>", "num_documents": 1234, "num_tokens": 56_789, "share": 0.75}
    start = {"event": "start", "sources": [code | {"drawn_tokens": 4321, "epochs": 1.5}, {"source": "prose"}]}
    recipe = {"data.sources": {"value": [["code", 0.75]]}, "data.path": {"value": str(tmp_path / "shards")}}
    text = page_of(write(tmp_path / "run", [start], recipe=recipe)).text
    for told in ("shards/<code>", "1,234", "56,789", "0.75", "4,321", "1.5", "prose"):
        assert told in text
    assert "987,654" not in text  # data.path is not what this run reads
