"""Several sources as one: exact shares, a pure function of the sample index, the old order for one source."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.errors import DataError
from puna.llama.config import DataConfig
from puna.llama.mixture import Mixture, labels, open_sources, plan, shares, table
from puna.llama.packing import Stream, micro_batches
from puna.llama.shards import Shards, ShardWriter
from puna.llama.tokenizer import Tokenizer

sys.path.append(str(Path(__file__).parents[1]))
from tiny_llama import tiny_tokenizer

WEIGHTS = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=6)


class Numbered:
    """A stream whose sample `own` of source `number` says so."""

    def __init__(self, number: int) -> None:
        self.number = number

    def sample(self, index: int, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        return np.full(seq_len + 1, 1000 * self.number + index), np.zeros(seq_len + 1, np.int64)


def mixture(*weights: float) -> Mixture:
    return Mixture([Numbered(number) for number in range(len(weights))], weights)


@given(weights=WEIGHTS, start=st.integers(0, 10**12))
@settings(max_examples=100, deadline=None)
def test_every_source_is_read_in_its_own_order_without_a_gap(weights, start):
    mixed = mixture(*weights)
    places = [mixed.place(index) for index in range(start, start + 50)]
    for source in range(len(weights)):
        own = [number for at, number in places if at == source]
        assert own == list(range(own[0], own[0] + len(own))) if own else True
    assert mixed.place(start) == places[0]


@given(weights=WEIGHTS, last=st.integers(0, 10**15))
@settings(max_examples=200, deadline=None)
def test_shares_are_exact_however_long_the_run(weights, last):
    """The number of a sample within its source is how often that source came before."""
    source, before = mixture(*weights).place(last)
    assert abs(before - last * weights[source] / math.fsum(weights)) < len(weights) + last * 1e-15


def test_seven_of_ten():
    places = [mixture(0.7, 0.3).place(index)[0] for index in range(1000)]
    for end in range(10, 1000, 7):
        assert abs(places[:end].count(0) - 0.7 * end) <= 1
    assert mixture(7, 3).place(123) == mixture(70, 30).place(123)


def test_weights_of_any_size():
    assert {mixture(1e308, 1e308).place(index)[0] for index in range(4)} == {0, 1}
    assert mixture(5e-324, 1e308).place(10**6) == (1, 10**6)
    assert shares(DataConfig(sources=(("a", 1e308), ("b", 1e308)))) == [0.5, 0.5]


@pytest.mark.parametrize("weight", [1.0, 0.3, 7.0])
def test_one_source_has_its_own_order(weight):
    assert [mixture(weight).place(index) for index in (0, 1, 17, 10**12)] == [(0, 0), (0, 1), (0, 17), (0, 10**12)]


def test_a_sample_comes_from_its_source_and_place():
    mixed = mixture(0.5, 0.5)
    for index in range(20):
        source, own = mixed.place(index)
        assert mixed.sample(index, 4)[0].tolist() == [1000 * source + own] * 5


@pytest.mark.parametrize(("num_ranks", "micro_batch"), [(2, 4), (4, 1), (1, 2)])
def test_the_union_over_ranks_does_not_depend_on_their_number(num_ranks, micro_batch):
    def rows(ranks, size):
        options = {"batch_tokens": 64, "seq_len": 8, "micro_batch": size, "num_ranks": ranks}
        batches = [b for rank in range(ranks) for b in micro_batches(mixture(3, 2, 1), 800, rank=rank, **options)]
        return sorted((i, row) for b in batches for i, row in zip(b.ids, b.tokens[:, 0].tolist(), strict=True))

    assert rows(num_ranks, micro_batch) == rows(1, 8)
    assert {row // 1000 for _, row in rows(1, 8)} == {0, 1, 2}


# --- folders


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> list[Tokenizer]:
    """Two different ones."""
    return [tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), size) for size in (340, 330)]


def write(folder: Path, tokenizer: Tokenizer, num_documents: int) -> str:
    with ShardWriter(folder, tokenizer) as writer:
        for split in ("train", "heldout"):
            for number in range(num_documents):
                writer.add(split, tokenizer.encode(f"{folder.name} {number} ") * 5, 30)
    return str(folder)


def test_one_folder_in_sources_reads_as_path_does(tokenizers, tmp_path):
    """Bit for bit the samples that the recipe without `sources` reads."""
    folder = write(tmp_path / "a", tokenizers[0], 20)
    stream = Stream(Shards(folder, "train"), seed=3)
    for data in (DataConfig(path=folder), DataConfig(sources=((folder, 0.25),))):
        (shards,) = open_sources(data, "train")
        mixed = Mixture([Stream(shards, seed=3)], [weight for _, weight in data.mixture()])
        for index in range(60):
            for mine, old in zip(mixed.sample(index, 16), stream.sample(index, 16), strict=True):
                assert np.array_equal(mine, old)


def test_sources_of_two_tokenizers_are_refused_by_name(tokenizers, tmp_path):
    folders = [write(tmp_path / name, tokenizer, 3) for name, tokenizer in zip("ab", tokenizers, strict=True)]
    with pytest.raises(DataError) as caught:
        open_sources(DataConfig(sources=((folders[0], 1.0), (folders[1], 1.0))), "train")
    assert str(caught.value).startswith(f"{folders[0]} and {folders[1]} were made by different tokenizers (")
    assert str(caught.value).endswith("Tokenize all sources with one tokenizer, or leave one of them out.")


def test_a_missing_source_is_named(tokenizers, tmp_path):
    folder = write(tmp_path / "a", tokenizers[0], 3)
    with pytest.raises(DataError, match="no folder of token shards at nowhere"):
        open_sources(DataConfig(sources=((folder, 1.0), ("nowhere", 1.0))), "train")


def test_plan_and_its_table(tokenizers, tmp_path):
    folders = [write(tmp_path / name, tokenizers[0], count) for name, count in (("code", 30), ("prose", 10))]
    data = DataConfig(sources=((folders[0], 3.0), (folders[1], 1.0)))
    sources = open_sources(data, "train")
    records = plan(data, sources, 1_000_000)
    assert [record["share"] for record in records] == [0.75, 0.25]
    assert [record["drawn_tokens"] for record in records] == [750_000, 250_000]
    for record, shards in zip(records, sources, strict=True):
        assert record["num_documents"] == shards.num_documents
        assert record["epochs"] * shards.num_tokens == pytest.approx(record["drawn_tokens"])
    lines = table(records).splitlines()
    assert lines[0].split() == ["source", "documents", "tokens", "share", "drawn", "epochs"]
    assert lines[1].split()[0] == folders[0]
    assert lines[1].split()[3:5] == ["0.7500", "750,000"]
    assert len({len(line) for line in lines}) == 1
    assert labels(sources) == ["code", "prose"]


def test_labels_of_like_names_are_paths(tokenizers, tmp_path):
    folders = [write(tmp_path / name / "shards", tokenizers[0], 2) for name in ("one", "two")]
    assert labels([Shards(folder, "train") for folder in folders]) == folders
