from hypothesis import given
from hypothesis import strategies as st

from puna.engine.stops import StopFilter

letters = st.text("ab\n", max_size=12)


def run(stops, pieces):
    stop = StopFilter(stops)
    texts = []
    for piece in pieces:
        texts.append(stop.push(piece))
        if stop.stopped:
            return texts, True
    return [*texts, stop.flush()], False


def test_holds_back_what_may_become_a_stop_string():
    stop = StopFilter(["END"])
    assert [stop.push(c) for c in "xEyENz"] == ["x", "", "Ey", "", "", "ENz"]
    assert [stop.push(c) for c in "wEND"] == ["w", "", "", ""]
    assert stop.stopped


def test_the_earliest_of_two_stop_strings_ends_the_text():
    assert run(["later", "one"], ["a one later"]) == (["a "], True)


def test_what_was_held_is_text_when_nothing_follows():
    assert run(["END"], ["finE", "N"]) == (["fin", "", "EN"], False)


@given(st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3), st.lists(letters, max_size=8))
def test_text_is_the_part_before_the_first_stop_string(stops, pieces):
    texts, stopped = run(stops, pieces)
    text, whole = "".join(texts), "".join(pieces)
    assert whole.startswith(text)
    assert not any(stop in text for stop in stops)
    assert stopped == any(stop in whole for stop in stops)
    assert stopped or text == whole


@given(st.text("ab\n", min_size=1, max_size=4), st.lists(letters, max_size=8))
def test_cutting_does_not_matter(stop, pieces):
    texts, _ = run([stop], pieces)
    assert "".join(texts) == "".join(pieces).split(stop)[0]
