"""Where a thread stands."""

import threading
import time

import pytest

from puna.train import phase


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch) -> phase.Place:
    here = phase.Place()
    monkeypatch.setattr(phase, "here", here)
    return here


def test_phases_nest_and_the_outermost_one_is_told_only_where_it_says_something(place: phase.Place) -> None:
    seen = []
    place.changed = lambda: seen.append(str(place))
    with phase.during("collective"):
        pass
    phase.enter("data wait")
    phase.begin_unit(6, [1, 2])
    with phase.during("forward/backward"), phase.during("collective"):
        pass
    assert seen == [
        "collective in start",
        "start",
        "data wait",
        "other work",
        "forward/backward",
        "collective in forward/backward",
        "forward/backward",
        "other work",
    ]
    assert (place.unit, place.samples) == (6, [1, 2])


def test_an_error_leaves_its_phase_standing(place: phase.Place) -> None:
    @phase.during("optimizer")
    def update() -> None:
        raise KeyError

    with pytest.raises(KeyError):
        update()
    assert place.phases[-1] == "optimizer"


def test_a_mark_is_progress_and_another_threads_marks_are_not(place: phase.Place) -> None:
    place.since = 0.0
    other = threading.Thread(target=phase.enter, args=("checkpoint",))
    other.start()
    other.join()
    assert (place.phases, place.since) == (["start"], 0.0)
    phase.enter("data wait")
    assert time.monotonic() - place.since < 1
