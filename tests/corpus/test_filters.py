"""Each filter removes what it is for and leaves what is just inside its threshold."""

import pytest

from puna.corpus.filters import REASONS, Limits, control_share, judge, repeated_share

FINE = "\n".join(f"line number {i} says something of its own" for i in range(20))
LIMITS = Limits()


def reason(data: bytes | str) -> str | None:
    return judge(data if isinstance(data, bytes) else data.encode(), LIMITS)[1]


@pytest.mark.parametrize(
    ("name", "removed", "stays"),
    [
        ("binary", FINE.encode() + b"\0", FINE.encode()),
        ("binary", "\x01\x02" + "x" * 190, "\x01\x02" + "x" * 200),
        ("binary", "\ufffd" * 3 + "x" * 190, "\ufffd" + "x" * 200),
        ("binary", b"\0" * (9 << 20), FINE.encode()),
        ("too_long", FINE.encode() * (1 + (8 << 20) // len(FINE)), FINE.encode()),
        ("not_utf8", FINE.encode() + b"\xff", (FINE + "é").encode()),
        ("not_utf8", "naïve café".encode("latin-1") * 20, ("naïve café, " * 20).encode()),
        ("too_short", "x" * 63 + "\n" * 50, "x" * 64),
        ("too_short", " ", FINE),
        ("empty", "", FINE),
        ("long_lines", FINE + "\n" + "y" * 10_001, FINE + "\n" + "y" * 10_000),
        ("repeated_lines", "a line that comes again and again\n" * 3, "a line that comes again and again\n" * 2),
        ("repeated_lines", FINE + "\n" + FINE + "\n" + FINE, FINE + "\n" + FINE),
    ],
)
def test_each_reason_fires_and_does_not_fire(name, removed, stays):
    assert name in REASONS
    assert reason(removed) == name
    assert reason(stays) is None


def test_every_reason_is_tested():
    (mark,) = test_each_reason_fires_and_does_not_fire.pytestmark
    assert {case[0] for case in mark.args[1]} == set(REASONS)


def test_text_loses_its_byte_order_mark_and_carriage_returns():
    text, why = judge(("\ufeff" + FINE.replace("\n", "\r\n")).encode(), LIMITS)
    assert (text, why) == (FINE, None)


def test_limits_are_options():
    assert judge(b"short", Limits(min_chars=5)) == ("short", None)
    assert judge(FINE.encode(), Limits(max_line_chars=20))[1] == "long_lines"
    assert judge(FINE.encode(), Limits(max_bytes=100))[1] == "too_long"


def test_shares():
    assert control_share("ab\x00\x1b") == 0.5
    assert control_share("a\tb\nc\r\f") == 0
    assert control_share("") == 0
    assert repeated_share("ab\n  ab\ncd\n\n\n") == pytest.approx(1 / 3)
    assert repeated_share("\n\n") == 1
