"""Stop strings in a stream of text."""

from collections.abc import Sequence


class StopFilter:
    """Passes text on, but nothing that is, or may still become, part of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops, self.stopped = tuple(stops), False
        self._held = ""

    def push(self, piece: str) -> str:
        """The text that is now certain. A complete stop string sets `stopped`; it and what follows are dropped."""
        text = self._held + piece
        ends = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        certain = len(text) - max((_overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
