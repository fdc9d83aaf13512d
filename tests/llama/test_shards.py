"""Token shards: what is written is read, and damage is named."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from puna.errors import DataError
from puna.llama.shards import MANIFEST, Shards, ShardWriter, read_manifest, verify, write_atomic
from puna.llama.tokenizer import Tokenizer

sys.path.append(str(Path(__file__).parents[1]))
from tiny_llama import tiny_tokenizer

TEXTS = [f"document {i}: " + "the llama eats grass " * (i % 5) for i in range(23)]
HOW = r"Make it with `puna corpus tokenize CORPUS --tokenizer FILE --out FOLDER`\."


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def write(folder: Path, tokenizer: Tokenizer, texts=TEXTS, **options) -> Path:
    with ShardWriter(folder, tokenizer, **options) as writer:
        for i, text in enumerate(texts):
            writer.add("heldout" if i % 4 == 0 else "train", tokenizer.encode(text), len(text.encode()))
    return folder


@pytest.mark.parametrize("shard_tokens", [1, 100, 1 << 20])
def test_reads_what_was_written(tmp_path, tokenizer, shard_tokens):
    write(tmp_path, tokenizer, shard_tokens=shard_tokens)
    for split, texts in (("heldout", TEXTS[::4]), ("train", [t for i, t in enumerate(TEXTS) if i % 4])):
        shards = Shards(tmp_path, split)
        assert shards.num_documents == len(texts)
        assert shards.num_bytes == sum(len(text.encode()) for text in texts)
        documents = [shards.document(i) for i in range(len(texts))]
        assert [tokenizer.decode(ids) for ids in documents] == texts
        assert [ids.tolist() for ids in documents] == tokenizer.encode_batch(texts, bos=True, eos=True)
        assert shards.lengths.dtype == np.int64
        assert shards.lengths.tolist() == [len(ids) for ids in documents]
        assert shards.num_tokens == shards.lengths.sum()
        assert isinstance(documents[0], np.memmap)
        assert documents[0].dtype == np.uint16
        assert (shards.bos, shards.eos, shards.vocab_size) == (tokenizer.bos, tokenizer.eos, tokenizer.vocab_size)
        assert shards.tokenizer_hash == Tokenizer.load(shards.tokenizer_dir).hash == tokenizer.hash
        with pytest.raises(IndexError, match=f"document {len(texts)} of {len(texts)}"):
            shards.document(len(texts))
    verify(tmp_path)
    num_files = len(list(tmp_path.glob("train-*.tokens")))
    assert num_files in {1: [17], 100: range(2, 17), 1 << 20: [1]}[shard_tokens]


def test_large_vocabulary_is_uint32(tmp_path, data_dir):
    tokenizer = Tokenizer.load(data_dir / "tok-llama3")
    write(tmp_path, tokenizer)
    shards = Shards(tmp_path, "train")
    assert shards.document(0).dtype == np.uint32
    assert tokenizer.decode(shards.document(0)) == TEXTS[1]


def test_same_input_same_bytes(tmp_path, tokenizer):
    for name in ("one", "two"):
        write(tmp_path / name, tokenizer)
    for path in (tmp_path / "one").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()


def test_source_is_kept(tmp_path, tokenizer):
    write(tmp_path, tokenizer, source={"key": "k"})
    assert read_manifest(tmp_path)["source"] == {"key": "k"}


def test_ids_outside_the_vocabulary_are_refused(tmp_path, tokenizer):
    with ShardWriter(tmp_path, tokenizer) as writer:
        for ids in ([tokenizer.vocab_size], [-1], [70_000]):
            with pytest.raises(ValueError, match=r"token ids must lie in 0\.\.339"):
                writer.add("train", ids, 1)
        writer.add("train", [], 0)
    assert Shards(tmp_path, "train").document(0).tolist() == [tokenizer.bos, tokenizer.eos]


def test_no_manifest_before_the_end(tmp_path, tokenizer):
    write(tmp_path, tokenizer)
    old = Shards(tmp_path, "train")
    expected = old.document(3).tolist()
    with pytest.raises(ValueError, match="token ids must lie in"), ShardWriter(tmp_path, tokenizer) as writer:
        writer.add("train", [1, -1], 3)
    with pytest.raises(DataError, match=rf"has no shards\.json \(it holds .*\); no shards were finished there\. {HOW}"):
        Shards(tmp_path, "train")
    assert old.document(3).tolist() == expected, "an open reader keeps the old files"


def test_missing_folder(tmp_path):
    with pytest.raises(DataError, match=rf"There is no folder of token shards at .*none\. {HOW}"):
        Shards(tmp_path / "none", "train")
    with pytest.raises(DataError, match=rf"has no shards\.json \(it holds nothing\); .* {HOW}"):
        Shards(tmp_path, "train")


def test_missing_split(tmp_path, tokenizer):
    write(tmp_path, tokenizer)
    with pytest.raises(DataError, match=r"has no documents in the split 'test' \(splits there: heldout, train\)"):
        Shards(tmp_path, "test")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def flip(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def set_manifest(**values):
    def change(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def drop_key(path: Path) -> None:
    manifest = json.loads(path.read_text())
    del manifest["bos"], manifest["dtype"]
    path.write_text(json.dumps(manifest))


def shift_offsets(path: Path) -> None:
    np.save(path, np.load(path) + 1)


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("train-00000.tokens", cut, "train-00000.tokens has "),
        ("train-00000.tokens", Path.unlink, "train-00000.tokens is missing; shards.json names it"),
        ("tokenizer/tokenizer.json", cut, "tokenizer.json has "),
        (MANIFEST, cut, "shards.json is damaged ("),
        (MANIFEST, lambda path: path.write_text("[]"), "shards.json is damaged ("),
        (MANIFEST, set_manifest(format_version=2), "has format version 2; this Puna reads 1"),
        (MANIFEST, drop_key, "shards.json is damaged (it lacks dtype, bos)"),
        ("heldout-00000.offsets.npy", shift_offsets, "offsets of split 'heldout'"),
    ],
)
def test_damage_is_named_at_open(tmp_path, tokenizer, name, damage, words):
    damage(write(tmp_path, tokenizer) / name)
    with pytest.raises(DataError) as error:
        Shards(tmp_path, "heldout")
    assert words in str(error.value)
    assert "Make the folder again with `puna corpus tokenize" in str(error.value)


def test_verify_finds_one_bit(tmp_path, tokenizer):
    flip(write(tmp_path, tokenizer) / "train-00000.tokens")
    Shards(tmp_path, "train")
    with pytest.raises(DataError, match=r"tokens was changed after it was written \(its SHA-256 differs\)"):
        verify(tmp_path)


def test_write_atomic_replaces_whole_files(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, b"one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]
