"""The index of lookups into distinct rows, where the receiver does not know the ids.

Rows are numbered as lookups first meet them, so a first meeting needs no number: only that it is one. What comes next
is predicted from what came (Pitman-Yor: a row seen c times weighs c - d, a first meeting d k + 1/4, after k rows) and
coded by a range coder with carries, whose cumulative weights are a Fenwick tree. For fast links the numbers are packed.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from puna.recsys.codec import planes
from puna.recsys.codec.compiled import kernel
from puna.recsys.codec.scratch import Scratch

_UNIT = 8  # of a lookup's weight; the discount d is 1 to 7 of it
_FRESH = 2
_PACKED = 0  # instead of a discount
_RENEW, _BITS = 1 << 32, 40


def encode(inverse: npt.NDArray[np.int64], num_distinct: int, scratch: Scratch) -> bytes:
    """The index (n,) in some bytes; its numbers first appear in order."""
    room = scratch.take("index", 8 * len(inverse) + 64, np.uint8)
    tree = scratch.take("tree", _tree_size(num_distinct), np.int64)
    seen = scratch.take("seen", num_distinct, np.int64)
    discount = _discount(inverse, seen)
    room[0] = discount
    size = _encode(inverse, num_distinct, discount, tree, seen, room)
    return room[:size].tobytes()


def pack(inverse: npt.NDArray[np.int64], num_distinct: int) -> bytes:
    """The index (n,) by `planes`: larger, and faster."""
    return bytes((_PACKED,)) + planes.pack(inverse, planes.width_of(num_distinct))


def decode(data: npt.NDArray[np.uint8], num_distinct: int, inverse: npt.NDArray[np.int64], scratch: Scratch) -> bool:
    """Fill inverse (n,) with numbers below num_distinct; False where the data of either kind are damaged."""
    if len(data) == 0 or data[0] >= _UNIT:
        return False
    if data[0] == _PACKED:
        planes.unpack(data[1:], num_distinct, inverse)
        return True
    tree = scratch.take("tree", _tree_size(num_distinct), np.int64)
    seen = scratch.take("seen", num_distinct, np.int64)
    return _decode(data, num_distinct, int(data[0]), tree, seen, inverse) == num_distinct


def _tree_size(num_distinct: int) -> int:
    return 1 + (1 << max(num_distinct - 1, 1).bit_length())


@kernel
def _discount(inverse: Any, seen: Any) -> int:
    """Of rows met once among those met once or twice twice: the usual estimate of d."""
    seen[:] = 0
    for i in range(inverse.shape[0]):
        seen[inverse[i]] += 1
    once, twice = 0, 0
    for k in range(seen.shape[0]):
        once += seen[k] == 1
        twice += seen[k] == 2
    return min(max((_UNIT * once + once // 2 + twice) // max(once + 2 * twice, 1), 1), _UNIT - 1)


@kernel
def _add(tree: Any, number: int, weight: int) -> None:
    at = number + 1
    while at < tree.shape[0]:
        tree[at] += weight
        at += at & -at


@kernel
def _below(tree: Any, number: int) -> int:
    """Weight of all rows before a number."""
    at, total = number, 0
    while at > 0:
        total += tree[at]
        at -= at & -at
    return total


@kernel
def _find(tree: Any, weight: int) -> Any:
    """The row in whose range a weight lies, and the weight of all rows before it."""
    at, step, below = 0, tree.shape[0] - 1, 0
    while step > 0:
        if at + step < tree.shape[0] and below + tree[at + step] <= weight:
            at += step
            below += tree[at]
        step >>= 1
    return at, below


@kernel
def _shed(state: Any, room: Any) -> None:
    """state: low, range, the byte that waits for a carry (-1: none), bytes of 255 after it, bytes written."""
    low = state[0]
    if low < (0xFF << (_BITS - 8)) or low >> _BITS:
        carry = low >> _BITS
        if state[2] >= 0:
            room[state[4]] = state[2] + carry
            state[4] += 1
        for _ in range(state[3]):
            room[state[4]] = 0xFF + carry
            state[4] += 1
        state[2], state[3] = (low >> (_BITS - 8)) & 0xFF, 0
    else:
        state[3] += 1
    state[0] = (low & (_RENEW - 1)) << 8


@kernel
def _code(state: Any, room: Any, start: int, weight: int, total: int) -> None:
    share = state[1] // total
    state[0] += share * start
    state[1] = share * weight
    while state[1] < _RENEW:
        state[1] <<= 8
        _shed(state, room)


@kernel
def _encode(inverse: Any, num_distinct: int, discount: int, tree: Any, seen: Any, room: Any) -> int:
    tree[:] = 0
    state = np.array([0, (1 << _BITS) - 1, -1, 0, 1])
    count = 0
    for i in range(inverse.shape[0]):
        number = inverse[i]
        known = _UNIT * i - discount * count
        fresh = discount * count + _FRESH if count < num_distinct else 0
        if number == count:
            if count > 0:
                _code(state, room, known, fresh, known + fresh)
            seen[number] = _UNIT - discount
            _add(tree, number, _UNIT - discount)
            count += 1
        else:
            if count > 1 or fresh > 0:
                _code(state, room, _below(tree, number), seen[number], known + fresh)
            seen[number] += _UNIT
            _add(tree, number, _UNIT)
    state[0] = (state[0] + _RENEW - 1) & -_RENEW
    _shed(state, room)
    _shed(state, room)
    size = state[4]
    while room[size - 1] == 0 and size > 1:
        size -= 1
    return size


@kernel
def _decode(data: Any, num_distinct: int, discount: int, tree: Any, seen: Any, inverse: Any) -> int:
    tree[:] = 0
    code: Any = 0
    at, width = 1, (1 << _BITS) - 1
    for _ in range(_BITS // 8):
        code = (code << 8) | (np.int64(data[at]) if at < data.shape[0] else 0)
        at += 1
    count = 0
    for i in range(inverse.shape[0]):
        known = _UNIT * i - discount * count
        fresh = discount * count + _FRESH if count < num_distinct else 0
        number, start, weight = count, known, fresh
        if count == 1 and fresh == 0:
            number, start, weight = 0, 0, known
        elif count > 0:
            share = width // (known + fresh)
            found = min(code // share, known + fresh - 1)
            if found < known:
                number, start = _find(tree, found)
                weight = seen[number]
            code -= share * start
            width = share * weight
            while width < _RENEW:
                width <<= 8
                code = (code << 8) | (np.int64(data[at]) if at < data.shape[0] else 0)
                at += 1
        if number == count:
            seen[number] = 0
            _add(tree, number, -discount)
            count += 1
        seen[number] += _UNIT - discount if seen[number] == 0 else _UNIT
        _add(tree, number, _UNIT)
        inverse[i] = number
    return count
