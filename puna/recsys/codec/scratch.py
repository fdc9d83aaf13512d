"""Arrays that are made once and grow. What `take` hands out is overwritten by the next `take` of the same name."""

from typing import Any

import numpy as np
import numpy.typing as npt


class Scratch:
    """Of one thread."""

    def __init__(self) -> None:
        self._held: dict[str, npt.NDArray[Any]] = {}
        self._given: dict[str, npt.NDArray[Any]] = {}

    def take(self, name: str, size: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """`size` numbers of `dtype`, of any value; a name has one dtype."""
        given = self._given.get(name)
        if given is not None and len(given) == size:
            return given
        held = self._held.get(name)
        if held is None or len(held) < size:
            held = self._held[name] = np.empty(size + size // 4, dtype)
        self._given[name] = held[:size]
        return self._given[name]
