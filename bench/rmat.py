"""An R-MAT graph (Chakrabarti, Zhan, Faloutsos 2004) as a TSV file of string ids, written as it is drawn.

    python bench/rmat.py --nodes 10_000_000 --edges 100_000_000 --out rmat.tsv

Quadrants 0.57, 0.19, 0.19, 0.05; an end beyond the last node is drawn again. Every node has an edge: the first ones
lead from each node in turn, in a scrambled order, to a drawn end. A function of
(nodes, edges, seed); memory does not grow.
"""

import argparse
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from puna.console import track
from puna.sparse.compiled import exact_kernel
from puna.sparse.hashing import mix

PIECE = 1 << 20
LINE_BYTES = 2 * 22
A, AB, ABC = (int(65536 * share) for share in (0.57, 0.76, 0.95))


@exact_kernel
def _end(key: Any, levels: int, num_nodes: int) -> Any:
    """A head and a tail below num_nodes."""
    state = key
    while True:
        head, tail, bits = 0, 0, state
        for level in range(levels):
            if level % 4 == 0:
                state = mix(state + np.uint64(0x9E3779B97F4A7C15))
                bits = state
            draw = np.int64(bits & np.uint64(0xFFFF))
            bits = bits >> np.uint64(16)
            head = 2 * head + (1 if draw >= AB else 0)
            tail = 2 * tail + (1 if (A <= draw < AB or draw >= ABC) else 0)
        if head < num_nodes and tail < num_nodes:
            return head, tail


@exact_kernel
def _digits(out: Any, filled: int, number: int) -> int:
    size, rest = 1, number
    while rest >= 10:
        rest //= 10
        size += 1
    for at in range(filled + size - 1, filled - 1, -1):
        out[at] = 48 + number % 10
        number //= 10
    return filled + size


@exact_kernel
def _lines(first: int, count: int, num_nodes: int, levels: int, step: int, seed: Any, out: Any) -> int:
    """Lines of edges first .. first + count; how many bytes."""
    filled = 0
    for edge in range(first, first + count):
        head, tail = _end(mix(seed ^ np.uint64(edge)), levels, num_nodes)
        if edge < num_nodes:
            head = np.int64((np.uint64(edge) * np.uint64(step)) % np.uint64(num_nodes))
        out[filled] = 117
        filled = _digits(out, filled + 1, head)
        out[filled] = 9
        out[filled + 1] = 117
        filled = _digits(out, filled + 2, tail)
        out[filled] = 10
        filled += 1
    return filled


def write(path: Path, num_nodes: int, num_edges: int, seed: int = 0) -> None:
    """Write the graph, names u0, u1, .. as they come; the file has its name once it is whole."""
    levels = max(1, (num_nodes - 1).bit_length())
    step = next(n for n in range(int(num_nodes * 0.618), 2 * num_nodes + 2) if math.gcd(n, num_nodes) == 1)
    room = np.empty(PIECE * LINE_BYTES, np.uint8)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        for first in track(range(0, num_edges, PIECE), "drawing edges"):
            count = min(PIECE, num_edges - first)
            file.write(room[: _lines(first, count, num_nodes, levels, step, mix(np.uint64(seed)), room)].data)
    os.replace(partial, path)


def main() -> None:
    """As typed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--edges", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    write(args.out, args.nodes, args.edges, args.seed)


if __name__ == "__main__":
    main()
