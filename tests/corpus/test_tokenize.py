"""A corpus becomes shards: the same texts, counted bytes, the cache, damage."""

import pytest

from puna.corpus import tokenize
from puna.corpus.bpe import train_tokenizer
from puna.corpus.build import build_corpus
from puna.corpus.tokenize import tokenize_corpus
from puna.errors import DataError, TokenizerError
from puna.llama.shards import Shards, verify
from puna.llama.tokenizer import Tokenizer


@pytest.fixture
def made(planter, tmp_path):
    for i in range(20):
        planter.plant(f"{i:02d}.txt", [*planter.words(100), "größer", "日本語"])
    build_corpus(str(planter.folder), tmp_path / "corpus", heldout=0.2)
    train_tokenizer(tmp_path / "corpus", 400, tmp_path / "tokenizer")
    return tmp_path


def run(made):
    return tokenize_corpus(made / "corpus", made / "tokenizer", made / "shards")


@pytest.mark.parametrize("batch_chars", [1, 2_000, 1 << 21])
def test_shards_hold_the_corpus(made, rows, monkeypatch, batch_chars):
    monkeypatch.setattr(tokenize, "BATCH_CHARS", batch_chars)
    report = run(made)
    tokenizer = Tokenizer.load(made / "tokenizer")
    for split in ("train", "heldout"):
        texts = [row["text"] for row in rows(made / "corpus" / f"{split}.jsonl")]
        shards = Shards(made / "shards", split)
        documents = [shards.document(i).tolist() for i in range(shards.num_documents)]
        assert documents == [tokenizer.encode(text, bos=True, eos=True) for text in texts]
        assert shards.num_bytes == sum(len(text.encode()) for text in texts)
        facts = report["splits"][split]
        assert (facts["num_tokens"], facts["num_bytes"]) == (shards.num_tokens, shards.num_bytes)
        assert facts["bytes_per_token"] == pytest.approx(shards.num_bytes / shards.num_tokens, abs=1e-4)
    verify(made / "shards")
    assert report["tokenizer_hash"] == tokenizer.hash


def test_second_call_and_changes(made, planter, capsys):
    first = run(made)
    files = {path: path.stat().st_mtime_ns for path in (made / "shards").rglob("*")}
    capsys.readouterr()
    second = run(made)
    assert f"shards {made / 'shards'}: up to date" in capsys.readouterr().err
    assert (first["up_to_date"], second["up_to_date"]) == (False, True)
    assert files == {path: path.stat().st_mtime_ns for path in (made / "shards").rglob("*")}

    (made / "shards" / "train-00000.tokens").write_bytes(b"")
    assert not run(made)["up_to_date"]
    assert "making them again, because" in capsys.readouterr().err

    train_tokenizer(made / "corpus", 401, made / "tokenizer")
    run(made)
    assert "making it again, because tokenizer was" in capsys.readouterr().err

    planter.plant("new.txt", planter.words())
    build_corpus(str(planter.folder), made / "corpus", heldout=0.2)
    third = run(made)
    assert "making it again, because the input changed" in capsys.readouterr().err
    assert len({first["key"], third["key"]}) == 2


def test_a_failure_leaves_no_shards(made, monkeypatch):
    run(made)
    train_tokenizer(made / "corpus", 401, made / "tokenizer")

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(Tokenizer, "encode_batch", fail)
    with pytest.raises(MemoryError):
        run(made)
    with pytest.raises(DataError, match=r"has no shards\.json"):
        Shards(made / "shards", "train")


def test_no_heldout_split(planter, tmp_path):
    planter.plant("one.txt", planter.words())
    build_corpus(str(planter.folder), tmp_path / "corpus", heldout=0)
    train_tokenizer(tmp_path / "corpus", 300, tmp_path)
    report = tokenize_corpus(tmp_path / "corpus", tmp_path / "tokenizer.json", tmp_path / "shards")
    assert list(report["splits"]) == ["train"]


def test_mistakes_are_named(made):
    with pytest.raises(DataError, match=r"There is no corpus at .*\. Make it with `puna corpus build --source PATH"):
        tokenize_corpus(made / "none", made / "tokenizer", made / "shards")
    with pytest.raises(TokenizerError, match="There is no tokenizer at"):
        tokenize_corpus(made / "corpus", made / "none", made / "shards")
    (made / "corpus" / "train.jsonl").write_text("")
    with pytest.raises(DataError, match=r"train\.jsonl is missing or was changed after it was written\. Build"):
        run(made)
