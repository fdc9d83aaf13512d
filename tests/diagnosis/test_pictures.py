"""Maps, time-lines and histograms hold what the records hold."""

import re

import pytest

from puna.diagnosis.pictures import (
    MAX_COLUMNS,
    heat_map,
    heat_maps,
    histogram,
    histograms,
    marks,
    moments,
    shade,
    time_lines,
)
from puna.diagnosis.records import REACH, STATISTICS, watched
from puna.report import read_events

START = {"event": "health_start", "step": 0, "tensors": {"a": "layer 0", "b": "layer 0", "c": "layer <1>"}}


def sample(step, **tensors):
    return {"event": "health", "step": step, "tensors": {name: {"u_rms": value} for name, value in tensors.items()}}


def read(folder):
    return watched(read_events(folder / "events.jsonl", []))


def cells(svg, level):
    """(x, y, width) of every rectangle of a colour."""
    found = re.search(rf'class="cells h{level}" d="([^"]+)"', svg)
    pieces = re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)", found[1]) if found else []
    return [tuple(map(float, piece)) for piece in pieces]


def test_colours_turn_at_the_limit():
    rms, stall = STATISTICS["u_rms"], STATISTICS["stall"]
    assert [shade(rms.badness(x, 0.6)) for x in (0.0, 0.2, 0.59, 0.6, 0.75, 9.0)] == [0, 0, 5, 6, 7, 8]
    assert [shade(stall.badness(x, 10)) for x in (1e6, 100, 11, 9.9, 1e-30)] == [0, 0, 5, 6, 8]
    for statistic in STATISTICS.values():
        assert statistic.at(0.5, statistic.limit) == pytest.approx(
            (statistic.calm * statistic.limit) ** 0.5 if statistic.log else (statistic.calm + statistic.limit) / 2
        )


def test_a_map_has_the_worst_tensor_of_each_layer_and_step():
    found = watched([START, sample(10, a=0.1, b=0.7, c=0.1), sample(20, a=0.1, b=0.1, c=0.1), sample(30, c=5.0)])
    svg = heat_map(found, "u_rms")
    (alarm,), (far,) = cells(svg, 6), cells(svg, 8)
    calm = sorted(cells(svg, 0))
    assert far[1] > alarm[1]  # layer 1 stands below layer 0
    assert far[0] > alarm[0]
    assert [round(width / alarm[2]) for *_, width in calm] == [2, 1]  # neighbours are one rectangle
    assert "update RMS: highest 5 in layer &lt;1&gt; at step 30; 2 of 2 layers rose above 0.6." in svg
    assert "<1>" not in svg


def test_gains_are_left_out_of_what_says_nothing_of_them():
    start = START | {"numel": {"a": 4096, "b": 64, "c": 64}}
    values = {"a": {"u_rms": 0.3, "surprise": 1.0}, "b": {"u_rms": 1.0, "surprise": 30.0}, "c": {"u_rms": 1.0}}
    found = watched([start, {"event": "health", "step": 1, "tensors": values}])
    assert found.worst("u_rms") == {"layer 0": [(1, 0.3)]}
    assert found.worst("surprise") == {"layer 0": [(1, 30.0)]}
    assert "worst matrix of each layer" in heat_map(found, "u_rms")
    assert "worst tensor of each layer" in heat_map(found, "surprise")


def test_a_long_map_is_thinned_without_losing_the_worst():
    samples = [sample(step, a=9.0 if step == 1234 else 0.2) for step in range(1, 3001)]
    svg = heat_map(watched([START, *samples]), "u_rms")
    assert len(cells(svg, 8)) == 1
    assert svg.count("<title>") <= MAX_COLUMNS + 1


def test_the_limit_is_the_monitors_own():
    own = START | {"rules": [{"rule": "coherent", "statistic": "u_rms", "watch": None, "alarm": 3.0}]}
    assert cells(heat_map(watched([own, sample(1, a=0.7)]), "u_rms"), 6) == []
    assert cells(heat_map(watched([START, sample(1, a=0.7)]), "u_rms"), 6) != []


def test_the_first_map_is_that_of_the_first_evidence(stalled):
    def first(found):
        return re.search(r'id="map-(\w+)" checked', heat_maps(found))[1]

    assert first(read(stalled)) == "surprise"
    assert first(watched([START, sample(1, a=0.2)])) == "u_rms"
    assert "No statistics" in heat_maps(watched([START]))


def test_alarms_and_actions_are_marked_without_words_upon_words():
    alarms = [{"event": "health_change", "step": step, "state": "alarm", "before": "watch"} for step in (500, 503, 900)]
    act = {"event": "health_action", "step": 500, "action": "roll_back"}
    found = watched([START, sample(1, a=0.2), sample(1000, a=0.2), *alarms, act])
    assert [(mark.x, mark.name) for mark in marks(found)] == [(500, "alarm, roll back"), (503, ""), (900, "alarm")]
    drawn = time_lines(found)
    assert drawn.count("roll back") == 1
    assert "limit 0.6" in drawn


def test_a_histogram_is_its_counts():
    counts = [0] * 41
    counts[20], counts[10], counts[30] = 50, 25, 25  # at 0 and around -1 and 1
    record = {"event": "health_histogram", "step": 7, "layers": {"layer 0": counts}}
    (moment,) = moments(watched([START, record]), "layer 0")
    svg = histogram(counts, moment, "layer 0")
    heights = [float(h) for h in re.findall(r'height="([\d.]+)"/>', svg)]
    assert len(heights) == 41
    assert heights[20] == pytest.approx(2 * heights[10])
    assert sum(height > 0 for height in heights) == 3
    assert "Step 7, the beginning: 50 % beyond ±0.9" in svg
    middle = [-REACH + 4 / 41 * (i + 0.5) for i in range(41)]
    assert svg.count("count beyond") == sum(abs(x) > 0.9 for x in middle)


def test_moments_stand_around_the_alarm(stalled, quiet):
    found = read(stalled)
    told = [(moment.name, moment.record["step"]) for moment in moments(found, "embedding")]
    names = [name for name, _ in told]
    assert names == ["the beginning", "before the alarm", "at the alarm", "after it"]
    assert dict(told)["before the alarm"] < 101 <= dict(told)["at the alarm"] < dict(told)["after it"]
    assert next(moment.name for moment in moments(read(quiet), "embedding")) == "the beginning"
    assert "No histograms" in histograms(watched([START]))


def test_the_histogram_turns_from_one_peak_to_two(stalled):
    found = read(stalled)
    by_name = {moment.name: moment.record["layers"]["layer 0"] for moment in moments(found, "layer 0")}

    def outer(counts):
        return (sum(counts[:12]) + sum(counts[-12:])) / sum(counts)

    assert outer(by_name["before the alarm"]) < 0.05
    assert outer(by_name["at the alarm"]) > 0.5
