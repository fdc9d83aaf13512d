import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from puna.evals.ngram import NGram

VOCAB = 11


def corpus(seed, num_documents, vocab=VOCAB):
    """Documents BOS (0) + skewed random text + EOS (1); some are empty."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 30, num_documents)
    return [[0, *(2 + rng.integers(0, vocab - 2, n) * rng.integers(0, 2, n)).tolist(), 1] for n in lengths]


def flat(documents):
    return np.array([t for d in documents for t in d], np.uint16), np.cumsum([0, *map(len, documents)])


class Reference:
    """The recursion of the module's head, word for word, over dictionaries."""

    def __init__(self, documents, vocab, order):
        self.vocab, self.order, self.counts = vocab, order, defaultdict(Counter)
        for document in documents:
            for i in range(1, len(document)):
                for n in range(min(order - 1, i) + 1):
                    self.counts[tuple(document[i - n : i])][document[i]] += 1

    def p(self, token, history):
        history = tuple(history)[-(self.order - 1) :] if self.order > 1 else ()
        p = 1 / self.vocab
        for n in range(len(history) + 1):
            seen = self.counts.get(history[len(history) - n :], Counter())
            if seen:
                p = (seen[token] + len(seen) * p) / (seen.total() + len(seen))
        return p


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_agrees_with_dictionaries(order):
    train, held = corpus(0, 60), corpus(1, 15)
    got = NGram(*flat(train), VOCAB, order).probabilities(*flat(held))
    reference = Reference(train, VOCAB, order)
    want = [reference.p(d[i], d[:i]) for d in held for i in range(1, len(d))]
    np.testing.assert_allclose(got, want, rtol=1e-13)


@pytest.mark.parametrize("history", [[0], [0, 2], [0, 10, 10, 10, 10, 9], [0, 2, 2, 2, 2, 2], [1, 1, 1], [7, 1]])
def test_sums_to_one_over_the_vocabulary(history):
    model = NGram(*flat(corpus(2, 40)), VOCAB)
    documents = [[*history, w] for w in range(VOCAB)]
    p = model.probabilities(*flat(documents)).reshape(VOCAB, len(history))[:, -1]
    assert p.sum() == pytest.approx(1, abs=1e-13)
    assert (p > 0).all()


def test_sums_to_one_where_ids_need_32_bits():
    vocab = 128_256
    rng = np.random.default_rng(3)
    documents = [[0, *rng.choice([5, 70_000, 128_255], 20), 1] for _ in range(20)]
    tokens = np.array([t for d in documents for t in d], np.uint32)
    model = NGram(tokens, np.cumsum([0, *map(len, documents)]), vocab)
    probes = np.stack([np.array([0, 5, 70_000, 128_255, 5, w]) for w in range(vocab)]).astype(np.uint32)
    p = model.probabilities(probes.ravel(), np.arange(vocab + 1) * 6)[4::5]
    assert p.sum() == pytest.approx(1, abs=1e-10)


def test_nothing_crosses_a_document_border():
    one = NGram(*flat([[0, 2, 3, 4, 1], [0, 5, 6, 1]]), VOCAB)
    other = NGram(*flat([[0, 5, 6, 1], [0, 2, 3, 4, 1]]), VOCAB)
    held = flat([[0, 2, 3, 4, 5, 1], [0, 6, 1], [0, 1]])
    np.testing.assert_array_equal(one.probabilities(*held), other.probabilities(*held))


def test_short_documents_leave_the_high_orders_out():
    held = flat([[0, 2, 1]])
    p = NGram(*flat([[0, 2, 1]] * 3), VOCAB).probabilities(*held)
    np.testing.assert_allclose(p, [Reference([[0, 2, 1]] * 3, VOCAB, 5).p(t, h) for t, h in [(2, [0]), (1, [0, 2])]])


def test_nats_is_the_sum_of_surprises():
    model, held = NGram(*flat(corpus(4, 30)), VOCAB), flat(corpus(5, 4))
    assert model.nats(*held) == pytest.approx(-sum(math.log(p) for p in model.probabilities(*held)))
