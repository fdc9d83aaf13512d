"""Signatures estimate Jaccard similarity, and clusters are those of all pairs compared."""

import random
import re
import subprocess
import sys

import numpy as np
import pytest

from puna.corpus.dedup import NUM_HASHES, MinHash, clusters, exact_key, similarity


def jaccard(a: str, b: str) -> float:
    left, right = ({tuple(w[i : i + 5]) for i in range(len(w) - 4)} for w in (re.findall(r"\w+", x) for x in (a, b)))
    return len(left & right) / len(left | right)


@pytest.mark.parametrize("times", [0, 1, 3, 6, 12, 25, 50])
def test_estimate_is_within_four_standard_errors(planter, times):
    words = planter.words(600)
    pair = [" ".join(words), " ".join(planter.edit(words, times))]
    exact, minhash = jaccard(*pair), MinHash()
    one, two = map(minhash.signature, pair)
    bound = 4 * (exact * (1 - exact) / NUM_HASHES) ** 0.5
    assert abs(similarity(one, two[None])[0] - exact) <= bound + 1e-9


def test_estimate_is_unbiased(planter):
    minhash, errors = MinHash(), []
    for times in range(1, 60):
        words = planter.words(400)
        pair = [" ".join(words), " ".join(planter.edit(words, times))]
        errors.append(similarity(*(s if k == 0 else s[None] for k, s in enumerate(map(minhash.signature, pair))))[0])
        errors[-1] -= jaccard(*pair)
    assert abs(np.mean(errors)) < 4 * 0.025 / len(errors) ** 0.5


def test_clusters_are_those_of_all_pairs(planter):
    texts = []
    for _ in range(12):
        words = planter.words(300)
        texts += [" ".join(words), *(" ".join(planter.edit(words, times)) for times in (1, 2, 5, 20))]
    random.Random(1).shuffle(texts)
    minhash = MinHash()
    signatures = np.stack([minhash.signature(text) for text in texts])
    expected = np.arange(len(texts))
    for _ in range(len(texts)):
        for i in range(len(texts)):
            alike = np.flatnonzero(similarity(signatures[i], signatures) >= 0.8)
            expected[alike] = expected[alike].min()
    assert clusters(signatures, 0.8).tolist() == expected.tolist()
    assert 12 < len(set(expected)) < len(texts)


def test_clusters_are_transitive(planter):
    words = planter.words(300)
    chain = [words]
    for _ in range(6):
        chain.append(planter.edit(chain[-1], 3))
    texts = [" ".join(words) for words in chain]
    assert jaccard(texts[0], texts[-1]) < 0.8 < min(map(jaccard, texts, texts[1:]))
    signatures = np.stack([MinHash().signature(text) for text in texts])
    assert clusters(signatures, 0.8).tolist() == [0] * len(texts)


def test_short_texts():
    signatures = np.stack([MinHash().signature(text) for text in ("", "a", "a b", "b a", "a b", "+ -", "- +", "a, b.")])
    assert clusters(signatures, 0.8).tolist() == [0, 1, 2, 3, 2, 5, 6, 2]
    assert clusters(np.zeros((0, NUM_HASHES), np.uint32), 0.8).tolist() == []


def test_exact_key_ignores_white_space_only():
    assert exact_key("a  b\n") == exact_key(" a\tb")
    assert len({exact_key(text) for text in ("a b", "A b", "ab", "a b.", "a b c")}) == 5


def test_signature_does_not_depend_on_the_hash_seed():
    code = "from puna.corpus.dedup import MinHash; print(MinHash().signature('some words of a text').tobytes().hex())"
    command = [sys.executable, "-c", code]
    runs = [subprocess.run(command, env={"PYTHONHASHSEED": s}, capture_output=True, check=True) for s in "12"]
    assert runs[0].stdout == runs[1].stdout != b""
