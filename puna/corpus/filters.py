"""Filters: each has a name, and a document that several would remove is counted under the first.

The thresholds are meant for code and prose alike; `repeated_lines` follows Gopher (arXiv 2112.11446, appendix A1),
which removes prose above 0.20, but source code repeats itself up to 0.35.
"""

import re
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from puna.corpus.formats import MAX_BYTES


class Limits(BaseModel):
    """Thresholds of the filters."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_chars: Annotated[int, Field(ge=1)] = 64  # without leading and trailing space
    max_bytes: Annotated[int, Field(ge=1, le=MAX_BYTES)] = 8 << 20
    max_control_share: Annotated[float, Field(ge=0, le=1)] = 0.01  # control characters and U+FFFD
    max_line_chars: Annotated[int, Field(ge=1)] = 10_000
    max_repeated_share: Annotated[float, Field(ge=0, le=1)] = 0.5  # of characters, in lines seen before


REASONS = {
    "empty": "no bytes, or a file without a document in it",
    "binary": "holds a NUL byte, or more control characters than max_control_share",
    "too_long": "more bytes than max_bytes",
    "not_utf8": "not valid UTF-8",
    "too_short": "fewer characters than min_chars",
    "long_lines": "a line longer than max_line_chars: minified or encoded data",
    "repeated_lines": "more of its characters than max_repeated_share lie in lines that came before",
}
_CONTROL = re.compile("[\0-\x08\x0b\x0e-\x1f\x7f\ufffd]")


def judge(data: bytes, limits: Limits) -> tuple[str, str | None]:
    """The text of a document and the name of the filter that removes it, if any.

    The text has no byte-order mark and its lines end with LF.
    """
    if not data:
        return "", "empty"
    if b"\0" in data:
        return "", "binary"
    if len(data) > limits.max_bytes:
        return "", "too_long"
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return "", "not_utf8"
    return text, _reason(text, limits)


def _reason(text: str, limits: Limits) -> str | None:
    if control_share(text) > limits.max_control_share:
        return "binary"
    if len(text.strip()) < limits.min_chars:
        return "too_short"
    if max(map(len, text.split("\n"))) > limits.max_line_chars:
        return "long_lines"
    if repeated_share(text) > limits.max_repeated_share:
        return "repeated_lines"
    return None


def control_share(text: str) -> float:
    """Share of characters that are U+FFFD or control characters other than tab, LF, form feed, CR."""
    return len(_CONTROL.findall(text)) / max(len(text), 1)


def repeated_share(text: str) -> float:
    """Share of the characters that lie in lines equal to an earlier line; indentation and empty lines do not count."""
    lines = [line.strip() for line in text.split("\n")]
    num_chars = sum(map(len, lines))
    return 1 - sum(map(len, set(lines))) / max(num_chars, 1)
