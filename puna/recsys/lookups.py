"""Kernels around tables: distinct ids of a batch, rows gathered and spread, gradients folded, row-wise updates.

A batch of B samples is cut into slices, one a rank: slice p is samples cuts[p] .. cuts[p + 1]. The ids that samples
have of table t stand in columns[t] .. columns[t + 1] of `ids` (B, L). With one column, what is exchanged are rows of
distinct ids: those of slice p are distinct[t, cuts[p] : cuts[p] + counts[t, p]], in the order of first sight. With
several, the table is of bags, with -1 where one has no more ids, and what is exchanged are sums, one a sample; there
are then as many in counts[t, p] as the slice has samples.
"""

import math
from typing import Any

import numpy as np

from puna.sparse.compiled import exact_kernel, fetch_ahead, kernel
from puna.sparse.hashing import mix
from puna.sparse.rows import add_row, copy_row, step_row

_ZERO = np.float32(0)
_AHEAD = 16  # rows
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@exact_kernel
def fill_uniform(key: Any, first_row: int, first_col: int, scale: float, out: Any) -> None:
    """out[r, k] = evenly from -scale to scale, a function of (key, first_row + r, first_col + k)."""
    for r in range(out.shape[0]):
        seed = mix(key ^ mix(np.uint64(first_row + r) + np.uint64(1)))
        for k in range(out.shape[1]):
            bits = mix(seed + np.uint64(first_col + k + 1) * _GOLDEN) >> np.uint64(11)
            out[r, k] = np.float32(scale * (float(bits) * 2.0**-52 - 1.0))


@exact_kernel
def fold_ids(ids: Any, rows: Any) -> None:
    """Ids beyond the rows of their column, (L,), become their remainder."""
    for n in range(ids.shape[0]):
        for c in range(ids.shape[1]):
            if ids[n, c] >= rows[c]:
                ids[n, c] %= rows[c]


@exact_kernel
def _place(row: Any, keys: Any) -> Any:
    """Where a row is in a table of hashes, or the free place where it would be."""
    mask = np.uint64(keys.shape[0] - 1)
    at = (np.uint64(row) * _GOLDEN >> np.uint64(32)) & mask  # Knuth, volume 3, section 6.4
    while keys[at] >= 0 and keys[at] != row:
        at = (at + np.uint64(1)) & mask
    return at


@exact_kernel
def _room(count: int) -> int:
    """Places of a table of hashes for so many: a power of two, at least twice as many."""
    size = 2
    while size < 2 * count:
        size *= 2
    return size


@exact_kernel
def find_distinct(
    ids: Any, columns: Any, cuts: Any, tables: Any, slices: Any, keep_all: bool, keys: Any, places: Any, distinct: Any,
    counts: Any, slots: Any, mine: int,
) -> None:  # fmt: skip
    """Distinct ids of the named tables in the named slices; slots[j, t]: which of them sample j of slice `mine` has.

    The tables have one column each. keep_all: every sample counts as one of its own. keys, places: room for a table of
    hashes, a power of two of at least twice a slice; keys are -1 before and after.
    """
    for n in range(tables.shape[0]):
        t = tables[n]
        for m in range(slices.shape[0]):
            p = slices[m]
            begin, count = cuts[p], 0
            for j in range(begin, cuts[p + 1]):
                wanted = ids[j, columns[t]]
                if keep_all:
                    slot = count
                    distinct[t, begin + count] = wanted
                    count += 1
                else:
                    at = _place(wanted, keys)
                    if keys[at] < 0:
                        keys[at] = wanted
                        places[at] = count
                        distinct[t, begin + count] = wanted
                        count += 1
                    slot = places[at]
                if p == mine:
                    slots[j - begin, t] = slot
            counts[t, p] = count
            for k in range(keys.shape[0]):
                keys[k] = -1


@exact_kernel
def count_between(distinct: Any, begin: int, count: int, first: int, end: int) -> int:
    """How many of the ids lie in first .. end."""
    found = 0
    for k in range(begin, begin + count):
        if distinct[k] >= first and distinct[k] < end:
            found += 1
    return found


@exact_kernel
def gather(
    flat: Any, offsets: Any, table_of: Any, spans: Any, ids: Any, columns: Any, distinct: Any, cuts: Any, counts: Any,
    starts: Any, begin: int, end: int, out: Any,
) -> None:  # fmt: skip
    """Rows, or sums of bags, of the blocks begin .. end (p x shards + s): of shard s for slice p, from starts[p, s] on.

    flat: the shards' numbers; offsets: where each begins; spans: (S, 3), first row, end row, width.
    """
    num_shards = table_of.shape[0]
    for n in range(begin, end):
        p, s = n // num_shards, n % num_shards
        t, first, last, width = table_of[s], spans[s, 0], spans[s, 1], spans[s, 2]
        at = starts[p, s]
        if columns[t + 1] - columns[t] > 1:
            _pool(flat, offsets[s], first, last, width, ids, columns[t], columns[t + 1], cuts[p], cuts[p + 1], out, at)
            continue
        for k in range(cuts[p], cuts[p] + counts[t, p]):
            row = distinct[t, k]
            if row >= first and row < last:
                source = offsets[s] + (row - first) * width
                for c in range(width):
                    out[at + c] = flat[source + c]
                at += width


@exact_kernel
def _pool(
    flat: Any, offset: int, first: int, last: int, width: int, ids: Any, left: int, right: int, begin: int, end: int,
    out: Any, at: int,
) -> None:  # fmt: skip
    """Sums of the rows first .. last that samples begin .. end have in columns left .. right of `ids`."""
    for j in range(begin, end):
        for c in range(width):
            out[at + c] = _ZERO
        for n in range(left, right):
            row = ids[j, n]
            if row >= first and row < last:
                source = offset + (row - first) * width
                for c in range(width):
                    out[at + c] += flat[source + c]
        at += width


@exact_kernel
def unpack(
    packed: Any, starts: Any, table_of: Any, spans: Any, lefts: Any, bags: Any, distinct: Any, first_slot: int,
    counts: Any, row_starts: Any, backward: bool, rows: Any,
) -> None:  # fmt: skip
    """Blocks of shards, (S,) starts in `packed`, to rows (M, D) of this rank's slice; backward: from rows to blocks.

    lefts: (S,) first number of a row that a shard has. bags: (T,) whether a table is of bags; shards by rows then each
    have a part of every sum, and rows are zero before. first_slot: where this rank's slice begins; counts: (T,) rows of
    it; row_starts: of tables, in rows.
    """
    for s in range(table_of.shape[0]):
        t, first, last, width = table_of[s], spans[s, 0], spans[s, 1], spans[s, 2]
        at, left = starts[s], lefts[s]
        for k in range(counts[t]):
            row = distinct[t, first_slot + k]
            if bags[t] or (row >= first and row < last):
                place = row_starts[t] + k
                for c in range(width):
                    if backward:
                        packed[at + c] = rows[place, left + c]
                    elif bags[t]:
                        rows[place, left + c] += packed[at + c]
                    else:
                        rows[place, left + c] = packed[at + c]
                at += width


@exact_kernel
def take(flat: Any, offsets: Any, ids: Any, out: Any) -> None:
    """out[j, 1 + t] = row ids[j, t] of table t, whose numbers begin at offsets[t]; out: (samples, 1 + T, D)."""
    samples, width, vectors = ids.shape[0], out.shape[2], out.reshape(-1)
    for j in range(samples):
        if j + 1 < samples:
            for t in range(ids.shape[1]):
                fetch_ahead(flat, offsets[t] + np.int64(ids[j + 1, t]) * width)  # type: ignore[call-arg]
        for t in range(ids.shape[1]):
            source = offsets[t] + np.int64(ids[j, t]) * width
            copy_row(vectors, (j * out.shape[1] + 1 + t) * width, flat, source, width)


@exact_kernel
def spread(rows: Any, row_starts: Any, slots: Any, begin: int, end: int, out: Any) -> None:
    """out[j, 1 + t] = rows[row_starts[t] + slots[j, t]] for samples begin .. end; out: (samples, 1 + T, D)."""
    width, vectors, flat = out.shape[2], out.reshape(-1), rows.reshape(-1)
    for j in range(begin, end):
        for t in range(slots.shape[1]):
            source = (row_starts[t] + slots[j, t]) * width
            copy_row(vectors, (j * out.shape[1] + 1 + t) * width, flat, source, width)


@exact_kernel
def fold(gradients: Any, row_starts: Any, slots: Any, begin: int, end: int, out: Any) -> None:
    """out[row_starts[t] + slots[j, t]] += gradients[j, 1 + t] for tables begin .. end, in the order of samples."""
    width, rows, flat = out.shape[1], out.reshape(-1), gradients.reshape(-1)
    for j in range(slots.shape[0]):
        for t in range(begin, end):
            place = (row_starts[t] + slots[j, t]) * width
            add_row(rows, place, flat, (j * gradients.shape[1] + 1 + t) * width, width)


@kernel
def squares(gradients: Any, count: int, out: Any) -> float:
    """out[i] = sum of the squares of row i; the sum of all, not finite where a number is not."""
    total = 0.0
    for i in range(count):
        square = _ZERO
        for c in range(gradients.shape[1]):
            square += gradients[i, c] * gradients[i, c]
        out[i] = square
        total += float(square)
    return total


@exact_kernel
def fold_by_id(
    gradients: Any, ids: Any, heights: Any, begin: int, end: int, rows: Any, out: Any, square: Any, counts: Any,
    totals: Any,
) -> None:  # fmt: skip
    """Of tables begin .. end, of so many rows: distinct ids of samples, (B, T), in the order of first sight to rows
    (T, B), the sums of their gradients to out (T, B, D), the squares of those to square (T, B); how many to counts and
    the sum of the squares to totals. gradients: (B, 1 + T, D)."""
    samples, width, sums, flat = ids.shape[0], out.shape[2], out.reshape(-1), gradients.reshape(-1)
    stride = gradients.shape[1] * width
    for t in range(begin, end):
        keys = np.full(_room(min(samples, heights[t])), -1, np.int32)
        places, count = np.empty(len(keys), np.int32), 0
        for j in range(samples):
            source = j * stride + (1 + t) * width
            if j + _AHEAD < samples:
                fetch_ahead(flat, source + _AHEAD * stride)  # type: ignore[call-arg]
            at = _place(ids[j, t], keys)
            if keys[at] < 0:
                keys[at] = rows[t, count] = ids[j, t]
                places[at] = count
                copy_row(sums, (t * samples + count) * width, flat, source, width)
                count += 1
            else:
                add_row(sums, (t * samples + places[at]) * width, flat, source, width)
        counts[t] = count
        totals[t] = squares(out[t], count, square[t])


@exact_kernel
def merge(
    packed: Any, starts: Any, span: Any, ids: Any, cuts: Any, counts: Any, bags: bool, scale: Any, keys: Any,
    places: Any, rows: Any, out: Any,
) -> int:  # fmt: skip
    """Gradients of one shard's rows over all slices: how many rows, their places in the shard, their sums (n, width).

    packed: blocks of the shard, (P,) starts. ids: (B, columns) of the table, or (B, 1) its distinct ones. bags: a
    sample's gradient is that of each of its ids. A row's terms are added in the order of slices, so that every rank
    that does this gets the same bits. keys: -1 before; keys, places: room for a table of hashes, a power of two.
    """
    found, width = 0, span[2]
    for p in range(starts.shape[0]):
        at = starts[p]
        for k in range(cuts[p], cuts[p] + counts[p]):
            sent = bags
            for n in range(ids.shape[1]):
                row = ids[k, n]
                if row < span[0] or row >= span[1]:
                    continue
                sent = True
                place = _place(row, keys)
                if keys[place] < 0:
                    keys[place] = row
                    places[place] = found
                    rows[found] = row - span[0]
                    for c in range(width):
                        out[found, c] = packed[at + c] * scale
                    found += 1
                else:
                    slot = places[place]
                    for c in range(width):
                        out[slot, c] += packed[at + c] * scale
            if sent:
                at += width
    return found


@exact_kernel
def step_rows(
    flat: Any, offset: int, sums: Any, sums_offset: int, rows: Any, count: int, gradients: Any, square: Any, dim: int,
    rate: Any, eps: Any,
) -> None:  # fmt: skip
    """SGD, where there are no sums: row -= rate x gradient, for so many rows. Else row-wise Adagrad, which divides the
    rate by sqrt(sum) + eps after sum += square / dim. square: of the whole row, (n,)."""
    width, given = gradients.shape[1], gradients.reshape(-1)
    for i in range(count):
        if i + _AHEAD < count:
            fetch_ahead(flat, offset + rows[i + _AHEAD] * width)  # type: ignore[call-arg]
        factor = rate
        if len(sums):
            place = sums_offset + rows[i]
            sums[place] += square[i] / np.float32(dim)
            factor = rate / (np.float32(math.sqrt(sums[place])) + eps)
        step_row(flat, offset + rows[i] * width, given, i * width, width, factor)


@exact_kernel
def step_kept(
    flat: Any, offsets: Any, sums: Any, rows: Any, counts: Any, gradients: Any, square: Any, rate: Any, eps: Any,
    begin: int, end: int,
) -> None:  # fmt: skip
    """Steps of the whole tables begin .. end, with what `fold_by_id` gave."""
    dim = gradients.shape[2]
    for t in range(begin, end):
        step_rows(
            flat, offsets[t], sums, offsets[t] // dim, rows[t], counts[t], gradients[t], square[t], dim, rate, eps
        )
