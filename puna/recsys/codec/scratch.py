"""Arrays that are made once and grow. What `take` hands out is overwritten by the next `take` of the same name."""

from typing import Any

import numpy as np
import numpy.typing as npt


class Scratch:
    """Of one thread."""

    def __init__(self) -> None:
        self._held: dict[str, npt.NDArray[Any]] = {}

    def take(self, name: str, size: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """`size` numbers of `dtype`, of any value; a name has one dtype."""
        held = self._held.get(name)
        if held is None or held.size < size:
            held = self._held[name] = np.empty(size + size // 4, dtype)
        return held[:size]
