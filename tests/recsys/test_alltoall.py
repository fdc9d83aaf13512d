"""The exchange: rows arrive, gradients return; plain is torch's own; bounds hold; ranks that disagree are named."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from puna.errors import RanksDiffer
from puna.recsys.alltoall import Exchange
from puna.recsys.wires import Block, Half, Int8, dithering, make_wire, with_noise

SHAPES = [
    [[(5, 3), (0, 4)], [(2, 3)], [], [(7, 1), (1, 8)]],
    [[(1, 3)], [(4, 4)], [(0, 2), (3, 5)], [(2, 2)]],
    [[], [], [], []],
    [[(6, 6)], [(1, 1)], [(2, 9)], [(3, 3), (3, 3)]],
]
"""[from][to] -> blocks (rows, width): uneven, empty, none at all."""


def blocks_of(rank: int, bound: float = 0.0, back: float = 0.0):
    sent = [[Block(*shape, bound, back) for shape in part] for part in SHAPES[rank]]
    received = [[Block(*shape, bound, back) for shape in part[rank]] for part in SHAPES]
    return sent, received


def numbers(rank: int, sent) -> Tensor:
    count = sum(block.count for part in sent for block in part)
    return torch.randn(count, generator=torch.Generator().manual_seed(rank))


def exchanged(wire: str, back: str, bound: float):
    """What arrives and what returns, and both as torch's own all_to_all_single has them."""
    rank = dist.get_rank()
    sent, received = blocks_of(rank, bound, bound)
    exchange = Exchange(None, make_wire(wire), make_wire(back))
    x = numbers(rank, sent).requires_grad_()
    out = exchange(x, sent, received, terms={"bound": bound})
    weights = torch.randn(len(out), generator=torch.Generator().manual_seed(rank + 10))
    (out * weights).sum().backward()
    counts = [[sum(block.count for block in part) for part in side] for side in (received, sent)]
    plain, returned = torch.empty_like(out), torch.empty_like(x)
    dist.all_to_all_single(plain, x.detach(), *counts)
    dist.all_to_all_single(returned, weights, counts[1], counts[0])
    traffic = [exchange.sent, exchange.returned]
    return out.detach(), plain, x.grad, returned, [(t.plain, t.metadata, t.payload) for t in traffic]


@pytest.mark.parametrize("wire", ["raw", "fp16", "int8"])
def test_rows_arrive_and_gradients_return(ranks, wire):
    for rank, (out, plain, grad, returned, traffic) in enumerate(ranks(exchanged, wire, wire, 0.0)):
        if wire == "raw":
            assert torch.equal(out, plain)
            assert torch.equal(grad, returned)
        else:
            assert not len(out) or not torch.equal(out, plain) or rank == 2
            torch.testing.assert_close(out, plain, atol=2e-2, rtol=0)
            torch.testing.assert_close(grad, returned, atol=2e-2, rtol=0)
        away = [block for to, part in enumerate(SHAPES[rank]) if to != rank for block in part]
        sizes = {"raw": lambda n, w: 4 * n * w, "fp16": lambda n, w: 2 * n * w, "int8": lambda n, w: n * (w + 8)}
        assert traffic[0] == (4 * sum(n * w for n, w in away), 0, sum(sizes[wire](n, w) for n, w in away))


def test_bounded_rows_keep_their_bounds(ranks, compiled):
    for rank, (out, plain, grad, returned, traffic) in enumerate(ranks(exchanged, "bounded", "raw", 0.02)):
        at = 0
        for origin, part in enumerate(SHAPES):
            for rows, width in part[rank]:
                a, b = (t[at : at + rows * width] for t in (out, plain))
                at += rows * width
                if rows * width and origin != rank:
                    assert (a - b).abs().max() <= 0.02 * (b.max() - b.min())
                assert origin != rank or torch.equal(a, b)
        assert torch.equal(grad, returned)
        assert traffic[0][1] == 8 * sum(1 + len(part) for to, part in enumerate(SHAPES[rank]) if to != rank)
        assert traffic[0][2] > 0 or rank == 2


def disagreeing():
    rank = dist.get_rank()
    sent, received = blocks_of(rank, 0.02)
    exchange, terms = Exchange(None, make_wire("bounded")), {"bound of C3": 0.02 if rank != 1 else 0.05, "step": 4}
    with pytest.raises(RanksDiffer) as raised:
        exchange.start(numbers(rank, sent), sent, received, terms)
    return str(raised.value)


def test_ranks_that_disagree_on_bounds_are_named(ranks, compiled):
    for text in ranks(disagreeing):
        assert "bound of C3: 0.02 on rank 0, 0.05 on rank 1, 0.02 on rank 2, 0.02 on rank 3" in text
        assert "step" not in text.split("Bounds are")[0]


def in_a_group():
    """Ranks 1 and 3 alone, from a tensor that has a graph of its own, and overlapped with other work."""
    rank = dist.get_rank()
    group = dist.new_group([1, 3])
    if rank not in (1, 3):
        return None
    me = rank // 2
    sent = [[Block(2, 3)], [Block(1, 3)]]
    received = [[Block(2 if me == 0 else 1, 3)] for _ in range(2)]
    leaf = torch.arange(9.0, requires_grad=True)
    x = leaf * (me + 1)
    exchange = Exchange(group)
    pending = exchange.start(x.detach(), sent, received)
    coming = []
    out = exchange(x, sent, received, pending=pending)
    (out * torch.arange(1.0, len(out) + 1)).sum().backward()
    other = exchange(x.detach().requires_grad_(), sent, received, sink=coming.append)
    other.sum().backward()
    return out.detach(), leaf.grad, coming[0].wait()


def test_any_group_will_do(ranks):
    found = ranks(in_a_group)
    first, second = found[1], found[3]
    assert first[0].tolist() == [0, 1, 2, 3, 4, 5, 0, 2, 4, 6, 8, 10]
    assert second[0].tolist() == [6, 7, 8, 12, 14, 16]
    assert first[1].tolist() == [1, 2, 3, 4, 5, 6, 1, 2, 3]
    assert second[1].tolist() == [14, 16, 18, 20, 22, 24, 8, 10, 12]
    assert first[2].tolist() == [1] * 9


def test_one_rank_is_an_exchange_with_itself():
    blocks = [[Block(2, 2), Block(1, 3)]]
    x = torch.arange(7.0, requires_grad=True)
    out = Exchange()(x, blocks, blocks)
    out.square().sum().backward()
    assert torch.equal(out, x)
    assert torch.equal(x.grad, 2 * x)


def test_a_rehearsal_puts_local_rows_through_the_wire():
    blocks = [[Block(40, 8)]]
    x = torch.randn(320, requires_grad=True)
    for wire in (Half(), Int8()):
        out = Exchange(None, wire, local=True)(x, blocks, blocks)
        assert 0 < (out - x).abs().max() < 0.02


def test_halves_are_clamped_and_int8_is_the_row_format():
    rows = np.array([[1e6, -1e6, 0.5, 2.0]], np.float32)
    (half,) = Half().encode([Block(1, 4)], [rows], False)
    out = np.empty((1, 4), np.float32)
    Half().decode([Block(1, 4)], [half], [out])
    assert out.tolist() == [[65504.0, -65504.0, 0.5, 2.0]]
    rows = np.array([[0.0, 1.0, 2.55]], np.float32)
    (stream,) = Int8().encode([Block(1, 3)], [rows], False)
    assert stream[:3].tolist() == [0, 100, 255]
    scale, low = np.frombuffer(stream[3:].tobytes(), np.float32)
    assert (scale, low) == (pytest.approx(0.01), 0.0)


def test_noise_makes_rounding_unbiased():
    """The mean over many draws of a quantiser of step 2 E after the noise is the number itself."""
    rows = np.array([[0.0, 1.0, 0.123, 0.5071]], np.float32)
    error = 0.05
    total = np.zeros(4)
    draws = 20_000
    for seed in range(1, draws + 1):
        noisy, bound = with_noise(rows, error, seed)
        assert bound * (noisy.max() - noisy.min()) == pytest.approx(error, rel=1e-5)
        total += np.rint(noisy[0] / (2 * error)) * 2 * error
    np.testing.assert_allclose(total / draws, rows[0], atol=4 * error / np.sqrt(draws) * 2)
    plain = np.rint(rows[0] / (2 * error)) * 2 * error
    assert np.abs(plain - rows[0]).max() > 0.02


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("shape", [(300, 16), (1, 1), (40, 7)])
def test_dithered_rows_keep_the_bound_and_both_ends_know_the_noise(shape, known):
    """Also beside NaN and infinity, and where all rows are equal."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 50, shape[0]).astype(np.int32)
    table = (rng.standard_normal((50, shape[1])) ** 3).astype(np.float32)
    strange = table[ids].copy()
    strange[ids == ids[0], 0] = np.nan
    strange[ids == ids[-1], -1] = -np.inf
    for rows in (table[ids], strange, np.full(shape, 0.3, np.float32)):
        block = Block(*shape, 0.05, dither=77, ids=ids if known else None)
        (stream,) = make_wire("bounded").encode([block], [rows], False)
        out, other = np.empty_like(rows), np.empty_like(rows)
        make_wire("bounded").decode([block], [stream], [out])
        make_wire("bounded").decode([replace(block, dither=78)], [stream], [other])
        finite = np.isfinite(rows)
        spread = np.ptp(rows[finite]) if finite.any() else 0.0
        assert np.array_equal(out[~finite], rows[~finite], equal_nan=True)
        assert np.abs(out[finite] - rows[finite]).max(initial=0) <= 0.05 * spread
        if spread and rows.size > 100:
            assert np.abs(other[finite] - rows[finite]).max() > 0.05 * spread
        if known:
            assert all(
                np.array_equal(out[ids == n], out[ids == n][:1].repeat((ids == n).sum(), 0), equal_nan=True)
                for n in ids
            )


def test_what_dither_does_to_a_row_does_not_depend_on_it():
    """Rows far below the bound arrive in the mean, which to the nearest they never do."""
    rows = np.array([[0.001, -0.004, 1.0, -1.0]], np.float32)
    total, draws = np.zeros(2), 4000
    for seed in range(1, draws + 1):
        (stream,) = make_wire("bounded").encode([block := Block(1, 4, 0.03, dither=seed)], [rows], False)
        make_wire("bounded").decode([block], [stream], [out := np.empty_like(rows)])
        total += out[0, :2]
    np.testing.assert_allclose(total / draws, rows[0, :2], atol=4 * 0.06 / np.sqrt(3 * draws))
    assert abs(total[0] - total[1]) / draws > 0.002
    (stream,) = make_wire("bounded").encode([block := Block(1, 4, 0.03)], [rows], False)
    make_wire("bounded").decode([block], [stream], [out := np.empty_like(rows)])
    assert not out[0, :2].any()


def test_the_noises_of_two_rows_are_independent():
    """Their product spreads as that of two even ones does: a third of the square of the bound, times the root of D."""
    zeros = np.zeros((4000, 64), np.float32)
    zeros[0, :2] = (-1, 1)
    noisy, _, error = dithering(zeros, 0.05, Block(*zeros.shape, 0.05, dither=5))
    products = np.einsum("id,id->i", noisy[2::2], noisy[3::2]) / float(error) ** 2
    assert products.std() == pytest.approx(np.sqrt(64) / 3, rel=0.15)
    assert noisy[2:].std() / error == pytest.approx(1 / np.sqrt(3), rel=0.01)
