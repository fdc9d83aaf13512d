"""Training a tokenizer: sizes, special slots, determinism, use."""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.corpus.bpe import default_num_special, train_tokenizer
from puna.corpus.build import build_corpus
from puna.errors import DataError, TokenizerError
from puna.llama.dialog import Message, render
from puna.llama.tokenizer import Tokenizer, special_names

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A package of this Python's standard library as a corpus."""
    out = tmp_path_factory.mktemp("corpus")
    build_corpus(str(Path(sysconfig.get_path("stdlib"), "email")), out, heldout=0.1)
    return out


@pytest.fixture(scope="module")
def tokenizer(corpus, tmp_path_factory) -> Tokenizer:
    out = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(corpus, 800, out)
    return Tokenizer.load(out)


def test_special_tokens_come_after_the_merges(tokenizer):
    assert tokenizer.vocab_size == 800
    assert tokenizer.special == {name: 784 + i for i, name in enumerate(special_names(16))}
    assert (tokenizer.bos, tokenizer.eos) == (784, 785)
    assert tokenizer.stop_ids == {785, 792, 793}


def test_256_slots_have_llama3_names(corpus, tmp_path, data_dir):
    train_tokenizer(corpus, 600, tmp_path / "own.json", num_special=256)
    own, llama3 = Tokenizer.load(tmp_path / "own.json"), Tokenizer.load(data_dir / "tok-llama3")
    assert {name: i - own.bos for name, i in own.special.items()} == {n: i - 128_000 for n, i in llama3.special.items()}
    assert own.bos == 600 - 256


def test_default_number_of_slots():
    assert [default_num_special(size) for size in (4096, 16_383, 16_384, 128_256)] == [16, 16, 256, 256]


def test_it_compresses_and_gives_the_text_back(tokenizer, corpus, rows):
    texts = [row["text"] for row in rows(corpus / "heldout.jsonl")]
    batch = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(ids) for ids in batch] == texts
    assert sum(len(text.encode()) for text in texts) > 2 * sum(map(len, batch))


@settings(deadline=None)
@given(st.text())
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_pieces_follow_the_pattern(tokenizer):
    """No piece joins what Llama 3's pattern parts: digits beyond three, words over a space."""
    pieces = [piece for piece in tokenizer.form.pieces if piece]
    assert not any(len(piece) > 3 and piece.isdigit() for piece in pieces)
    assert not any(b" " in piece.strip() for piece in pieces)
    assert b"return" in pieces or b" return" in pieces


def test_chat_format_works(tokenizer):
    ids = render(tokenizer, [Message("user", "hi")]).ids
    assert tokenizer.decode(ids) == "user\n\nhiassistant\n\n"


def test_transformers_gives_the_same_ids(tokenizer, corpus, tmp_path, rows):
    transformers = pytest.importorskip("transformers")
    tokenizer.to_hf(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for row in rows(corpus / "heldout.jsonl"):
        assert theirs(row["text"]).input_ids == tokenizer.encode(row["text"], bos=True)
    assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (784, 785, 800)


def test_second_call_and_changes(corpus, tmp_path, capsys):
    first = train_tokenizer(corpus, 400, tmp_path / "t.json")
    content = (tmp_path / "t.json").read_bytes()
    assert train_tokenizer(corpus, 400, tmp_path / "t.json")["up_to_date"]
    assert f"tokenizer {tmp_path / 't.json'}: up to date" in capsys.readouterr().err
    again = train_tokenizer(corpus, 401, tmp_path / "t.json")
    assert "making it again, because vocab_size was 400 and is 401" in capsys.readouterr().err
    assert (first["vocab_size"], again["vocab_size"]) == (400, 401)
    (tmp_path / "t.json").write_text("")
    train_tokenizer(corpus, 400, tmp_path / "t.json")
    assert (tmp_path / "t.json").read_bytes() == content


def test_nothing_goes_to_standard_output(corpus, tmp_path, capfd):
    train_tokenizer(corpus, 400, tmp_path)
    assert capfd.readouterr().out == ""


def test_same_bytes_whatever_the_hash_seed(corpus, tmp_path):
    code = "import sys; from pathlib import Path; from puna.corpus.bpe import train_tokenizer; "
    code += "train_tokenizer(Path(sys.argv[1]), 1000, Path(sys.argv[2]))"
    for seed in ("1", "2"):
        command = [sys.executable, "-c", code, str(corpus), str(tmp_path / f"{seed}.json")]
        subprocess.run(command, cwd=ROOT, env={"PYTHONHASHSEED": seed}, check=True, capture_output=True)
    assert (tmp_path / "1.json").read_bytes() == (tmp_path / "2.json").read_bytes()


def test_small_corpus_gives_a_smaller_vocabulary(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "ab " * 40}))
    build_corpus(str(tmp_path / "a.jsonl"), tmp_path.with_name("small"), heldout=0, limits=None)
    report = train_tokenizer(tmp_path.with_name("small"), 5000, tmp_path.with_name("small"))
    assert report["vocab_size"] == 256 + report["num_merges"] + 16 < 300
    assert Tokenizer.load(tmp_path.with_name("small")).vocab_size == report["vocab_size"]


def test_mistakes_are_named(corpus, tmp_path):
    with pytest.raises(TokenizerError, match=r"num_special is 11\. Give at least 12: the chat formats need them\."):
        train_tokenizer(corpus, 4096, tmp_path, num_special=11)
    words = r"A vocabulary of 272 has no room beside 256 bytes and 16 control tokens\. Give a vocab_size above 272\."
    with pytest.raises(TokenizerError, match=words):
        train_tokenizer(corpus, 272, tmp_path)
    with pytest.raises(DataError, match=r"There is no corpus at .*none \(corpus\.json is missing or not understood\)"):
        train_tokenizer(tmp_path / "none", 4096, tmp_path)
