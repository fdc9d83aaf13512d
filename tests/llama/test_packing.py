"""Documents become batches."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.llama.packing import IGNORED, Stream, micro_batches, packed, unpacked

BOS, EOS = 1, 2


class Documents:
    """Documents in memory with the face of `Shards`: document i is BOS, i + 3 repeated, EOS."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = np.array(lengths)
        self.num_documents, self.num_tokens = len(lengths), int(sum(lengths))

    def document(self, i: int) -> np.ndarray:
        return np.array([BOS, *[i + 3] * (self.lengths[i] - 2), EOS], np.uint16)


@pytest.fixture
def documents() -> Documents:
    return Documents([5, 12, 3, 30, 7, 2, 16])


def test_an_epoch_of_the_stream_is_every_document_once(documents):
    tokens, _ = Stream(documents, seed=0).read(0, documents.num_tokens)
    pieces = np.split(tokens, np.flatnonzero(tokens == BOS)[1:])
    assert sorted(map(tuple, pieces)) == sorted(tuple(documents.document(i)) for i in range(7))


def test_epochs_and_seeds_differ_in_order(documents):
    n = documents.num_tokens
    first = Stream(documents, seed=0).read(0, n)[0]
    assert not np.array_equal(first, Stream(documents, seed=0).read(n, n)[0])
    assert not np.array_equal(first, Stream(documents, seed=1).read(0, n)[0])
    assert np.array_equal(first, Stream(documents, seed=0).read(0, n)[0])


@given(offset=st.integers(0, 300), length=st.integers(1, 90), cut=st.integers(0, 90))
@settings(max_examples=60, deadline=None)
def test_a_window_is_a_pure_function_of_its_offset(offset, length, cut):
    documents = Documents([5, 12, 3, 30, 7, 2, 16])
    stream, cut = Stream(documents, 3), min(cut, length)
    whole = stream.read(offset, length)[0]
    parts = [Stream(documents, 3).read(offset + cut, length - cut)[0], stream.read(offset, cut)[0]]
    assert np.array_equal(whole, np.concatenate(parts[::-1]))


def test_an_epoch_of_samples_is_every_whole_window_once(documents):
    stream, seq_len = Stream(documents, 0), 8
    rows = [stream.sample(index, seq_len)[0][:-1].tolist() for index in range(75 // seq_len)]
    windows = stream.read(0, 72)[0].reshape(9, seq_len).tolist()
    assert sorted(rows) == sorted(windows)
    assert rows != windows


def test_every_token_but_bos_is_a_target_once(documents):
    stream, seq_len = Stream(documents, 0), 8
    batch = packed(stream, list(range(9)), seq_len)
    targets = batch.targets[batch.targets != IGNORED]
    expected, _ = stream.read(1, 72)
    assert batch.weight == len(targets)
    assert sorted(targets.tolist()) == sorted(token for token in expected if token != BOS)


def test_documents_number_the_pieces_of_a_row(documents):
    batch = packed(Stream(documents, 0), [0, 1], 20)
    starts = batch.tokens == BOS
    changes = torch.zeros_like(starts)
    changes[:, 1:] = batch.documents[:, 1:] != batch.documents[:, :-1]
    assert torch.equal(changes[:, 1:], starts[:, 1:])


def test_unpacked_holds_the_same_pairs_of_token_and_target(documents):
    batch = packed(Stream(documents, 0), [0, 1, 2], 20)
    rows = unpacked(batch)

    def pairs(b):
        return sorted(
            (int(t), int(y)) for t, y in zip(b.tokens.flatten(), b.targets.flatten(), strict=True) if y != IGNORED
        )

    assert rows.weight == batch.weight
    assert pairs(rows) == pairs(batch)
    assert rows.documents.max() == 0


@pytest.mark.parametrize(("num_ranks", "micro_batch"), [(1, 8), (2, 4), (4, 1), (2, 1), (1, 2)])
def test_the_union_over_ranks_does_not_depend_on_their_number(documents, num_ranks, micro_batch):
    def ids(ranks, size):
        batches = [
            micro_batches(
                Stream(documents, 0), 100, batch_tokens=64, seq_len=8, micro_batch=size, rank=rank, num_ranks=ranks
            )
            for rank in range(ranks)
        ]
        assert len({len(own) for own in batches}) == 1
        return sorted(i for own in batches for batch in own for i in batch.ids)

    assert ids(num_ranks, micro_batch) == ids(1, 8) == list(range(12, 20))


def test_known_order(documents):
    """Pinned: a resumed run must meet the same samples in every later version."""
    stream = Stream(documents, 0)
    assert [stream.sample(index, 8)[0][:4].tolist() for index in (0, 5, 12)] == [
        [6, 6, 6, 6],
        [4, 4, 4, 4],
        [1, 3, 3, 3],
    ]
